"""Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization.

Ramprasaath R. Selvaraju, Michael Cogswell, Abhishek Das, Ramakrishna Vedantam, Devi Parikh and
Dhruv Batra, ICCV 2017, arXiv:1610.02391.

With the activations A of a layer and G = d y / d A of a score y (a logit, before softmax),

    alpha_c = mean_u G_cu,    map_u = ReLU(sum_c alpha_c A_cu),

enlarged to the input. Variants weight otherwise (see ``transfuse.ops.grad_weighted_map``):
Grad-CAM++, XGrad-CAM, LayerCAM, HiResCAM, element-wise Grad-CAM. -G explains what speaks against a
class (counterfactual). Guided Grad-CAM multiplies the enlarged map with guided backpropagation. For
conv -> global average pooling -> linear, the map before ReLU is CAM / (h w).

The order of the finish is that of the field's reference package: ReLU, scale, enlarge, mean over
layers, scale.

Deviations. Denominators of Grad-CAM++ and XGrad-CAM keep their sign (the package adds its eps and
may divide by zero where activations cancel). A map without anything positive is zero, and said so.
Eigen-smoothing takes the sign of the principal component that agrees with the map it smooths (the
package leaves it to the SVD). The model's mode is restored, and hooks live for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.saliency._capture import (
    capture,
    find_layers,
    map_size,
    to_maps,
    token_grid,
)
from transfuse.methods.saliency._layer_maps import LayerMaps
from transfuse.methods.saliency._targets import Targets
from transfuse.ops import finish_map, grad_weighted_map
from transfuse.ops._saliency_call import METHODS, working_dtype
from transfuse.ops._saliency_reference import weighted_channels

__all__ = ["GradCAM", "guided_backprop", "guided_grad_cam", "token_grid"]

_INTENSITIES = (0.9, 1.0, 1.1)


@register(
    title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    authors=(
        "Ramprasaath R. Selvaraju",
        "Michael Cogswell",
        "Abhishek Das",
        "Ramakrishna Vedantam",
        "Devi Parikh",
        "Dhruv Batra",
    ),
    year=2017,
    venue="ICCV",
    arxiv="1610.02391",
    repository="https://github.com/ramprs/grad-cam",
    kind="saliency",
    ops=("grad_weighted_map", "finish_map"),
)
class GradCAM(LayerMaps):
    """Where a network sees a class, from the gradients and activations of its layers.

    Args:
        model: Called as ``model(x)``; returns (B, K) logits, an object with ``logits``, or what
            the targets are a function of.
        layers: Name of a module, or several, whose maps are averaged.
        method: ``"gradcam"``, ``"gradcam++"``, ``"xgradcam"``, ``"layercam"``, ``"hirescam"``,
            ``"elementwise"`` or ``"linear"``.
        reshape: A function that makes (B, C, *S) of what the layers put out, for transformers
            ``token_grid``.
        counterfactual: Explain with -G, what lowers the score.
        eigen_smooth: The first principal component over channels of the weighted activations in
            place of their sum.
        augment: Mean of six maps: mirrored or not, intensity times 0.9, 1 and 1.1.
        backend: Of ``grad_weighted_map``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...     nn.Linear(4, 5),
        ... )
        >>> cam = GradCAM(net, "1")
        >>> cam(torch.rand(2, 3, 9, 12), targets=[0, 3]).shape
        torch.Size([2, 9, 12])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        method: str = "gradcam",
        reshape: Callable[[Tensor], Tensor] | None = None,
        counterfactual: bool = False,
        eigen_smooth: bool = False,
        augment: bool = False,
        backend: str | None = None,
    ) -> None:
        self._code = _checks.choice("method", method, METHODS)
        super().__init__(model, find_layers(model, layers), reshape, backend)
        self.method = method
        self.counterfactual, self.eigen_smooth, self.augment = counterfactual, eigen_smooth, augment

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r}, layers={list(self.layers)})"

    def _raw(self, x: Tensor, targets: Targets) -> list[Tensor]:
        captured = capture(self.model, x, self.layers, targets)
        maps = []
        for act, grad in to_maps(captured, self.layers, self.reshape):
            grad = -grad if self.counterfactual else grad
            if self.eigen_smooth:
                maps.append(_principal(act, grad, self._code))
            else:
                maps.append(grad_weighted_map(act, grad, method=self.method, backend=self.backend))
        return maps

    def _together(
        self,
        x: Tensor,
        targets: Targets,
        normalize: str | None,
        size: str | int | Sequence[int] | None,
    ) -> Tensor:
        if not self.augment:
            return self._finished(x, targets, normalize, size)
        if targets is None:
            targets = _most_likely(self.model, x)
        variants = []
        for mirrored in (False, True):
            for factor in _INTENSITIES:
                one = factor * (x.flip(-1) if mirrored else x)
                found = self._finished(one, targets, normalize, size)
                variants.append(found.flip(-1) if mirrored else found)
        return torch.stack(variants).mean(0)

    def _finished(self, x: Tensor, targets: Targets, normalize: object, size: object) -> Tensor:
        raw = self.raw(x, targets)
        space = map_size(size, x, raw[0].dim() - 1)
        scaled = [finish_map(m, relu=True, normalize=normalize) for m in raw]  # type: ignore[arg-type]
        together = finish_map(scaled, size=space, relu=True, normalize=None)
        if normalize is None:
            return together
        # Once more, where a mean of several or an enlarged map no longer fills the scale; what is
        # zero has been said to be.
        top = together.flatten(1).amax(1).reshape(-1, *[1] * (together.dim() - 1))
        low = together.flatten(1).amin(1).reshape(top.shape)
        if normalize == "max":
            low = torch.zeros_like(low)
        return (together - low) / (top - low + 1e-7)


