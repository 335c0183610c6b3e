"""Weighted sums of lists of tensors on GPUs, and their coefficient gradients, in Triton.

One program owns a chunk of one tensor, found in a table; tensors of every list are found by tables
of their addresses, so any number of tensors of any sizes is one launch. Sums of products are kept
per chunk and added in order, in float64: no atomics, so results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 2048  # elements of a chunk
FOLD = 256  # sums of a program that adds chunks
PARTIAL = 2**24  # sums of chunks that are held at once
# Ways an element finds its coefficient.
ONE, BYTES, WORDS, HASHED = 0, 1, 2, 3


@triton.jit
def chunk_of(chunks, number):
    """Block, first element and number of elements of a chunk of :func:`chunk_table`."""
    entry = chunks + 3 * number
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _mixed(x):
    """The finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _partition(ids, keys, block, begin, element, live, partitions, MODE: tl.constexpr):
    """Numbers of the coefficients of a chunk's elements; a chunk never crosses 2^32."""
    if MODE == 3:
        key = tl.load(keys + block)
        high = _mixed((begin >> 32).to(tl.uint32) + _mixed((key >> 32).to(tl.uint32)))
        inner = _mixed(key.to(tl.uint32) ^ high)
        bits = _mixed(element.to(tl.uint32) ^ inner)
        # An argument of 1 is a number of Python in compiled code, without methods.
        return (((bits >> 16) * tl.cast(partitions, tl.uint32)) >> 16).to(tl.int32)
    if MODE == 2:
        words = tl.load(ids + block).to(tl.pointer_type(tl.uint16))
        return tl.load(words + element, mask=live, other=0).to(tl.int32)
    octets = tl.load(ids + block).to(tl.pointer_type(tl.uint8))
    return tl.load(octets + element, mask=live, other=0).to(tl.int32)


