"""Least distance programming, batched: the point of a polyhedron that is nearest to the origin.

    min |w|^2  subject to  A w >= b,   from the Gram matrix G = A A^T alone.

Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23): with E = [A^T; b^T] and the
last unit vector f, min |E u - f| over u >= 0 has a residual r whose last entry is
rho = |r|^2 = 1 - b^T u; the answer is w = A^T u / rho, and there is none exactly if rho = 0. The
problem in u is solved by their active-set method: every set of positive u it passes has independent
columns, so it ends after finitely many steps at the exact solution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Below this rho the polyhedron is empty, or so far out that float64 cannot tell: |w| of 1e6 in
# units of the largest row.
EMPTY = 1e-12


class Distance(NamedTuple):
    """Multipliers mu (I, R) with w = A^T mu, and which instances have a solution (I,)."""

    multipliers: Tensor
    feasible: Tensor


def least_distance(
    gram: Tensor, b: Tensor, rows: Tensor, start: Tensor | None = None, tol: float = 1e-9
) -> Distance:
    """Solve all instances at once.

    Args:
        gram: G (I, R, R), float64, 0 in rows that do not count.
        b: (I, R), 0 in rows that do not count.
        rows: (I, R) bool, rows that count.
        start: multipliers near the solution.
        tol: largest relative violation of a row.

    Raises:
        RuntimeError: an instance did not come to rest, which rounding would have to cause.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = diagonal.amax(-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    size = b.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    g, c = gram / scale[..., None], b / size
    h = g + c[:, :, None] * c[:, None, :]
    u = _nonnegative(h, c, rows, None if start is None else _warm(start * scale / size, c), tol)
    rho = 1.0 - (c * u).sum(-1, keepdim=True)
    feasible = rho[..., 0] > EMPTY
    mu = u / torch.where(rho > EMPTY, rho, 1.0)
    mu = _polished(g, c, mu)
    left = torch.where(rows, c - torch.einsum("irs,is->ir", g, mu), -torch.inf).amax(-1)
    feasible = feasible & ((left <= 1e3 * tol) | ~rows.any(-1))
    return Distance(mu * size / scale, feasible)


def _warm(mu: Tensor, c: Tensor) -> Tensor:
    """u of multipliers: mu = u / (1 - c^T u) the other way round."""
    mu = mu.clamp_min(0.0)
    return mu / (1.0 + (c * mu).sum(-1, keepdim=True)).clamp_min(1e-6)


def _nonnegative(h: Tensor, c: Tensor, rows: Tensor, start: Tensor | None, tol: float) -> Tensor:
    """min 0.5 u^T h u - c^T u over u >= 0, u = 0 where rows are False."""
    u = torch.zeros_like(c) if start is None else torch.where(rows, start, 0.0)
    passive = u > 0
    blocked = torch.zeros_like(passive)
    moving = passive.any(-1)  # instances whose u is not yet the solution on its passive set
    limit = 100 + 20 * c.shape[-1]
    for _ in range(limit):
        # Where u is settled, let the row in whose constraint is missed the most.
        slack = c - torch.einsum("irs,is->ir", h, u)
        rho = 1.0 - (c * u).sum(-1, keepdim=True)
        open_ = rows & ~passive & ~blocked & (slack > (0.1 * tol * rho).clamp_min(1e-15))
        grows = ~moving & open_.any(-1)
        if not bool((moving | grows).any()):
            return u
        newest = torch.where(open_, slack, -torch.inf).argmax(-1, keepdim=True)
        enters = torch.zeros_like(passive).scatter_(-1, newest, True) & grows[:, None]
        passive = passive | enters
        solution = _solve_on(h, c, passive)
        # Rounding: a row that would enter with the wrong sign stays out until others have moved.
        wrong = enters & ~(solution > 0)
        passive, blocked = passive & ~wrong, blocked | wrong
        active = (moving | grows) & ~wrong.any(-1)
        negative = passive & (solution <= 0)
        done = active & ~negative.any(-1)
        ratio = torch.where(negative, u / (u - solution).clamp_min(1e-300), torch.inf)
        alpha = ratio.amin(-1, keepdim=True)
        alpha = torch.where(alpha.isfinite(), alpha, 0.0)
        part = torch.where(passive, u + alpha * (solution - u), 0.0)
        leaves = negative & (ratio <= alpha)
        part = torch.where(leaves | (part <= 0), 0.0, part)
        u = torch.where(done[:, None], torch.where(passive, solution, 0.0), u)
        stepped = active & ~done
        u = torch.where(stepped[:, None], part, u)
        passive = torch.where(stepped[:, None], u > 0, passive)
        blocked = blocked & ~(done | stepped)[:, None]
        moving = stepped
    raise RuntimeError(f"least_distance: no rest after {limit} steps")


def _solve_on(h: Tensor, c: Tensor, passive: Tensor) -> Tensor:
    """The solution of h u = c on the passive rows, 0 elsewhere."""
    # The passive rows in front, as many as the largest set has.
    count = int(passive.sum(-1).max())
    order = (~passive).to(torch.int8).argsort(stable=True, dim=-1)[:, :count]
    p = passive.gather(-1, order).to(h.dtype)
    inner = h.gather(1, order[:, :, None].expand(-1, -1, h.shape[2]))
    inner = inner.gather(2, order[:, None, :].expand(-1, count, -1))
    inner = inner * p[:, :, None] * p[:, None, :] + torch.diag_embed(1.0 - p)
    solution, info = torch.linalg.solve_ex(inner, (c.gather(-1, order) * p)[..., None])
    solution = torch.where((info != 0)[:, None], 0.0, solution[..., 0] * p)
    solution = torch.where(solution.isfinite(), solution, 0.0)
    return torch.zeros_like(c).scatter(-1, order, solution)


def _polished(g: Tensor, c: Tensor, mu: Tensor) -> Tensor:
    """The multipliers once more from g itself, where that is well posed and keeps their signs."""
    passive = mu > 0
    again = _solve_on(g, c, passive)
    p = passive.to(g.dtype)
    again = again + _solve_on(g, (c - torch.einsum("irs,is->ir", g, again)) * p, passive)
    before, after = (
        ((c - torch.einsum("irs,is->ir", g, x)) * p).abs().amax(-1) for x in (mu, again)
    )
    better = (after <= before) & ((again > 0) | ~passive).all(-1)
    return torch.where(better[:, None], again, mu)
