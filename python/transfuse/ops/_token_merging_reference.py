"""Token merging written out: its specification, its oracle, and its fallback.

Arithmetic is float64 for float64 inputs and float32 for all others, rounded once at the end. Plain
autograd differentiates it to any order; which token is nearest, merged or largest is piecewise
constant and has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Vectors shorter than this count as zero: they have similarity 0 to everything.
SMALLEST_NORM = 1e-12
# Entries of the largest piece of the score matrix.
BLOCK = 1 << 20


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of the last axis over their norms, and the inverse norms; zero vectors stay zero."""
    square = x.square().sum(-1, keepdim=True)
    positive = square > SMALLEST_NORM**2
    inverse = torch.where(positive, torch.where(positive, square, 1.0).rsqrt(), 0.0)
    return x * inverse, inverse


def take(y: Tensor, rows: Tensor) -> Tensor:
    """``out[b, i] = y[b, rows[b, i]]``; its gradient does not depend on the order of threads."""
    if y.device.type == "cuda":  # the gradient of indexing is sorted there, that of gather atomic
        return y[torch.arange(y.shape[0], device=y.device)[:, None], rows]
    return y.gather(1, rows[..., None].expand(-1, -1, y.shape[2]))


def add_up(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """``out[b, r] = sum of x[b, i] with rows[b, i] = r``, (B, count, C)."""
    out = torch.zeros((x.shape[0], count, x.shape[2]), dtype=x.dtype, device=x.device)
    if x.device.type == "cuda":
        batch = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(rows)
        return out.index_put((batch, rows), x, accumulate=True)
    return out.scatter_add(1, rows[..., None].expand(-1, -1, x.shape[2]), x)


def nearest_composed(
    x: Tensor, reference: Tensor, mask: Tensor | None, *, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Similarity and index of the nearest reference, for checked arguments."""
    wide = accumulate(x.dtype)
    reference = reference.expand(x.shape[0], -1, -1)
    if reference.shape[1] == 0:
        nothing = x.sum(-1).to(wide)  # stays a function of x, of derivative 0
        index = torch.full_like(nothing, -1, dtype=torch.int64)
        return nothing.masked_fill(index < 0, -torch.inf), index
    rows, _ = unit(x.to(wide))
    columns, _ = unit(reference.to(wide))
    index = _argmax(rows.detach(), columns.detach(), mask, exclude_self)
    known = index >= 0
    found = take(columns, torch.where(known, index, 0))
    return torch.where(known, (rows * found).sum(-1), -torch.inf), index


def _argmax(rows: Tensor, columns: Tensor, mask: Tensor | None, exclude_self: bool) -> Tensor:
    """Lowest index of the largest score of each row, -1 where nothing is allowed; in blocks of
    rows, so that the score matrix is never there."""
    count = columns.shape[1]
    numbers = torch.arange(count, device=columns.device)
    block = max(1, BLOCK // (count * max(1, rows.shape[0])))
    parts = []
    for begin in range(0, rows.shape[1], block):
        part = rows[:, begin : begin + block]
        score = part @ columns.mT
        score = torch.where(score.isnan(), -torch.inf, score)
        allowed = None if mask is None else mask[:, None, :]
        if exclude_self:
            own = begin + torch.arange(part.shape[1], device=columns.device)
            other = own[:, None] != numbers
            allowed = other if allowed is None else allowed & other
        if allowed is not None:
            score = torch.where(allowed, score, -torch.inf)
        best, index = score.max(-1)
        if allowed is not None:
            # All of them NaN: the first allowed one stands for them.
            first, lowest = allowed.to(torch.int8).max(-1)
            index = torch.where(best == -torch.inf, lowest, index)
            index = torch.where(first > 0, index, -1)
        parts.append(index)
    if not parts:
        return torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
    return torch.cat(parts, dim=1)


def segments_composed(
    x: Tensor, scale: Tensor | None, rows: Tensor, order: Tensor, start: Tensor, weighting: int
) -> Tensor:
    """Sum (0), mean (1) or first token (2) of each row, with a scale per token."""
    rows = rows.expand(x.shape[0], -1)
    if weighting == 2:
        survivors = order.gather(1, start[:, :-1])
        return take(x, survivors.expand(x.shape[0], -1))
    wide = x.to(accumulate(x.dtype))
    if scale is not None:
        wide = wide * scale[..., None]
    total = add_up(wide, rows, start.shape[1] - 1)
    if weighting == 1:
        total = total / start.diff(dim=1)[..., None]
    return total.to(x.dtype)


def gather_composed(y: Tensor, scale: Tensor | None, rows: Tensor) -> Tensor:
    """The row of each token, times a scale per token."""
    out = take(y, rows.expand(y.shape[0], -1))
    if scale is None:
        return out
    return (out.to(accumulate(y.dtype)) * scale[..., None]).to(y.dtype)


def amax_composed(x: Tensor, rows: Tensor, order: Tensor, start: Tensor) -> Tensor:
    """Largest number of each row and channel; its gradient goes to the lowest token that has it."""
    shape = (x.shape[0], start.shape[1] - 1, x.shape[2])
    places = rows[..., None].expand(x.shape)
    fixed = x.detach()
    top = torch.full(shape, -torch.inf, dtype=x.dtype, device=x.device)
    top = top.scatter_reduce(1, places, fixed, "amax").gather(1, places)
    own = (fixed == top) | (fixed.isnan() & top.isnan())
    tokens = torch.arange(x.shape[1], device=x.device)[:, None]
    candidates = torch.where(own, tokens, x.shape[1])
    winner = torch.full(shape, x.shape[1], dtype=torch.int64, device=x.device)
    winner = winner.scatter_reduce(1, places, candidates, "amin")
    return x.gather(1, winner)


def push_composed(
    x: Tensor,
    reference: Tensor,
    similarity: Tensor,
    index: Tensor,
    alpha: float,
    threshold: float,
) -> Tensor:
    """``x + alpha (x - nearest)`` where the similarity exceeds the threshold, else x itself."""
    reference = reference.expand(x.shape[0], -1, -1)
    if reference.shape[1] == 0:
        return x.clone()
    wide = x.to(accumulate(x.dtype))
    other = take(reference, torch.where(index < 0, 0, index)).to(wide.dtype)
    moved = (wide + alpha * (wide - other)).to(x.dtype)
    return torch.where((similarity > threshold)[..., None], moved, x)
