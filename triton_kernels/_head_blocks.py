"""What the head curvature kernels share: the arithmetic of a sample, products over the columns, and
how a batch is cut into pieces. See ``csrc/cpu/head_curvature.cpp`` for the arithmetic."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from ._attention_plan import Launch
from ._triton import tl, triton

PRECISION = "ieee"  # 1 - p and small differences of slopes would not survive TF32
GRADIENT, DIAGONAL, PRODUCT = 0, 1, 2
PROGRAMS = 512  # of a launch: about how many keep a GPU busy
LOOP = 16  # pieces that one program goes through rather than leaving sums to be added
COLUMNS = 64  # of a step over the columns
# Columns, and classes of a block, in a tile of results: products in float32 hold whole rows and
# columns of what they multiply in registers.
TILE = 32
OPTIONS = {"num_warps": 4, "num_stages": 2}


# ---- one block of samples ------------------------------------------------------------------------


@triton.jit
def added(parts, row, live, column, there, classes, plane, SPLITS: tl.constexpr):
    """The sum of parts (SPLITS, N, C) of ``plane`` numbers each, a tile of samples x classes, 0
    where nothing is."""
    mask = live[:, None] & there[None, :]
    at = parts + row.to(tl.int64)[:, None] * classes + column[None, :]
    total = tl.load(at, mask=mask, other=0.0)
    for _ in tl.static_range(SPLITS - 1):
        at += plane
        total += tl.load(at, mask=mask, other=0.0)
    return total


@triton.jit
def probabilities(z, column, there, BINARY: tl.constexpr):
    """p and 1 - p, both with all their digits: 1 - p of the largest is the sum of the others."""
    if BINARY:
        small = tl.exp(-tl.abs(z))
        total = 1.0 + small
        p = tl.where(z >= 0, 1.0, small) / total
        rest = tl.where(z >= 0, small, 1.0) / total
    else:
        z = tl.where(there[None, :], z, -float("inf"))
        top = column[None, :] == tl.argmax(z, axis=1)[:, None]
        peak = tl.sum(tl.where(top, z, 0.0), axis=1)
        power = tl.exp(z - peak[:, None])
        others = tl.sum(tl.where(top, 0.0, power), axis=1)[:, None]
        total = others + tl.sum(tl.where(top, power, 0.0), axis=1)[:, None]
        p = power / total
        rest = tl.where(top, others, total - power) / total
    return p, rest


@triton.jit
def jacobian(p, rest, g, column, BINARY: tl.constexpr):
    """J g = p * (g - p.g) with all its digits where p is near 1, and p.g."""
    if BINARY:
        along = tl.sum(p * g, axis=1)[:, None]
        result = p * rest * g
    else:
        top = column[None, :] == tl.argmax(p, axis=1)[:, None]
        each = p * g
        others = tl.sum(tl.where(top, 0.0, each), axis=1)[:, None]
        along = others + tl.sum(tl.where(top, each, 0.0), axis=1)[:, None]
        result = p * tl.where(top, g * rest - others, g - along)
    return result, along


@triton.jit
def factor(p, rest, u, targets, at, mask, column, scale, KIND: tl.constexpr, BINARY: tl.constexpr):
    """What a sample is multiplied with: (p - y) / n, p (1 - p) / n or J u / n."""
    if KIND == 0:
        left = p - tl.load(targets + at, mask=mask, other=0.0)
    elif KIND == 1:
        left = p * rest
    else:
        left, _ = jacobian(p, rest, u, column, BINARY)
    return tl.where(mask, scale * left, 0.0)


@triton.jit
def slopes(g, p, rest, u, mask, column, KIND: tl.constexpr, BINARY: tl.constexpr):
    """Gradients by the logits and by u, of g, the gradient by what a sample is multiplied with."""
    turn = g
    if KIND == 1:
        g = g * (rest - p)
    if KIND == 2:
        # By p: g * (u - p.u) - u * p.g.
        mean = tl.sum(p * u, axis=1)[:, None]
        turn, along = jacobian(p, rest, g, column, BINARY)
        g = g * (u - mean) - u * along
    slope, _ = jacobian(p, rest, g, column, BINARY)
    return tl.where(mask, slope, 0.0), tl.where(mask, turn, 0.0)


@triton.jit
def features(x, row, live, column, columns):
    """A tile of samples x columns, 0 where nothing is."""
    at = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(at, mask=live[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def rows_of(matrix, stride, classes, columns, number, there, column):
    """A tile of classes x columns of a matrix with rows of ``stride`` numbers."""
    at = matrix + number.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(at, mask=there[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def piece(pieces, number):
    """Domain, first and last sample of a piece, and where its domain begins and ends."""
    at = pieces + 5 * number
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)


# ---- shared launches ----------------------------------------------------------------------------


@triton.jit
def dots_kernel(
    x, one, two, parts_one, parts_two, pieces,
    samples, columns, classes, stretch, one_row, one_domain, two_row, two_domain,
    TWO: tl.constexpr, SQUARE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of a piece's samples (squared) with the rows of its domain's matrices, over one
    stretch of the columns: parts (splits, N, C)."""
    domain, first, last, _, _ = piece(pieces, tl.program_id(0))
    row, number = first + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live, there = row < last, number < classes
    begin = tl.program_id(2) * stretch
    end = tl.minimum(begin + stretch, columns)
    one += domain.to(tl.int64) * one_domain
    if TWO:
        two += domain.to(tl.int64) * two_domain
    first_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    second_sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        tile = features(x, row, live, column, columns)
        if SQUARE:
            tile = tile * tile
        matrix = rows_of(one, one_row, classes, columns, number, there, column)
        first_sum = tl.dot(tile, tl.trans(matrix), first_sum, input_precision=PRECISION)
        if TWO:
            matrix = rows_of(two, two_row, classes, columns, number, there, column)
            second_sum = tl.dot(tile, tl.trans(matrix), second_sum, input_precision=PRECISION)
    at = (tl.program_id(2).to(tl.int64) * samples + row)[:, None] * classes + number[None, :]
    mask = live[:, None] & there[None, :]
    tl.store(parts_one + at, first_sum, mask=mask)
    if TWO:
        tl.store(parts_two + at, second_sum, mask=mask)


