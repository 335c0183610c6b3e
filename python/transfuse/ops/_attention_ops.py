"""Fake kernels and autograd of the raw C++ attention ops: what ``torch.compile`` sees."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse.ops._attention_core import (
    Calls,
    Static,
    _backward,
    _forward,
    _jvp,
    _jvp_backward,
    core_of,
    rules,
)

_registered = False


def _like_query(query: Tensor, width: int) -> Tensor:
    """An output in the layout the kernel chooses: token-major when the query is."""
    batch, heads, rows, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return query.new_empty((batch, heads, rows, width))


def _statistics(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=_statistics(query))


def _fake_forward(query, keys, values, biases, bias_at, masks, indices, scales, causal, windows):
    return _like_query(query, values[0].shape[3]), _lse(query)


def _fake_gradients(query, keys, values, biases, bias_at, bias_grads):
    wide = _statistics(query)
    return (
        query.new_empty(query.shape, dtype=wide),
        [k.new_empty(k.shape) for k in keys],
        [v.new_empty(v.shape) for v in values],
        [
            query.new_empty(biases[at].shape, dtype=wide)
            for at, wanted in zip(bias_at, bias_grads, strict=True)
            if wanted
        ],
    )


def _fake_backward(
    grad_out,
    grad_lse,
    query,
    keys,
    values,
    biases,
    bias_at,
    masks,
    indices,
    scales,
    causal,
    windows,
    out,
    lse,
    bias_grads,
):
    return _fake_gradients(query, keys, values, biases, bias_at, bias_grads)


def _fake_jvp(
    query,
    keys,
    values,
    biases,
    bias_at,
    masks,
    indices,
    scales,
    causal,
    windows,
    out,
    lse,
    query_t,
    keys_t,
    values_t,
    biases_t,
):
    return _like_query(query, values[0].shape[3]), _lse(query)


def _fake_jvp_backward(
    grad_out,
    grad_lse,
    query,
    keys,
    values,
    biases,
    bias_at,
    masks,
    indices,
    scales,
    causal,
    windows,
    out,
    lse,
    query_t,
    keys_t,
    values_t,
    biases_t,
    out_t,
    lse_t,
    bias_grads,
):
    return _fake_gradients(query, keys, values, biases, bias_at, bias_grads)


def _fake_fused(
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
    lse = _lse(query) if len(gate) == 1 else query.new_empty((0,), dtype=_statistics(query))
    return _like_query(query, values[0].shape[3]), lse


def _setup_forward(ctx, inputs, output, backend: str):
    query, keys, values, biases, bias_at, masks, indices, scales, causal, windows = inputs
    if query.device.type == "cuda":
        backend = _triton_ops.COMPILED  # the only kernels there that have a backward
    ctx.static = Static(tuple(scales), tuple(causal), backend, windows=tuple(windows))
    ctx.bias_at = bias_at
    ctx.unmoved = tuple(_nothing_for(given) for given in (masks, indices, windows))
    spread = [None if at < 0 else biases[at] for at in bias_at]
    ctx.save_for_backward(query, *keys, *values, *spread, *masks, *indices, *output)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx, grad_out, grad_lse):
    sources = len(ctx.static.scales)
    *tensors, out, lse = ctx.saved_tensors
    # The flags of a Tensor[] argument come as one list, in the order of the raw op's arguments.
    wanted = ctx.needs_input_grad[3]
    needs = [False] * (1 + 2 * sources) + [at >= 0 and wanted[at] for at in ctx.bias_at]
    vjp, _ = _RULES["forward"]
    grads = vjp(ctx.static, tensors, (out, lse), (grad_out, grad_lse), needs)
    parts = core_of(grads, sources)
    biases = [g for g, at in zip(parts.biases, ctx.bias_at, strict=True) if at >= 0]
    masks, indices, windows = ctx.unmoved
    return parts.query, parts.keys, parts.values, biases, None, masks, indices, None, None, windows


def _nothing_for(given: Sequence) -> list[None] | None:
    """No gradient, in the form that torch wants: of a list of nothing but tensors, a list (and an
    empty one counts as such)."""
    return [None] * len(given) if all(isinstance(t, Tensor) for t in given) else None


_RULES = rules(Calls(_forward, _backward, _jvp, _jvp_backward))


def _refuse(name: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"transfuse::{name}: differentiate transfuse.ops.attend in eager mode for second "
            "derivatives; a compiled graph holds first derivatives only."
        )

    return backward


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    global _registered
    if _registered:
        return
    _registered = True
    fakes = {
        "forward": _fake_forward,
        "backward": _fake_backward,
        "jvp": _fake_jvp,
        "jvp_backward": _fake_jvp_backward,
        "fused": _fake_fused,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"transfuse::attention_{name}", fake)
    attach("", ("backward", "jvp", "jvp_backward", "fused"), "cpu")


def attach(ending: str, refusing: Sequence[str], backend: str) -> None:
    """Attach autograd to the ops whose names end so; ``refusing`` have no derivative."""
    torch.library.register_autograd(
        f"transfuse::attention_forward{ending}",
        _backward_of_forward,
        setup_context=functools.partial(_setup_forward, backend=backend),
    )
    for name in refusing:
        torch.library.register_autograd(
            f"transfuse::attention_{name}{ending}",
            _refuse(f"attention_{name}"),
            setup_context=lambda ctx, inputs, output: None,
        )
