"""Device functions and argument records shared by the attention kernels.

Every kernel receives its tensors as records (named tuples) of a pointer and its strides, so that
no layout is assumed and nothing is copied or expanded; absent parts are ``None`` and disappear at
compile time. Batch, head and row strides are counted in a compile-time ``unit`` (a power of two
that divides them all): Triton itself only notices divisibility by 16, and without the unit rows of
40 or 72 half-precision elements would be loaded one element at a time.

Tiles are written for both orientations: ``i`` counts local query rows and ``j`` local keys, one of
them along each axis of the tile. The query and forward passes use (queries, keys); the key pass
uses (keys, queries), which keeps its left matrix operands in registers.
"""

from typing import Any, NamedTuple

from ._triton import tl, triton

# log2(e) and ln(2): the kernels exponentiate in base 2, the only base the hardware has.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Operand(NamedTuple):
    """A (batch, head, row, column) tensor; column is 0 for a (batch, head, row) tensor."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any
    unit: Any


class Pairs(NamedTuple):
    """A (batch, head, query, key) bias or mask; ``per_row`` False: the same for every query."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any
    unit: Any
    per_row: Any


class Blend(NamedTuple):
    """(1 - w) x + w other[index]; ``weight`` is an Operand, or None for the float ``constant``."""

    other: Any
    index: Any
    weight: Any
    constant: Any


class Source(NamedTuple):
    """One source of keys and values as the kernels see it.

    ``repeat`` query heads share one key head. Compile-time fields: ``shared`` (one batch entry for
    all queries, no index), ``causal`` (0 none, 1 upper
    left, 2 lower right), ``fold`` (positive scale and no bias, so the scale commutes with the row
    maximum), ``even`` (no block needs a bounds check), ``ends`` (last source of its softmax group).
    """

    key: Any
    value: Any
    bias: Any
    mask: Any
    index: Any
    blend: Any
    key_tangent: Any
    value_tangent: Any
    bias_tangent: Any
    gate: Any
    gate_constant: Any
    length: Any
    repeat: Any
    scale: Any
    shared: Any
    causal: Any
    fold: Any
    even: Any
    ends: Any


@triton.jit
def locate(operand, batch, head, start):
    """Pointer to (batch, head, start, 0), in 64-bit arithmetic."""
    offset = (
        tl.cast(batch, tl.int64) * operand.batch
        + tl.cast(head, tl.int64) * operand.head
        + tl.cast(start, tl.int64) * operand.row
    )
    return operand.data + offset * operand.unit


@triton.jit
def count(SIZE: tl.constexpr, WIDE: tl.constexpr):
    """0 .. SIZE-1, in 64 bits where offsets inside one tile may exceed 32."""
    offsets = tl.arange(0, SIZE)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return offsets


