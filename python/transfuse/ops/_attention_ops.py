"""Fake kernels and autograd of the raw C++ attention ops: what ``torch.compile`` sees."""

from __future__ import annotations

import torch
from torch import Tensor

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


def _setup_forward(ctx, inputs, output):
    query, keys, values, biases, bias_at, masks, indices, scales, causal, windows = inputs
    ctx.static = Static(tuple(scales), tuple(causal), "cpu", windows=tuple(windows))
    ctx.bias_at = bias_at
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
    # torch wants the gradient of an empty list to be one.
    windows = None if ctx.static.windows else []
    return parts.query, parts.keys, parts.values, biases, None, None, None, None, None, windows


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
    torch.library.register_autograd(
        "transfuse::attention_forward", _backward_of_forward, setup_context=_setup_forward
    )
    for name in ("backward", "jvp", "jvp_backward", "fused"):
        torch.library.register_autograd(
            f"transfuse::attention_{name}",
            _refuse(f"attention_{name}"),
            setup_context=lambda ctx, inputs, output: None,
        )
