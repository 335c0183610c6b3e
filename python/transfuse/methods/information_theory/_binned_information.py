"""Plug-in entropies of binned activations by counting equal rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops import row_groups

CORRECTIONS = (None, "miller-madow")
RULES = ("minmax", "quantile")
# Columns that a row may have before its bins say nothing.
WIDEST = 10_000


class BinnedInformation(NamedTuple):
    """Bits: ``input`` I(X; T), ``label`` I(T; Y), ``entropy`` H(T).

    ``singletons`` is the share of occupied cells that hold one row; ``outside`` that of activations
    below the first edge.
    """

    input: float
    label: float
    entropy: float
    singletons: float
    outside: float


def check_bins(bins: object, range_: object) -> None:
    """At least 2 edges; a rule or an ascending pair."""
    if _checks.positive_int("bins", bins) < 2:
        raise ValueError(f"bins: expected at least 2 edges, got {bins}")
    if isinstance(range_, str):
        _checks.choice("range", range_, {rule: 0 for rule in RULES})
        return
    if not isinstance(range_, (tuple, list)) or len(range_) != 2:
        raise TypeError(
            f"range: expected two numbers, 'minmax' or 'quantile', got {_checks.describe(range_)}"
        )
    low, high = (_checks.number("range", end) for end in range_)
    if low >= high:
        raise ValueError(f"range: expected ascending numbers, got {low} and {high}")


def edges_of(t: Tensor, bins: int, range_: tuple[float, float] | str) -> Tensor:
    """Edges (bins,), float32; fewer by quantiles of which some are equal."""
    if not isinstance(range_, str):
        # In double precision and rounded once, as the released code makes them.
        return torch.linspace(*range_, bins, dtype=torch.float64, device=t.device).float()
    values = t.detach().float().flatten()
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"t: expected finite activations with range={range_!r}")
    if range_ == "minmax":
        low, high = values.aminmax()
        return (
            torch.linspace(float(low), float(high), bins, dtype=torch.float64).float().to(t.device)
        )
    ordered = values.sort().values
    at = torch.linspace(0, values.numel() - 1, bins, dtype=torch.float64).round().long()
    return ordered[at.to(t.device)].unique()


def entropy(counts: Tensor, correction: str | None = None) -> float:
    """Plug-in entropy of counts in bits; Miller and Madow add (cells - 1) / (2 n) nats."""
    n = int(counts.sum())
    c = counts.double()
    bits = math.log2(n) - float((c * c.log2()).sum()) / n
    if correction is not None:
        bits += (counts.numel() - 1) / (2 * n * math.log(2))
    return bits


def joint_counts(a: Tensor, b: Tensor) -> Tensor:
    """Counts of the pairs of numbers that occur."""
    return torch.unique(a * (b.max() + 1) + b, return_counts=True)[1]


def identities(name: str, value: object, rows: int) -> Tensor:
    """(N,) numbers of distinct entries: labels as they are, rows (also one-hot) by their numbers.

    Raises:
        TypeError, ValueError: not a dense tensor of ``rows`` rows.
    """
    value = _checks.dense(name, value)
    if value.dim() < 1 or value.shape[0] != rows:
        raise ValueError(f"{name}: expected {rows} rows, got shape {tuple(value.shape)}")
    if rows == 0:
        raise ValueError(f"{name}: expected at least one row, got shape {tuple(value.shape)}")
    if value.dim() == 1 and not value.is_floating_point():
        return torch.unique(value, return_inverse=True)[1]
    flat = value.reshape(rows, -1)
    try:
        return row_groups(flat if flat.is_floating_point() else flat.double()).group
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def information(
    t: Tensor,
    x_id: Tensor,
    y_id: Tensor,
    bins: int,
    range_: tuple[float, float] | str,
    wrap: bool,
    correction: str | None,
) -> BinnedInformation:
    """Of checked arguments."""
    groups = row_groups(t, edges_of(t, bins, range_), wrap=wrap)
    x_id, y_id = x_id.to(t.device), y_id.to(t.device)
    of_t = entropy(groups.counts, correction)

    def shared(ids: Tensor) -> float:
        # H(T) + H(A) - H(T, A) = H(T) - H(T | A), which is exact where A determines T.
        own = entropy(ids.bincount(), correction)
        return of_t + own - entropy(joint_counts(groups.group, ids), correction)

    return BinnedInformation(
        shared(x_id),
        shared(y_id),
        of_t,
        float((groups.counts == 1).double().mean()),
        groups.below / max(1, t.numel()),
    )
