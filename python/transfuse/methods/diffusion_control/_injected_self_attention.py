"""Self-attention and features mixed with those of a source: the formulas of ``diff_styler``."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.methods._attention_layers import masked_source
from transfuse.ops import KV, Blend, attend


def check_rate(rate: object) -> float:
    """A share of the source, in [0, 1]."""
    value = _checks.number("rate", rate)
    if not 0 <= value <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate!r}")
    return value


def _source_rows(name: str, rows: int, n_source: int) -> None:
    _checks.positive_int("n_source", n_source)
    if rows % n_source or rows == 0:
        raise ValueError(
            f"{name}: expected a batch that is a multiple of the {n_source} source rows, got {rows}"
        )


def injected_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rate: float,
    n_source: int | None = None,
    source: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention in which queries and keys, and not values, are mixed with a source's.

    q_j <- rate q_src + (1 - rate) q_j, k_j likewise; out_j = softmax(scale q_j k_j^T) v_j. Row j of
    the batch belongs to source row j mod n.

    Args:
        query: (B, H, N, D); any norm of queries and keys is applied before.
        key: (B, H, N, D).
        value: (B, H, N, Dv).
        rate: rho in [0, 1]; 0 is plain attention, 1 gives all rows of one source the same map.
        n_source: n, when the first n rows of the batch are the source; they stay as they are.
        source: (query, key) (n, H, N, D) of a source outside the batch, instead of ``n_source``.
        mask: bool (True = may attend) or additive, broadcastable to (B, H, N, N); or None.
        scale: Logit scale; None is 1/sqrt(D).
        backend: Backend of ``transfuse.ops.attend``.

    Returns:
        (B, H, N, Dv). Gradients reach the rows' own queries, keys and values, not the source.

    Raises:
        ValueError, TypeError: Not exactly one kind of source, a batch that is no multiple of n, a
            rate out of range, or shapes that do not fit.

    Notes:
        One call of ``attend``: both blends happen in the kernel through an index map; nothing is
        repeated or changed in place.

    Example:
        >>> q, k, v = torch.randn(3, 3, 2, 6, 4).unbind()
        >>> injected_self_attention(q, k, v, rate=0.6, n_source=1).shape
        torch.Size([3, 2, 6, 4])
    """
    rate = check_rate(rate)
    if (n_source is None) == (source is None):
        raise ValueError("n_source and source: expected exactly one of them")
    _checks.tensor("query", query, ("B", "H", "N", "D"))
    rows = query.shape[0]
    weight: float | Tensor = rate
    if source is None:
        count = 0 if n_source is None else n_source
        _source_rows("query", rows, count)
        other_query, other_key = query[:count], key[:count]
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        weight = torch.full((rows, 1, 1), rate, dtype=work, device=query.device)
        weight[:count] = 0.0
    else:
        other_query, other_key = source
        count = other_query.shape[0]
        _source_rows("query", rows, count)
    plain = masked_source(key, value, mask)
    if rate == 0.0:
        return attend(query, plain, scale=scale, backend=backend)
    index = torch.arange(rows, device=query.device) % count
    keys = KV(
        key,
        value,
        bias=plain.bias,
        mask=plain.mask,
        blend=Blend(other_key.detach(), weight, index),
    )
    blend = Blend(other_query.detach(), weight, index)
    return attend(query, keys, blend=blend, scale=scale, backend=backend)


def inject_features(
    hidden: Tensor, *, n_source: int | None = None, source: Tensor | None = None
) -> Tensor:
    """The source's features in every row: of the batch's first n rows, or of a source outside it.

    Args:
        hidden: (B, ...) residual-branch output, before the shortcut is added.
        n_source: n, when the first n rows are the source.
        source: (n, ...), instead.

    Returns:
        A new tensor of the shape of ``hidden``; the rows that were replaced carry no gradient.

    Raises:
        ValueError: Not exactly one kind of source, or a batch that is no multiple of n.

    Example:
        >>> inject_features(torch.arange(3.0)[:, None], n_source=1).flatten()
        tensor([0., 0., 0.])
    """
    if (n_source is None) == (source is None):
        raise ValueError("n_source and source: expected exactly one of them")
    own = hidden[:0]
    if source is None:
        count = 0 if n_source is None else n_source
        _source_rows("hidden", hidden.shape[0], count)
        own = hidden[:count]
        source = own
    count = source.shape[0]
    _source_rows("hidden", hidden.shape[0], count)
    if source.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"source: expected {tuple(hidden.shape[1:])} after the batch, "
            f"got {tuple(source.shape[1:])}"
        )
    times = (hidden.shape[0] - own.shape[0]) // count
    repeated = source.detach().to(hidden).repeat(times, *[1] * (hidden.ndim - 1))
    return torch.cat([own, repeated])
