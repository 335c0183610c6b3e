"""The differentiable core of the head curvature ops on the CPU: kernels, and rules of derivatives.

The kernels give the gradient (with targets) or the Hessian diagonal (without) and the first
derivative of either. The second derivative is composed of eager torch operations; a third raises.
Forward mode and ``torch.func`` transforms do not come here: their wrappers run the composition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse._autograd import Differentiable, Tensors, function
from transfuse.ops import _head_reference
from transfuse.ops._head_call import Head, Segments


class Static(NamedTuple):
    """What a call has besides tensors; ``x_grad``, ``head_grad``: gradients that are wanted."""

    offsets: tuple[int, ...]
    x_grad: bool = True
    head_grad: bool = True


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """The result, p and 1 - p of (x, weight, bias, targets)."""
    return torch.ops.transfuse.head_forward(*tensors, static.offsets)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by x, weight and bias, of (grad, p, 1 - p, x, weight, bias, targets)."""
    grad, *rest = tensors
    options = (static.offsets, static.x_grad, static.head_grad)
    return torch.ops.transfuse.head_backward(grad.contiguous(), *rest, *options)


def _second(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by grad, x, weight and bias, of (cotangents of x, weight and bias, grad, x, weight,
    bias, targets)."""
    *cotangents, grad, x, weight, bias, targets = tensors
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (grad, x, weight, bias)]
        grad, x, weight, bias = leaves
        head = Head(x, weight, bias, Segments(static.offsets, True))
        if targets is None:
            out = _head_reference.diagonal(head)
        else:
            out = _head_reference.gradient(head, targets)
        moved = [(t, c) for t, c in zip(leaves[1:], cotangents, strict=True) if c is not None]
        first = torch.autograd.grad(
            out, [t for t, _ in moved], grad, create_graph=True, materialize_grads=True
        )
        present = [t for t in leaves if t is not None]
        found = iter(
            torch.autograd.grad(
                first, present, [c for _, c in moved], allow_unused=True, materialize_grads=True
            )
        )
    return tuple(None if t is None else next(found) for t in leaves)


second = function(Differentiable(name="head_curvature_second", forward=_second))


class Calls(NamedTuple):
    """What the rules call: Functions in eager mode, raw ops under torch.compile."""

    forward: Callable
    backward: Callable


def rules(table: Callable[[], Calls]) -> dict[str, Callable]:
    """vjp rules of both directions, written against ``table()``."""

    def forward_vjp(static, tensors, outputs, grads, needs):
        x_grad, head_grad = bool(needs[0]), bool(needs[1] or needs[2])
        if grads[0] is None or not (x_grad or head_grad):
            return [None] * 4
        wanted = static._replace(x_grad=x_grad, head_grad=head_grad)
        _, p, rest = outputs
        found = table().backward(wanted, (grads[0], p, rest, *tensors))
        kept = (needs[0], needs[1], needs[2])
        return [*(g if need else None for g, need in zip(found, kept, strict=True)), None]

    def backward_vjp(static, tensors, outputs, cotangents, needs):
        grad, _, _, x, weight, bias, targets = tensors
        if bias is None:
            cotangents = (*cotangents[:2], None)
        if not static.x_grad:
            cotangents = (None, *cotangents[1:])
        if not static.head_grad:
            cotangents = (cotangents[0], None, None)
        if all(c is None for c in cotangents):
            return [None] * 7
        found = second(static, (*cotangents, grad, x, weight, bias, targets))
        return [found[0], None, None, *found[1:], None]

    return {"forward": forward_vjp, "backward": backward_vjp}


def _build() -> Calls:
    calls: dict[str, Callable] = {}
    rule = rules(lambda: Calls(**calls))
    for name, body in (("forward", forward), ("backward", backward)):
        calls[name] = function(
            Differentiable(name=f"head_curvature_{name}", forward=body, vjp=rule[name])
        )
    return Calls(**calls)


functions = _build()


# ---- what torch.compile sees --------------------------------------------------------------------

_RULES = rules(lambda: Calls(forward, backward))


def _fake_forward(x, weight, bias, targets, offsets):
    width = x.shape[1] + (bias is not None)
    p = x.new_empty((x.shape[0], weight.shape[0]))
    out = x.new_empty((len(offsets) - 1, weight.shape[0], width))
    return out, p, torch.empty_like(p)


def _fake_backward(grad, p, rest, x, weight, bias, targets, offsets, x_grad, head_grad):
    return (
        torch.empty_like(x) if x_grad else x.new_empty((0,)),
        torch.empty_like(weight) if head_grad else x.new_empty((0,)),
        x.new_empty((weight.shape[0] if head_grad and bias is not None else 0,)),
    )


def _setup_forward(ctx, inputs, output):
    *tensors, offsets = inputs
    ctx.static = Static(tuple(offsets))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of_forward(ctx, *grads):
    saved = ctx.saved_tensors
    found = _RULES["forward"](ctx.static, saved[:4], saved[4:], grads, ctx.needs_input_grad[:4])
    return (*found, None)


def _setup_backward(ctx, inputs, output):
    *tensors, offsets, x_grad, head_grad = inputs
    ctx.static = Static(tuple(offsets), x_grad, head_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_of_backward(ctx, *grads):
    found = _RULES["backward"](ctx.static, ctx.saved_tensors, None, grads, ctx.needs_input_grad)
    return (*found, None, None, None)


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    for name, fake, setup, rule in (
        ("forward", _fake_forward, _setup_forward, _backward_of_forward),
        ("backward", _fake_backward, _setup_backward, _backward_of_backward),
    ):
        torch.library.register_fake(f"transfuse::head_{name}", fake)
        torch.library.register_autograd(f"transfuse::head_{name}", rule, setup_context=setup)
