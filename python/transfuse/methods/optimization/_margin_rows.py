"""Rows of margin constraints on a matrix W, given by two small factors each.

Row r says <a_r, W> = delta_r^T W z_r with a_r = delta_r z_r^T, which is never formed: the Gram
matrix of all rows is the element-wise product of those of delta and of z. Instances are batched
over one leading dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse.methods.optimization._least_distance import least_distance

# Equalities that depend on each other up to this are one.
RANK = 1e-12


class Rows(NamedTuple):
    """delta (I, R, d), z (I, R, d), rhs (I, R), and which rows are inequalities or equalities."""

    delta: Tensor
    z: Tensor
    rhs: Tensor
    inequality: Tensor
    equality: Tensor

    def gram(self) -> Tensor:
        """(I, R, R) products <a_r, a_s>."""
        return (self.delta @ self.delta.mT) * (self.z @ self.z.mT)

    def apply(self, w: Tensor) -> Tensor:
        """(I, R) products <a_r, W>."""
        return ((self.delta @ w) * self.z).sum(-1)

    def combine(self, mu: Tensor) -> Tensor:
        """(I, d, d) sums of mu_r a_r."""
        return (self.delta * mu[..., None]).mT @ self.z


class Projection(NamedTuple):
    """The nearest W (I, d, d), its multipliers (I, R), and for which instances there is one."""

    weight: Tensor
    multipliers: Tensor
    feasible: Tensor


class Polyhedron:
    """The matrices that satisfy rows of constraints.

    Args:
        rows: the constraints, float64.
        tol: how far a row may be missed, relative to the largest number of its kind.
    """

    def __init__(self, rows: Rows, tol: float) -> None:
        self.rows, self.tol = rows, tol
        gram = rows.gram()
        self._equal = rows.equality.to(gram.dtype)
        self._unequal = rows.inequality.to(gram.dtype)
        # Equalities are eliminated: what is left of an inequality is orthogonal to all of them.
        inner = gram * self._equal[:, :, None] * self._equal[:, None, :]
        self._inverse = torch.linalg.pinv(inner, rtol=RANK, hermitian=True)
        self._cross = gram * self._equal[:, :, None]
        left = gram - self._cross.mT @ self._inverse @ self._cross
        self._gram = left * self._unequal[:, :, None] * self._unequal[:, None, :]
        self._start: Tensor | None = None

    def project(self, v: Tensor | None = None) -> Projection:
        """The W nearest to v (I, d, d); without it, the smallest.

        Starts where the last projection ended.
        """
        rows = self.rows
        need = rows.rhs if v is None else rows.rhs - rows.apply(v)
        known = torch.einsum("irs,is->ir", self._inverse, need * self._equal)
        need = (need - torch.einsum("irs,ir->is", self._cross, known)) * self._unequal
        found = least_distance(self._gram, need, rows.inequality, self._start, self.tol)
        self._start = found.multipliers
        back = torch.einsum("irs,is->ir", self._cross, found.multipliers)
        mu = found.multipliers + known - torch.einsum("irs,is->ir", self._inverse, back)
        w = rows.combine(mu)
        w = w if v is None else w + v
        got = rows.apply(w)
        missed = torch.where(rows.equality, (got - rows.rhs).abs(), 0.0).amax(-1)
        size = 1.0 + torch.where(rows.equality, rows.rhs.abs(), 0.0).amax(-1)
        return Projection(w, mu, found.feasible & (missed <= max(self.tol, 1e-9) * size))
