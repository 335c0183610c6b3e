"""Forward-mode derivative of attention, and the gradient of that derivative.

With T = c (Q_t K^T + Q K_t^T) + bias_t and P the attention weights:
lse_t = mu = rowsum(P T), out_t = (P T) V + P V_t - mu out.

P is recomputed from the saved log-sum-exp and divided by its own row sum, which is 1 up to the
rounding of that log-sum-exp: without this the rounding would scale mu and out_t.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._attention_plan import (
    MAX_SOURCES,
    Launch,
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
    any_pair,
    batch_of,
    biased,
    count,
    finite_lse,
    key_limits,
    load_rows,
    load_tile,
    permitted,
    probabilities,
    store_rows,
    store_tile,
    tangent_logits,
)
from ._triton import tl, triton
from .attention_backward import Gradients, Tangents, plan_gradients


class Carry(NamedTuple):
    """Float32 sums between launches where there are more sources than one launch unrolls."""

    out: Any
    mu: Any
    norm: Any


@triton.jit
def _tangent_step(
    acc,
    mu,
    norm,
    query,
    query_tangent,
    lse,
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
    """Add one block of keys to (P T) V + P V_t, to mu and to the row sum of P."""
    kv_head = head // source.repeat
    length = source.length
    key = load_tile(
        source.key, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_D, D, CHECK, WIDE
    )
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    products = tl.dot(query_tangent, tl.trans(key), input_precision=PRECISION)
    key_tangent = load_tile(
        source.key_tangent,
        source_batch,
        kv_head,
        start_n,
        length,
        BLOCK_N,
        BLOCK_D,
        D,
        CHECK,
        WIDE,
    )
    products = tl.dot(query, tl.trans(key_tangent), products, input_precision=PRECISION)
    logits = biased(
        scores, source, allowed, batch, head, start_m, start_n, i, j, rows, CHECK, RESTRICTED
    )
    p = probabilities(logits, lse)
    pt = p * tangent_logits(products, source, batch, head, start_m, start_n, i, j, rows, CHECK)
    mu += tl.sum(pt, 1)
    norm += tl.sum(p, 1)
    value = load_tile(
        source.value, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_DV, DV, CHECK, WIDE
    )
    acc = tl.dot(pt.to(value.dtype), value, acc, input_precision=PRECISION)
    value_tangent = load_tile(
        source.value_tangent,
        source_batch,
        kv_head,
        start_n,
        length,
        BLOCK_N,
        BLOCK_DV,
        DV,
        CHECK,
        WIDE,
    )
    acc = tl.dot(p.to(value.dtype), value_tangent, acc, input_precision=PRECISION)
    return acc, mu, norm


@triton.jit
def _tangent_walk(
    acc,
    mu,
    norm,
    query,
    query_tangent,
    lse,
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
    i = count(BLOCK_M, WIDE)[:, None]
    j = count(BLOCK_N, WIDE)[None, :]
    for start_n in range(first, last, BLOCK_N):
        allowed = permitted(source, batch, head, start_m, start_n, i, j, rows, CHECK, CHECK)
        if source.mask is not None:
            if any_pair(allowed):
                acc, mu, norm = _tangent_step(
                    acc,
                    mu,
                    norm,
                    query,
                    query_tangent,
                    lse,
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
            acc, mu, norm = _tangent_step(
                acc,
                mu,
                norm,
                query,
                query_tangent,
                lse,
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
    return acc, mu, norm


@triton.jit
def _tangent_take(
    acc,
    mu,
    norm,
    query,
    query_tangent,
    lse,
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
    """Add one source: the blocks that need no check, then the rest."""
    source_batch = batch_of(source, batch)
    full, stop = key_limits(source, start_m, rows, BLOCK_M, BLOCK_N)
    acc, mu, norm = _tangent_walk(
        acc,
        mu,
        norm,
        query,
        query_tangent,
        lse,
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
        acc, mu, norm = _tangent_walk(
            acc,
            mu,
            norm,
            query,
            query_tangent,
            lse,
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
    return acc, mu, norm


@triton.jit
def jvp_kernel(
    query,
    query_tangent,
    sources,
    out,
    lse,
    out_tangent,
    lse_tangent,
    carry,
    heads,
    rows,
    COUNT: tl.constexpr,
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
    """out_tangent and lse_tangent for one block of queries of one (batch, head)."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    start_m = (tiles - 1 - program % tiles) * BLOCK_M
    pair = program // tiles
    batch = pair // heads
    head = pair % heads
    q = load_tile(query, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    qt = load_tile(query_tangent, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    saved_lse = finite_lse(load_rows(lse, batch, head, start_m, rows, BLOCK_M, WIDE))
    if FIRST:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        mu = tl.zeros([BLOCK_M], tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc = load_tile(carry.out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE)
        mu = load_rows(carry.mu, batch, head, start_m, rows, BLOCK_M, WIDE)
        norm = load_rows(carry.norm, batch, head, start_m, rows, BLOCK_M, WIDE)
    for s in tl.static_range(COUNT):
        acc, mu, norm = _tangent_take(
            acc,
            mu,
            norm,
            q,
            qt,
            saved_lse[:, None],
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
    if LAST:
        inverse = 1.0 / tl.where(norm == 0.0, 1.0, norm)
        acc *= inverse[:, None]
        mu *= inverse
        primal = load_tile(out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE)
        acc -= mu[:, None] * primal.to(tl.float32)
        store_tile(out_tangent, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, WIDE)
        store_rows(lse_tangent, mu, batch, head, start_m, rows, BLOCK_M, WIDE)
    else:
        store_tile(carry.out, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, WIDE)
        store_rows(carry.mu, mu, batch, head, start_m, rows, BLOCK_M, WIDE)
        store_rows(carry.norm, norm, batch, head, start_m, rows, BLOCK_M, WIDE)


def plan_jvp(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
    out: torch.Tensor,
    lse: torch.Tensor,
    query_t: torch.Tensor,
    keys_t: Sequence[torch.Tensor],
    values_t: Sequence[torch.Tensor],
    biases_t: Sequence[torch.Tensor | None],
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """Results of :func:`attention_jvp` and the launches that fill them."""
    check_dtypes(
        ("query", [query]),
        ("keys", keys),
        ("values", values),
        ("query_t", [query_t]),
        ("keys_t", keys_t),
        ("values_t", values_t),
    )
    check_pairs("biases", biases, boolean=False)
    check_pairs("biases_t", biases_t, boolean=False)
    check_pairs("masks", masks, boolean=True)
    batches, heads, rows, width = query.shape
    value_width = values[0].shape[3]
    check_head_dims(width, value_width)
    longest = max(key.shape[2] for key in keys)
    config = choose(
        "jvp",
        query.dtype,
        max(width, value_width),
        rows,
        longest,
        differs_per_row(biases, masks, biases_t),
    )
    records = [
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
            tangents=(keys_t[s], values_t[s], biases_t[s]),
        )
        for s in range(len(keys))
    ]
    out_t = query.new_empty((batches, heads, rows, value_width))
    lse_t = query.new_empty((batches, heads, rows), dtype=torch.float32)
    chunks = [records[at : at + MAX_SOURCES] for at in range(0, len(records), MAX_SOURCES)]
    carry = None
    if len(chunks) > 1:
        carry = Carry(
            operand(torch.empty_like(out_t, dtype=torch.float32)),
            operand(torch.empty_like(lse_t)),
            operand(torch.empty_like(lse_t)),
        )
    launches = []
    for number, chunk in enumerate(chunks):
        arguments = {
            "query": operand(query),
            "query_tangent": operand(query_t),
            "sources": tuple(chunk),
            "out": operand(out),
            "lse": operand(lse),
            "out_tangent": operand(out_t),
            "lse_tangent": operand(lse_t),
            "carry": carry,
            "heads": heads,
            "rows": rows,
            "COUNT": len(chunk),
            "FIRST": number == 0,
            "LAST": number + 1 == len(chunks),
            "D": width,
            "DV": value_width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": padded(width),
            "BLOCK_DV": padded(value_width),
            "WIDE": is_wide(operand(query), operand(query_t), operand(out), tuple(chunk)),
            "PRECISION": matrix_precision(),
        }
        grid = (triton.cdiv(rows, config.block_m) * batches * heads,)
        launches.append(Launch(jvp_kernel, grid, arguments, options(config)))
    return (out_t, lse_t), launches


def attention_jvp(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
    out: torch.Tensor,
    lse: torch.Tensor,
    query_t: torch.Tensor,
    keys_t: Sequence[torch.Tensor],
    values_t: Sequence[torch.Tensor],
    biases_t: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of the results of ``attention_forward``.

    Args:
        query, keys, values, biases, masks, indices, scales, causal: as given to it.
        out, lse: its results.
        query_t, keys_t, values_t: tangents, shapes and dtypes of their primals, any strides.
        biases_t: per source tangent of the bias, expanded like it, or None for zero.

    Returns:
        out_t (B, H, N, Dv) in the dtype of ``query`` and lse_t (B, H, N) float32; both 0 for a
        fully masked row.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: head dimension outside 1 .. 256.
    """
    results, launches = plan_jvp(
        query,
        keys,
        values,
        biases,
        masks,
        indices,
        scales,
        causal,
        out,
        lse,
        query_t,
        keys_t,
        values_t,
        biases_t,
    )
    run(launches, query.device)
    return results


def attention_jvp_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    masks: Sequence[torch.Tensor | None],
    indices: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
    out: torch.Tensor,
    lse: torch.Tensor,
    query_t: torch.Tensor,
    keys_t: Sequence[torch.Tensor],
    values_t: Sequence[torch.Tensor],
    biases_t: Sequence[torch.Tensor | None],
    out_t: torch.Tensor,
    lse_t: torch.Tensor,
    bias_grads: Sequence[bool],
) -> Gradients:
    """Gradient of <grad_out, out_t> + <grad_lse, lse_t> with respect to the primals.

    The gradient with respect to the tangents is that of ``attention_backward``: out_t and lse_t
    are linear in them.

    Args:
        grad_out, grad_lse: gradients of ``out_t`` and ``lse_t`` (the latter may be None).
        query ... biases_t: as given to :func:`attention_jvp`; ``out_t``, ``lse_t`` its results.
        bias_grads: per source whether the gradient of its bias is wanted.

    Returns:
        (dquery, [dkey], [dvalue], [dbias of the flagged sources]) as ``attention_backward``.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: head dimension outside 1 .. 256.
    """
    check_dtypes(
        ("query", [query]), ("query_t", [query_t]), ("keys_t", keys_t), ("values_t", values_t)
    )
    check_pairs("biases_t", biases_t, boolean=False)
    results, launches = plan_gradients(
        grad_out,
        grad_lse,
        query,
        keys,
        values,
        biases,
        masks,
        indices,
        scales,
        causal,
        out,
        lse,
        bias_grads,
        Tangents(query_t, keys_t, values_t, biases_t, out_t, lse_t),
    )
    run(launches, query.device)
    return results