@triton.jit
def fold_kernel(
    partial, starts, out, out_bias, columns, classes, width,
    JOINED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the sum of the chunks of a group, in order: to ``out`` (groups, C, D), or (not
    JOINED, one group) to (C, d) and to ``out_bias``."""
    group, number = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], tl.float32)
    stop = tl.load(starts + group + 1)
    for start in range(tl.load(starts + group), stop, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (part.to(tl.int64) * classes + number)[:, None] * width + column[None, :]
        mask = (part < stop)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
    if JOINED:
        to = out + (group.to(tl.int64) * classes + number) * width + column
        tl.store(to, total, mask=inside)
    else:
        to = out + number.to(tl.int64) * columns + column
        tl.store(to, total, mask=column < columns)
        if out_bias is not None:
            tl.store(out_bias + number + column * 0, total, mask=column == columns)


# ---- plans ---------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Of the samples: ``pieces`` (P, 5), see :func:`piece`; where the pieces of each chunk begin
    (K + 1), and the chunks of each domain (E + 1), as of the batch (2)."""

    pieces: torch.Tensor
    chunks: torch.Tensor
    domains: torch.Tensor
    batch: torch.Tensor
    whole: torch.Tensor  # the pieces of the batch as one chunk


@functools.lru_cache(maxsize=64)
def _made(offsets: tuple[int, ...], rows: int, most: int, device: torch.device) -> Tables:
    pieces: list[tuple[int, ...]] = []
    chunks: list[int] = []
    domains = [0]
    for domain, (begin, end) in enumerate(itertools.pairwise(offsets)):
        for start in range(begin, end, most):
            chunks.append(len(pieces))
            stop = min(start + most, end)
            pieces += [
                (domain, first, min(first + rows, stop), begin, end)
                for first in range(start, stop, rows)
            ]
        domains.append(len(chunks))
    chunks.append(len(pieces))
    lists = (pieces, chunks, domains, [0, len(chunks) - 1], [0, len(pieces)])
    return Tables(*(torch.tensor(entries, dtype=torch.int32).to(device) for entries in lists))


_CAPTURED: dict[object, Tables] = {}


def tables_of(offsets: tuple[int, ...], rows: int, most: int, device: torch.device) -> Tables:
    """Tables on the device, kept from call to call: making them waits for it."""
    key = (offsets, rows, most, device)
    found = _made(*key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[key] = found  # a graph has their addresses for good
    elif device.type == "cuda":
        # Another stream than that which made them may be at work on them when they are let go.
        for table in found:
            table.record_stream(torch.cuda.current_stream(device))
    return found


class Blocks(NamedTuple):
    """Sizes of tiles, the parts of the columns, and the tables."""

    rows: int
    classes: int
    splits: int
    tables: Tables


def blocks_of(
    kind: int,
    samples: int,
    columns: int,
    classes: int,
    offsets: tuple[int, ...],
    device: torch.device,
) -> Blocks:
    """``kind``: as of :func:`kind_of`."""
    width = max(16, triton.next_power_of_2(classes))
    many = samples >= 4096 and classes <= 16 and kind != PRODUCT
    rows = 32 if many else 16
    across = max(1, triton.cdiv(columns, TILE))
    most = max(
        LOOP * rows, triton.cdiv(triton.cdiv(samples, max(1, PROGRAMS // across)), rows) * rows
    )
    tables = tables_of(offsets, rows, most, device)
    programs = tables.pieces.shape[0] * triton.cdiv(width, TILE)
    wanted = min(
        16,
        max(1, 16384 // (rows * width)),
        triton.cdiv(columns, 2 * COLUMNS),
        triton.cdiv(PROGRAMS // 2, programs),
    )
    splits = 1 << max(0, wanted.bit_length() - 1)
    return Blocks(rows, width, splits, tables)


class Matrices(NamedTuple):
    """A (C, ...) matrix, or one for each domain: distances of its rows and of the domains'."""

    tensor: torch.Tensor
    row: int
    domain: int


def plan_dots(
    blocks: Blocks,
    x: torch.Tensor,
    classes: int,
    one: Matrices,
    two: Matrices | None,
    square: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Launch]:
    """Parts (splits, N, C) of both products, and the launch that fills them."""
    samples, columns = x.shape
    parts = [
        None if m is None else x.new_empty((blocks.splits, samples, classes)) for m in (one, two)
    ]
    block = min(TILE, blocks.classes)
    second = Matrices(None, 0, 0) if two is None else two
    arguments = {
        "x": x,
        "one": one.tensor,
        "two": second.tensor,
        "parts_one": parts[0],
        "parts_two": parts[1],
        "pieces": blocks.tables.pieces,
        "samples": samples,
        "columns": columns,
        "classes": classes,
        "stretch": triton.cdiv(triton.cdiv(columns, blocks.splits), COLUMNS) * COLUMNS,
        "one_row": one.row,
        "one_domain": one.domain,
        "two_row": second.row,
        "two_domain": second.domain,
        "TWO": two is not None,
        "SQUARE": square,
        "PRECISION": PRECISION,
        "BLOCK_N": blocks.rows,
        "BLOCK_C": block,
        "BLOCK_K": COLUMNS,
    }
    grid = (blocks.tables.pieces.shape[0], triton.cdiv(classes, block), blocks.splits)
    return (*parts, Launch(dots_kernel, grid, arguments, OPTIONS))


def plan_fold(
    partial: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    out_bias: torch.Tensor | None,
    columns: int,
) -> Launch:
    _, classes, width = partial.shape
    joined = out.dim() == 3
    arguments = {
        "partial": partial,
        "starts": starts,
        "out": out,
        "out_bias": out_bias,
        "columns": columns,
        "classes": classes,
        "width": width,
        "JOINED": joined,
        "PARTS": 16,
        "BLOCK": 128,
    }
    grid = (starts.shape[0] - 1, classes, triton.cdiv(width, 128))
    return Launch(fold_kernel, grid, arguments, {"num_warps": 4})


def kind_of(targets: torch.Tensor | None, vectors: torch.Tensor | None) -> int:
    if targets is not None:
        return GRADIENT
    return DIAGONAL if vectors is None else PRODUCT
