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
from typing import NamedTuple

import torch

from ._attention_bias_gradient import bias_kernel
from ._attention_gradients import Saved
from ._attention_key_gradient import key_kernel
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
from ._attention_query_gradient import query_kernel
from ._triton import triton

Gradients = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class Tangents(NamedTuple):
    """Inputs and results of the forward-mode derivative whose gradient is wanted."""

    query: torch.Tensor
    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor | None]
    out: torch.Tensor
    lse: torch.Tensor


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
