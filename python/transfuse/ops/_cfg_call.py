"""Checks of a call of the cfg_step family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from transfuse import _checks
from transfuse.ops._sampler_updates import Move, Number, coefficients, per_sample

ANY = (float("-inf"), float("inf"))


class Call(NamedTuple):
    """A checked call: inputs, guidance and coefficients."""

    sample: Tensor | None
    cond: Tensor
    uncond: Tensor | None
    noise: Tensor | None
    move: Move
    scale: Number
    rescale: float


def batched(name: str, value: object) -> Tensor:
    """A dense floating tensor (B, ...)."""
    value = _checks.dense(name, value)
    _checks.floating(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: expected shape (B, ...), got no dimension")
    return value


def companion(name: str, value: object, of: str, like: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of another."""
    value = _checks.dense(name, value)
    _checks.same_dtype(name, value, of, like)
    _checks.same_device(name, value, of, like)
    if value.shape != like.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape)} (that of {of}), got {tuple(value.shape)}"
        )
    return value


def normalise(
    sample: object,
    cond: object,
    uncond: object,
    update: object,
    *,
    scale: object,
    rescale: object,
    prediction: object,
    noise: object,
    need: Sequence[str] = (),
) -> Call:
    """Check the arguments.

    ``need``: what results ask for besides the update: ``"sample"``, ``"uncond"`` and ``"alpha"``
    (a known noise level).
    """
    cond = batched("cond", cond)
    move = coefficients(update, prediction, cond, "cond")
    scale = per_sample("scale", scale, cond, "cond", ANY, "(-inf, inf)")
    rescale = _checks.number("rescale", rescale)
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale: expected a number in [0, 1], got {rescale}")
    if uncond is None:
        if isinstance(scale, Tensor) or scale != 1.0 or "uncond" in need:
            raise ValueError(
                "uncond: expected a tensor (only scale 1.0 without statistics needs none), got None"
            )
    else:
        uncond = companion("uncond", uncond, "cond", cond)
    moves = not _zero(move.a) or "sample" in need
    if sample is None:
        if moves:
            raise TypeError("sample: expected a tensor (only Predict needs none), got None")
    else:
        sample = companion("sample", sample, "cond", cond)
    if "alpha" in need and move.p is None:
        raise ValueError("update.alpha: expected a number or a tensor (B,), got None")
    if noise is None:
        if not _zero(move.c):
            raise ValueError("noise: expected a tensor (the update adds noise), got None")
    else:
        noise = companion("noise", noise, "cond", cond)
    return Call(sample, cond, uncond, noise, move, scale, rescale)


def _zero(number: Number) -> bool:
    return not isinstance(number, Tensor) and number == 0.0
