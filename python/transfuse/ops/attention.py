"""Fused attention injection: ``attend``, ``attend_with_lse`` and ``merge_attention``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _backend, _native, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _attention_ops, _attention_triton_ops
from transfuse.ops._attention_call import hopper_limit
from transfuse.ops._attention_core import Static, compact, functions, raw
from transfuse.ops._attention_reference import (
    _mix,
    attend_reference,
    attend_with_lse_reference,
    merge_attention_reference,
)
from transfuse.ops._sources import (
    CAUSAL_NONE,
    CAUSAL_UPPER_LEFT,
    KV,
    AttendResult,
    Blend,
    Normalised,
    autocast,
    normalise,
    require_one_softmax,
)

__all__ = ["KV", "AttendResult", "Blend", "attend", "attend_with_lse", "merge_attention"]

_backend.declare(
    "attend",
    ("reference", "cpu", "triton", "cuda"),
    limits={"cuda": hopper_limit},
    dtypes={"cuda": (torch.bfloat16, torch.float16)},
)
_attention_triton_ops.register()
if _native.status().loaded:
    _attention_ops.register()


def attend(
    query: Tensor,
    sources: KV | Sequence[KV],
    *,
    blend: Blend | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of one query to several sources of keys and values, fused.

    With q = (1 - w) query + w other[index] when ``blend`` is given, source s has the logits

    .. math:: l_s = \tau_s \, \mathrm{scale} \, q k_s^\top + b_s,

    masked where told. Sources of one group g share one softmax over all their keys, and

    .. math:: \mathrm{out} = \sum_g \mathrm{gate}_g \; \mathrm{softmax}(l_g)\, V_g .

    Args:
        query: (B, H, N, D), float32, float64, bfloat16 or float16; any strides.
        sources: one :class:`KV` or several; see there for keys, masks, biases, gates, index maps.
        blend: a second query mixed in inside the kernel.
        scale: finite factor of the logits; None means ``1 / sqrt(D)``.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back. ``"cuda"`` is a forward pass for compute capability 9.0, half precisions,
            head dims that are multiples of 8 up to 128 and at most 8 sources; blends run in eager
            torch before it, derivatives are those of ``"triton"``, and of the blocks that are
            hidden only those that the causal rule hides are skipped.

    Returns:
        (B, H, N, Dv) in the dtype of the query. Rows that may attend to nothing are zero.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        O(B H N M (D + Dv)) operations; memory beyond the output is O(N) in forward, backward,
        double backward and forward mode. Logits and sums are float32 (float64 for float64). The
        same bits come out on every run and for every number of threads. Blocks of 32 queries and
        up to 96 keys that a mask or the causal rule hides wholly are skipped. When a derivative is
        wanted, blends, gates and the sum over groups run as eager torch around the fused core.

    Reference:
        Online softmax: Milakov & Gimelshein 2018 (arXiv:1805.02867); recomputation in the backward:
        Dao et al. 2022, FlashAttention (arXiv:2205.14135).

    Example:
        >>> import torch
        >>> from transfuse.ops import KV, attend
        >>> q, k, v = torch.randn(3, 1, 8, 64, 40).unbind(0)
        >>> text_k, text_v = torch.randn(2, 1, 8, 7, 40).unbind(0)
        >>> attend(q, [KV(k, v), KV(text_k, text_v, group=1, gate=0.5)]).shape
        torch.Size([1, 8, 64, 40])
    """
    query, sources, blend = autocast(query, sources, blend)
    if backend == "reference":
        return attend_reference(query, sources, blend=blend, scale=scale)
    call = normalise(query, sources, blend, scale)
    chosen = _choose(call, backend)
    if chosen == "composed":
        return _composed(call)
    if needs_derivative(_tensors(call)):
        return _differentiable(call, chosen)
    return _fused(call, chosen)[0]


