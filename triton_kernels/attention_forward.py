"""Attention over several sources: forward pass, and the fused inference op around it.

One program owns a block of queries of one (batch, head) and walks over all keys of all sources
with the running maximum, normaliser and accumulator of each softmax group in registers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._attention_plan import (
    MAX_SOURCES,
    Launch,
    blend_record,
    check_dtypes,
    check_head_dims,
    check_pairs,
    choose,
    differs_per_row,
    is_wide,
    matrix_precision,
    operand,
    options,
    padded,
    run,
    source_record,
)
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


def plan_fused(
    query: torch.Tensor,
    query_other: torch.Tensor | None,
    query_weight: float | torch.Tensor | None,
    query_index: torch.Tensor | None,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_others: Sequence[torch.Tensor | None],
    key_weights: Sequence[float | torch.Tensor | None],
    key_indices: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
    groups: Sequence[int],
    gates: Sequence[float | torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """Results of :func:`attention_fused` and the launches that fill them."""
    check_dtypes(
        ("query", [query]),
        ("query_other", [query_other]),
        ("keys", keys),
        ("values", values),
        ("key_others", key_others),
    )
    check_pairs("biases", biases, boolean=False)
    check_pairs("masks", masks, boolean=True)
    batches, heads, rows, width = query.shape
    value_width = values[0].shape[3]
    check_head_dims(width, value_width)
    out = query.new_empty((batches, heads, rows, value_width))
    single = len(gates) == 1
    lse = query.new_empty((batches, heads, rows), dtype=torch.float32)
    if not single:
        lse.fill_(float("nan"))
    # A gate of exactly 0 removes the group's work; the last group stays to write the zeros.
    dead = {g for g, gate in enumerate(gates) if not isinstance(gate, torch.Tensor) and gate == 0}
    live = [s for s in range(len(keys)) if single or groups[s] not in dead]
    if not live:
        return (out.zero_(), lse), []
    order = sorted(live, key=lambda s: groups[s])
    ends = [
        position + 1 == len(order) or groups[order[position + 1]] != groups[s]
        for position, s in enumerate(order)
    ]

    longest = max(keys[s].shape[2] for s in order)
    grouped = sum(ends) > 1
    blended = query_other is not None or any(other is not None for other in key_others)
    config = choose(
        "forward",
        query.dtype,
        max(width, value_width),
        rows,
        longest,
        grouped or blended or differs_per_row(biases, masks),
    )
    blend = None
    if query_other is not None and (isinstance(query_weight, torch.Tensor) or query_weight != 0):
        blend = blend_record(query_other, query_weight, query_index)
    records = []
    for s, end in zip(order, ends, strict=True):
        weight = key_weights[s]
        key_blend = None
        if key_others[s] is not None and (isinstance(weight, torch.Tensor) or weight != 0):
            key_blend = blend_record(key_others[s], weight, key_indices[s])
        records.append(
            source_record(
                keys[s],
                values[s],
                bias=biases[s],
                mask=masks[s],
                index=indices[s],
                scale=scales[s],
                causal=causal[s],
                heads=heads,
                block_n=config.block_n,
                ends=end,
                blend=key_blend,
                gate=gates[groups[s]] if end else 1.0,
            )
        )
    chunks = [records[at : at + MAX_SOURCES] for at in range(0, len(records), MAX_SOURCES)]
    carry = None
    if len(chunks) > 1:
        state = torch.empty_like(out, dtype=torch.float32)
        total = torch.empty_like(state) if grouped else None
        carry = Carry(
            operand(state),
            operand(torch.empty_like(lse)),
            operand(total) if grouped else None,
        )
    launches = []
    for number, chunk in enumerate(chunks):
        arguments = {
            "query": operand(query),
            "blend": blend,
            "sources": tuple(chunk),
            "out": operand(out),
            "lse": operand(lse) if single else None,
            "carry": carry,
            "heads": heads,
            "rows": rows,
            "COUNT": len(chunk),
            "GROUPED": grouped,
            "FIRST": number == 0,
            "LAST": number + 1 == len(chunks),
            "D": width,
            "DV": value_width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": padded(width),
            "BLOCK_DV": padded(value_width),
            "WIDE": is_wide(operand(query), blend, tuple(chunk)),
            "PRECISION": matrix_precision(),
        }
        grid = (triton.cdiv(rows, config.block_m) * batches * heads,)
        launches.append(Launch(forward_kernel, grid, arguments, options(config)))
    return (out, lse), launches


def attention_fused(
    query: torch.Tensor,
    query_other: torch.Tensor | None,
    query_weight: float | torch.Tensor | None,
    query_index: torch.Tensor | None,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_others: Sequence[torch.Tensor | None],
    key_weights: Sequence[float | torch.Tensor | None],
    key_indices: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
    groups: Sequence[int],
    gates: Sequence[float | torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated sum of softmax groups over blended queries and keys, in one kernel.

    out = sum_g gate_g * softmax over the sources of group g of (scale_s q_eff k_eff^T + bias_s) v.

    Args:
        query: (B, H, N, D), float32, float16 or bfloat16, any strides.
        query_other: (B or 1 or any with ``query_index``, H, N, D) or None.
        query_weight: float, or (B, H, N) expanded tensor; q_eff = (1 - w) query + w other.
        query_index: (B,) int64 map from query batch to ``query_other`` batch, or None.
        keys: per source (Bs, Hk, M, D), H % Hk == 0, Bs in {B, 1} or any with an index.
        values: per source (Bs, Hk, M, Dv).
        key_others: per source (Bo, Hk, M, D) or None, blended like the query.
        key_weights: per source float, or expanded (Bs, Hk, M) tensor, or None.
        key_indices: per source (Bs,) int64 map from source batch to ``key_others`` batch, or None.
        biases: per source expanded (B, H, N, M) float tensor or None; -inf allowed.
        masks: per source expanded (B, H, N, M) bool tensor, True = may attend, or None.
        indices: per source (B,) int64 map from query batch to source batch, or None.
        scales: per source factor of q k^T, applied to the float32 logits.
        causal: per source 0 none, 1 upper left (j <= i), 2 lower right (j <= i + M - N).
        groups: group of each source, 0 .. G-1, each used.
        gates: per group float or expanded (B, H, N) tensor. A float 0 skips the group.

    Returns:
        out (B, H, N, Dv) in the dtype of ``query``; lse (B, H, N) float32 of the softmax when there
        is one group, NaN (undefined) otherwise. A fully masked row: its group adds 0, lse -inf.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: head dimension outside 1 .. 256.

    Notes:
        O(B H N M (D + Dv)) time, no N x M buffer, no copies. Deterministic. More than 8 sources
        take one launch per 8, with the softmax state carried in float32.
    """
    results, launches = plan_fused(
        query,
        query_other,
        query_weight,
        query_index,
        keys,
        values,
        key_others,
        key_weights,
        key_indices,
        biases,
        masks,
        indices,
        scales,
        causal,
        groups,
        gates,
    )
    run(launches, query.device)
    return results


def plan_forward(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """Results of :func:`attention_forward` and the launches that fill them."""
    none = [None] * len(keys)
    return plan_fused(
        query,
        None,
        None,
        None,
        keys,
        values,
        none,
        none,
        none,
        biases,
        masks,
        indices,
        scales,
        causal,
        [0] * len(keys),
        [1.0],
    )


def attention_forward(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over the keys of several sources; arguments as in :func:`attention_fused`.

    Returns:
        out (B, H, N, Dv) in the dtype of ``query`` and lse (B, H, N) float32.
    """
    results, launches = plan_forward(query, keys, values, biases, masks, indices, scales, causal)
    run(launches, query.device)
    return results
