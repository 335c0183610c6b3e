"""There and Back Again: Revisiting Backpropagation Saliency Methods.

Sylvestre-Alvise Rebuffi, Ruth Fong, Xu Ji and Andrea Vedaldi, CVPR 2020, arXiv:2004.02866.

A virtual identity layer after a layer with activations a leaves the network as it is; the gradient
of its parameters is a sum over locations u, whose terms S_u say how much each location matters
(phase 1: scaling, bias, 1 x 1, 3 x 3 or depth-wise convolution, or the real convolution that
follows). Phase 2 makes a number of S_u: norm, norm of the positive part, sum, maximum.

    NormGrad = conv1x1 and norm = |a_u| |g_u|,   selective NormGrad = scaling and filter_norm,

with g = d score / d a, the score a logit. Maps of several layers are multiplied, as in the released
grid, or weighted: sum_l w_l m_l / sum w, prod_l m_l^(w_l / sum w). Meta-saliency takes the map
after one step theta - lr d CE / d theta of all weights. Class sensitivity is the correlation of the
maps of the most and the least likely class; low is sensitive.

Closed forms of ``transfuse.ops.normgrad_map``; no outer product is formed.

Deviations. Maps are scaled for each sample (the released code takes extremes over the batch). A
constant map (the bias of a layer before global average pooling) is zero, and said so; the released
code divides by zero. The released code differentiates -score and changes signs: the same. No
gradient of the model's own parameters is computed. Samples of one meta-saliency call share one step
on their mean loss, as in the released code; call it for each sample if they should not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.saliency._capture import (
    capture,
    check_input,
    evaluation,
    find_layers,
    map_size,
    to_maps,
    token_grid,
)
from transfuse.methods.saliency._layer_maps import LayerMaps
from transfuse.methods.saliency._targets import Targets, classes_of, logits_of
from transfuse.ops import finish_map, normgrad_map
from transfuse.ops._saliency_call import PHASES1, PHASES2

__all__ = ["NormGrad", "class_sensitivity", "meta_saliency", "token_grid"]

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@register(
    title="There and Back Again: Revisiting Backpropagation Saliency Methods",
    authors=("Sylvestre-Alvise Rebuffi", "Ruth Fong", "Xu Ji", "Andrea Vedaldi"),
    year=2020,
    venue="CVPR",
    arxiv="2004.02866",
    repository="https://github.com/srebuffi/revisiting_saliency",
    kind="saliency",
    ops=("normgrad_map", "finish_map"),
)
class NormGrad(LayerMaps):
    """How much each location would change a virtual identity layer.

    Args:
        model: Called as ``model(x)``; returns (B, K) logits, an object with ``logits``, or what
            the targets are a function of.
        layers: Name of a module, or several, whose maps are combined.
        phase1: ``"conv1x1"``, ``"conv3x3"``, ``"conv3x3_depthwise"``, ``"scaling"``, ``"bias"``,
            or ``"conv"``: the layers are convolutions, and the map is that of their own weights.
        phase2: ``"norm"``, ``"filter_norm"``, ``"sum"`` or ``"max"``.
        reshape: A function that makes (B, C, *S) of what the layers put out, for transformers
            ``token_grid``.
        combine: ``"product"`` or ``"mean"`` of the maps of several layers.
        weights: None, ``"linear"`` (1 to n in the order of the layers) or a number for each layer.
        backend: Of ``normgrad_map``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        ...     nn.Linear(16, 5),
        ... )
        >>> NormGrad(net, "1")(torch.rand(2, 3, 9, 12), targets=[0, 3]).shape
        torch.Size([2, 9, 12])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        phase1: str = "conv1x1",
        phase2: str = "norm",
        reshape: Callable[[Tensor], Tensor] | None = None,
        combine: str = "product",
        weights: str | Sequence[float] | None = None,
        backend: str | None = None,
    ) -> None:
        _checks.choice("phase1", phase1, PHASES1)
        _checks.choice("phase2", phase2, PHASES2)
        _checks.choice("combine", combine, {"product": 0, "mean": 1})
        found = find_layers(model, layers)
        super().__init__(model, found, reshape, backend)
        self.phase1, self.phase2, self.combine = phase1, phase2, combine
        if isinstance(weights, str):
            _checks.choice("weights", weights, {"linear": 0})
            weights = [float(n) for n in range(1, len(found) + 1)]
        self.weights = weights
        # "conv": what each layer's convolution looks like.
        self._geometry = (
            {name: _convolution(name, module) for name, module in found.items()}
            if phase1 == "conv"
            else {}
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.phase1!r}, {self.phase2!r}, layers={list(self.layers)})"
        )

    def _raw(self, x: Tensor, targets: Targets) -> list[Tensor]:
        proper = self.phase1 == "conv"
        captured = capture(self.model, x, self.layers, targets, inputs=proper)
        pairs = to_maps(captured, self.layers, self.reshape)
        maps = []
        for name, (act, grad) in zip(self.layers, pairs, strict=True):
            kernel_size, stride, padding, dilation = self._geometry.get(name, (None, 1, 0, 1))
            found = normgrad_map(
                act,
                grad,
                phase1=self.phase1,
                phase2=self.phase2,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                backend=self.backend,
            )
            maps.append(found)
        return maps

    def _together(
        self,
        x: Tensor,
        targets: Targets,
        normalize: str | None,
        size: str | int | Sequence[int] | None,
    ) -> Tensor:
        raw = self.raw(x, targets)
        space = map_size(size, x, raw[0].dim() - 1)
        if len(raw) == 1:
            return finish_map(raw[0], size=space, normalize=normalize, eps=0.0)
        return finish_map(
            raw,
            size=space,
            normalize=normalize,
            eps=0.0,
            combine=self.combine,
            weights=self.weights,
        )


