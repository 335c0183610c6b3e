"""The forward pass of attention: one program per block of queries of one (batch, head).

It walks over all keys of all sources with the running maximum, normaliser and accumulator of each
softmax group in registers.
"""

from typing import Any, NamedTuple

from ._attention_tiles import (
    LN2,
    LOG2E,
    any_pair,
    batch_of,
    blend_tile,
    key_limits,
    load_pairs,
    load_rows,
    load_tile,
    permitted,
    store_rows,
    store_tile,
)
from ._triton import tl, triton


class Carry(NamedTuple):
    """Float32 state between launches where there are more sources than one launch unrolls."""

    out: Any
    lse: Any
    total: Any


@triton.jit
def _absorb(
    query,
    acc,
    top,
    norm,
    source,
    allowed,
    source_batch,
    batch,
    head,
    start_m,
    start_n,
    i,
    j,
    rows,
    CHECK: tl.constexpr,
    RESTRICTED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over one block of keys; ``top`` is the row maximum in units of log 2."""
    kv_head = head // source.repeat
    key = load_tile(
        source.key, source_batch, kv_head, start_n, source.length, BLOCK_N, BLOCK_D, D, CHECK, WIDE
    )
    if source.blend is not None:
        key = blend_tile(
            key,
            source.blend,
            source_batch,
            kv_head,
            start_n,
            source.length,
            BLOCK_N,
            BLOCK_D,
            D,
            CHECK,
            WIDE,
        )
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    factor = source.scale * LOG2E
    if not source.fold:
        scores = scores * factor
        if source.bias is not None:
            bias = load_pairs(
                source.bias, batch, head, start_m, start_n, i, j, rows, source.length, CHECK
            )
            scores += bias.to(tl.float32) * LOG2E
    if RESTRICTED:
        scores = tl.where(allowed, scores, float("-inf"))
    highest = tl.max(scores, 1)
    if source.fold:
        # A positive scale commutes with the maximum: scale and subtract in one multiply-add.
        highest = highest * factor
    new_top = tl.maximum(top, highest)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    if source.fold:
        weights = tl.math.exp2(scores * factor - anchor[:, None])
    else:
        weights = tl.math.exp2(scores - anchor[:, None])
    decay = tl.math.exp2(top - anchor)
    norm = norm * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    value = load_tile(
        source.value,
        source_batch,
        kv_head,
        start_n,
        source.length,
        BLOCK_N,
        BLOCK_DV,
        DV,
        CHECK,
        WIDE,
    )
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, new_top, norm


@triton.jit
def _walk(
    query,
    acc,
    top,
    norm,
    source,
    source_batch,
    batch,
    head,
    start_m,
    rows,
    first,
    last,
    CHECK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Absorb the keys first .. last-1 of one source."""
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    if WIDE:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    for start_n in range(first, last, BLOCK_N):
        allowed = permitted(source, batch, head, start_m, start_n, i, j, rows, CHECK, CHECK)
        if source.mask is not None:
            if any_pair(allowed):
                acc, top, norm = _absorb(
                    query,
                    acc,
                    top,
                    norm,
                    source,
                    allowed,
                    source_batch,
                    batch,
                    head,
                    start_m,
                    start_n,
                    i,
                    j,
                    rows,
                    CHECK,
                    True,
                    D,
                    DV,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                    WIDE,
                    PRECISION,
                )
        else:
            acc, top, norm = _absorb(
                query,
                acc,
                top,
                norm,
                source,
                allowed,
                source_batch,
                batch,
                head,
                start_m,
                start_n,
                i,
                j,
                rows,
                CHECK,
                CHECK,
                D,
                DV,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                WIDE,
                PRECISION,
            )
    return acc, top, norm


@triton.jit
def _take(
    query,
    acc,
    top,
    norm,
    source,
    batch,
    head,
    start_m,
    rows,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Absorb one source: first the blocks that need no bounds or causal check, then the rest."""
    source_batch = batch_of(source, batch)
    full, stop = key_limits(source, start_m, rows, BLOCK_M, BLOCK_N)
    acc, top, norm = _walk(
        query,
        acc,
        top,
        norm,
        source,
        source_batch,
        batch,
        head,
        start_m,
        rows,
        0,
        full,
        False,
        D,
        DV,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        WIDE,
        PRECISION,
    )
    if not source.even:
        acc, top, norm = _walk(
            query,
            acc,
            top,
            norm,
            source,
            source_batch,
            batch,
            head,
            start_m,
            rows,
            full,
            stop,
            True,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
    return acc, top, norm


@triton.jit
def forward_kernel(
    query,
    blend,
    sources,
    out,
    lse,
    carry,
    heads,
    rows,
    COUNT: tl.constexpr,
    GROUPED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sum over groups of gate * softmax(...) values; see the launchers for the arguments."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    # Last block of queries first: with causal sources it has the most keys.
    start_m = (tiles - 1 - program % tiles) * BLOCK_M
    pair = program // tiles
    batch = pair // heads
    head = pair % heads

    tile = load_tile(query, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    if blend is not None:
        tile = blend_tile(tile, blend, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)

    if FIRST:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
    else:
        # A finished softmax (out, lse) is the same state as (acc = out, top = lse, norm = 1).
        acc = load_tile(carry.out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE)
        state = load_rows(carry.lse, batch, head, start_m, rows, BLOCK_M, WIDE)
        norm = tl.where(state == float("-inf"), 0.0, 1.0)
        top = state * LOG2E
    if GROUPED:
        if FIRST:
            total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        else:
            total = load_tile(
                carry.total, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE
            )

    for s in tl.static_range(COUNT):
        # Records are passed on, never assigned: assignment turns compile-time fields into values.
        acc, top, norm = _take(
            tile,
            acc,
            top,
            norm,
            sources[s],
            batch,
            head,
            start_m,
            rows,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
        if sources[s].ends:
            # Fully masked rows have norm 0 and acc 0: they give 0, and lse -inf below.
            safe = tl.where(norm == 0.0, 1.0, norm)
            acc = acc / safe[:, None]
            if sources[s].gate is not None:
                gate = load_rows(sources[s].gate, batch, head, start_m, rows, BLOCK_M, WIDE)[
                    :, None
                ]
                acc = tl.where(gate == 0.0, 0.0, acc * gate)
            else:
                acc = acc * sources[s].gate_constant
            if lse is not None:
                result = tl.where(norm == 0.0, float("-inf"), top * LN2 + tl.math.log2(safe) * LN2)
                store_rows(lse, result, batch, head, start_m, rows, BLOCK_M, WIDE)
            if GROUPED:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
                top = tl.full([BLOCK_M], float("-inf"), tl.float32)
                norm = tl.zeros([BLOCK_M], tl.float32)

    if LAST:
        if GROUPED:
            acc = total
        store_tile(out, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, WIDE)
    else:
        safe = tl.where(norm == 0.0, 1.0, norm)
        acc = acc / safe[:, None]
        state = tl.where(norm == 0.0, float("-inf"), top * LN2 + tl.math.log2(safe) * LN2)
        store_tile(carry.out, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, WIDE)
        store_rows(carry.lse, state, batch, head, start_m, rows, BLOCK_M, WIDE)
        if GROUPED:
            store_tile(carry.total, total, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, WIDE)
