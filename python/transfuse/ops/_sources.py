"""What ``transfuse.ops.attend`` attends to: source descriptions and their validation.

A call is described by frozen dataclasses (:class:`KV`, :class:`Blend`); :func:`normalise` checks
all of it and lays it out as the parallel lists that kernels and autograd take, one entry per
source. After it nothing needs to be checked again. It touches metadata only (no tensor
op beyond a view), is traceable by ``torch.compile(fullgraph=True)``, and costs tens of
microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

MAX_HEAD_DIM = 256

CAUSAL_NONE = 0
CAUSAL_UPPER_LEFT = 1
CAUSAL_LOWER_RIGHT = 2
_CAUSAL = {
    None: CAUSAL_NONE,
    "upper_left": CAUSAL_UPPER_LEFT,
    "lower_right": CAUSAL_LOWER_RIGHT,
}

_QUERY_AXES = ("B", "H", "N", "D")
_KEY_AXES = ("Bs", "Hk", "M", "D")
_VALUE_AXES = ("Bs", "Hk", "M", "Dv")
_KEY_OTHER_AXES = ("Bo", "Hk", "M", "D")
_QUERY_OTHER_AXES = ("Bo", "H", "N", "D")
_LOGIT_AXES = ("B", "H", "N", "M")
_ROW_AXES = ("B", "H", "N")
_KEY_ROW_AXES = ("Bs", "Hk", "M")


# eq=False: comparing tensors with == is not a truth value, so instances compare by identity.
@dataclass(frozen=True, eq=False)
class Blend:
    """A second tensor mixed into queries or keys: ``(1 - weight) * x + weight * other[index]``.

    Args:
        other: (Bo, H, N, D) beside a query, (Bo, Hk, M, D) beside a key; same dtype as its partner.
            Bo is the batch size of the partner or 1, or anything with ``index``.
        weight: a finite number, or a tensor that broadcasts to (B, H, N) beside a query and to
            (Bs, Hk, M) beside a key, in the dtype of the partner or float32. 0 and 1 are exact.
        index: int64 or int32 (B,): which batch entry of ``other`` belongs to each batch entry of
            the partner; None pairs them in order.
    """

    other: Tensor
    weight: float | Tensor
    index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class KV:
    """One set of keys and values to attend to; logits are ``temperature * scale * q k^T + bias``.

    Args:
        key: (Bs, Hk, M, D), same dtype and device as the query; the query's head count is a
            multiple of Hk, and query head ``h`` reads head ``h // (H // Hk)``. Bs is the query's
            batch size or 1, or anything with ``index``. Hk is the same for all sources.
        value: (Bs, Hk, M, Dv); Dv may differ from D but not between sources.

    Keyword Args:
        group: sources with the same number share one softmax; groups are summed, each with its
            gate. Numbers run from 0 without gaps.
        gate: factor of the group's output: a finite number, or a tensor that broadcasts to (B, H,
            N) by torch's rules ((B, 1, 1) for one value per batch entry). Sources of one group
            carry the same gate.
        temperature: finite number > 0 that multiplies the logits of this source before its bias.
        bias: added to the logits; floating, broadcasts to (B, H, N, M); -inf forbids.
        mask: bool, True = may attend; broadcasts to (B, H, N, M).
        causal: None, ``"upper_left"`` (key j <= query i) or ``"lower_right"`` (j <= i + M - N).
        index: int64 or int32 (B,): which batch entry of key and value each query batch entry reads.
        blend: second key mixed into ``key``; its ``index`` has shape (Bs,).
    """

    key: Tensor
    value: Tensor
    _: KW_ONLY
    group: int = 0
    gate: float | Tensor = 1.0
    temperature: float = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    causal: str | None = None
    index: Tensor | None = None
    blend: Blend | None = None


class AttendResult(NamedTuple):
    """Output of attention with the log-sum-exp of each row's logits.

    ``out`` is (B, H, N, Dv) in the dtype of the query; ``lse`` is (B, H, N) in float32 (float64 for
    float64), -inf for a row that may attend to nothing.
    """

    out: Tensor
    lse: Tensor


class Normalised(NamedTuple):
    """A validated call as flat lists, one entry per source unless said.

    What broadcasts has full rank with each dimension full or 1 ("aligned"); nothing is expanded.
    """

    query: Tensor  # (B, H, N, D)
    query_other: Tensor | None  # (Bo, H, N, D)
    query_weight: float | Tensor | None  # float or aligned (B, H, N)
    query_index: Tensor | None  # int64 (B,)
    keys: list[Tensor]  # (Bs, Hk, M, D)
    values: list[Tensor]  # (Bs, Hk, M, Dv)
    key_others: list[Tensor | None]  # (Bo, Hk, M, D)
    key_weights: list[float | Tensor | None]  # float or aligned (Bs, Hk, M)
    key_indices: list[Tensor | None]  # int64 (Bs,)
    biases: list[Tensor | None]  # aligned (B, H, N, M), query dtype or float32
    masks: list[Tensor | None]  # bool, aligned (B, H, N, M)
    indices: list[Tensor | None]  # int64 (B,)
    scales: list[float]  # temperature * scale
    causal: list[int]
    groups: list[int]  # 0 .. G-1
    gates: list[float | Tensor]  # one per GROUP: float or aligned (B, H, N)

    def is_core(self) -> bool:  # no property: torch 2.10's compiler has none of a named tuple
        """One softmax over unblended tensors with gate 1: the raw core computes it alone."""
        if len(self.gates) != 1 or self.query_other is not None:
            return False
        if isinstance(self.gates[0], Tensor) or self.gates[0] != 1.0:
            return False
        return all(other is None for other in self.key_others)


def normalise(
    query: Tensor,
    sources: KV | Sequence[KV],
    blend: Blend | None = None,
    scale: float | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Normalised:
    """Check every argument of ``attend`` and lay the call out as flat lists.

    ``names`` are what errors call the sources; a name of "" leaves the part alone (``key``).

    Raises:
        TypeError: an argument of the wrong class or dtype.
        ValueError: a wrong shape, device, option or index; the message names the argument, what was
            expected and what was given.
    """
    _checks.tensor("query", query, _QUERY_AXES)
    _checks.floating("query", query)
    batch, heads, length, width = query.shape
    _head_dim("query", width)
    scale = 1.0 / math.sqrt(width) if scale is None else _checks.number("scale", scale)

    other = weight = other_index = None
    if blend is not None:
        other, weight, other_index = _blend(
            "blend", blend, "query", query, _QUERY_OTHER_AXES, _ROW_AXES
        )

    if isinstance(sources, KV):
        sources, single = (sources,), True
    elif isinstance(sources, (list, tuple)):
        single = False
    else:
        raise TypeError(
            f"sources: expected a KV or a list or tuple of KV, got {_checks.describe(sources)}"
        )
    if len(sources) == 0:
        raise ValueError("sources: expected at least one KV, got none")

    result = Normalised(
        query, other, weight, other_index, [], [], [], [], [], [], [], [], [], [], [], []
    )
    gates: dict[int, tuple[str, object]] = {}
    for number, source in enumerate(sources):
        if names is not None:
            name = names[number]
        else:
            name = "sources" if single else f"sources[{number}]"
        if not isinstance(source, KV):
            raise TypeError(f"{name}: expected a KV, got {_checks.describe(source)}")
        _append(result, name, source, scale)
        _collect_gate(gates, name, source)

    count = len(gates)
    for group in range(count):
        if group not in gates:
            raise ValueError(
                f"sources: expected groups numbered from 0 without gaps, got groups {sorted(gates)}"
            )
        name, gate = gates[group]
        if isinstance(gate, Tensor):
            gate = _checks.coefficient(
                _part(name, "gate"), gate, (batch, heads, length), _ROW_AXES, "query", query
            )
        result.gates.append(gate)
    return result


def autocast(query, sources, blend):
    """Under autocast, attention runs in the autocast dtype, as torch's own does."""
    if not isinstance(query, Tensor):
        return query, sources, blend
    device = query.device.type
    # Not asked where torch 2.10's compiler would not know the question; it has no such devices.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return query, sources, blend
    dtype = torch.get_autocast_dtype(device)
    if not query.is_floating_point() or query.dtype == torch.float64:
        return query, sources, blend

    def cast(tensor):
        return (
            tensor.to(dtype)
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
            else tensor
        )

    def cast_blend(b):
        return Blend(cast(b.other), cast(b.weight), b.index) if isinstance(b, Blend) else b

    def cast_source(s):
        if not isinstance(s, KV):
            return s
        return KV(
            cast(s.key),
            cast(s.value),
            group=s.group,
            gate=cast(s.gate),
            temperature=s.temperature,
            bias=s.bias,
            mask=s.mask,
            causal=s.causal,
            index=s.index,
            blend=cast_blend(s.blend),
        )

    if isinstance(sources, (list, tuple)):
        sources = [cast_source(s) for s in sources]
    else:
        sources = cast_source(sources)
    return cast(query), sources, cast_blend(blend)