def _convolution(name: str, module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """What phase 1 ``"conv"`` needs of a convolution: kernel, stride, padding, dilation."""
    if not isinstance(module, _CONVOLUTIONS):
        raise ValueError(
            f"layers: phase1='conv' expects convolutions (nn.Conv2d, nn.Conv3d), got {name!r}, "
            f"a {type(module).__name__}"
        )
    if module.groups != 1 or module.padding_mode != "zeros":
        raise ValueError(
            f"layers: phase1='conv' expects one group and padding by zeros, got {name!r} with "
            f"{module.groups} groups and padding {module.padding_mode!r}"
        )
    if isinstance(module.padding, str):
        reach = [
            d * (k - 1) if module.padding == "same" else 0
            for k, d in zip(module.kernel_size, module.dilation, strict=True)
        ]
        if any(r % 2 for r in reach):
            raise ValueError(f"layers: the padding of {name!r} differs between its two sides")
        padding = tuple(r // 2 for r in reach)
    else:
        padding = tuple(module.padding)
    return tuple(module.kernel_size), tuple(module.stride), padding, tuple(module.dilation)


def class_sensitivity(
    saliency: Callable[[Tensor, Tensor], Tensor], model: nn.Module, x: Tensor
) -> Tensor:
    """Correlation of the maps of the most and the least likely class; low is class sensitive.

    Args:
        saliency: Called with x and classes (B,); gives maps (B, *S), a :class:`NormGrad` for
            example.
        model: Gives the logits of x.
        x: (B, ...), the batch.

    Returns:
        (B,) in [-1, 1], Pearson's; NaN where a map is constant.

    Raises:
        TypeError, ValueError: A model without (B, K) logits.
    """
    plain = check_input(x)
    with evaluation(model), torch.no_grad():
        logits = logits_of(model(plain))
    most, least = (saliency(x, k).flatten(1) for k in (logits.argmax(1), logits.argmin(1)))
    most, least = (m - m.mean(1, keepdim=True) for m in (most, least))
    return (most * least).sum(1) / (most.norm(dim=1) * least.norm(dim=1))


def meta_saliency(
    saliency: Callable[[Tensor, Targets], Tensor],
    model: nn.Module,
    x: Tensor,
    targets: Targets = None,
    *,
    lr: float,
    ascend: bool = False,
) -> Tensor:
    """A map after one step of gradient descent of all weights on the target classes.

    Args:
        saliency: Called with x and the classes while the weights are moved; a :class:`NormGrad` of
            the model, for example.
        model: Whose weights are moved, and given back to the bit, also after an exception.
        x: (B, ...), the batch.
        targets: Classes, as of :meth:`NormGrad.raw`; no function.
        lr: Length of the step, theta - lr d CE / d theta with the mean cross entropy of the batch,
            1e-4 to 1e-3 in the paper; 0 gives the map itself.
        ascend: Step up instead (the adversarial direction).

    Returns:
        What ``saliency`` returns.

    Raises:
        TypeError, ValueError: What cannot be explained; the message says why.

    Notes:
        In evaluation mode, so that statistics of normalisation stay. Samples share the step.
    """
    lr = _checks.number("lr", lr)
    if callable(targets):
        raise TypeError("targets: meta-saliency needs classes, got a function")
    plain = check_input(x)
    with evaluation(model):
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        try:
            for p in parameters:
                p.requires_grad_()
            logits = logits_of(model(plain))
            classes = classes_of(logits.detach(), targets)
            loss = nn.functional.cross_entropy(logits.float(), classes)
            steps = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            for p in parameters:
                p.requires_grad_(False)
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, step in zip(parameters, steps, strict=True):
                if step is not None:
                    p.add_(step, alpha=lr if ascend else -lr)
        return saliency(x, classes)
    finally:
        with torch.no_grad():
            for p, own in zip(parameters, kept, strict=True):
                p.copy_(own)
