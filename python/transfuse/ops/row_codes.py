"""Codes of rows: equal rows have equal codes, so that counting rows is counting numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend, _checks, _native, _triton_ops
from transfuse.ops._row_codes_reference import codes_of

__all__ = ["RowCodes", "RowGroups", "row_codes", "row_groups"]

_backend.declare(
    "row_codes",
    ("reference", "cpu", "triton"),
    dtypes={"triton": (torch.float32, torch.float64, torch.bfloat16, torch.float16)},
)


def _fake(x, edges, wrap):
    return x.new_empty((x.shape[0], 2), dtype=torch.int64), x.new_empty((2,), dtype=torch.int64)


_triton_ops.define(
    "row_codes",
    "row_codes",
    "(Tensor x, Tensor? edges, bool wrap) -> (Tensor, Tensor)",
    recorded=True,
)
torch.library.register_fake("transfuse::row_codes_triton", _fake)
if _native.status().loaded:
    torch.library.register_fake("transfuse::row_codes", _fake)


class RowCodes(NamedTuple):
    """``codes`` (N, 2), int64; ``below``, how many numbers lie below the first edge."""

    codes: Tensor
    below: int


class RowGroups(NamedTuple):
    """Distinct rows: ``group`` (N,), the group of each row; ``counts`` (G,), rows of each group."""

    group: Tensor
    counts: Tensor
    below: int


def row_codes(
    x: Tensor, edges: Tensor | None = None, *, wrap: bool = False, backend: str | None = None
) -> RowCodes:
    """A 128-bit code of every row, of its numbers or of the cells they fall into.

    The cell of a number v is ``(number of edges <= v) - 1``. Numbers from the last edge on have the
    last, ``len(edges) - 1``. Codes of a row are sums over its columns of mixed symbols.

    Args:
        x: (N, u), float32, float64, bfloat16 or float16; any strides. With edges it is compared in
            float32.
        edges: (E,), floating, ascending, E at least 1; None: the numbers themselves, exactly
            (-0 is 0).
        wrap: numbers below the first edge go to the last cell; otherwise to the first.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        :class:`RowCodes`. Every backend gives the same bits.

    Raises:
        TypeError, ValueError: an argument that does not fit, or NaN in x.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        One read of x; 16 bytes per row are kept. Different rows share a code with a chance of about
        2^-128 a pair. Codes are no function to differentiate, and carry no gradient.

    Example:
        >>> import torch
        >>> from transfuse.ops import row_codes
        >>> x = torch.tensor([[0.1, 0.9], [0.2, 0.8]])
        >>> codes = row_codes(x, torch.tensor([0.0, 0.5])).codes
        >>> torch.equal(codes[0], codes[1])
        True
    """
    x = _checks.tensor("x", x, ("N", "u"))
    _checks.floating("x", x)
    if not isinstance(wrap, bool):
        raise TypeError(f"wrap: expected True or False, got {_checks.describe(wrap)}")
    if edges is not None:
        edges = _checks.tensor("edges", edges, ("E",))
        _checks.floating("edges", edges)
        _checks.same_device("edges", edges, "x", x)
        edges = edges.detach().to(torch.float32).contiguous()
        if edges.shape[0] < 1 or not bool((edges[1:] >= edges[:-1]).all() & edges.isfinite().all()):
            raise ValueError("edges: expected at least one, finite and ascending")
    chosen = _triton_ops.traced(_backend.choose("row_codes", backend, x.device, x.dtype))
    if chosen == "cpu":
        codes, counts = torch.ops.transfuse.row_codes(x.detach(), edges, wrap)
    elif chosen == "triton":
        kernel = _triton_ops.kernel("row_codes", "row_codes")
        codes, counts = kernel(x.detach().resolve_neg(), edges, wrap)
    elif chosen == _triton_ops.COMPILED:
        codes, counts = torch.ops.transfuse.row_codes_triton(x.detach(), edges, wrap)
    else:
        codes, counts = codes_of(x.detach(), edges, wrap)
    missing, below = counts.tolist()
    if missing > 0:
        raise ValueError(f"x: expected numbers, got {missing} NaN")
    return RowCodes(codes, below)


def row_groups(
    x: Tensor, edges: Tensor | None = None, *, wrap: bool = False, backend: str | None = None
) -> RowGroups:
    """Which rows are equal, in their numbers or in the cells these fall into.

    Args:
        x, edges, wrap, backend: as :func:`row_codes`.

    Returns:
        :class:`RowGroups`; groups are numbered in the order of their codes.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`row_codes`.

    Notes:
        Rows are sorted by 64 bits of their codes, and by all 128 if two codes share these.

    Example:
        >>> import torch
        >>> from transfuse.ops import row_groups
        >>> row_groups(torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]])).counts.sort().values
        tensor([1, 2])
    """
    codes, below = row_codes(x, edges, wrap=wrap, backend=backend)
    order = codes[:, 0].argsort(stable=True)
    ordered = codes[order]
    fresh = ordered[1:] != ordered[:-1]
    if bool((fresh[:, 1] & ~fresh[:, 0]).any()):
        _, index, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
        return RowGroups(index, counts, below)
    number = torch.zeros_like(order)
    number[1:] = fresh[:, 0].cumsum(0)
    index = torch.empty_like(order)
    index[order] = number
    return RowGroups(index, index.bincount(), below)
