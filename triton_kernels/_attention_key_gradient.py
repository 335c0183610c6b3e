"""The key pass of the attention backward: one program per block of keys of a source.

Each loops over the queries that read them. The formulas are in
``attention_backward``.
"""

from ._attention_gradients import logit_gradients
from ._attention_tiles import (
    any_pair,
    biased,
    count,
    diagonal,
    finite_lse,
    load_rows,
    load_tile,
    permitted,
    probabilities,
    store_tile,
    tangent_logits,
)
from ._triton import tl, triton


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
    ds, x, u = logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
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
