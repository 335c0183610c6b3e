"""The Triton attention kernels as ops of torch: what ``torch.compile`` sees of them.

They take what the C++ ops take, and have their rules of derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse.ops import _attention_ops
from transfuse.ops._attention_core import raw
from transfuse.ops._sources import Normalised

_CORE = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] biases, int[] bias_at, "
    "Tensor?[] masks, Tensor?[] indices, float[] scales, int[] causal, int[] windows"
)
_SCHEMAS = {
    "forward": f"({_CORE}) -> (Tensor, Tensor)",
    "backward": f"(Tensor grad_out, Tensor? grad_lse, {_CORE}, Tensor out, Tensor lse, "
    "bool[] bias_grads) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    "fused": "(Tensor query, Tensor? query_other, float query_weight, Tensor? query_weights, "
    "Tensor? query_index, Tensor[] keys, Tensor[] values, Tensor?[] key_others, "
    "float[] key_weight, Tensor?[] key_weights, Tensor?[] key_indices, Tensor[] biases, "
    "int[] bias_at, Tensor?[] masks, Tensor?[] indices, float[] scales, int[] causal, "
    "int[] groups, float[] gate, Tensor?[] gates) -> (Tensor, Tensor)",
}
_registered = False


def fused(call: Normalised) -> tuple[Tensor, Tensor]:
    """Everything in one Triton kernel; not differentiable."""
    rows = call.query.shape[:3]

    def expand(weight, shape):
        return weight.expand(shape) if isinstance(weight, Tensor) else weight

    logits = [(*rows, key.shape[2]) for key in call.keys]
    return _triton_ops.kernel("attention", "attention_fused")(
        call.query,
        call.query_other,
        expand(call.query_weight, rows),
        call.query_index,
        call.keys,
        call.values,
        call.key_others,
        [expand(w, k.shape[:3]) for w, k in zip(call.key_weights, call.keys, strict=True)],
        call.key_indices,
        [None if b is None else b.expand(s) for b, s in zip(call.biases, logits, strict=True)],
        [None if m is None else m.expand(s) for m, s in zip(call.masks, logits, strict=True)],
        call.indices,
        call.scales,
        call.causal,
        call.groups,
        [expand(g, rows) for g in call.gates],
    )


def _spread(biases: list[Tensor], bias_at: list[int]) -> list[Tensor | None]:
    """A bias or None per source: the inverse of ``compact``."""
    return [None if at < 0 else biases[at] for at in bias_at]


def _core(name: str, position: int) -> Callable:
    """A raw Triton kernel, with the biases at ``position`` as an op's schema has them."""

    def call(*given):
        biases = _spread(*given[position : position + 2])
        return getattr(raw("triton"), name)(*given[:position], biases, *given[position + 2 :])

    return call


def _chosen(numbers: list[float], tensors: list[Tensor | None]) -> list[float | Tensor]:
    """Weights that a schema takes as numbers and tensors."""
    return [n if t is None else t for n, t in zip(numbers, tensors, strict=True)]


def _launch_fused(
    query,
    query_other,
    query_weight,
    query_weights,
    query_index,
    keys,
    values,
    key_others,
    key_weight,
    key_weights,
    key_indices,
    biases,
    bias_at,
    masks,
    indices,
    scales,
    causal,
    groups,
    gate,
    gates,
):
    return fused(
        Normalised(
            query,
            query_other,
            *_chosen([query_weight], [query_weights]),
            query_index,
            keys,
            values,
            key_others,
            _chosen(key_weight, key_weights),
            key_indices,
            _spread(biases, bias_at),
            masks,
            indices,
            scales,
            causal,
            groups,
            _chosen(gate, gates),
        )
    )


def _new(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_forward(query, keys, values, *rest):
    return _new(query, values[0])


def _fake_fused(query, query_other, query_weight, query_weights, query_index, keys, values, *rest):
    return _new(query, values[0])


def _fake_backward(grad_out, grad_lse, query, keys, values, biases, bias_at, *rest):
    wanted = rest[-1]
    return (
        query.new_empty(query.shape),
        [k.new_empty(k.shape) for k in keys],
        [v.new_empty(v.shape) for v in values],
        [
            biases[at].new_empty(biases[at].shape)
            for at, need in zip(bias_at, wanted, strict=True)
            if need
        ],
    )


def register() -> None:
    """Make the ops, with fakes and derivatives. Imports no Triton."""
    global _registered
    if _registered:
        return
    _registered = True
    for name, launch, fake in (
        ("forward", _core("forward", 3), _fake_forward),
        ("backward", _core("backward", 5), _fake_backward),
        ("fused", _launch_fused, _fake_fused),
    ):
        own = f"attention_{name}"
        _triton_ops.wrap(own, launch, _SCHEMAS[name], recorded=True)
        torch.library.register_fake(f"transfuse::{own}_triton", fake)
    _attention_ops.attach("_triton", ("backward", "fused"), _triton_ops.COMPILED)
