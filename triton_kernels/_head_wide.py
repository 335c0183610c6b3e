"""Heads with more classes than fit in a tile: three launches forward, four or five backward.

Products over the columns in parts, as for other heads; a pass over whole rows of classes, which
leaves what every sample is multiplied with; then products of these with the columns, by blocks of
classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._attention_plan import Launch
from ._head_blocks import (
    DIAGONAL,
    LOOP,
    PRECISION,
    PRODUCT,
    TILE,
    Blocks,
    Matrices,
    added,
    blocks_of,
    factor,
    features,
    kind_of,
    piece,
    plan_dots,
    plan_fold,
    probabilities,
    rows_of,
    slopes,
)
from ._triton import tl, triton

ROWS = 4  # samples of a pass over rows
OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _forward_rows_kernel(
    parts, parts_u, bias, targets, vectors, p_out, rest_out, u_out, left_out, pieces,
    columns, classes, width, plane, vectors_domain,
    KIND: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """p, 1 - p, u and the factors of some samples of a piece, all (N, C)."""
    domain, first, last, begin, end = piece(pieces, tl.program_id(0))
    row = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.arange(0, BLOCK_C)
    live, there = row < last, number < classes
    mask = live[:, None] & there[None, :]
    at = row.to(tl.int64)[:, None] * classes + number[None, :]
    z = added(parts, row, live, number, there, classes, plane, SPLITS)
    if BIAS:
        z += tl.load(bias + number, mask=there, other=0.0)[None, :]
    p, rest = probabilities(z, number, there, False)
    tl.store(p_out + at, p, mask=mask)
    tl.store(rest_out + at, rest, mask=mask)
    u = z
    if KIND == 2:
        u = added(parts_u, row, live, number, there, classes, plane, SPLITS)
        if BIAS:
            own = vectors + domain.to(tl.int64) * vectors_domain + columns
            own += number.to(tl.int64) * width
            u += tl.load(own, mask=there, other=0.0)[None, :]
        tl.store(u_out + at, u, mask=mask)
    scale = 1.0 / (end - begin).to(tl.float32)
    left = factor(p, rest, u, targets, at, mask, number, scale, KIND, False)
    tl.store(left_out + at, left, mask=mask)


@triton.jit
def _backward_rows_kernel(
    parts, grad, targets, p_in, rest_in, u_in, slope_out, turn_out, left_out, pieces,
    columns, classes, width, plane,
    KIND: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients by the logits and by u, and the factors, of some samples of a piece."""
    domain, first, last, begin, end = piece(pieces, tl.program_id(0))
    row = first + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.arange(0, BLOCK_C)
    live, there = row < last, number < classes
    mask = live[:, None] & there[None, :]
    at = row.to(tl.int64)[:, None] * classes + number[None, :]
    g = added(parts, row, live, number, there, classes, plane, SPLITS)
    if BIAS:
        own = grad + domain.to(tl.int64) * classes * width + columns
        g += tl.load(own + number.to(tl.int64) * width, mask=there, other=0.0)[None, :]
    p = tl.load(p_in + at, mask=mask, other=0.0)
    rest = tl.load(rest_in + at, mask=mask, other=0.0)
    scale = 1.0 / (end - begin).to(tl.float32)
    g = scale * g
    u = g
    if KIND == 2:
        u = tl.load(u_in + at, mask=mask, other=0.0)
    slope, turn = slopes(g, p, rest, u, mask, number, KIND, False)
    tl.store(slope_out + at, slope, mask=mask)
    if KIND == 2:
        tl.store(turn_out + at, turn, mask=mask)
    left = factor(p, rest, u, targets, at, mask, number, scale, KIND, False)
    tl.store(left_out + at, left, mask=mask)


