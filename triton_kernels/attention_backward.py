"""Gradients of attention, and of its forward-mode derivative, without atomics.

Three passes, each recomputing the probabilities from the saved log-sum-exp:

- query pass: one program per block of queries, loops over all sources' keys; also leaves the row
  statistics that the other passes read;
- key pass, per source: one program per block of keys of one source batch and key head, loops over
  the query batches mapped to it, the query heads that share it and the queries;
- bias pass, per bias that wants a gradient: one program per block of the bias's own shape, loops
  over whatever the bias was broadcast along.

With W = G V^T, delta = rowsum(G out) - g (G, g: gradients of out and lse) and dS = P (W - delta):
dq = c dS K, dk = c dS^T Q, dv = P^T G, dbias = dS.

For the derivative (suffix t: tangents, T: tangent of the logits, mu = lse_t), with Z = G V_t^T,
rho = rowsum(G out_t) - mu delta, Y = T (W - delta) - mu W + Z, X = P (Y - rho), U = P (T - mu):
dq = c (X K + dS K_t), dk = c (X^T Q + dS^T Q_t), dv = U^T G, dbias = X.
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
    maybe,
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
    diagonal,
    finite_lse,
    key_limits,
    load_rows,
    load_tile,
    locate,
    permitted,
    probabilities,
    store_rows,
    store_tile,
    tangent_logits,
)
from ._triton import tl, triton


class Saved(NamedTuple):
    """What the passes read per query; ``delta`` and ``rho`` are left by the query pass."""

    query: Any
    query_tangent: Any
    grad_out: Any
    grad_lse: Any
    out: Any
    lse: Any
    out_tangent: Any
    lse_tangent: Any
    delta: Any
    rho: Any


class Tangents(NamedTuple):
    """Inputs and results of the forward-mode derivative whose gradient is wanted."""

    query: torch.Tensor
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    out: torch.Tensor
    lse: torch.Tensor


@triton.jit
def _logit_gradients(p, w, t, z, delta, mu, rho, TANGENT: tl.constexpr):
    """(dS, X, U) of the module docstring; without tangents X = dS and U = P."""
    ds = p * (w - delta)
    if TANGENT:
        x = p * (t * (w - delta) - mu * w + z - rho)
        u = p * (t - mu)
    else:
        x = ds
        u = p
    return ds, x, u


@triton.jit
def _query_step(
    acc,
    query,
    query_tangent,
    grad,
    lse,
    delta,
    mu,
    rho,
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
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of keys to dq / scale."""
    kv_head = head // source.repeat
    length = source.length
    key = load_tile(
        source.key, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_D, D, CHECK, WIDE
    )
    value = load_tile(
        source.value, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_DV, DV, CHECK, WIDE
    )
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = biased(
        scores, source, allowed, batch, head, start_m, start_n, i, j, rows, CHECK, RESTRICTED
    )
    p = probabilities(logits, lse)
    w = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    t = w
    z = w
    if TANGENT:
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
        products = tl.dot(query_tangent, tl.trans(key), input_precision=PRECISION)
        products = tl.dot(query, tl.trans(key_tangent), products, input_precision=PRECISION)
        t = tangent_logits(products, source, batch, head, start_m, start_n, i, j, rows, CHECK)
        z = tl.dot(grad, tl.trans(value_tangent), input_precision=PRECISION)
    ds, x, _u = _logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
    acc = tl.dot(x.to(key.dtype), key, acc, input_precision=PRECISION)
    if TANGENT:
        acc = tl.dot(ds.to(key.dtype), key_tangent, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _query_walk(
    acc,
    query,
    query_tangent,
    grad,
    lse,
    delta,
    mu,
    rho,
    source,
    source_batch,
    batch,
    head,
    start_m,
    rows,
    first,
    last,
    CHECK: tl.constexpr,
    TANGENT: tl.constexpr,
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
                acc = _query_step(
                    acc,
                    query,
                    query_tangent,
                    grad,
                    lse,
                    delta,
                    mu,
                    rho,
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
                    TANGENT,
                    D,
                    DV,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                    WIDE,
                    PRECISION,
                )
        else:
            acc = _query_step(
                acc,
                query,
                query_tangent,
                grad,
                lse,
                delta,
                mu,
                rho,
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
                TANGENT,
                D,
                DV,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                WIDE,
                PRECISION,
            )
    return acc


@triton.jit
def _query_take(
    acc,
    query,
    query_tangent,
    grad,
    lse,
    delta,
    mu,
    rho,
    source,
    batch,
    head,
    start_m,
    rows,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one source to dq / scale: the blocks that need no check, then the rest."""
    source_batch = batch_of(source, batch)
    full, stop = key_limits(source, start_m, rows, BLOCK_M, BLOCK_N)
    acc = _query_walk(
        acc,
        query,
        query_tangent,
        grad,
        lse,
        delta,
        mu,
        rho,
        source,
        source_batch,
        batch,
        head,
        start_m,
        rows,
        0,
        full,
        False,
        TANGENT,
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
        acc = _query_walk(
            acc,
            query,
            query_tangent,
            grad,
            lse,
            delta,
            mu,
            rho,
            source,
            source_batch,
            batch,
            head,
            start_m,
            rows,
            full,
            stop,
            True,
            TANGENT,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
    return acc


@triton.jit
def query_kernel(
    saved,
    sources,
    grad_query,
    carry,
    heads,
    rows,
    COUNT: tl.constexpr,
    UNIFORM: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and delta (and rho) for the other passes. UNIFORM: all sources share one scale."""
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    start_m = (tiles - 1 - program % tiles) * BLOCK_M
    pair = program // tiles
    batch = pair // heads
    head = pair % heads

    query = load_tile(saved.query, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    grad = load_tile(
        saved.grad_out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE
    ).to(query.dtype)
    out = load_tile(saved.out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE)
    lse = load_rows(saved.lse, batch, head, start_m, rows, BLOCK_M, WIDE)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if saved.grad_lse is not None:
        delta -= load_rows(saved.grad_lse, batch, head, start_m, rows, BLOCK_M, WIDE)
    # Whatever gradient a fully masked row gets, nothing depends on it.
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    lse = finite_lse(lse)
    query_tangent = query
    mu = delta
    rho = delta
    if TANGENT:
        query_tangent = load_tile(
            saved.query_tangent, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE
        )
        out_tangent = load_tile(
            saved.out_tangent, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE
        )
        mu = load_rows(saved.lse_tangent, batch, head, start_m, rows, BLOCK_M, WIDE)
        rho = tl.sum(grad.to(tl.float32) * out_tangent.to(tl.float32), 1) - mu * delta
    if FIRST:
        store_rows(saved.delta, delta, batch, head, start_m, rows, BLOCK_M, WIDE)
        if TANGENT:
            store_rows(saved.rho, rho, batch, head, start_m, rows, BLOCK_M, WIDE)

    if FIRST:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        acc = load_tile(carry, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    for s in tl.static_range(COUNT):
        # The scale multiplies the float32 sum, not dS: small dS would underflow in float16.
        part = acc if UNIFORM else tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        part = _query_take(
            part,
            query,
            query_tangent,
            grad,
            lse[:, None],
            delta[:, None],
            mu[:, None],
            rho[:, None],
            sources[s],
            batch,
            head,
            start_m,
            rows,
            TANGENT,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            WIDE,
            PRECISION,
        )
        acc = part if UNIFORM else acc + part * sources[s].scale
    if UNIFORM:
        acc = acc * sources[0].scale
    if LAST:
        store_tile(grad_query, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, WIDE)
    else:
        store_tile(carry, acc, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, WIDE)


@triton.jit
def _key_step(
    grad_key,
    grad_value,
    key,
    value,
    key_tangent,
    value_tangent,
    saved,
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
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of queries to dk / scale and dv; tiles are (keys, queries)."""
    query = load_tile(saved.query, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    grad = load_tile(
        saved.grad_out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE
    ).to(query.dtype)
    lse = finite_lse(load_rows(saved.lse, batch, head, start_m, rows, BLOCK_M, WIDE))
    delta = load_rows(saved.delta, batch, head, start_m, rows, BLOCK_M, WIDE)[None, :]
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    logits = biased(
        scores, source, allowed, batch, head, start_m, start_n, i, j, rows, CHECK, RESTRICTED
    )
    p = probabilities(logits, lse[None, :])
    w = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    t = w
    z = w
    mu = delta
    rho = delta
    if TANGENT:
        query_tangent = load_tile(
            saved.query_tangent, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE
        )
        mu = load_rows(saved.lse_tangent, batch, head, start_m, rows, BLOCK_M, WIDE)[None, :]
        rho = load_rows(saved.rho, batch, head, start_m, rows, BLOCK_M, WIDE)[None, :]
        products = tl.dot(key, tl.trans(query_tangent), input_precision=PRECISION)
        products = tl.dot(key_tangent, tl.trans(query), products, input_precision=PRECISION)
        t = tangent_logits(products, source, batch, head, start_m, start_n, i, j, rows, CHECK)
        z = tl.dot(value_tangent, tl.trans(grad), input_precision=PRECISION)
    ds, x, u = _logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
    grad_value = tl.dot(u.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    grad_key = tl.dot(x.to(query.dtype), query, grad_key, input_precision=PRECISION)
    if TANGENT:
        grad_key = tl.dot(ds.to(query.dtype), query_tangent, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def _key_walk(
    grad_key,
    grad_value,
    key,
    value,
    key_tangent,
    value_tangent,
    saved,
    source,
    batch,
    kv_head,
    start_n,
    rows,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add all queries of one batch entry, over the heads that share this key head."""
    i = count(BLOCK_M, WIDE)[None, :]
    j = count(BLOCK_N, WIDE)[:, None]
    first = 0
    if source.causal != 0:
        first = max(0, start_n - diagonal(source, rows)) // BLOCK_M * BLOCK_M
    for r in range(0, source.repeat):
        head = kv_head * source.repeat + r
        for start_m in range(first, rows, BLOCK_M):
            allowed = permitted(
                source, batch, head, start_m, start_n, i, j, rows, not source.even, True
            )
            if source.mask is not None:
                if any_pair(allowed):
                    grad_key, grad_value = _key_step(
                        grad_key,
                        grad_value,
                        key,
                        value,
                        key_tangent,
                        value_tangent,
                        saved,
                        source,
                        allowed,
                        batch,
                        head,
                        start_m,
                        start_n,
                        i,
                        j,
                        rows,
                        not source.even,
                        True,
                        TANGENT,
                        D,
                        DV,
                        BLOCK_M,
                        BLOCK_D,
                        BLOCK_DV,
                        WIDE,
                        PRECISION,
                    )
            else:
                grad_key, grad_value = _key_step(
                    grad_key,
                    grad_value,
                    key,
                    value,
                    key_tangent,
                    value_tangent,
                    saved,
                    source,
                    allowed,
                    batch,
                    head,
                    start_m,
                    start_n,
                    i,
                    j,
                    rows,
                    not source.even,
                    not source.even,
                    TANGENT,
                    D,
                    DV,
                    BLOCK_M,
                    BLOCK_D,
                    BLOCK_DV,
                    WIDE,
                    PRECISION,
                )
    return grad_key, grad_value


@triton.jit
def key_kernel(
    saved,
    source,
    grad_key,
    grad_value,
    batches,
    kv_heads,
    rows,
    SHARED: tl.constexpr,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one source. SHARED: every query batch reads the one source batch."""
    length = source.length
    tiles = tl.cdiv(length, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % tiles * BLOCK_N
    pair = program // tiles
    source_batch = pair // kv_heads
    kv_head = pair % kv_heads

    key = load_tile(
        source.key, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_D, D, True, WIDE
    )
    value = load_tile(
        source.value, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_DV, DV, True, WIDE
    )
    key_tangent = key
    value_tangent = value
    if TANGENT:
        key_tangent = load_tile(
            source.key_tangent,
            source_batch,
            kv_head,
            start_n,
            length,
            BLOCK_N,
            BLOCK_D,
            D,
            True,
            WIDE,
        )
        value_tangent = load_tile(
            source.value_tangent,
            source_batch,
            kv_head,
            start_n,
            length,
            BLOCK_N,
            BLOCK_DV,
            DV,
            True,
            WIDE,
        )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first = source_batch
    last = source_batch + 1
    if SHARED or source.index is not None:
        first = 0
        last = batches
    for batch in range(first, last):
        if source.index is not None:
            if tl.load(source.index + batch) == source_batch:
                dk, dv = _key_walk(
                    dk,
                    dv,
                    key,
                    value,
                    key_tangent,
                    value_tangent,
                    saved,
                    source,
                    batch,
                    kv_head,
                    start_n,
                    rows,
                    TANGENT,
                    D,
                    DV,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BLOCK_DV,
                    WIDE,
                    PRECISION,
                )
        else:
            dk, dv = _key_walk(
                dk,
                dv,
                key,
                value,
                key_tangent,
                value_tangent,
                saved,
                source,
                batch,
                kv_head,
                start_n,
                rows,
                TANGENT,
                D,
                DV,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                WIDE,
                PRECISION,
            )
    dk = dk * source.scale
    store_tile(grad_key, dk, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_D, D, WIDE)
    store_tile(grad_value, dv, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_DV, DV, WIDE)


@triton.jit
def _bias_step(
    acc,
    saved,
    source,
    allowed,
    batch,
    head,
    start_m,
    start_n,
    i,
    j,
    rows,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS (or X) of one tile of (queries, keys)."""
    source_batch = batch_of(source, batch)
    kv_head = head // source.repeat
    length = source.length
    query = load_tile(saved.query, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE)
    grad = load_tile(
        saved.grad_out, batch, head, start_m, rows, BLOCK_M, BLOCK_DV, DV, True, WIDE
    ).to(query.dtype)
    lse = finite_lse(load_rows(saved.lse, batch, head, start_m, rows, BLOCK_M, WIDE))
    delta = load_rows(saved.delta, batch, head, start_m, rows, BLOCK_M, WIDE)[:, None]
    key = load_tile(
        source.key, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_D, D, True, WIDE
    )
    value = load_tile(
        source.value, source_batch, kv_head, start_n, length, BLOCK_N, BLOCK_DV, DV, True, WIDE
    )
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = biased(scores, source, allowed, batch, head, start_m, start_n, i, j, rows, True, True)
    p = probabilities(logits, lse[:, None])
    w = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    t = w
    z = w
    mu = delta
    rho = delta
    if TANGENT:
        query_tangent = load_tile(
            saved.query_tangent, batch, head, start_m, rows, BLOCK_M, BLOCK_D, D, True, WIDE
        )
        mu = load_rows(saved.lse_tangent, batch, head, start_m, rows, BLOCK_M, WIDE)[:, None]
        rho = load_rows(saved.rho, batch, head, start_m, rows, BLOCK_M, WIDE)[:, None]
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
            True,
            WIDE,
        )
        products = tl.dot(query, tl.trans(key_tangent), products, input_precision=PRECISION)
        t = tangent_logits(products, source, batch, head, start_m, start_n, i, j, rows, True)
        value_tangent = load_tile(
            source.value_tangent,
            source_batch,
            kv_head,
            start_n,
            length,
            BLOCK_N,
            BLOCK_DV,
            DV,
            True,
            WIDE,
        )
        z = tl.dot(grad, tl.trans(value_tangent), input_precision=PRECISION)
    _ds, x, _u = _logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
    return acc + x


@triton.jit
def bias_kernel(
    saved,
    source,
    grad_bias,
    batches,
    heads,
    rows,
    own_heads,
    own_rows,
    own_keys,
    SUM_BATCH: tl.constexpr,
    SUM_HEAD: tl.constexpr,
    SUM_ROW: tl.constexpr,
    SUM_KEY: tl.constexpr,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    OWN_M: tl.constexpr,
    OWN_N: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one bias, summed over the SUM_ axes it was broadcast along."""
    tiles_m = tl.cdiv(own_rows, BLOCK_M)
    tiles_n = tl.cdiv(own_keys, BLOCK_N)
    program = tl.program_id(0)
    own_n = program % tiles_n * BLOCK_N
    program = program // tiles_n
    own_m = program % tiles_m * BLOCK_M
    program = program // tiles_m
    own_head = program % own_heads
    own_batch = program // own_heads
    last_batch = batches if SUM_BATCH else own_batch + 1
    last_head = heads if SUM_HEAD else own_head + 1
    last_m = rows if SUM_ROW else own_m + 1
    last_n = source.length if SUM_KEY else own_n + 1

    i = count(BLOCK_M, WIDE)[:, None]
    j = count(BLOCK_N, WIDE)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(own_batch, last_batch):
        for head in range(own_head, last_head):
            for start_m in range(own_m, last_m, BLOCK_M):
                for start_n in range(own_n, last_n, BLOCK_N):
                    allowed = permitted(
                        source, batch, head, start_m, start_n, i, j, rows, True, True
                    )
                    if any_pair(allowed):
                        acc = _bias_step(
                            acc,
                            saved,
                            source,
                            allowed,
                            batch,
                            head,
                            start_m,
                            start_n,
                            i,
                            j,
                            rows,
                            TANGENT,
                            D,
                            DV,
                            BLOCK_M,
                            BLOCK_N,
                            BLOCK_D,
                            BLOCK_DV,
                            WIDE,
                            PRECISION,
                        )
    if SUM_ROW:
        acc = tl.sum(acc, 0)[None, :]
    if SUM_KEY:
        acc = tl.sum(acc, 1)[:, None]
    i = count(OWN_M, WIDE)[:, None]
    j = count(OWN_N, WIDE)[None, :]
    base = locate(grad_bias, own_batch, own_head, own_m)
    base += tl.cast(own_n, tl.int64) * grad_bias.column
    tl.store(
        base + i * grad_bias.row * grad_bias.unit + j * grad_bias.column,
        acc.to(grad_bias.data.dtype.element_ty),
        mask=(own_m + i < own_rows) & (own_n + j < own_keys),
    )


Gradients = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


def plan_gradients(
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
    bias_grads: Sequence[bool],
    tangents: Tangents | None = None,
) -> tuple[Gradients, list[Launch]]:
    """Results and launches of a gradient; with ``tangents``, of that of the derivative."""
    check_dtypes(("query", [query]), ("keys", keys), ("values", values))
    check_pairs("biases", biases, boolean=False)
    check_pairs("masks", masks, boolean=True)
    batches, heads, rows, width = query.shape
    value_width = values[0].shape[3]
    check_head_dims(width, value_width)
    delta = query.new_empty((batches, heads, rows), dtype=torch.float32)
    second = tangents is not None
    saved = Saved(
        query=operand(query),
        query_tangent=operand(tangents.query) if second else None,
        grad_out=operand(grad_out),
        grad_lse=maybe(operand, grad_lse),
        out=operand(out),
        lse=operand(lse),
        out_tangent=operand(tangents.out) if second else None,
        lse_tangent=operand(tangents.lse) if second else None,
        delta=operand(delta),
        rho=operand(torch.empty_like(delta)) if second else None,
    )

    def record(s: int, block_n: int):
        tangent = (tangents.keys[s], tangents.values[s], tangents.biases[s]) if second else None
        return source_record(
            keys[s],
            values[s],
            bias=biases[s],
            mask=masks[s],
            index=indices[s],
            scale=scales[s],
            causal=causal[s],
            heads=heads,
            block_n=block_n,
            tangents=tangent,
        )

    prefix = "jvp_" if second else ""
    widest = max(width, value_width)
    common = {
        "TANGENT": second,
        "D": width,
        "DV": value_width,
        "BLOCK_D": padded(width),
        "BLOCK_DV": padded(value_width),
        "PRECISION": matrix_precision(),
    }
    launches = []

    longest = max(key.shape[2] for key in keys)
    config = choose(
        prefix + "dquery", query.dtype, widest, rows, longest, differs_per_row(biases, masks)
    )
    records = [record(s, config.block_n) for s in range(len(keys))]
    chunks = [records[at : at + MAX_SOURCES] for at in range(0, len(records), MAX_SOURCES)]
    grad_query = query.new_empty(query.shape)
    carry = None
    if len(chunks) > 1:
        carry = operand(torch.empty_like(grad_query, dtype=torch.float32))
    for number, chunk in enumerate(chunks):
        arguments = {
            "saved": saved,
            "sources": tuple(chunk),
            "grad_query": operand(grad_query),
            "carry": carry,
            "heads": heads,
            "rows": rows,
            "COUNT": len(chunk),
            "UNIFORM": len(chunks) == 1 and len(set(scales)) == 1,
            "FIRST": number == 0,
            "LAST": number + 1 == len(chunks),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WIDE": is_wide(saved, tuple(chunk)),
            **common,
        }
        grid = (triton.cdiv(rows, config.block_m) * batches * heads,)
        launches.append(Launch(query_kernel, grid, arguments, options(config)))

    grad_keys, grad_values = [], []
    for s, key in enumerate(keys):
        source_batches, kv_heads, length, _ = key.shape
        config = choose(
            prefix + "dkey",
            query.dtype,
            widest,
            rows,
            length,
            differs_per_row([biases[s], masks[s]]),
        )
        source = record(s, config.block_n)
        grad_keys.append(key.new_empty(key.shape))
        grad_values.append(key.new_empty(values[s].shape))
        arguments = {
            "saved": saved,
            "source": source,
            "grad_key": operand(grad_keys[s]),
            "grad_value": operand(grad_values[s]),
            "batches": batches,
            "kv_heads": kv_heads,
            "rows": rows,
            "SHARED": source_batches == 1,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WIDE": is_wide(saved, source),
            **common,
        }
        grid = (triton.cdiv(length, config.block_n) * source_batches * kv_heads,)
        launches.append(Launch(key_kernel, grid, arguments, options(config)))

    grad_biases = []
    for s, wanted in enumerate(bias_grads):
        bias = biases[s]
        if not wanted or bias is None:
            continue
        own = [1 if bias.stride(axis) == 0 else bias.shape[axis] for axis in range(4)]
        config = choose(
            prefix + "dbias",
            query.dtype,
            widest,
            rows,
            keys[s].shape[2],
            differs_per_row([bias, masks[s]]),
        )
        source = record(s, config.block_n)
        grad_bias = bias.new_empty(own)
        grad_biases.append(grad_bias)
        arguments = {
            "saved": saved,
            "source": source,
            "grad_bias": operand(grad_bias),
            "batches": batches,
            "heads": heads,
            "rows": rows,
            "own_heads": own[1],
            "own_rows": own[2],
            "own_keys": own[3],
            "SUM_BATCH": own[0] != bias.shape[0],
            "SUM_HEAD": own[1] != bias.shape[1],
            "SUM_ROW": own[2] != bias.shape[2],
            "SUM_KEY": own[3] != bias.shape[3],
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "OWN_M": 1 if own[2] != bias.shape[2] else config.block_m,
            "OWN_N": 1 if own[3] != bias.shape[3] else config.block_n,
            "WIDE": is_wide(saved, source, operand(grad_bias)),
            **common,
        }
        tiles = triton.cdiv(own[2], config.block_m) * triton.cdiv(own[3], config.block_n)
        grid = (tiles * own[0] * own[1],)
        launches.append(Launch(bias_kernel, grid, arguments, options(config)))
    return (grad_query, grad_keys, grad_values, grad_biases), launches


def attention_backward(
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
    bias_grads: Sequence[bool],
) -> Gradients:
    """Gradient of <grad_out, out> + <grad_lse, lse>.

    Args:
        grad_out: (B, H, N, Dv), any strides.
        grad_lse: (B, H, N) or None, any strides.
        query, keys, values, biases, masks, indices, scales, causal: as given to
            :func:`attention_forward`.
        out, lse: its results.
        bias_grads: per source whether the gradient of its bias is wanted.

    Returns:
        (dquery, [dkey], [dvalue], [dbias of the flagged sources]). A bias gradient has the bias's
        own shape: size 1 along axes where its stride is 0.

    Raises:
        TypeError: unsupported or mixed dtypes.
        ValueError: head dimension outside 1 .. 256.

    Notes:
        Deterministic, no atomics; memory beyond the results: one float32 per query and head.
    """
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
    )
    run(launches, query.device)
    return results
