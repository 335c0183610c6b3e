"""Checks of calls of the saliency ops, and how layouts become (B, C, locations)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

METHODS = {
    "gradcam": 0,
    "gradcam++": 1,
    "xgradcam": 2,
    "layercam": 3,
    "hirescam": 4,
    "linear": 4,
    "elementwise": 5,
}
LAYOUTS = {"nchw": 0, "nhwc": 1, "tokens": 2}
PHASES1 = {
    "scaling": 0,
    "bias": 1,
    "conv1x1": 2,
    "conv3x3": 2,
    "conv3x3_depthwise": 3,
    "conv": 2,
}
PHASES2 = {"norm": 0, "filter_norm": 1, "sum": 2, "max": 3}
_AXES = ("d", "h", "w")

Triple = tuple[int, int, int]


class Geometry(NamedTuple):
    """A convolution over (depth, rows, columns); axes that are not there have a kernel of 1."""

    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple

    def outputs(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Its numbers of locations; those of ``grid`` where that is 0."""
        return tuple(
            n if n == 0 else (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(grid, *self, strict=True)
        )


class Canonical(NamedTuple):
    """The tensors as (B, C, locations), and their spatial axes."""

    act: Tensor
    grad: Tensor
    space: tuple[int, ...]
    out_space: tuple[int, ...]


def layer(act: object, grad: object, layout: str, *, alike: bool) -> Canonical:
    """Check two tensors of one layer (``alike``: of one shape) and bring channels forward."""
    _checks.choice("layout", layout, LAYOUTS)
    tensors = [_one(name, x, layout) for name, x in (("act", act), ("grad", grad))]
    # As they were given, before channels came forward.
    shapes = [tuple(x.shape) for x in (act, grad) if isinstance(x, Tensor)]
    first, second = tensors
    if alike and first.shape != second.shape:
        raise ValueError(f"grad: expected the shape of act, {shapes[0]}, got {shapes[1]}")
    if first.dim() != second.dim() or first.shape[0] != second.shape[0]:
        raise ValueError(
            f"grad: expected {first.dim()} dimensions and a batch of {first.shape[0]} as act has, "
            f"got shape {shapes[1]}"
        )
    _checks.same_dtype("grad", second, "act", first)
    _checks.same_device("grad", second, "act", first)
    spaces = [tuple(x.shape[2:]) for x in tensors]
    return Canonical(first.flatten(2), second.flatten(2), *spaces)


def _one(name: str, value: object, layout: str) -> Tensor:
    x = _checks.dense(name, value)
    _checks.floating(name, x)
    least, most, axes = {
        "nchw": (4, 5, "(B, C, h, w) or (B, C, d, h, w)"),
        "nhwc": (4, 5, "(B, h, w, C) or (B, d, h, w, C)"),
        "tokens": (3, 3, "(B, T, C)"),
    }[layout]
    if not least <= x.dim() <= most:
        raise ValueError(f"{name}: expected {axes} for layout {layout!r}, got {tuple(x.shape)}")
    x = x if layout == "nchw" else x.movedim(-1, 1)
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one channel, got shape {tuple(x.shape)}")
    return x


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- NormGrad ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Which map: codes of the phases, the grid of the activations, and the neighbourhoods."""

    phase1: int
    phase2: int
    grid: Triple
    geometry: Geometry

    @property
    def out_grid(self) -> tuple[int, ...]:
        """The grid of the gradients, and of the map."""
        return self.geometry.outputs(self.grid)


def plan(
    found: Canonical,
    act: Tensor,
    grad: Tensor,
    phase1: object,
    phase2: object,
    layout: object,
    given: Mapping[str, object],
) -> Plan:
    """Check the phases, and the geometry that phase ``"conv"`` is given."""
    code1, code2 = (
        _checks.choice(name, value, table)
        for name, value, table in (("phase1", phase1, PHASES1), ("phase2", phase2, PHASES2))
    )
    rank = len(found.space)
    if layout == "tokens" and phase1 in ("conv3x3", "conv3x3_depthwise", "conv"):
        raise ValueError(
            f"phase1: {phase1!r} needs neighbours, which layout 'tokens' does not have; reshape "
            "the tokens to a grid and use layout 'nhwc'"
        )
    if phase1 == "conv":
        geometry = _given_geometry(rank, given)
    else:
        defaults = {"kernel_size": None, "stride": 1, "padding": 0, "dilation": 1}
        for name, default in defaults.items():
            if given[name] is not default and given[name] != default:
                raise ValueError(f"{name}: expected only with phase1='conv', got {phase1!r}")
        three = 3 if phase1 in ("conv3x3", "conv3x3_depthwise") else 1
        shape = _triple([three] * rank, 1)
        geometry = Geometry(shape, (1, 1, 1), tuple(k // 2 for k in shape), (1, 1, 1))  # type: ignore[arg-type]
    grid = _triple(found.space, 1)
    outputs = geometry.outputs(grid)
    if min(outputs) < 0 or any(out < 1 <= n for out, n in zip(outputs, grid, strict=True)):
        raise ValueError(
            f"kernel_size: expected a kernel that fits into the {found.space} locations of act, "
            f"got {geometry.kernel[3 - rank :]} with padding {geometry.padding[3 - rank :]} and "
            f"dilation {geometry.dilation[3 - rank :]}"
        )
    if outputs != _triple(found.out_space, 1):
        raise ValueError(
            f"grad: expected {outputs[3 - rank :]} locations, which is what kernel_size, stride, "
            f"padding and dilation make of the {found.space} of act, got {found.out_space}"
        )
    return Plan(code1, code2, grid, geometry)


def _triple(values: Sequence[int], filler: int) -> Triple:
    return (*([filler] * (3 - len(values))), *values)  # type: ignore[return-value]


def _given_geometry(rank: int, given: Mapping[str, object]) -> Geometry:
    if given["kernel_size"] is None:
        raise ValueError("kernel_size: expected the kernel of the convolution, got None")
    limits = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return Geometry(
        *(
            _triple(_numbers(name, given[name], rank, least), filler)
            for name, (least, filler) in limits.items()
        )
    )


def _numbers(name: str, value: object, rank: int, least: int) -> list[int]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != rank:
            raise ValueError(f"{name}: expected one integer or {rank}, got {len(value)}")
        numbers = list(value)
    else:
        numbers = [value] * rank
    for entry in numbers:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"{name}: expected integers, got {_checks.describe(entry)}")
        if not least <= entry < 2**31:
            raise ValueError(f"{name}: expected integers of at least {least}, got {entry}")
    return numbers