@triton.jit
def _outer_kernel(
    left, x, out, out_bias, pieces, chunks, columns, classes, out_row, bias_row,
    SQUARE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the sum over one chunk of left_n x_n^T, and of left_n for the bias."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    number = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = number < classes
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(tl.load(chunks + chunk), tl.load(chunks + chunk + 1)):
        _, first, last, _, _ = piece(pieces, i)
        row = first + tl.arange(0, BLOCK_N)
        live = row < last
        own = rows_of(left, classes, last, classes, row, live, number)
        tile = features(x, row, live, column, columns)
        if SQUARE:
            tile = tile * tile
        total = tl.dot(tl.trans(own), tile, total, input_precision=PRECISION)
        ones += own
    at = chunk.to(tl.int64) * classes + number
    to = out + at[:, None] * out_row + column[None, :]
    tl.store(to, total, mask=there[:, None] & (column < columns)[None, :])
    if BIAS:
        mask = there & (tl.program_id(1) == 0)
        tl.store(out_bias + at * bias_row, tl.sum(ones, axis=0), mask=mask)


@triton.jit
def _moved_kernel(
    x, left, slope, turn, grad, weight, vectors, to_x, pieces,
    columns, classes, width, vectors_domain,
    KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient by the features."""
    domain, first, last, _, _ = piece(pieces, tl.program_id(0))
    row = first + tl.arange(0, BLOCK_N)
    live = row < last
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad += domain.to(tl.int64) * classes * width
    if KIND == 2:
        vectors += domain.to(tl.int64) * vectors_domain
    by_factor = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    moved = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, classes, BLOCK_C):
        number = start + tl.arange(0, BLOCK_C)
        there = number < classes
        own = rows_of(left, classes, last, classes, row, live, number)
        matrix = rows_of(grad, width, classes, columns, number, there, column)
        by_factor = tl.dot(own, matrix, by_factor, input_precision=PRECISION)
        own = rows_of(slope, classes, last, classes, row, live, number)
        matrix = rows_of(weight, columns, classes, columns, number, there, column)
        moved = tl.dot(own, matrix, moved, input_precision=PRECISION)
        if KIND == 2:
            own = rows_of(turn, classes, last, classes, row, live, number)
            matrix = rows_of(vectors, width, classes, columns, number, there, column)
            moved = tl.dot(own, matrix, moved, input_precision=PRECISION)
    if KIND == 1:
        by_factor = 2.0 * by_factor * features(x, row, live, column, columns)
    to = to_x + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(to, moved + by_factor, mask=live[:, None] & (column < columns)[None, :])


# ---- plans ---------------------------------------------------------------------------------------


def _rows_grid(blocks: Blocks) -> tuple[int, int]:
    return blocks.tables.pieces.shape[0], triton.cdiv(blocks.rows, ROWS)


def _plan_outer(
    blocks: Blocks,
    left: torch.Tensor,
    x: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor | None],
    chunks: torch.Tensor,
    bias: bool,
    square: bool,
) -> Launch:
    """``out``: matrices of all chunks and their bias; both apart, or (None) in one of width D."""
    columns, classes = x.shape[1], left.shape[1]
    width = columns + bias
    matrix, column = out
    apart = column is not None or not bias
    arguments = {
        "left": left,
        "x": x,
        "out": matrix,
        "out_bias": column if apart else matrix.flatten()[columns:],
        "pieces": blocks.tables.pieces,
        "chunks": chunks,
        "columns": columns,
        "classes": classes,
        "out_row": columns if apart else width,
        "bias_row": 1 if apart else width,
        "SQUARE": square,
        "BIAS": bias,
        "PRECISION": PRECISION,
        "BLOCK_N": blocks.rows,
        "BLOCK_C": TILE,
        "BLOCK_D": TILE,
    }
    across = max(1, triton.cdiv(columns, TILE))
    grid = (chunks.shape[0] - 1, across, triton.cdiv(classes, TILE))
    return Launch(_outer_kernel, grid, arguments, OPTIONS)


def plan_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    vectors: torch.Tensor | None,
    offsets: Sequence[int],
) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """As that of ``head_curvature``."""
    (samples, columns), classes, domains = x.shape, weight.shape[0], len(offsets) - 1
    width, kind = columns + (bias is not None), kind_of(targets, vectors)
    blocks = blocks_of(kind, samples, columns, classes, tuple(offsets), x.device)
    tables = blocks.tables
    apart = 0 if vectors is None or vectors.shape[0] == 1 else classes * width
    second = None if vectors is None else Matrices(vectors, width, apart)
    parts, parts_u, dots = plan_dots(
        blocks, x, classes, Matrices(weight, columns, 0), second, square=False
    )
    out = x.new_empty((domains, classes, width))
    p, rest, left = (x.new_empty((samples, classes)) for _ in range(3))
    u = x.new_empty((samples if kind == PRODUCT else 0, classes))
    arguments = {
        "parts": parts,
        "parts_u": parts_u,
        "bias": bias,
        "targets": targets,
        "vectors": vectors,
        "p_out": p,
        "rest_out": rest,
        "u_out": u,
        "left_out": left,
        "pieces": tables.pieces,
        "columns": columns,
        "classes": classes,
        "width": width,
        "plane": samples * classes,
        "vectors_domain": apart,
        "KIND": kind,
        "BIAS": bias is not None,
        "SPLITS": blocks.splits,
        "BLOCK_N": ROWS,
        "BLOCK_C": blocks.classes,
    }
    rows = Launch(_forward_rows_kernel, _rows_grid(blocks), arguments, OPTIONS)
    chunks = tables.chunks.shape[0] - 1
    partial = out if chunks == domains else x.new_empty((chunks, classes, width))
    outer = _plan_outer(
        blocks, left, x, (partial, None), tables.chunks, bias is not None, kind == DIAGONAL
    )
    launches = [dots, rows, outer]
    if partial is not out:
        launches.append(plan_fold(partial, tables.domains, out, None, columns))
    return (out, p, rest, u), launches


def plan_backward(
    grad: torch.Tensor,
    p: torch.Tensor,
    rest: torch.Tensor,
    u: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    vectors: torch.Tensor | None,
    offsets: Sequence[int],
    results: tuple[torch.Tensor | None, ...],
) -> list[Launch]:
    """The launches that fill the gradients by x, weight, bias and vectors; None: not wanted."""
    (samples, columns), classes = x.shape, weight.shape[0]
    width, kind = columns + (bias is not None), kind_of(targets, vectors)
    blocks = blocks_of(kind, samples, columns, classes, tuple(offsets), x.device)
    tables = blocks.tables
    to_x, to_weight, to_bias, to_vectors = results
    parts, _, dots = plan_dots(
        blocks, x, classes, Matrices(grad, width, classes * width), None, square=kind == DIAGONAL
    )
    slope, left, turn = (x.new_empty((samples, classes)) for _ in range(3))
    shared = {
        "grad": grad,
        "pieces": tables.pieces,
        "columns": columns,
        "classes": classes,
        "width": width,
        "KIND": kind,
    }
    arguments = {
        **shared,
        "parts": parts,
        "targets": targets,
        "p_in": p,
        "rest_in": rest,
        "u_in": u,
        "slope_out": slope,
        "turn_out": turn,
        "left_out": left,
        "plane": samples * classes,
        "BIAS": bias is not None,
        "SPLITS": blocks.splits,
        "BLOCK_N": ROWS,
        "BLOCK_C": blocks.classes,
    }
    launches = [dots, Launch(_backward_rows_kernel, _rows_grid(blocks), arguments, OPTIONS)]
    if to_x is not None:
        apart = 0 if vectors is None or vectors.shape[0] == 1 else classes * width
        arguments = {
            **shared,
            "x": x,
            "left": left,
            "slope": slope,
            "turn": turn,
            "weight": weight,
            "vectors": vectors,
            "to_x": to_x,
            "vectors_domain": apart,
            "PRECISION": PRECISION,
            "BLOCK_N": blocks.rows,
            "BLOCK_C": TILE,
            "BLOCK_D": TILE,
        }
        grid = (tables.pieces.shape[0], triton.cdiv(columns, TILE))
        launches.append(Launch(_moved_kernel, grid, arguments, OPTIONS))

    def summed(factors, out, out_bias, chunks, groups):
        """Sums of the chunks, then, if a group has several, of these."""
        if chunks.shape[0] == groups.shape[0]:
            found = (out, out_bias)
            return [_plan_outer(blocks, factors, x, found, chunks, bias is not None, False)]
        partial = x.new_empty((chunks.shape[0] - 1, classes, width))
        return [
            _plan_outer(blocks, factors, x, (partial, None), chunks, bias is not None, False),
            plan_fold(partial, groups, out, out_bias, columns),
        ]

    few = tables.pieces.shape[0] <= LOOP
    if to_weight is not None:
        chunks = tables.whole if few else tables.chunks
        launches += summed(slope, to_weight, to_bias, chunks, tables.batch)
    if to_vectors is not None:
        one = to_vectors.shape[0] == 1
        chunks = tables.whole if one and few else tables.chunks
        launches += summed(turn, to_vectors, None, chunks, tables.batch if one else tables.domains)
    return launches
