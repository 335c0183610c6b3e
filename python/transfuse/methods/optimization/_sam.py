"""The arithmetic of sharpness-aware steps over lists of tensors.

Everything that touches all parameters is here, in calls over whole lists: the kernels of
``transfuse.ops`` for norms and the ascent, torch's where there is nothing to fuse. Norms and radii
stay 0-dimensional tensors on the device; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse.ops import multi_norm, sam_perturb_

HALF = (torch.float16, torch.bfloat16)


class Slice(NamedTuple):
    """Parameters of one device, dtype and rule, with their gradients."""

    params: list[Tensor]
    grads: list[Tensor]
    adaptive: bool


def slices(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], adaptive: Sequence[bool]
) -> list[Slice]:
    """Parameters that have a gradient, by device, dtype and rule."""
    found: dict[tuple, Slice] = {}
    for param, grad, rule in zip(params, grads, adaptive, strict=True):
        if grad is None:
            continue
        key = (param.device, param.dtype, rule)
        if key not in found:
            found[key] = Slice([], [], rule)
        found[key].params.append(param)
        found[key].grads.append(grad)
    return list(found.values())


def norm(parts: Sequence[Slice], device: torch.device) -> Tensor:
    """One norm over all parts of theta * g (adaptive) or g, at least float32."""
    found = [
        multi_norm(part.grads, scale=part.params if part.adaptive else None).to(device)
        for part in parts
    ]
    if not found:
        return torch.zeros((), device=device)
    wide = max((t.dtype for t in found), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.linalg.vector_norm(torch.stack([t.to(wide) for t in found]))


def ascend(
    parts: Sequence[Slice], params: Sequence[Tensor], into: list[Tensor] | None, factor: Tensor
) -> list[Tensor]:
    """theta += factor * theta^2 g or factor * g in every part; copies of all parameters before."""
    kept = [torch.empty_like(p) for p in params] if into is None else into
    place = {id(p): copy for p, copy in zip(params, kept, strict=True)}
    moved = {id(p) for part in parts for p in part.params}
    still = [p for p in params if id(p) not in moved]
    if still:
        torch._foreach_copy_([place[id(p)] for p in still], still)
    for part in parts:
        sam_perturb_(
            part.params,
            part.grads,
            factor.to(part.params[0].device),
            adaptive=part.adaptive,
            eps=0.0,
            norm=torch.ones((), device=part.params[0].device),
            backup=[place[id(p)] for p in part.params],
        )
    return kept


def released_directions(parts: Sequence[Slice]) -> Iterator[list[Tensor]]:
    """theta^2 or 1 of each part: the released TRAM leaves the gradient out."""
    for part in parts:
        if part.adaptive:
            yield list(torch._foreach_mul(part.params, part.params))
        else:
            yield [torch.ones_like(p) for p in part.params]


def add_scaled(part: Slice, moves: list[Tensor], factor: Tensor) -> None:
    """theta += factor * moves, which are overwritten."""
    torch._foreach_mul_(moves, factor.to(moves[0]))
    torch._foreach_add_(part.params, moves)


def fisher_norm(parts: Sequence[Slice], fisher: Sequence[list[Tensor]], device) -> Tensor:
    """sqrt(g^T F^-1 g) over all parts."""
    total = torch.zeros((), device=device)
    for part, weights in zip(parts, fisher, strict=True):
        terms = list(torch._foreach_mul(part.grads, part.grads))
        torch._foreach_div_(terms, weights)
        one = torch.stack(list(torch._foreach_norm(_wide(terms), 1))).sum().to(device)
        total = total + one
    return total.sqrt()


def copies(params: Sequence[Tensor], into: list[Tensor] | None = None) -> list[Tensor]:
    """Copies of tensors, in given memory if there is any."""
    if into is None:
        return [p.detach().clone() for p in params]
    torch._foreach_copy_(into, list(params))
    return into


def restore(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """The parameters exactly as they were."""
    torch._foreach_copy_(list(params), list(saved))


def blend(mean: list[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """mean = decay * mean + (1 - decay) * params."""
    torch._foreach_lerp_(mean, list(params), 1.0 - decay)


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """At least float32: squares of half-precision gradients vanish or overflow."""
    return [t.float() for t in tensors] if tensors[0].dtype in HALF else tensors
