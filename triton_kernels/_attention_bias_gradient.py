"""The bias pass of the attention backward: one program per block of a bias's own shape.

Each loops over what its bias was broadcast along. The formulas are in
``attention_backward``.
"""

from ._attention_gradients import logit_gradients
from ._attention_tiles import (
    any_pair,
    batch_of,
    biased,
    count,
    finite_lse,
    load_rows,
    load_tile,
    locate,
    permitted,
    probabilities,
    tangent_logits,
)
from ._triton import tl, triton


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
    _ds, x, _u = logit_gradients(p, w, t, z, delta, mu, rho, TANGENT)
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
