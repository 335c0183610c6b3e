"""Gradient, Hessian diagonal and Hessian-vector product of a linear head on GPUs, in Triton.

Two launches forward, for all domains together: products over the columns in parts (logits, and u =
V x), then one program for each block of columns and stretch of a domain, which adds the parts,
makes the factors of its samples and multiplies them with its columns. Two launches backward in the
same way, one more where a batch is cut into several stretches, whose sums are then added in order.
That needs all classes of a sample in one tile; heads with more have the kernels of ``_head_wide``.
No atomics, so results do not vary. Products are IEEE float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _head_wide
from ._attention_plan import Launch, run
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

CLASSES_ONE_TILE = 32  # beyond, the kernels of _head_wide run
CLASSES_MOST = 1024
COLUMNS_MOST = 65534 * TILE  # a grid has 65535 programs along its second axis


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    parts, parts_u, x, bias, targets, vectors, p_out, rest_out, u_out, out, pieces, chunks,
    columns, classes, width, plane, vectors_domain,
    KIND: tl.constexpr, BINARY: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns of the sum over one chunk, (chunks, C, D). The first block's program
    also stores p, 1 - p and u, and sums the factors: the column of the bias."""
    chunk = tl.program_id(0)
    number = tl.arange(0, BLOCK_C)
    wide = number.to(tl.int64) * width
    there = number < classes
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for i in range(tl.load(chunks + chunk), tl.load(chunks + chunk + 1)):
        domain, first, last, begin, end = piece(pieces, i)
        row = first + tl.arange(0, BLOCK_N)
        live = row < last
        mask = live[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * classes + number[None, :]
        z = added(parts, row, live, number, there, classes, plane, SPLITS)
        if BIAS:
            z += tl.load(bias + number, mask=there, other=0.0)[None, :]
        p, rest = probabilities(z, number, there, BINARY)
        u = z
        if KIND == 2:
            u = added(parts_u, row, live, number, there, classes, plane, SPLITS)
            if BIAS:
                own = vectors + domain.to(tl.int64) * vectors_domain + columns
                u += tl.load(own + wide, mask=there, other=0.0)[None, :]
        if tl.program_id(1) == 0:
            tl.store(p_out + at, p, mask=mask)
            tl.store(rest_out + at, rest, mask=mask)
            if KIND == 2:
                tl.store(u_out + at, u, mask=mask)
        scale = 1.0 / (end - begin).to(tl.float32)
        left = factor(p, rest, u, targets, at, mask, number, scale, KIND, BINARY)
        tile = features(x, row, live, column, columns)
        if KIND == 1:
            tile = tile * tile
        total = tl.dot(tl.trans(left), tile, total, input_precision=PRECISION)
        ones += left
    out += chunk.to(tl.int64) * classes * width
    at = wide[:, None] + column[None, :]
    tl.store(out + at, total, mask=there[:, None] & (column < columns)[None, :])
    if BIAS:
        mask = there & (tl.program_id(1) == 0)
        tl.store(out + wide + columns, tl.sum(ones, axis=0), mask=mask)


@triton.jit
def _backward_kernel(
    parts, x, weight, grad, targets, vectors, p_in, rest_in, u_in,
    to_x, to_weight, to_bias, to_vectors, pieces, chunks,
    columns, classes, width, plane, weight_row, bias_row, vectors_domain,
    KIND: tl.constexpr, BINARY: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    SHARED: tl.constexpr, ONE: tl.constexpr,
    TO_X: tl.constexpr, TO_HEAD: tl.constexpr, TO_VECTORS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of columns of the gradients of one chunk. ONE: the chunk is the batch, results are
    final; otherwise a chunk is a stretch of a domain, and sums (chunks, C, D) are to be added."""
    chunk = tl.program_id(0)
    number = tl.arange(0, BLOCK_C)
    wide = number.to(tl.int64) * width
    there = number < classes
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = there[:, None] & (column < columns)[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    turned = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    ones = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    turned_ones = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    stop = tl.load(chunks + chunk + 1)
    for i in range(tl.load(chunks + chunk), stop):
        domain, first, last, begin, end = piece(pieces, i)
        row = first + tl.arange(0, BLOCK_N)
        live = row < last
        mask = live[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * classes + number[None, :]
        own = grad + domain.to(tl.int64) * classes * width
        g = added(parts, row, live, number, there, classes, plane, SPLITS)
        if BIAS:
            g += tl.load(own + wide + columns, mask=there, other=0.0)[None, :]
        p = tl.load(p_in + at, mask=mask, other=0.0)
        rest = tl.load(rest_in + at, mask=mask, other=0.0)
        scale = 1.0 / (end - begin).to(tl.float32)
        g = scale * g
        u = g
        if KIND == 2:
            u = tl.load(u_in + at, mask=mask, other=0.0)
        slope, turn = slopes(g, p, rest, u, mask, number, KIND, BINARY)
        tile = features(x, row, live, column, columns)
        if TO_HEAD:
            total = tl.dot(tl.trans(slope), tile, total, input_precision=PRECISION)
            ones += slope
        if TO_VECTORS:
            if not SHARED:
                turned = tl.where(first == begin, 0.0, turned)
                turned_ones = tl.where(first == begin, 0.0, turned_ones)
            turned = tl.dot(tl.trans(turn), tile, turned, input_precision=PRECISION)
            turned_ones += turn
            ends = i == stop - 1
            slot = chunk
            if ONE and not SHARED:
                ends = last == end
                slot = domain
            if ends:
                result = to_vectors + slot.to(tl.int64) * classes * width
                to = result + wide[:, None] + column[None, :]
                tl.store(to, turned, mask=inside)
                if BIAS:
                    to = result + wide + columns
                    first_block = there & (tl.program_id(1) == 0)
                    tl.store(to, tl.sum(turned_ones, axis=0), mask=first_block)
        if TO_X:
            left = factor(p, rest, u, targets, at, mask, number, scale, KIND, BINARY)
            matrix = rows_of(own, width, classes, columns, number, there, column)
            moved = tl.dot(left, matrix, input_precision=PRECISION)
            if KIND == 1:
                moved = 2.0 * tile * moved
            if KIND == 2:
                mine = vectors + domain.to(tl.int64) * vectors_domain
                matrix = rows_of(mine, width, classes, columns, number, there, column)
                moved = tl.dot(turn, matrix, moved, input_precision=PRECISION)
            matrix = rows_of(weight, columns, classes, columns, number, there, column)
            moved = tl.dot(slope, matrix, moved, input_precision=PRECISION)
            to = to_x + row.to(tl.int64)[:, None] * columns + column[None, :]
            tl.store(to, moved, mask=live[:, None] & (column < columns)[None, :])
    if TO_HEAD:
        to = to_weight + chunk.to(tl.int64) * classes * weight_row
        to = to + number.to(tl.int64)[:, None] * weight_row + column[None, :]
        tl.store(to, total, mask=inside)
        if BIAS:
            mask = there & (tl.program_id(1) == 0)
            to = to_bias + (chunk.to(tl.int64) * classes + number) * bias_row
            tl.store(to, tl.sum(ones, axis=0), mask=mask)


# ---- plans ---------------------------------------------------------------------------------------


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"head: the triton backend computes in float32, got {x.dtype}")
    if weight.shape[0] > CLASSES_MOST or x.shape[0] >= 2**30 or x.shape[1] > COLUMNS_MOST:
        raise ValueError(
            f"head: the triton backend takes up to {CLASSES_MOST} classes, {COLUMNS_MOST} columns "
            f"and 2^30 samples, got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )


def _options(blocks: Blocks) -> dict[str, int]:
    return {"num_warps": 8 if blocks.classes > 16 else 4, "num_stages": 1}


def plan_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    vectors: torch.Tensor | None,
    offsets: Sequence[int],
) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """Results of :func:`head_forward`, and the launches that fill them."""
    _check(x, weight)
    if weight.shape[0] > CLASSES_ONE_TILE:
        return _head_wide.plan_forward(x, weight, bias, targets, vectors, offsets)
    (samples, columns), classes, domains = x.shape, weight.shape[0], len(offsets) - 1
    width, kind = columns + (bias is not None), kind_of(targets, vectors)
    blocks = blocks_of(kind, samples, columns, classes, tuple(offsets), x.device)
    apart = 0 if vectors is None or vectors.shape[0] == 1 else classes * width
    second = None if vectors is None else Matrices(vectors, width, apart)
    parts, parts_u, dots = plan_dots(
        blocks, x, classes, Matrices(weight, columns, 0), second, square=False
    )
    out = x.new_empty((domains, classes, width))
    p, rest = (x.new_empty((samples, classes)) for _ in range(2))
    u = x.new_empty((samples if kind == PRODUCT else 0, classes))
    chunks = blocks.tables.chunks.shape[0] - 1
    partial = out if chunks == domains else x.new_empty((chunks, classes, width))
    arguments = {
        "parts": parts,
        "parts_u": parts_u,
        "x": x,
        "bias": bias,
        "targets": targets,
        "vectors": vectors,
        "p_out": p,
        "rest_out": rest,
        "u_out": u,
        "out": partial,
        "pieces": blocks.tables.pieces,
        "chunks": blocks.tables.chunks,
        "columns": columns,
        "classes": classes,
        "width": width,
        "plane": samples * classes,
        "vectors_domain": apart,
        "KIND": kind,
        "BINARY": classes == 1,
        "BIAS": bias is not None,
        "SPLITS": blocks.splits,
        "PRECISION": PRECISION,
        "BLOCK_N": blocks.rows,
        "BLOCK_C": blocks.classes,
        "BLOCK_D": TILE,
    }
    grid = (chunks, max(1, triton.cdiv(columns, TILE)))
    launches = [dots, Launch(_forward_kernel, grid, arguments, _options(blocks))]
    if partial is not out:
        launches.append(plan_fold(partial, blocks.tables.domains, out, None, columns))
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
    x_grad: bool,
    head_grad: bool,
    vectors_grad: bool,
) -> tuple[tuple[torch.Tensor, ...], list[Launch]]:
    """Results of :func:`head_backward`, and the launches that fill them."""
    _check(x, weight)

    def result(wanted: bool, like: torch.Tensor | None) -> torch.Tensor:
        return torch.empty_like(like) if wanted and like is not None else x.new_empty((0,))

    results = (
        result(x_grad, x),
        result(head_grad, weight),
        result(head_grad, bias),
        result(vectors_grad, vectors),
    )
    to_x, to_weight, to_bias, to_vectors = results
    vectors_grad = vectors_grad and vectors is not None
    if weight.shape[0] > CLASSES_ONE_TILE:
        wanted = (x_grad, head_grad, head_grad and bias is not None, vectors_grad)
        filled = tuple(r if flag else None for r, flag in zip(results, wanted, strict=True))
        return results, _head_wide.plan_backward(
            grad, p, rest, u, x, weight, bias, targets, vectors, offsets, filled
        )
    (samples, columns), classes = x.shape, weight.shape[0]
    width, kind = columns + (bias is not None), kind_of(targets, vectors)
    blocks = blocks_of(kind, samples, columns, classes, tuple(offsets), x.device)
    tables = blocks.tables
    shared = vectors is None or vectors.shape[0] == 1
    parts, _, dots = plan_dots(
        blocks, x, classes, Matrices(grad, width, classes * width), None, square=kind == DIAGONAL
    )
    # As few pieces as one program can go through are not worth a launch that adds sums.
    one = tables.pieces.shape[0] <= LOOP
    chunks = 1 if one else tables.chunks.shape[0] - 1
    sums: tuple[torch.Tensor | None, ...] = (to_weight, to_bias, to_vectors)
    if chunks > 1:
        part, part_vectors = (
            x.new_empty((chunks, classes, width)) if wanted else None
            for wanted in (head_grad, vectors_grad)
        )
        part_bias = None if part is None else part.flatten()[columns:]
        sums = part, part_bias, part_vectors
    arguments = {
        "parts": parts,
        "x": x,
        "weight": weight,
        "grad": grad,
        "targets": targets,
        "vectors": vectors,
        "p_in": p,
        "rest_in": rest,
        "u_in": u,
        "to_x": to_x,
        **dict(zip(("to_weight", "to_bias", "to_vectors"), sums, strict=True)),
        "pieces": tables.pieces,
        "chunks": tables.whole if one else tables.chunks,
        "columns": columns,
        "classes": classes,
        "width": width,
        "plane": samples * classes,
        "weight_row": columns if chunks == 1 else width,
        "bias_row": 1 if chunks == 1 else width,
        "vectors_domain": 0 if shared else classes * width,
        "KIND": kind,
        "BINARY": classes == 1,
        "BIAS": bias is not None,
        "SPLITS": blocks.splits,
        "SHARED": shared,
        "ONE": one,
        "TO_X": x_grad,
        "TO_HEAD": head_grad,
        "TO_VECTORS": vectors_grad,
        "PRECISION": PRECISION,
        "BLOCK_N": blocks.rows,
        "BLOCK_C": blocks.classes,
        "BLOCK_D": TILE,
    }
    grid = (chunks, max(1, triton.cdiv(columns, TILE)))
    launches = [dots, Launch(_backward_kernel, grid, arguments, _options(blocks))]
    if chunks > 1 and sums[0] is not None:
        folded = None if bias is None else to_bias
        launches.append(plan_fold(sums[0], tables.batch, to_weight, folded, columns))
    if chunks > 1 and sums[2] is not None:
        starts = tables.batch if shared else tables.domains
        launches.append(plan_fold(sums[2], starts, to_vectors, None, columns))
    return results, launches


# ---- calls ---------------------------------------------------------------------------------------


def head_forward(*arguments) -> tuple[torch.Tensor, ...]:
    """The result (E, C, D), p, 1 - p and u of :func:`plan_forward`'s arguments, as the C++ op
    ``transfuse::head_forward``."""
    results, launches = plan_forward(*arguments)
    run(launches, results[0].device)
    return results


def head_backward(*arguments) -> tuple[torch.Tensor, ...]:
    """Gradients by x, weight, bias and vectors of :func:`plan_backward`'s arguments, as the C++ op
    ``transfuse::head_backward``."""
    results, launches = plan_backward(*arguments)
    run(launches, results[0].device)
    return results
