"""Chosen columns of an attention map from the log-sum-exp of its rows; the map is never formed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfuse import _checks


def attention_columns(
    query: Tensor,
    key: Tensor,
    columns: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Columns of softmax(scale q k^T + mask): exp(scale q k_c + mask_c - lse).

    Args:
        query: (B, H, N, D).
        key: (1 or B, Hk, M, D), Hk a divisor of H.
        columns: (n,) integer, keys wanted, in [0, M).
        lse: (B, H, N) from ``attend_with_lse`` on the same query, key, scale and mask.
        scale: None is 1/sqrt(D).
        mask: bool (True = may attend) or additive, broadcastable to (B, H, N, M); or None.

    Returns:
        (B, H, N, n) in float32 (float64 for float64). Rows that attend to nothing are zero.

    Raises:
        ValueError, TypeError: Parts that do not fit.

    Notes:
        O(B H N n D) operations, O(B H N n) memory. Differentiable.

    Example:
        >>> from transfuse.ops import KV, attend_with_lse
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
        >>> lse = attend_with_lse(q, KV(k, v)).lse
        >>> columns = attention_columns(q, k, torch.tensor([3, 0]), lse)
        >>> full = (q @ k.mT / 2).softmax(-1)
        >>> torch.allclose(columns, full[..., [3, 0]], atol=1e-6)
        True
    """
    _checks.tensor("query", query, ("B", "H", "N", "D"))
    _checks.tensor("key", key, ("B", "Hk", "M", "D"))
    _checks.tensor("lse", lse, ("B", "H", "N"))
    _checks.tensor("columns", columns, ("n",))
    batch, heads, rows, width = query.shape
    own_heads, keys = key.shape[1], key.shape[2]
    columns = _checks.index_map(
        "columns", columns, columns.shape[0], keys, "one key each", "query", query
    )
    if tuple(lse.shape) != (batch, heads, rows):
        raise ValueError(f"lse: expected {(batch, heads, rows)} (B, H, N), got {tuple(lse.shape)}")
    if own_heads == 0 or heads % own_heads or key.shape[3] != width:
        raise ValueError(
            f"key: expected a head count that divides {heads} and width {width}, "
            f"got {tuple(key.shape)}"
        )
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    chosen = key.index_select(2, columns).to(work).repeat_interleave(heads // own_heads, dim=1)
    factor = 1.0 / math.sqrt(width) if scale is None else _checks.number("scale", scale)
    logits = factor * (query.to(work) @ chosen.mT)
    if mask is not None:
        full = _checks.broadcast("mask", mask, (batch, heads, rows, keys), ("B", "H", "N", "M"))
        part = full if full.shape[3] == 1 else full.index_select(3, columns)
        if part.is_floating_point():
            logits = logits + part.to(work)
        else:
            logits = logits.masked_fill(~part.bool(), -torch.inf)
    # A row that attends to nothing has lse = -inf; -inf - -inf would be NaN.
    lse = lse.to(work)[..., None]
    return (logits - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
