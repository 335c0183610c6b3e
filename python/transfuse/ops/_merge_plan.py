"""Merge plans: which tokens become one, in a form that merging and unmerging read directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

__all__ = ["MergePlan", "Roles", "compose_plans", "identity_plan", "plan_composed", "segments_of"]


# (x, reference, mask of the reference) -> (similarity, index)
Search = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class MergePlan(NamedTuple):
    """Which tokens become one; made by ``match_tokens``, used by ``merge_tokens`` and the others.

    Integer tensors on the device of the metric. A plan of batch size 1 serves any batch.

    Args:
        rows: (B, N), the row of the merged tensor that holds each token.
        order: (B, N), tokens row by row: first the one that gave the row its place (an unmerged
            source, a destination or a protected token), then those merged into it, ascending.
        start: (B, R + 1), where each of the R rows begins in ``order``; the last entry is N.

    Notes:
        Rows come in this order, each part in ascending token number: protected tokens, sources that
        were not merged, destinations.
    """

    rows: Tensor
    order: Tensor
    start: Tensor

    @property
    def token_count(self) -> int:
        """N, the number of tokens before merging."""
        return tokens_of(self)

    @property
    def row_count(self) -> int:
        """R, the number of tokens after merging."""
        return rows_of(self)

    @property
    def survivors(self) -> Tensor:
        """(B, R): the token that gave each row its place."""
        return survivors_of(self)

    @property
    def sizes(self) -> Tensor:
        """(B, R): how many tokens each row holds."""
        return self.start.diff(dim=1)


# The same as functions, for calls that are compiled: torch 2.10's compiler does not know properties
# of a named tuple that it saw being made.
def tokens_of(plan: MergePlan) -> int:
    return plan.rows.shape[1]


def rows_of(plan: MergePlan) -> int:
    return plan.start.shape[1] - 1


def survivors_of(plan: MergePlan) -> Tensor:
    return plan.order.gather(1, plan.start[:, :-1])


class Roles(NamedTuple):
    """How a call divides the tokens, before any similarity is known.

    Args:
        destination: (D,) token numbers, or None for every odd token.
        protect: Protected tokens, ascending.
        limit: How many sources may be merged at most.
    """

    destination: Tensor | None
    protect: tuple[int, ...]
    limit: int


def segments_of(rows: Tensor, last: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``start`` of a plan.

    Args:
        rows: (B, N) row of each token.
        last: (B, N) bool, tokens that come after the others of their row.
        count: Number of rows.
    """
    order = (2 * rows + last.to(rows.dtype)).argsort(dim=1, stable=True)
    sizes = torch.zeros((rows.shape[0], count), dtype=rows.dtype, device=rows.device)
    sizes = sizes.scatter_add(1, rows, torch.ones_like(rows))
    start = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    return order, start


def identity_plan(batch: int, tokens: int, device: torch.device) -> MergePlan:
    """The plan that merges nothing and keeps every token where it is."""
    rows = torch.arange(tokens, device=device).expand(batch, tokens)
    start = torch.arange(tokens + 1, device=device).expand(batch, tokens + 1)
    return MergePlan(rows, rows, start)


def plan_composed(metric: Tensor, roles: Roles, merged: int, search: Search) -> MergePlan:
    """The plan of ``match_tokens`` in eager torch, from the neighbours that ``search`` finds.

    ``merged`` is within ``roles.limit``.
    """
    batch, tokens = metric.shape[0], metric.shape[1]
    device = metric.device
    if roles.destination is None:
        destination = torch.arange(1, tokens, 2, device=device)
    else:
        destination = roles.destination.sort().values
    protect = torch.tensor(roles.protect, dtype=torch.int64, device=device)
    # 1: source, 2: destination, 0: protected, whatever it is besides.
    plain = torch.ones(tokens, dtype=torch.int64, device=device).index_fill(0, destination, 2)
    group = plain.index_fill(0, protect, 0)
    source = (plain == 2).to(torch.int64).argsort(stable=True)[: tokens - destination.shape[0]]

    found = search(
        metric.index_select(1, source),
        metric.index_select(1, destination),
        (group == 2).index_select(0, destination)[None],
    )
    # NaN is merged last, and a protected source not at all.
    similarity = found[0].nan_to_num(nan=torch.finfo(found[0].dtype).min)
    similarity = similarity.masked_fill((group == 0).index_select(0, source)[None], -torch.inf)
    chosen = similarity.sort(dim=1, descending=True, stable=True).indices[:, :merged]
    leaving = source[chosen]
    target = destination[found[1].gather(1, chosen)]

    gone = torch.zeros((batch, tokens), dtype=torch.bool, device=device)
    gone = gone.scatter(1, leaving, True)
    count = tokens - merged
    survivors = (group + 3 * gone.to(torch.int64)).argsort(dim=1, stable=True)[:, :count]
    numbers = torch.arange(count, device=device).expand(batch, count)
    rows = torch.zeros((batch, tokens), dtype=torch.int64, device=device)
    rows = rows.scatter(1, survivors, numbers)
    rows = rows.scatter(1, leaving, rows.gather(1, target))
    return MergePlan(rows, *segments_of(rows, gone, count))


def compose_plans(first: MergePlan, second: MergePlan) -> MergePlan:
    """One plan for two merges, one after the other.

    Args:
        first: the plan applied first; N tokens become R.
        second: a plan for R tokens.

    Returns:
        A plan for N tokens. ``sum``, ``amax`` and ``prune`` by it equal the two merges in a row;
        ``mean`` is the mean over all tokens of a row, as two merges with ``weight`` give it, where
        a mean of means would weigh small groups more. Unmerging by it undoes both.

    Raises:
        TypeError, ValueError: something that is not a plan, or plans that do not fit.

    Example:
        >>> import torch
        >>> from transfuse.ops import compose_plans, match_tokens, merge_tokens
        >>> x = torch.randn(1, 16, 8)
        >>> first = match_tokens(x, 6)
        >>> y = merge_tokens(x, first, mode="sum")
        >>> second = match_tokens(y, 3)
        >>> both = merge_tokens(x, compose_plans(first, second), mode="sum")
        >>> torch.allclose(both, merge_tokens(y, second, mode="sum"), atol=1e-5)
        True
    """
    for name, plan in (("first", first), ("second", second)):
        if not isinstance(plan, MergePlan):
            raise TypeError(f"{name}: expected a MergePlan, got {_checks.describe(plan)}")
    if tokens_of(second) != rows_of(first):
        raise ValueError(
            f"second: expected a plan for {rows_of(first)} tokens (the rows of first), "
            f"got one for {tokens_of(second)}"
        )
    batch = max(first.rows.shape[0], second.rows.shape[0])
    for name, plan in (("first", first), ("second", second)):
        if plan.rows.shape[0] not in (1, batch):
            raise ValueError(f"{name}: expected batch {batch} or 1, got {plan.rows.shape[0]}")
    first, second = (MergePlan(*(t.expand(batch, -1) for t in plan)) for plan in (first, second))
    rows = second.rows.gather(1, first.rows)
    survivors = survivors_of(first).gather(1, survivors_of(second))
    last = torch.ones_like(rows, dtype=torch.bool).scatter(1, survivors, False)
    return MergePlan(rows, *segments_of(rows, last, rows_of(second)))
