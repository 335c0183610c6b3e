"""The query pass of the attention backward: one program per block of queries.

Each loops over all keys of all sources, and leaves the row statistics that the others read. The
formulas are in ``attention_backward``.
"""

from ._attention_gradients import logit_gradients
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
    ds, x, _u = logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
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
