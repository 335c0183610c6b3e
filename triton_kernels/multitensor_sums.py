"""Norms of lists of tensors and inner products of many on GPUs, in Triton.

As in ``multitensor``, one program owns a chunk of one tensor, found in a table; what chunks give is
added in order. No atomics, so results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton
from .multitensor import BLOCK, addresses, chunk_of, chunk_table, one_dtype

ROWS = 8  # lists whose products with all others one program makes
PRODUCTS = 2**24  # numbers in the Gram matrices of all chunks
OPTIONS = {"num_warps": 8, "num_stages": 2}


@triton.jit
def _norm_kernel(
    chunks, tensors, factors, partial, like, factor_like,
    ORDER: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squares (ORDER 2) or magnitudes (1) of one chunk, or its largest magnitude (0), where NaN
    stays. In float64: squares of what float32 holds neither overflow nor vanish."""
    number = tl.program_id(0).to(tl.int64)
    block, begin, count = chunk_of(chunks, number)
    at = tl.arange(0, BLOCK)
    data = tl.load(tensors + block).to(tl.pointer_type(like.dtype.element_ty))
    x = tl.load(data + begin + at, mask=at < count, other=0.0).to(tl.float64)
    if SCALED:
        data = tl.load(factors + block).to(tl.pointer_type(factor_like.dtype.element_ty))
        x = x * tl.load(data + begin + at, mask=at < count, other=0.0).to(tl.float64)
    if ORDER == 2:
        found = tl.sum(x * x, 0)
    elif ORDER == 1:
        found = tl.sum(tl.abs(x), 0)
    else:
        strange = tl.sum((x != x).to(tl.int32), 0)
        found = tl.max(tl.where(x != x, 0.0, tl.abs(x)), 0)
        found = tl.where(strange > 0, float("nan"), found)
    tl.store(partial + number, found)


@triton.jit
def _gram_kernel(
    chunks, tensors, partial, lists, blocks, like,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of some lists with themselves and with later ones, (chunk, list, list): sums over
    ``BLOCK`` elements in float32, of those in float64. The address of an absent tensor is 0."""
    number = tl.program_id(0).to(tl.int64)
    block, begin, count = chunk_of(chunks, number)
    first = tl.program_id(1) * ROWS
    row, column = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    own = tl.load(tensors + row * blocks + block, mask=row < lists, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < count
        rows = own.to(tl.pointer_type(like.dtype.element_ty))[:, None] + (begin + at)[None, :]
        mask = (own != 0)[:, None] & live[None, :]
        x = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        for other in range(first, lists):
            address = tl.load(tensors + other * blocks + block)
            data = address.to(tl.pointer_type(like.dtype.element_ty)) + begin + at
            y = tl.load(data, mask=live & (address != 0), other=0.0).to(tl.float32)
            sums = tl.sum(x * y[None, :], 1).to(tl.float64)
            total += tl.where(column[None, :] == other, sums[:, None], 0.0)
    to = partial + (number * lists + row[:, None]) * lists + column[None, :]
    tl.store(to, total, mask=(row < lists)[:, None] & (column < lists)[None, :])


def plan_norm(
    chunks: torch.Tensor,
    tensors: torch.Tensor,
    factors: torch.Tensor | None,
    partial: torch.Tensor,
    like: torch.Tensor,
    factor_like: torch.Tensor | None,
    order: int,
) -> Launch:
    """The launch that fills ``partial`` (n,) float64 of ``chunks`` (n, 3).

    Args:
        tensors, factors: addresses (m,).
        like, factor_like: any tensors of their dtypes.
    """
    arguments = {
        "chunks": chunks,
        "tensors": tensors,
        "factors": factors,
        "partial": partial,
        "like": like,
        "factor_like": factor_like,
        "ORDER": order,
        "SCALED": factors is not None,
        "BLOCK": BLOCK,
    }
    return Launch(_norm_kernel, (chunks.shape[0],), arguments, OPTIONS)


def plan_gram(
    chunks: torch.Tensor, tensors: torch.Tensor, partial: torch.Tensor, like: torch.Tensor
) -> Launch:
    """The launch that fills ``partial`` (n, T, T) float64, on and above the diagonal at least, of
    ``tensors`` (T, m), addresses or 0."""
    lists, blocks = tensors.shape
    rows = min(ROWS, triton.next_power_of_2(lists))
    arguments = {
        "chunks": chunks,
        "tensors": tensors,
        "partial": partial,
        "lists": lists,
        "blocks": blocks,
        "like": like,
        "ROWS": rows,
        "COLUMNS": triton.next_power_of_2(lists),
        # What a program holds: as many numbers whatever the lists.
        "BLOCK": BLOCK * ROWS // rows // 2,
    }
    grid = (chunks.shape[0], triton.cdiv(lists, rows))
    return Launch(_gram_kernel, grid, arguments, OPTIONS)


def multi_norm(
    tensors: Sequence[torch.Tensor], scale: Sequence[torch.Tensor], order: int
) -> torch.Tensor:
    """The sum of squares (order 2) or of magnitudes (1), or the largest (0), of all elements, of
    their products with ``scale`` if there are any; 0-dimensional, float64."""
    device = tensors[0].device
    own, factors = one_dtype(tensors), one_dtype(scale)
    table, _ = chunk_table([t.numel() for t in own])
    partial = torch.zeros(max(1, table.shape[0]), dtype=torch.float64, device=device)
    if table.shape[0] > 0:
        by = addresses(factors, device) if factors else None
        like = factors[0] if factors else None
        run(
            [plan_norm(table.to(device), addresses(own, device), by, partial, own[0], like, order)],
            device,
        )
    return partial.amax() if order == 0 else partial.sum()


def multi_gram(tensors: Sequence[torch.Tensor], lists: int, sizes: Sequence[int]) -> torch.Tensor:
    """(T, T) float64, as the C++ op ``transfuse::multi_gram``: of T m tensors, of which absent ones
    are empty."""
    device, own = tensors[0].device, one_dtype(tensors)
    most, per_chunk = BLOCK, lists * lists
    while sum(sizes) // most * per_chunk > PRODUCTS:
        most *= 2
    table, _ = chunk_table(sizes, most)
    if table.shape[0] == 0:
        return torch.zeros((lists, lists), dtype=torch.float64, device=device)
    at = torch.tensor([t.data_ptr() if t.numel() > 0 else 0 for t in own], dtype=torch.int64)
    partial = torch.empty((table.shape[0], lists, lists), dtype=torch.float64, device=device)
    run([plan_gram(table.to(device), at.reshape(lists, -1).to(device), partial, own[0])], device)
    upper = torch.triu(partial.sum(0))
    return upper + torch.triu(upper, 1).mT
