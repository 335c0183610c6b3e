"""cfg_step written out: its specification, its oracle, and its fallback.

Arithmetic is float64 for float64 inputs and float32 for all others, in the order in which samplers
are usually written: guide, rescale, clean latent, move. Results are rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse.ops._cfg_call import Call, normalise
from transfuse.ops._sampler_updates import Number, Update


class CFGCosines(NamedTuple):
    """Result of a step with its statistics; see ``transfuse.ops.cfg_step_with_cosine``."""

    sample: Tensor
    cosine: Tensor


class CFGOriginal(NamedTuple):
    """Result of a step with the clean latent; see ``transfuse.ops.cfg_step_with_original``."""

    sample: Tensor
    original: Tensor


def cfg_step_reference(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor | None,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
) -> Tensor:
    """As ``transfuse.ops.cfg_step``."""
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise,
    )  # fmt: skip
    return composed(call)


def cfg_step_with_original_reference(
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
) -> CFGOriginal:
    """As ``transfuse.ops.cfg_step_with_original``."""
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise, need=("sample", "alpha"),
    )  # fmt: skip
    return CFGOriginal(composed(call), composed_original(call))


def cfg_step_with_cosine_reference(
    sample: Tensor | None,
    cond: Tensor,
    uncond: Tensor,
    update: Update,
    *,
    scale: float | Tensor,
    rescale: float = 0.0,
    prediction: str = "epsilon",
    noise: Tensor | None = None,
    space: str = "prediction",
) -> CFGCosines:
    """As ``transfuse.ops.cfg_step_with_cosine``."""
    call = normalise(
        sample, cond, uncond, update,
        scale=scale, rescale=rescale, prediction=prediction, noise=noise, need=needs_of(space),
    )  # fmt: skip
    return CFGCosines(composed(call), composed_cosine(call, space))


SPACES = ("prediction", "original")


def needs_of(space: object) -> tuple[str, ...]:
    """What the statistic of a space needs."""
    if not isinstance(space, str) or space not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(map(repr, SPACES))}, got {space!r}")
    return ("uncond",) if space == "prediction" else ("uncond", "sample", "alpha")


# ---- the formulas for checked arguments ----------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _times(number: Number, x: Tensor) -> Tensor:
    if isinstance(number, Tensor):
        number = number.to(x.dtype).view(-1, *([1] * (x.dim() - 1)))
    return number * x


def _flat(x: Tensor) -> Tensor:
    """As (B, n)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _guided(call: Call) -> Tensor:
    cond = _wide(call.cond)
    if call.uncond is None:
        return cond
    uncond = _wide(call.uncond)
    guided = uncond + _times(call.scale, cond - uncond)
    if call.rescale == 0.0:
        return guided
    return guided * (1.0 - call.rescale + call.rescale * _ratio(cond, guided))


def _ratio(cond: Tensor, guided: Tensor) -> Tensor:
    """Deviation of the conditional prediction over that of the guided one; 1 where it is 0."""
    spreads = []
    for x in (cond, guided):
        x = _flat(x)
        centred = x - x.mean(1, keepdim=True)
        spreads.append(centred.square().sum(1))
    varied = (spreads[0] > 0.0) & (spreads[1] > 0.0)
    ratio = torch.where(varied, spreads[0], 1.0) / torch.where(varied, spreads[1], 1.0)
    return ratio.sqrt().view(-1, *([1] * (cond.dim() - 1)))


def composed(call: Call) -> Tensor:
    """The moved latent."""
    out = _times(call.move.b, _guided(call))
    if call.sample is not None:
        out = out + _times(call.move.a, _wide(call.sample))
    if call.noise is not None:
        out = out + _times(call.move.c, _wide(call.noise))
    return out.to(call.cond.dtype)


def composed_original(call: Call) -> Tensor:
    """The clean latent that the guided prediction implies."""
    out = _times(call.move.p, _wide(call.sample)) + _times(call.move.q, _guided(call))
    return out.to(call.cond.dtype)


def composed_cosine(call: Call, space: str) -> Tensor:
    """Cosine of the conditional and the unconditional prediction of each sample, or of the clean
    latents they imply; 1 for two zero vectors, 0 for one."""
    cond, uncond = _wide(call.cond), _wide(call.uncond)
    if space == "original":
        sample = _times(call.move.p, _wide(call.sample))
        cond = sample + _times(call.move.q, cond)
        uncond = sample + _times(call.move.q, uncond)
    cond, uncond = _flat(cond), _flat(uncond)
    return cosine((cond * cond).sum(1), (cond * uncond).sum(1), (uncond * uncond).sum(1))


def cosine(first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
    """From |a|^2, <a, b> and |b|^2; 1 for two zero vectors, 0 for one."""
    nonzero = (first > 0.0) & (second > 0.0)
    length = torch.where(nonzero, first, 1.0).sqrt() * torch.where(nonzero, second, 1.0).sqrt()
    same = ((first == 0.0) & (second == 0.0)).to(first.dtype)
    return torch.where(nonzero, cross / length, same)
