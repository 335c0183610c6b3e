"""Attention written out: the specification of ``attend``, its oracle, and its fallback.

Every logit is formed, so this is for understanding, for tests, and for devices without a kernel.
Arithmetic is float64 for float64 inputs and float32 for all others; blended tokens and results are
rounded once, to the dtype of the inputs. Plain autograd differentiates it to any order, forward and
reverse. Guards (``torch.where`` before, not only after, the operation that would overflow) keep
derivatives of fully masked rows and of -inf biases at zero instead of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.ops._sources import (
    CAUSAL_LOWER_RIGHT,
    CAUSAL_NONE,
    KV,
    AttendResult,
    Blend,
    normalise,
    normalise_merge,
    require_one_softmax,
)


def attend_reference(
    query: Tensor,
    sources: KV | Sequence[KV],
    *,
    blend: Blend | None = None,
    scale: float | None = None,
) -> Tensor:
    """Sum over groups of ``gate * softmax(logits of the group) V``, as ``transfuse.ops.attend``."""
    call = normalise(query, sources, blend, scale)
    mixed = _mix(query, call.query_other, call.query_weight, call.query_index)
    keys = [
        _mix(*parts)
        for parts in zip(
            call.keys, call.key_others, call.key_weights, call.key_indices, strict=True
        )
    ]
    total = None
    for group, gate in enumerate(call.gates):
        members = [s for s, own in enumerate(call.groups) if own == group]
        out, _ = _one_softmax(
            mixed,
            [keys[s] for s in members],
            [call.values[s] for s in members],
            [call.biases[s] for s in members],
            [call.masks[s] for s in members],
            [call.indices[s] for s in members],
            [call.scales[s] for s in members],
            [call.causal[s] for s in members],
        )
        out = _gated(out, gate)
        total = out if total is None else total + out
    return total.to(query.dtype)


def attend_with_lse_reference(
    query: Tensor,
    sources: KV | Sequence[KV],
    *,
    blend: Blend | None = None,
    scale: float | None = None,
) -> AttendResult:
    """As :func:`attend_reference` for one group with gate 1, with the log-sum-exp of its logits."""
    call = normalise(query, sources, blend, scale)
    require_one_softmax(call)
    out, lse = _one_softmax(
        _mix(query, call.query_other, call.query_weight, call.query_index),
        [
            _mix(*parts)
            for parts in zip(
                call.keys, call.key_others, call.key_weights, call.key_indices, strict=True
            )
        ],
        call.values,
        call.biases,
        call.masks,
        call.indices,
        call.scales,
        call.causal,
    )
    return AttendResult(out.to(query.dtype), lse)


def core_reference(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all sources, with the arguments of the raw op."""
    out, lse = _one_softmax(query, keys, values, biases, masks, indices, scales, causal)
    return out.to(query.dtype), lse


def merge_attention_reference(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    gates: Sequence[float | Tensor] | None = None,
) -> AttendResult:
    """``out = sum_s gate_s exp(lse_s - lse) out_s`` with ``lse = log sum_s exp(lse_s)``.

    The parts are attention over disjoint sets of keys; with gates None the result is attention over
    their union. A gate scales what its part contributes to the output and leaves the softmax, and
    so ``lse``, as it is (to weigh a part inside the softmax, add the logarithm of the weight to its
    lse).
    """
    checked = normalise_merge(outs, lses, gates)
    accumulate = _accumulate_dtype(outs[0])
    logits = torch.stack([lse.to(accumulate) for lse in lses], dim=-1)  # (B, H, N, S)
    weights, lse = _softmax(logits, logits != -torch.inf)
    total = None
    for part, (out, gate) in enumerate(zip(outs, checked, strict=True)):
        term = _gated(weights[..., part, None] * out.to(accumulate), gate)
        total = term if total is None else total + term
    return AttendResult(total.to(outs[0].dtype), lse)


