"""Layers of a network with low-rank experts beside their frozen weights.

Adapters are put in place of ``nn.Linear`` and ``nn.Conv2d`` modules; which expert a forward uses is
one setting shared by all adapters of a network (:class:`Routing`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.ops import lora_conv2d, lora_linear


class Routing:
    """Which expert the samples of a forward use: a number, or int64 (B,)."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.expert: int | Tensor = 0


class Adapter(nn.Module):
    """A frozen linear or convolution layer with E low-rank deltas and E biases.

    Args:
        layer: the layer; its weight is kept (shared, frozen).
        routing: chooses the expert.
        r: rank; for a k x k convolution A and B have r k rows and columns.
        alpha: deltas are multiplied by alpha / r.
        train_bias: each expert has a bias of its own, if the layer has one.
        generator: for A (Kaiming-uniform with a = sqrt 5); B starts at 0.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        routing: Routing,
        *,
        r: int,
        alpha: float,
        train_bias: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        out, into, *kernel = layer.weight.shape
        size = kernel[0] if kernel else 1
        if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or kernel[0] != kernel[1]):
            raise ValueError(
                f"layer: expected a square kernel and one group, got kernel {tuple(kernel)} and "
                f"{layer.groups} groups"
            )
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise ValueError(f"layer: expected zero padding, got {layer.padding_mode!r}")
        # A convolution's delta may have more rows than it has rank, as in a stem of 3 channels.
        if not kernel and r > min(out, into):
            raise ValueError(f"r: expected at most min(in, out) = {min(out, into)}, got {r}")
        self.layer, self.routing, self.scale = layer, routing, alpha / r
        like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        bound = math.sqrt(1.0 / (into * size))
        start = torch.rand(routing.experts, r * size, into * size, generator=generator)
        self.down = nn.Parameter(((2.0 * start - 1.0) * bound).to(**like))
        self.up = nn.Parameter(torch.zeros(routing.experts, out * size, r * size, **like))
        self.bias: nn.Parameter | None = None
        if train_bias and layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().repeat(routing.experts, 1))
        layer.requires_grad_(False)
        self.merged: int | None = None
        self._kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        layer, bias = self.layer, self.layer.bias if self.bias is None else self.bias
        expert = self.routing.expert
        if self.merged is not None:
            if isinstance(expert, Tensor) or expert != self.merged:
                raise RuntimeError(
                    f"expert {expert} is asked for while expert {self.merged} is merged; unmerge()"
                )
            return layer(x)
        options: dict[str, Any] = {"scale": self.scale, "expert": expert}
        if isinstance(layer, nn.Linear):
            return lora_linear(x, layer.weight, bias, self.down, self.up, **options)
        return lora_conv2d(
            x, layer.weight, bias, self.down, self.up, **options,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation,  # type: ignore[arg-type]
        )  # fmt: skip

    @torch.no_grad()
    def merge(self, expert: int) -> None:
        """Give the layer a weight with an expert's delta, so that forwards cost what it does."""
        self.unmerge()
        layer = self.layer
        self._kept = (layer.weight, layer.bias)
        delta = (self.up[expert] @ self.down[expert]) * self.scale
        # New tensors: the old ones may be shared with the network this one was made from.
        layer.weight = nn.Parameter(layer.weight + delta.view(layer.weight.shape), False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias[expert].clone(), False)
        self.merged = expert

    def unmerge(self) -> None:
        """Give the layer its own weight and bias back."""
        if self._kept is not None:
            self.layer.weight, self.layer.bias = self._kept
        self.merged, self._kept = None, None


class ExpertNorm(nn.Module):
    """A batch normalisation with parameters and running statistics of its own for each expert."""

    def __init__(self, layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.experts = nn.ModuleList(copy.deepcopy(layer) for _ in range(routing.experts))
        for own in self.experts:
            own.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.routing.expert
        if not isinstance(expert, Tensor):
            return self.experts[expert](x)
        used = expert.unique().tolist()
        out = torch.empty_like(x)
        for e in used:
            at = (expert == e).nonzero().flatten()
            out = out.index_copy(0, at, self.experts[e](x.index_select(0, at)))
        return out


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def wrap(
    module: nn.Module,
    experts: int,
    *,
    r: int,
    alpha: float,
    targets: Callable[[str, nn.Module], bool] | Sequence[str] | None,
    frozen_biases: Sequence[str],
    generator: torch.Generator | None,
) -> Routing:
    """Put adapters into a network, in place; freeze everything else.

    Args:
        module: the network.
        experts: how many experts.
        r, alpha: of :class:`Adapter`.
        targets: which Linear and Conv2d layers get low-rank deltas: names, ends of names, or a
            function (name, layer); None: all of them.
        frozen_biases: names of layers whose bias stays the network's (the last classifier layer).
        generator: for the adapters.

    Returns:
        The routing that all adapters share.

    Raises:
        ValueError: nothing to adapt, or a layer that cannot be.
    """
    routing = Routing(experts)
    module.requires_grad_(False)
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if isinstance(targets, str):
        raise TypeError(f"targets: expected a sequence of names, got the string {targets!r}")

    def wanted(name: str, layer: nn.Module) -> bool:
        if targets is None:
            return True
        if callable(targets):
            return targets(name, layer)
        return any(name == t or name.endswith("." + t) for t in targets)

    chosen = {n for n, m in found if wanted(n, m)}
    if not chosen:
        names = [n for n, _ in found]
        raise ValueError(f"targets: expected a Linear or Conv2d layer, none matches in {names}")
    for name, layer in found:
        # Without deltas there is still a bias of each expert.
        own_bias = name not in frozen_biases
        if name not in chosen and (layer.bias is None or not own_bias):
            continue
        adapter: nn.Module
        if name in chosen:
            adapter = Adapter(
                layer, routing, r=r, alpha=alpha, train_bias=own_bias, generator=generator
            )
        else:
            adapter = ExpertBias(layer, routing)
        _replace(module, name, adapter)
    for name, norm in [(n, m) for n, m in module.named_modules() if isinstance(m, NORMS)]:
        _replace(module, name, ExpertNorm(norm, routing))
    return routing


class ExpertBias(nn.Module):
    """A frozen layer whose bias each expert has of its own."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, routing: Routing) -> None:
        super().__init__()
        layer.requires_grad_(False)
        self.layer: Any = layer
        self.routing = routing
        bias: Any = layer.bias
        self.bias = nn.Parameter(bias.detach().repeat(routing.experts, 1))

    def forward(self, x: Tensor) -> Tensor:
        # A row (1, O), or one per sample (B, O), beside the layer's own.
        shift = self.bias[self.routing.expert] - self.layer.bias
        shift = shift if shift.dim() == 2 else shift[None]
        if isinstance(self.layer, nn.Conv2d):
            return self.layer(x) + shift[:, :, None, None]
        return self.layer(x) + shift.view(shift.shape[0], *([1] * (x.dim() - 2)), shift.shape[1])


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise ValueError("module: expected a network that holds layers, got a single layer")
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def adapters(module: nn.Module) -> Iterator[Adapter]:
    """All adapters of a network."""
    return (m for m in module.modules() if isinstance(m, Adapter))
