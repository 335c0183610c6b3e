"""Fake kernel and autograd of the raw C++ op ``mix``: what ``torch.compile`` sees."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops import _mix_core as core
from transfuse.ops._mix_core import Static

_registered = False
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


def _setup(ctx, inputs, output) -> None:
    tensors, coefficients, numbers, outputs, pairs = inputs
    ctx.static = Static(
        len(tensors),
        outputs,
        tuple(zip(pairs[::2], pairs[1::2], strict=True)),
        tuple(numbers) if coefficients is None else None,
        "cpu",  # the kernel of a raw op is chosen by the device, not by the name of a backend
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
    """Attach the fake and autograd to the C++ op; called once, after the library is loaded."""
    global _registered
    if _registered:
        return
    _registered = True
    torch.library.register_fake("transfuse::mix", _fake)
    torch.library.register_autograd("transfuse::mix", _backward, setup_context=_setup)
