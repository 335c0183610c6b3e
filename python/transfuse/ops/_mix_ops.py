"""Fakes and autograd of the raw op ``mix``, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse.ops import _mix_core as core
from transfuse.ops._mix_core import Static

_registered: set[str] = set()
_vjp, _ = core.rules(lambda: core.forward)


def _result(like: Tensor) -> Tensor:
    out = torch.empty_like(like)
    if like.shape[0] <= 1 or out.stride(0) == like.shape[1:].numel():
        return out
    return like.new_empty(like.shape)


def _fake(inputs, coefficients, numbers, outputs, pairs):
    first = inputs[0]
    products = first.new_empty((first.shape[0], len(pairs) // 2), dtype=torch.float64)
    return [_result(first) for _ in range(outputs)], products


def _setup(ctx, inputs, output, backend: str) -> None:
    tensors, coefficients, numbers, outputs, pairs = inputs
    ctx.static = Static(
        len(tensors),
        outputs,
        tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        tuple(numbers) if coefficients is None else None,
        backend,
    )
    ctx.filled = (len(numbers) > 0, len(pairs) > 0)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, coefficients)


def _backward(ctx, grads, products):
    tensors = ctx.saved_tensors
    grads = [None] * ctx.static.outputs if grads is None else grads
    needs = [*ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    found = _vjp(ctx.static, tensors, None, (*grads, products), needs)
    # torch takes an empty list for one of tensors, whose gradient is a list.
    lists = (None if ctx.filled[0] else [], None, None if ctx.filled[1] else [])
    return list(found[:-1]), found[-1], *lists


def register() -> None:
    """Attach fake and autograd to the C++ op; called once, after the library is loaded."""
    # The kernel of a C++ op is chosen by the device, not by the name of a backend.
    _attach("transfuse::mix", "cpu")


def register_triton() -> None:
    """Make the Triton kernel an op of torch, as the C++ one is. Imports no Triton."""
    if _triton_ops.COMPILED in _registered:
        return
    signature = (
        "(Tensor[] inputs, Tensor? coefficients, float[] numbers, int outputs, int[] pairs) "
        "-> (Tensor[], Tensor)"
    )
    _triton_ops.define("mix", "mix", signature, recorded=True)
    _attach("transfuse::mix_triton", _triton_ops.COMPILED)


def _attach(op: str, backend: str) -> None:
    if backend in _registered:
        return
    _registered.add(backend)
    torch.library.register_fake(op, _fake)
    setup = functools.partial(_setup, backend=backend)
    torch.library.register_autograd(op, _backward, setup_context=setup)
