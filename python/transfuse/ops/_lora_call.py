"""The checks of the low-rank adapted layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transfuse import _checks

Chosen = tuple[int | Tensor, float | Tensor]


def linear_call(
    x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: object, expert: object
) -> Chosen:
    """Check a call of lora_linear; returns the expert of each sample (or of all) and the scale."""
    _layer(x, weight, bias, down, up, 2)
    _checks.size("x", x, -1, weight.shape[1], "inputs of weight")
    _rank(down, up, weight.shape[1], weight.shape[0])
    return _experts(x, down, scale, expert)


def conv2d_call(
    x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: object, expert: object
) -> Chosen:
    """Check a call of lora_conv2d, as :func:`linear_call`."""
    _layer(x, weight, bias, down, up, 4)
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, I, H, W), got {x.dim()}")
    out, into, size, other = weight.shape
    if size != other:
        raise ValueError(f"weight: expected a square kernel, got {size} x {other}")
    if x.shape[1] != into:
        raise ValueError(
            f"x: expected {into} channels (those of weight; groups are not supported), "
            f"got {x.shape[1]}"
        )
    _rank(down, up, into * size, out * size)
    return _experts(x, down, scale, expert)


def _layer(x: Any, weight: Any, bias: Any, down: Any, up: Any, rank: int) -> None:
    """Kinds, dtypes and devices of the tensors of a layer."""
    for name, value in (("x", x), ("weight", weight), ("down", down), ("up", up)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    companions = [("weight", weight), ("down", down), ("up", up)]
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor or None, got {_checks.describe(bias)}")
        companions.append(("bias", bias))
    _checks.floating("x", x)
    for name, value in companions:
        _checks.same_dtype(name, value, "x", x)
        _checks.same_device(name, value, "x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, ..., I), got {tuple(x.shape)}")
    for name, value, dims in (("weight", weight, rank), ("down", down, 3), ("up", up, 3)):
        if value.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got {tuple(value.shape)}")
    if bias is not None and tuple(bias.shape) not in (
        (weight.shape[0],),
        (down.shape[0], weight.shape[0]),
    ):
        raise ValueError(
            f"bias: expected ({weight.shape[0]},) or one row per expert "
            f"({down.shape[0]}, {weight.shape[0]}), got {tuple(bias.shape)}"
        )


def _rank(down: Tensor, up: Tensor, into: int, out: int) -> None:
    experts, rank, _ = down.shape
    for name, value, want in (
        ("down", down, (experts, rank, into)),
        ("up", up, (experts, out, rank)),
    ):
        if tuple(value.shape) != want:
            raise ValueError(f"{name}: expected shape {want}, got {tuple(value.shape)}")


def _experts(x: Tensor, down: Tensor, scale: object, expert: object) -> Chosen:
    """The expert of each sample (one number if all share it), and the checked scale."""
    experts = down.shape[0]
    if isinstance(scale, Tensor):
        _checks.auxiliary("scale", scale, "x", x)
        if tuple(scale.shape) != (experts,):
            raise ValueError(f"scale: expected shape ({experts},), got {tuple(scale.shape)}")
    else:
        scale = _checks.number("scale", scale)
    if expert is None:
        if experts != 1:
            raise ValueError(f"expert: expected a number or int64 (B,) for {experts} experts")
        return 0, scale
    if isinstance(expert, Tensor):
        index = _checks.index_map("expert", expert, x.shape[0], experts, "batch of x", "x", x)
        return index, scale
    if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < experts:
        raise ValueError(f"expert: expected a number in [0, {experts}), got {expert!r}")
    return expert, scale
