"""The information bottleneck curve by Blahut-Arimoto iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.methods.information_theory._binned_information import identities


class InformationBound(NamedTuple):
    """Bits at each beta, in the order given: ``input`` I(X; T) and ``label`` I(T; Y), (B,)."""

    betas: Tensor
    input: Tensor
    label: Tensor


def _plogp(p: Tensor) -> Tensor:
    return torch.where(p > 0, p * p.clamp_min(1e-300).log2(), 0.0)


class _Problem:
    """p(x) and p(y|x), of which none are equal."""

    def __init__(self, p_x: Tensor, p_yx: Tensor) -> None:
        self.p_x, self.p_yx = p_x, p_yx
        self.own = _plogp(p_yx).sum(1)
        self.of_y = float(_plogp(p_x @ p_yx).sum())

    def solved(self, p_tx: Tensor, beta: float, iterations: int, tol: float) -> Tensor:
        """Iterated until p(t|x) rests."""
        for _ in range(iterations):
            p_t = self.p_x @ p_tx
            p_yt = (p_tx * self.p_x[:, None]).T @ self.p_yx / p_t[:, None].clamp_min(1e-300)
            gap = self.own[:, None] - self.p_yx @ p_yt.clamp_min(1e-300).log2().T
            new = (math.log(2.0) * (p_t.clamp_min(1e-300).log2() - beta * gap)).softmax(1)
            change = float((new - p_tx).abs().max())
            p_tx = new
            if change < tol:
                break
        return p_tx

    def informations(self, p_tx: Tensor) -> tuple[float, float]:
        """I(X; T) and I(T; Y) in bits."""
        of_t = float(_plogp(self.p_x @ p_tx).sum())
        kept = float(self.p_x @ _plogp(p_tx).sum(1)) - of_t
        p_ty = (p_tx * self.p_x[:, None]).T @ self.p_yx
        said = float(_plogp(p_ty).sum()) - of_t - self.of_y
        return max(0.0, kept), max(0.0, said)


def information_bound(
    inputs: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    *,
    clusters: int = 8,
    iterations: int = 200,
    tol: float = 1e-9,
) -> InformationBound:
    r"""Least I(X; T) for what T says of Y: minima of I(X; T) - beta I(T; Y).

    .. math:: p(t|x) \propto p(t)\, e^{-\beta\, \mathrm{KL}(p(y|x) \| p(y|t))}, \quad
              p(t) = \sum_x p(x) p(t|x), \quad p(y|t) = \sum_x p(y|x) p(t|x) p(x) / p(t)

    Args:
        inputs: (n, ...), rows that may repeat.
        labels: (n,) integers, or (n, C) one-hot rows.
        betas: positive numbers; solved from the largest on, each from the solution before.
        clusters: values of T; the minima need no more than there are distinct p(y|x).
        iterations: at most so many for each beta.
        tol: change of p(t|x) below which a beta is done.

    Returns:
        :class:`InformationBound`, float64. Minima are local ones.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Reference:
        Tishby, Pereira and Bialek, The Information Bottleneck Method, 1999.

    Example:
        >>> x = torch.arange(4)
        >>> information_bound(x, x // 2, [100.0]).label
        tensor([1.], dtype=torch.float64)
    """
    inputs = _checks.dense("inputs", inputs)
    x = identities("inputs", inputs, inputs.shape[0] if inputs.dim() > 0 else 0).cpu()
    y = identities("labels", labels, x.shape[0]).cpu()
    clusters = _checks.positive_int("clusters", clusters)
    iterations = _checks.positive_int("iterations", iterations)
    given = [_checks.number(f"betas[{i}]", b, positive=True) for i, b in enumerate(betas)]
    joint = torch.zeros(int(x.max()) + 1, int(y.max()) + 1, dtype=torch.float64)
    joint.index_put_((x, y), torch.ones(len(x), dtype=torch.float64), accumulate=True)
    p_x = joint.sum(1) / joint.sum()
    p_yx = joint / joint.sum(1, keepdim=True)
    # Inputs with one p(y|x) have one p(t|x).
    p_yx, group = torch.unique(p_yx, dim=0, return_inverse=True)
    p_x = torch.zeros(len(p_yx), dtype=torch.float64).index_add_(0, group, p_x)
    problem = _Problem(p_x, p_yx)
    clusters = min(clusters, len(p_yx))
    # In the order of p(y|x), blurred: a cluster that is certain of Y would never let go.
    soft = torch.full((len(p_yx), clusters), 1.0, dtype=torch.float64)
    soft[torch.arange(len(p_yx)), torch.arange(len(p_yx)) * clusters // len(p_yx)] += 4.0
    soft /= soft.sum(1, keepdim=True)
    found: dict[float, tuple[float, float]] = {}
    before = soft
    for beta in sorted(set(given), reverse=True):
        # One cluster for all is a fixed point of every beta; so no result is above it.
        best, found[beta] = 0.0, (0.0, 0.0)
        ends = [problem.solved(p, beta, iterations, tol) for p in (before, soft)]
        for p_tx in ends:
            kept, said = problem.informations(p_tx)
            if kept - beta * said < best:
                best, found[beta], before = kept - beta * said, (kept, said), p_tx
    values = torch.tensor([found[b] for b in given], dtype=torch.float64).reshape(-1, 2)
    return InformationBound(torch.tensor(given, dtype=torch.float64), values[:, 0], values[:, 1])