def require_one_softmax(call: Normalised) -> None:
    """Refuse what has no single log-sum-exp: several groups, or a gate other than the number 1."""
    if len(call.gates) != 1:
        raise ValueError(
            "sources: expected one group (a log-sum-exp belongs to one softmax), "
            f"got {len(call.gates)} groups"
        )
    if isinstance(call.gates[0], Tensor) or call.gates[0] != 1.0:
        raise ValueError(
            "sources: expected gate 1.0 where the log-sum-exp is returned, "
            f"got {_checks.describe(call.gates[0])}"
        )


def normalise_merge(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    gates: Sequence[float | Tensor] | None,
) -> list[float | Tensor]:
    """Check the arguments of ``merge_attention``; returns one gate per part, tensors aligned."""
    for name, value in (("outs", outs), ("lses", lses), ("gates", gates)):
        if not isinstance(value, (list, tuple)) and not (name == "gates" and value is None):
            raise TypeError(f"{name}: expected a list or tuple, got {_checks.describe(value)}")
    if len(outs) == 0:
        raise ValueError("outs: expected at least one tensor, got none")
    if len(lses) != len(outs):
        raise ValueError(f"lses: expected {len(outs)} entries (one per out), got {len(lses)}")
    if gates is not None and len(gates) != len(outs):
        raise ValueError(f"gates: expected {len(outs)} entries (one per out), got {len(gates)}")
    first = _checks.tensor("outs[0]", outs[0], ("B", "H", "N", "Dv"))
    _checks.floating("outs[0]", first)
    rows = tuple(first.shape[:3])
    checked: list[float | Tensor] = []
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _checks.tensor(f"outs[{number}]", out, ("B", "H", "N", "Dv"))
        _checks.same_dtype(f"outs[{number}]", out, "outs[0]", first)
        _checks.same_device(f"outs[{number}]", out, "outs[0]", first)
        if out.shape != first.shape:
            raise ValueError(
                f"outs[{number}]: expected shape {tuple(first.shape)} (that of outs[0]), "
                f"got {tuple(out.shape)}"
            )
        _checks.tensor(f"lses[{number}]", lse, _ROW_AXES)
        _checks.auxiliary(f"lses[{number}]", lse, "outs[0]", first)
        if tuple(lse.shape) != rows:
            raise ValueError(
                f"lses[{number}]: expected shape {rows} (B, H, N), got {tuple(lse.shape)}"
            )
        gate = 1.0 if gates is None else gates[number]
        checked.append(
            _checks.coefficient(f"gates[{number}]", gate, rows, _ROW_AXES, "outs[0]", first)
        )
    return checked