@triton.jit
def _lincomb_kernel(
    chunks, base, deltas, out, coefficients, ids, keys, lists, blocks, partitions,
    base_like, delta_like,
    HAS_BASE: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one result."""
    block, begin, count = chunk_of(chunks, tl.program_id(0).to(tl.int64))
    at = tl.arange(0, BLOCK)
    live = at < count
    element = begin + at
    if MODE != 0:
        part = _partition(ids, keys, block, begin, element, live, partitions, MODE)
        known = live & (part < partitions)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BASE:
        first = tl.load(base + block).to(tl.pointer_type(base_like.dtype.element_ty))
        total += tl.load(first + element, mask=live, other=0.0).to(tl.float32)
    for i in range(lists):
        row = i * blocks + block
        data = tl.load(deltas + row).to(tl.pointer_type(delta_like.dtype.element_ty))
        x = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
        if MODE == 0:
            total += tl.load(coefficients + row) * x
        else:
            factor = tl.load(coefficients + row * partitions + part, mask=known, other=0.0)
            total += factor * x
    written = tl.load(out + block).to(tl.pointer_type(base_like.dtype.element_ty))
    tl.store(written + element, total.to(base_like.dtype.element_ty), mask=live)


@triton.jit
def _dots_kernel(
    chunks, grads, deltas, partial, ids, keys, lists, blocks, partitions,
    grad_like, delta_like,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of one chunk, (chunk, list, partition)."""
    number = tl.program_id(0).to(tl.int64)
    block, begin, count = chunk_of(chunks, number)
    at = tl.arange(0, BLOCK)
    live = at < count
    element = begin + at
    if MODE != 0:
        part = _partition(ids, keys, block, begin, element, live, partitions, MODE)
    own = tl.load(grads + block).to(tl.pointer_type(grad_like.dtype.element_ty))
    g = tl.load(own + element, mask=live, other=0.0).to(tl.float32)
    for i in range(lists):
        data = tl.load(deltas + i * blocks + block)
        data = data.to(tl.pointer_type(delta_like.dtype.element_ty))
        product = g * tl.load(data + element, mask=live, other=0.0).to(tl.float32)
        to = partial + (number * lists + i) * partitions
        if MODE == 0:
            tl.store(to, tl.sum(product, 0))
        else:
            for q in range(partitions):
                tl.store(to + q, tl.sum(tl.where(live & (part == q), product, 0.0), 0))


@triton.jit
def _fold_kernel(partial, starts, sums, blocks, width, row, BLOCK: tl.constexpr):
    """Adds the chunks of one block in order to sums[list, block, partition]."""
    block = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < width
    to = sums + (at // row * blocks + block) * row + at % row
    total = tl.load(to, mask=live, other=0.0)
    first, last = tl.load(starts + block), tl.load(starts + block + 1)
    for chunk in range(first, last):
        total += tl.load(partial + chunk * width + at, mask=live, other=0.0).to(tl.float64)
    tl.store(to, total, mask=live)


def chunk_table(sizes: Sequence[int], most: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """(chunks, 3): block, first element, number of elements, at most ``most``; and where each
    block's begin."""
    counts = torch.tensor([-(-size // most) for size in sizes], dtype=torch.int64)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    block = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    begin = (torch.arange(int(starts[-1])) - starts[block]) * most
    count = (torch.tensor(sizes, dtype=torch.int64)[block] - begin).clamp_max(most)
    return torch.stack((block, begin, count), 1).contiguous(), starts


def plan_lincomb(
    tables: dict[str, torch.Tensor],
    base_like: torch.Tensor,
    delta_like: torch.Tensor,
    *,
    lists: int,
    mode: int,
    has_base: bool,
) -> list[Launch]:
    """The launch for blocks whose results are of one dtype.

    Args:
        tables: ``chunks`` (n, 3), addresses ``base`` (m), ``deltas`` (T, m), ``out`` (m), ``ids``
            (m), ``keys`` (m), all int64, and ``coefficients`` (T, m, K) float32.
        base_like, delta_like: any tensors of the dtypes of results and lists.
    """
    chunks, table = tables["chunks"], tables["coefficients"]
    arguments = {
        **tables,
        "lists": lists,
        "blocks": table.shape[1],
        "partitions": table.shape[2],
        "base_like": base_like,
        "delta_like": delta_like,
        "HAS_BASE": has_base,
        "MODE": mode,
        "BLOCK": BLOCK,
    }
    options = {"num_warps": 8, "num_stages": 2}
    return [Launch(_lincomb_kernel, (chunks.shape[0],), arguments, options)]


def plan_dots(
    tables: dict[str, torch.Tensor],
    starts: torch.Tensor,
    partial: torch.Tensor,
    sums: torch.Tensor,
    grad_like: torch.Tensor,
    delta_like: torch.Tensor,
    *,
    mode: int,
) -> list[Launch]:
    """Sums of chunks (n, T, K) float32, then those of blocks, added to (T, m, K) float64."""
    lists, blocks, partitions = sums.shape
    arguments = {
        **tables,
        "partial": partial,
        "lists": lists,
        "blocks": blocks,
        "partitions": partitions,
        "grad_like": grad_like,
        "delta_like": delta_like,
        "MODE": mode,
        "BLOCK": BLOCK,
    }
    width = lists * partitions
    fold = {
        "partial": partial,
        "starts": starts,
        "sums": sums,
        "blocks": blocks,
        "width": width,
        "row": partitions,
        "BLOCK": FOLD,
    }
    return [
        Launch(
            _dots_kernel, (tables["chunks"].shape[0],), arguments, {"num_warps": 8, "num_stages": 2}
        ),
        Launch(_fold_kernel, (blocks, triton.cdiv(width, FOLD)), fold, {"num_warps": 4}),
    ]


def addresses(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Where contiguous tensors begin, int64, on the device."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64).to(device)


def one_dtype(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous, and all of one dtype: float32 where they differ."""
    kinds = {t.dtype for t in tensors}
    unknown = kinds - set(DTYPES)
    if unknown:
        raise TypeError(
            "lists of tensors: the triton backend supports float32, float16 and bfloat16, got "
            f"{sorted(map(str, unknown))}"
        )
    if len(kinds) > 1:
        return [t.float().contiguous() for t in tensors]
    return [t.contiguous() for t in tensors]


def _parts(ids: Sequence[torch.Tensor], keys: Sequence[int], device: torch.device):
    """Mode, addresses of ids, keys, and what must stay alive."""
    none = torch.zeros(1, dtype=torch.int64, device=device)
    if ids:
        kept = [t.contiguous() for t in ids]
        mode = WORDS if ids[0].dtype == torch.uint16 else BYTES
        return mode, addresses(kept, device), none, kept
    if keys:
        return HASHED, none, torch.tensor(list(keys), dtype=torch.int64).to(device), []
    return ONE, none, none, []


def lincomb(
    base: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    ids: Sequence[torch.Tensor],
    keys: Sequence[int],
) -> list[torch.Tensor]:
    """As the C++ op ``transfuse::lincomb``."""
    lists, blocks, _ = coefficients.shape
    likes = base if base else deltas[:blocks]
    results = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in likes]
    device = results[0].device
    moved = one_dtype(deltas)
    first = [t.contiguous() for t in base] if base else results
    one_dtype(results)
    mode, id_table, key_table, kept = _parts(ids, keys, device)
    shared = {
        "deltas": addresses(moved, device),
        "out": addresses(results, device),
        "base": addresses(first, device),
        "ids": id_table,
        "keys": key_table,
        "coefficients": coefficients.to(torch.float32).contiguous(),
    }
    table, _ = chunk_table([t.numel() for t in results])
    for dtype in dict.fromkeys(t.dtype for t in results):
        own = torch.tensor([t.dtype == dtype for t in results])
        chunks = table[own[table[:, 0]]].contiguous().to(device)
        if chunks.shape[0] == 0:
            continue
        like = next(t for t in results if t.dtype == dtype)
        launches = plan_lincomb(
            {"chunks": chunks, **shared}, like, moved[0], lists=lists, mode=mode,
            has_base=bool(base),
        )  # fmt: skip
        run(launches, device)
    del kept
    return results


def block_dots(
    grads: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    ids: Sequence[torch.Tensor],
    keys: Sequence[int],
    partitions: int,
) -> torch.Tensor:
    """As the C++ op ``transfuse::block_dots``: (T, m, K) float64."""
    device, blocks = grads[0].device, len(grads)
    lists = len(deltas) // blocks
    left, right = one_dtype(grads), one_dtype(deltas)
    mode, id_table, key_table, kept = _parts(ids, keys, device)
    table, starts = chunk_table([t.numel() for t in left])
    sums = torch.zeros((lists, blocks, partitions), dtype=torch.float64, device=device)
    if table.shape[0] == 0:
        return sums
    tables = {
        "grads": addresses(left, device),
        "deltas": addresses(right, device),
        "ids": id_table,
        "keys": key_table,
    }
    held = max(1, PARTIAL // (lists * partitions))
    for first in range(0, table.shape[0], held):
        chunks = table[first : first + held]
        count = chunks.shape[0]
        partial = torch.empty((count, lists, partitions), dtype=torch.float32, device=device)
        own = (starts - first).clamp(0, count).to(device)
        some = {"chunks": chunks.to(device), **tables}
        run(plan_dots(some, own, partial, sums, left[0], right[0], mode=mode), device)
    del kept
    return sums
