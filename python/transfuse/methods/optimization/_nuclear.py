"""The smallest nuclear norm within a polyhedron of matrices, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.methods.optimization._margin_rows import Polyhedron, Projection

STEPS, RELAXATION = 5000, 1.6
# The gap is looked at every so many steps.
LOOK = 10


def smallest_nuclear(polyhedron: Polyhedron, start: Projection, tol: float) -> Tensor:
    """W (I, d, d) by the alternating direction method of multipliers.

    One half projects on the polyhedron, exactly; the other shrinks singular values. Multipliers mu
    of a projection, scaled so that |sum mu_r a_r|_2 <= 1, bound every norm from below by rhs^T mu,
    so the gap is known.

    Args:
        polyhedron: where to look.
        start: its smallest matrix in the Frobenius norm.
        tol: relative gap to stop at.

    Raises:
        RuntimeError: the gap did not close.
    """
    rows = polyhedron.rows
    w = start.weight
    top = torch.linalg.matrix_norm(w, ord=2)
    if not bool((top > 0).any()):
        return w
    # Shrinks by the size of the singular values themselves, as found best by trial.
    shrink = torch.where(top > 0, top, 1.0)[:, None]
    z, dual = w, torch.zeros_like(w)
    best, size = w, torch.linalg.matrix_norm(w, ord="nuc")
    bound = _bound(rows, start.multipliers)
    for step in range(1, STEPS + 1):
        found = polyhedron.project(z - dual)
        w = found.weight
        mixed = RELAXATION * w + (1 - RELAXATION) * z
        left, s, right = torch.linalg.svd(mixed + dual, full_matrices=False)
        z = (left * (s - shrink).clamp_min(0.0)[:, None, :]) @ right
        dual = dual + mixed - z
        if step % LOOK:
            continue
        now = torch.linalg.matrix_norm(w, ord="nuc")
        better = (now < size) & found.feasible
        best, size = torch.where(better[:, None, None], w, best), torch.where(better, now, size)
        bound = torch.maximum(bound, _bound(rows, found.multipliers))
        if bool((size - bound <= tol * size).all()):
            return best
    gap = ((size - bound) / size.clamp_min(torch.finfo(size.dtype).tiny)).max()
    raise RuntimeError(f"att_svm: the gap of the nuclear norm is {gap:.1e} after {STEPS} steps")


def _bound(rows, mu: Tensor) -> Tensor:
    """A lower bound of the norm within the polyhedron, from any multipliers."""
    size = torch.linalg.matrix_norm(rows.combine(mu), ord=2)
    return (rows.rhs * mu).sum(-1) / torch.where(size > 0, size, torch.inf)