def attend_with_lse(
    query: Tensor,
    sources: KV | Sequence[KV],
    *,
    blend: Blend | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> AttendResult:
    r"""As :func:`attend` for one group with gate 1, together with the log-sum-exp of its logits.

    Args:
        query, sources, blend, scale, backend: as in :func:`attend`; all sources in group 0, gate 1.

    Returns:
        :class:`AttendResult` (out, lse); both are differentiable. lse is (B, H, N), float32
        (float64 for float64), -inf where a row may attend to nothing.

    Raises:
        ValueError: more than one group, or a gate other than 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import KV, attend_with_lse, merge_attention
        >>> q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
        >>> parts = (slice(0, 9), slice(9, 16))
        >>> halves = [attend_with_lse(q, KV(k[:, :, s], v[:, :, s])) for s in parts]
        >>> merged = merge_attention([h.out for h in halves], [h.lse for h in halves])
        >>> torch.allclose(merged.out, attend_with_lse(q, KV(k, v)).out, atol=1e-5)
        True
    """
    query, sources, blend = autocast(query, sources, blend)
    if backend == "reference":
        return attend_with_lse_reference(query, sources, blend=blend, scale=scale)
    call = normalise(query, sources, blend, scale)
    require_one_softmax(call)
    chosen = _choose(call, backend)
    if chosen == "composed":
        return attend_with_lse_reference(query, sources, blend=blend, scale=scale)
    if needs_derivative(_tensors(call)):
        return AttendResult(*_core(call, chosen, range(len(call.keys)), _blended_query(call)))
    return AttendResult(*_fused(call, chosen))


def merge_attention(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    gates: Sequence[float | Tensor] | None = None,
) -> AttendResult:
    r"""Attention over a union of key sets from the results over its parts.

    .. math:: \mathrm{lse} = \log \sum_s e^{\mathrm{lse}_s}, \quad
              \mathrm{out} = \sum_s \mathrm{gate}_s \, e^{\mathrm{lse}_s - \mathrm{lse}}
              \, \mathrm{out}_s .

    Args:
        outs: tensors (B, H, N, Dv), one per part.
        lses: tensors (B, H, N), one per part, -inf where a part had nothing to attend to.
        gates: one factor per part, a number or a tensor that broadcasts to (B, H, N); it scales
            the part's contribution and leaves the softmax as it is.

    Returns:
        :class:`AttendResult`; rows to which no part contributes are zero with lse -inf.

    Raises:
        ValueError: counts or shapes that do not agree.

    Notes:
        Elementwise work of O(B H N Dv) per part, in eager torch: differentiable to any order.

    Example:
        >>> import torch
        >>> from transfuse.ops import merge_attention
        >>> outs, lses = torch.randn(2, 1, 2, 5, 8).unbind(0), torch.zeros(2, 1, 2, 5).unbind(0)
        >>> torch.allclose(merge_attention(outs, lses).out, (outs[0] + outs[1]) / 2, atol=1e-6)
        True
    """
    return merge_attention_reference(outs, lses, gates)


# ---- internal ------------------------------------------------------------------------------------


def _choose(call: Normalised, backend: str | None) -> str:
    tensors = (call.query, *(t for pair in zip(call.keys, call.values, strict=True) for t in pair))
    device, dtype = call.query.device, call.query.dtype
    return _triton_ops.traced(_backend.choose("attend", backend, device, dtype, tensors))


def _tensors(call: Normalised) -> list[Tensor | None]:
    """Everything a derivative may be asked of."""
    weights = [call.query_weight, *call.key_weights, *call.gates]
    return [
        call.query,
        call.query_other,
        *call.keys,
        *call.values,
        *call.key_others,
        *call.biases,
        *(w for w in weights if isinstance(w, Tensor)),
    ]


def _numbers(weights) -> tuple[list[float], list[Tensor | None]]:
    """Weights as numbers and tensors, the way the raw op takes them."""
    numbers = [w if isinstance(w, float) else 0.0 for w in weights]
    return numbers, [w if isinstance(w, Tensor) else None for w in weights]


def _fused(call: Normalised, backend: str) -> tuple[Tensor, Tensor]:
    """Everything in one kernel; not differentiable."""
    if call.is_core():
        return raw(backend).forward(
            call.query,
            call.keys,
            call.values,
            call.biases,
            call.masks,
            call.indices,
            call.scales,
            call.causal,
            [],
        )
    if backend == "triton":
        return _attention_triton_ops.fused(call)
    if backend == "cuda":
        call = _without_blends(call)
    (query_weight,), (query_weights,) = _numbers([call.query_weight])
    key_weight, key_weights = _numbers(call.key_weights)
    gate, gates = _numbers(call.gates)
    ops = torch.ops.transfuse
    traced = backend == _triton_ops.COMPILED
    return (ops.attention_fused_triton if traced else ops.attention_fused)(
        call.query,
        call.query_other,
        query_weight,
        query_weights,
        call.query_index,
        call.keys,
        call.values,
        call.key_others,
        key_weight,
        key_weights,
        call.key_indices,
        *compact(call.biases),
        call.masks,
        call.indices,
        call.scales,
        call.causal,
        call.groups,
        gate,
        gates,
    )


def _without_blends(call: Normalised) -> Normalised:
    """The same call with blends done in eager torch."""
    none = [None] * len(call.keys)
    return call._replace(
        query=_blended_query(call),
        query_other=None,
        query_weight=None,
        query_index=None,
        keys=_blended_keys(call, range(len(call.keys))),
        key_others=none,
        key_weights=none,
        key_indices=none,
    )


def _blended_keys(call: Normalised, members) -> list[Tensor]:
    return [
        _mix(call.keys[s], call.key_others[s], call.key_weights[s], call.key_indices[s])
        for s in members
    ]


def _blended_query(call: Normalised) -> Tensor:
    return _mix(call.query, call.query_other, call.query_weight, call.query_index)


def _core(call: Normalised, backend: str, members, query: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable core over some of the sources."""
    tensors = (
        query,
        *_blended_keys(call, members),
        *(call.values[s] for s in members),
        *(call.biases[s] for s in members),
        *(call.masks[s] for s in members),
        *(call.indices[s] for s in members),
    )
    static = Static(
        tuple(call.scales[s] for s in members), tuple(call.causal[s] for s in members), backend
    )
    if torch.compiler.is_compiling():
        return _attention_ops._forward(static, tensors)
    return functions.forward(static, tensors)


def _differentiable(call: Normalised, backend: str) -> Tensor:
    """Blends, gates and the sum over groups in eager torch, around the fused core of each group."""
    query = _blended_query(call)
    total = None
    for group, gate in enumerate(call.gates):
        members = [s for s, own in enumerate(call.groups) if own == group]
        out, _ = _core(call, backend, members, query)
        if isinstance(gate, Tensor):
            out = out * gate[..., None].to(out.dtype)
        elif gate != 1.0:
            out = out * gate
        total = out if total is None else total + out
    return total


def _composed(call: Normalised) -> Tensor:
    """Eager torch where no kernel is a default: SDPA per group, its keys concatenated."""
    query = _blended_query(call)
    batch, heads, rows, _ = query.shape
    total = None
    for group, gate in enumerate(call.gates):
        members = [s for s, own in enumerate(call.groups) if own == group]
        out = _sdpa_group(call, members, query, batch, heads, rows)
        if isinstance(gate, Tensor):
            out = out * gate[..., None].to(out.dtype)
        elif gate != 1.0:
            out = out * gate
        total = out if total is None else total + out
    return total


def _sdpa_group(
    call: Normalised, members, query: Tensor, batch: int, heads: int, rows: int
) -> Tensor:
    def per_query(tensor: Tensor, index: Tensor | None) -> Tensor:
        if index is not None:
            tensor = tensor.index_select(0, index)
        if tensor.shape[1] != heads:
            tensor = tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
        return tensor.expand(batch, -1, -1, -1)

    keys, values, shifts = [], [], []
    first = call.scales[members[0]]
    for s in members:
        key = _mix(call.keys[s], call.key_others[s], call.key_weights[s], call.key_indices[s])
        # One SDPA has one scale: the other sources' ratio to it goes into their keys.
        ratio = call.scales[s] / first if first != 0.0 else 1.0
        keys.append(per_query(key if ratio == 1.0 else key * ratio, call.indices[s]))
        values.append(per_query(call.values[s], call.indices[s]))
        shifts.append(_shift(call, s, query, rows))
    shift = None
    if any(t is not None for t in shifts):
        zero = query.new_zeros(())
        shift = torch.cat(
            [
                (zero if t is None else t).expand(batch, heads, rows, k.shape[2])
                for t, k in zip(shifts, keys, strict=True)
            ],
            dim=-1,
        )
    key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    if heads == 0:
        # Nothing to compute; torch 2.10's kernel for CPUs divides by the number of heads.
        return query @ key.mT @ value
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=shift, scale=first)
    if shift is not None or sum(k.shape[2] for k in keys) == 0:
        # Rows that may attend to nothing are zero here, NaN in SDPA.
        out = torch.nan_to_num(out) if shift is None else out.masked_fill(_blind(shift), 0.0)
    return out


def _blind(shift: Tensor) -> Tensor:
    return (shift == -torch.inf).all(dim=-1, keepdim=True)


def _shift(call: Normalised, s: int, query: Tensor, rows: int) -> Tensor | None:
    """Bias, mask and causal rule of a source as one additive tensor, or None."""
    keys = call.keys[s].shape[2]
    allowed = call.masks[s]
    if call.causal[s] != CAUSAL_NONE:
        position = torch.arange(rows, device=query.device)[:, None]
        if call.causal[s] != CAUSAL_UPPER_LEFT:
            position = position + (keys - rows)
        causal = torch.arange(keys, device=query.device) <= position
        allowed = causal if allowed is None else allowed & causal
    bias = call.biases[s]
    if allowed is None:
        return None if bias is None else bias.to(query.dtype)
    base = query.new_zeros(()) if bias is None else bias.to(query.dtype)
    return torch.where(allowed, base, -torch.inf)
