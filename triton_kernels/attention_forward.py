"""Attention over several sources: forward pass, and the fused inference op around it."""

from collections.abc import Sequence

import torch

from ._attention_forward_kernel import Carry, forward_kernel
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
from ._triton import triton


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
