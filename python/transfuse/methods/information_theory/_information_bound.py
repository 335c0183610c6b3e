"""The information bottleneck curve by Blahut-Arimoto iterations."""

from __future__ import annotations

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
    clusters = min(clusters, len(p_yx))
    own = _plogp(p_yx).sum(1)
    p_y = p_x @ p_yx
    # Near one cluster each, in the order of p(y|x).
    p_tx = torch.full((len(p_yx), clusters), 1e-3, dtype=torch.float64)
    p_tx[torch.arange(len(p_yx)), torch.arange(len(p_yx)) * clusters // len(p_yx)] += 1.0
    p_tx /= p_tx.sum(1, keepdim=True)
    found: dict[float, tuple[float, float]] = {}
    for beta in sorted(set(given), reverse=True):
        for _ in range(iterations):
            p_t = p_x @ p_tx
            p_yt = (p_tx * p_x[:, None]).T @ p_yx / p_t[:, None].clamp_min(1e-300)
            gap = own[:, None] - p_yx @ p_yt.clamp_min(1e-300).log2().T
            new = (p_t.clamp_min(1e-300).log2() - beta * gap) * torch.log(
                torch.tensor(2.0).double()
            )
            new = new.softmax(1)
            change = float((new - p_tx).abs().max())
            p_tx = new
            if change < tol:
                break
        p_t = p_x @ p_tx
        kept = float(p_x @ _plogp(p_tx).sum(1) - _plogp(p_t).sum())
        p_ty = (p_tx * p_x[:, None]).T @ p_yx
        said = float(_plogp(p_ty).sum() - _plogp(p_t).sum() - _plogp(p_y).sum())
        found[beta] = (max(0.0, kept), max(0.0, said))
    values = torch.tensor([found[b] for b in given], dtype=torch.float64).reshape(-1, 2)
    return InformationBound(torch.tensor(given, dtype=torch.float64), values[:, 0], values[:, 1])