def _part(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _append(result: Normalised, name: str, source: KV, scale: float) -> None:
    """Check one source and append it to the lists."""
    query, key = result.query, source.key
    batch, heads, length, _ = query.shape
    own_batch, keys = _check_pair(result, name, key, source.value)
    index = source.index
    if index is not None:
        index = _checks.index_map(
            _part(name, "index"), index, batch, own_batch, "batch of query", "query", query
        )
    elif own_batch != batch and own_batch != 1:
        raise ValueError(
            f"{_part(name, 'key')}: expected batch {batch} (that of query) or 1, or an index of "
            f"shape ({batch},), got {own_batch} (shape {tuple(key.shape)})"
        )
    temperature = _checks.number(_part(name, "temperature"), source.temperature, positive=True)
    bias, mask = source.bias, source.mask
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{name}.bias: expected a tensor or None, got {_checks.describe(bias)}")
        _checks.auxiliary(_part(name, "bias"), bias, "query", query)
        bias = _checks.broadcast(
            _part(name, "bias"), bias, (batch, heads, length, keys), _LOGIT_AXES
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"{name}.mask: expected a bool tensor (True = may attend) or None, "
                f"got {_checks.describe(mask)}"
            )
        _checks.same_device(_part(name, "mask"), mask, "query", query)
        mask = _checks.broadcast(
            _part(name, "mask"), mask, (batch, heads, length, keys), _LOGIT_AXES
        )
    other = weight = other_index = None
    if source.blend is not None:
        other, weight, other_index = _blend(
            _part(name, "blend"),
            source.blend,
            _part(name, "key"),
            key,
            _KEY_OTHER_AXES,
            _KEY_ROW_AXES,
        )
    group = source.group
    if isinstance(group, bool) or not isinstance(group, int) or group < 0:
        raise ValueError(f"{name}.group: expected an int >= 0, got {_checks.describe(group)}")
    result.keys.append(key)
    result.values.append(source.value)
    result.key_others.append(other)
    result.key_weights.append(weight)
    result.key_indices.append(other_index)
    result.biases.append(bias)
    result.masks.append(mask)
    result.indices.append(index)
    result.scales.append(temperature * scale)
    result.causal.append(_checks.choice(_part(name, "causal"), source.causal, _CAUSAL))
    result.groups.append(group)


def _check_pair(result: Normalised, name: str, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Key and value against the query, each other and the first source; returns (Bs, M)."""
    query = result.query
    _, heads, _, width = query.shape
    key_name, value_name = _part(name, "key"), _part(name, "value")
    _checks.tensor(key_name, key, _KEY_AXES)
    _checks.tensor(value_name, value, _VALUE_AXES)
    for part, tensor in ((key_name, key), (value_name, value)):
        _checks.same_dtype(part, tensor, "query", query)
        _checks.same_device(part, tensor, "query", query)
    batch, own_heads, keys, own_width = key.shape
    *shared, value_width = value.shape
    if own_width != width or shared != [batch, own_heads, keys]:
        _checks.size(key_name, key, 3, width, "head dim of query")
        _checks.size(value_name, value, 0, batch, "batch of key")
        _checks.size(value_name, value, 1, own_heads, "heads of key")
        _checks.size(value_name, value, 2, keys, "number of keys")
    _head_dim(value_name, value_width)
    if len(result.keys) > 0:
        first = result.values[0].shape
        _checks.size(key_name, key, 1, first[1], "head count of the first source")
        _checks.size(value_name, value, 3, first[3], "value width of the first source")
    if heads > 0 and (own_heads == 0 or heads % own_heads != 0):
        raise ValueError(
            f"{key_name}: expected a head count that divides the {heads} heads of query, "
            f"got {own_heads} (shape {tuple(key.shape)})"
        )
    return batch, keys


def _collect_gate(gates: dict[int, tuple[str, object]], name: str, source: KV) -> None:
    """Remember the gate of a group, and refuse a second one that differs."""
    gate = source.gate
    if not isinstance(gate, Tensor):
        gate = _checks.number(_part(name, "gate"), gate)
    if source.group not in gates:
        gates[source.group] = (name, gate)
        return
    first_name, first = gates[source.group]
    if isinstance(gate, Tensor) or isinstance(first, Tensor):
        same = gate is first
    else:
        same = gate == first
    if not same:
        raise ValueError(
            f"{name}.gate: expected the gate of {first_name if first_name else 'key'} "
            f"(sources of group {source.group} share one softmax and so one gate: the same number "
            f"or the same tensor object), got {_checks.describe(gate)} beside "
            f"{_checks.describe(first)}"
        )


def _blend(
    name: str,
    blend: Blend,
    partner_name: str,
    partner: Tensor,
    axes: tuple[str, ...],
    row_axes: tuple[str, ...],
) -> tuple[Tensor, float | Tensor, Tensor | None]:
    """Check a blend against the tensor it is mixed into."""
    if not isinstance(blend, Blend):
        raise TypeError(f"{name}: expected a Blend or None, got {_checks.describe(blend)}")
    other = _checks.tensor(_part(name, "other"), blend.other, axes)
    _checks.same_dtype(_part(name, "other"), other, partner_name, partner)
    _checks.same_device(_part(name, "other"), other, partner_name, partner)
    for dim in (1, 2, 3):
        _checks.size(
            _part(name, "other"), other, dim, partner.shape[dim], f"{axes[dim]} of {partner_name}"
        )
    batch = partner.shape[0]
    index = blend.index
    if index is not None:
        index = _checks.index_map(
            _part(name, "index"),
            index,
            batch,
            other.shape[0],
            f"batch of {partner_name}",
            partner_name,
            partner,
        )
    elif other.shape[0] != batch and other.shape[0] != 1:
        raise ValueError(
            f"{name}.other: expected batch {batch} (that of {partner_name}) or 1, or an index of "
            f"shape ({batch},), got {other.shape[0]} (shape {tuple(other.shape)})"
        )
    weight = _checks.coefficient(
        _part(name, "weight"),
        blend.weight,
        tuple(partner.shape[:3]),
        row_axes,
        partner_name,
        partner,
    )
    return other, weight, index


def _head_dim(name: str, width: int) -> None:
    if width < 1 or width > MAX_HEAD_DIM:
        raise ValueError(f"{name}: expected a last dimension of 1 to {MAX_HEAD_DIM}, got {width}")