def _most_likely(model: nn.Module, x: Tensor) -> list[int]:
    """Of the plain input, so that all of its variants explain one class."""
    from transfuse.methods.saliency._capture import check_input, evaluation
    from transfuse.methods.saliency._targets import logits_of

    x = check_input(x)
    with evaluation(model), torch.no_grad():
        return logits_of(model(x)).argmax(1).tolist()


def _principal(act: Tensor, grad: Tensor, method: int) -> Tensor:
    """(B, *S): the first right singular direction of the centred weighted activations."""
    dtype = working_dtype(act.dtype)
    terms = weighted_channels(act.flatten(2).to(dtype), grad.flatten(2).to(dtype), method)
    points = (terms - terms.mean(2, keepdim=True)).mT
    _, _, directions = torch.linalg.svd(points, full_matrices=False)
    found = (points @ directions[:, 0, :, None])[..., 0]
    agrees = (found * terms.sum(1)).sum(1, keepdim=True)
    return (found * torch.where(agrees < 0, -1.0, 1.0)).unflatten(1, act.shape[2:])


def guided_backprop(model: nn.Module, x: Tensor, targets: Targets = None) -> Tensor:
    """Gradient of the score with respect to the input, through ReLUs that let positive ones pass.

    Args:
        model: With its ReLUs as modules (``nn.ReLU``, ``nn.ReLU6``); functional ones are not seen.
        x: (B, ...), the batch.
        targets: As of :meth:`GradCAM.raw`.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: What cannot be explained; the message says why.

    Reference:
        Springenberg et al. 2015, Striving for simplicity (arXiv:1412.6806).
    """
    found = capture(model, x, (), targets, input_gradient=True, guided=True)
    return found.input_gradient  # type: ignore[return-value]


def guided_grad_cam(cam: GradCAM, x: Tensor, targets: Targets = None) -> Tensor:
    """Guided backpropagation times the enlarged map, element by element.

    Args:
        cam: The map to multiply with.
        x: (B, C, *S), the batch.
        targets: As of :meth:`GradCAM.raw`.

    Returns:
        A tensor like x.

    Raises:
        TypeError, ValueError: What cannot be explained; the message says why.
    """
    return guided_backprop(cam.model, x, targets) * cam(x, targets)[:, None].to(x.dtype)