@triton.jit
def load_tile(
    operand,
    batch,
    head,
    start,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows start .. start+ROWS-1 of a matrix, zero outside it. CHECK False: all rows exist."""
    i = count(ROWS, WIDE)[:, None]
    d = count(COLUMNS, WIDE)[None, :]
    pointers = (
        locate(operand, batch, head, start) + i * operand.row * operand.unit + d * operand.column
    )
    if CHECK and WIDTH < COLUMNS:
        tile = tl.load(pointers, mask=(start + i < length) & (d < WIDTH), other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=start + i < length, other=0.0)
    elif WIDTH < COLUMNS:
        tile = tl.load(pointers, mask=d < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    operand,
    tile,
    batch,
    head,
    start,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    i = count(ROWS, WIDE)[:, None]
    d = count(COLUMNS, WIDE)[None, :]
    pointers = (
        locate(operand, batch, head, start) + i * operand.row * operand.unit + d * operand.column
    )
    tl.store(
        pointers,
        tile.to(operand.data.dtype.element_ty),
        mask=(start + i < length) & (d < WIDTH),
    )


@triton.jit
def load_rows(operand, batch, head, start, length, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """A float32 vector over rows, zero outside the tensor."""
    i = count(ROWS, WIDE)
    pointers = locate(operand, batch, head, start) + i * operand.row * operand.unit
    return tl.load(pointers, mask=start + i < length, other=0.0).to(tl.float32)


@triton.jit
def store_rows(operand, values, batch, head, start, length, ROWS: tl.constexpr, WIDE: tl.constexpr):
    i = count(ROWS, WIDE)
    pointers = locate(operand, batch, head, start) + i * operand.row * operand.unit
    tl.store(pointers, values, mask=start + i < length)


@triton.jit
def load_pairs(pairs, batch, head, start_m, start_n, i, j, rows, keys, CHECK: tl.constexpr):
    """A bias or mask tile, zero outside; one row or column only where all queries share it.

    CHECK False: all keys of the tile exist.
    """
    base = locate(pairs, batch, head, start_m) + tl.cast(start_n, tl.int64) * pairs.column
    pointers = base + j * pairs.column
    if pairs.per_row:
        pointers += i * pairs.row * pairs.unit
        inside = start_m + i < rows
        if CHECK:
            inside = inside & (start_n + j < keys)
        tile = tl.load(pointers, mask=inside, other=0)
    elif CHECK:
        tile = tl.load(pointers, mask=start_n + j < keys, other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def map_batch(index, batch):
    """The batch entry that ``index`` (or the identity, where it is None) assigns to ``batch``."""
    mapped = batch
    if index is not None:
        mapped = tl.load(index + batch)
    return mapped


@triton.jit
def batch_of(source, batch):
    """The source batch that a query batch reads."""
    mapped = map_batch(source.index, batch)
    if source.shared:
        mapped = 0
    return mapped


@triton.jit
def blend_tile(
    tile,
    blend,
    batch,
    head,
    start,
    length,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mix in float32; weights 0 and 1 select, so that they are exact even beside inf or NaN."""
    other = load_tile(
        blend.other,
        map_batch(blend.index, batch),
        head,
        start,
        length,
        ROWS,
        COLUMNS,
        WIDTH,
        CHECK,
        WIDE,
    )
    if blend.weight is not None:
        weight = load_rows(blend.weight, batch, head, start, length, ROWS, WIDE)[:, None]
    else:
        weight = tl.full([ROWS, 1], 0.0, tl.float32) + blend.constant
    mixed = tile.to(tl.float32) * (1.0 - weight) + other.to(tl.float32) * weight
    mixed = mixed.to(tile.dtype)
    return tl.where(weight == 0.0, tile, tl.where(weight == 1.0, other, mixed))


@triton.jit
def diagonal(source, rows):
    """Causal keys of query i are those up to i + diagonal."""
    shift = 0
    if source.causal == 2:
        shift = source.length - rows
    return shift


@triton.jit
def key_limits(source, start_m, rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first key that needs a check, one past the last key) for one block of queries."""
    stop = source.length
    full = source.length
    if source.causal != 0:
        shift = diagonal(source, rows)
        stop = max(0, min(stop, start_m + BLOCK_M + shift))
        full = max(0, min(full, start_m + 1 + shift))
    return full // BLOCK_N * BLOCK_N, stop


@triton.jit
def permitted(
    source,
    batch,
    head,
    start_m,
    start_n,
    i,
    j,
    rows,
    CHECK: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Which pairs may attend; None where all of them do.

    CHECK: keys of the tile may lie outside the source. DIAGONAL: the tile may cross the causal
    diagonal. Queries outside need no check anywhere: they carry zero gradients.
    """
    allowed = None
    if source.mask is not None:
        allowed = load_pairs(
            source.mask, batch, head, start_m, start_n, i, j, rows, source.length, CHECK
        ).to(tl.int1)
    if CHECK:
        inside = start_n + j < source.length
        allowed = allowed & inside if source.mask is not None else inside
    if DIAGONAL and source.causal != 0:
        below = start_n + j <= start_m + i + diagonal(source, rows)
        allowed = allowed & below if source.mask is not None or CHECK else below
    return allowed


@triton.jit
def any_pair(allowed):
    """Whether one pair of the tile may attend, as a scalar."""
    return tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0


@triton.jit
def biased(
    scores,
    source,
    allowed,
    batch,
    head,
    start_m,
    start_n,
    i,
    j,
    rows,
    CHECK: tl.constexpr,
    RESTRICTED: tl.constexpr,
):
    """Logits in natural units: scale * scores + bias, -inf where not allowed."""
    logits = scores * source.scale
    if source.bias is not None:
        logits += load_pairs(
            source.bias, batch, head, start_m, start_n, i, j, rows, source.length, CHECK
        ).to(tl.float32)
    if RESTRICTED:
        logits = tl.where(allowed, logits, float("-inf"))
    return logits


@triton.jit
def probabilities(logits, lse):
    """exp(logits - lse). ``lse`` of a fully masked row must already be +inf (see finite_lse)."""
    return tl.math.exp2((logits - lse) * LOG2E)


@triton.jit
def finite_lse(lse):
    """lse with -inf (fully masked rows) turned to +inf, so that their probabilities are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def tangent_logits(
    products, source, batch, head, start_m, start_n, i, j, rows, CHECK: tl.constexpr
):
    """Tangent of the logits: scale * products + tangent of the bias."""
    tangent = products * source.scale
    if source.bias_tangent is not None:
        tangent += load_pairs(
            source.bias_tangent, batch, head, start_m, start_n, i, j, rows, source.length, CHECK
        ).to(tl.float32)
    return tangent