def _one_softmax(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    scales: Sequence[float],
    causal: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The core in accumulation precision."""
    accumulate = _accumulate_dtype(query)
    batch, heads, length, _ = query.shape
    query = query.to(accumulate)
    logits, allowed, columns = [], [], []
    for key, value, bias, mask, index, scale, rule in zip(
        keys, values, biases, masks, indices, scales, causal, strict=True
    ):
        key = _per_query(key, index, batch, heads).to(accumulate)  # (B, H, M, D)
        value = _per_query(value, index, batch, heads).to(accumulate)  # (B, H, M, Dv)
        part = scale * (query @ key.transpose(-2, -1))  # (B, H, N, M)
        may = _causal(rule, length, key.shape[2], query.device).expand(part.shape)
        if mask is not None:
            may = may & mask
        if bias is not None:
            bias = bias.to(accumulate)
            finite = bias != -torch.inf
            may = may & finite
            part = part + torch.where(finite, bias, 0.0)
        logits.append(part)
        allowed.append(may)
        columns.append(value)
    weights, lse = _softmax(torch.cat(logits, dim=-1), torch.cat(allowed, dim=-1))
    return weights @ torch.cat(columns, dim=-2), lse


def _softmax(logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the last axis; a row that allows nothing gives 0 and -inf."""
    alive = allowed.any(dim=-1, keepdim=True)
    if logits.shape[-1] == 0:
        peak = logits.new_zeros((*logits.shape[:-1], 1))
    else:
        # Both results do not depend on the peak, so it is a constant to autograd.
        peak = torch.where(allowed, logits.detach(), -torch.inf).amax(dim=-1, keepdim=True)
        peak = torch.where(alive, peak, 0.0)
    powers = torch.exp(torch.where(allowed, logits, peak) - peak)
    powers = torch.where(allowed, powers, 0.0)
    total = torch.where(alive, powers.sum(dim=-1, keepdim=True), 1.0)
    lse = torch.where(alive, peak + torch.log(total), -torch.inf)
    return powers / total, lse.squeeze(-1)


def _per_query(source: Tensor, index: Tensor | None, batch: int, heads: int) -> Tensor:
    """Keys or values as each query sees them: (Bs, Hk, M, C) -> (B, H, M, C)."""
    if index is not None:
        source = source.index_select(0, index)
    elif source.shape[0] != batch:
        source = source.expand(batch, -1, -1, -1)
    if source.shape[1] != heads:
        source = source.repeat_interleave(heads // source.shape[1], dim=1)
    return source


def _mix(
    own: Tensor, other: Tensor | None, weight: float | Tensor | None, index: Tensor | None
) -> Tensor:
    """``(1 - weight) * own + weight * other[index]``, a tensor of the dtype of ``own``.

    Made in accumulation precision and rounded once: a kernel whose products take bfloat16 operands
    cannot keep more of it.
    """
    if other is None:
        return own
    if index is not None:
        other = other.index_select(0, index)
    if isinstance(weight, Tensor):
        weight = weight.to(_accumulate_dtype(own))[..., None]
    elif weight == 0.0:
        return own
    elif weight == 1.0:
        return other.expand(own.shape)
    wide, other = own.to(_accumulate_dtype(own)), other.to(_accumulate_dtype(own))
    return ((1.0 - weight) * wide + weight * other).to(own.dtype)


def _gated(out: Tensor, gate: float | Tensor) -> Tensor:
    if isinstance(gate, Tensor):
        return gate.to(out.dtype)[..., None] * out
    return out if gate == 1.0 else gate * out


def _causal(rule: int, length: int, keys: int, device: torch.device) -> Tensor:
    """(N, M) bool, True = may attend."""
    if rule == CAUSAL_NONE:
        return torch.ones((), dtype=torch.bool, device=device)
    query = torch.arange(length, device=device)[:, None]
    if rule == CAUSAL_LOWER_RIGHT:
        query = query + (keys - length)
    return torch.arange(keys, device=device) <= query


def _accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
