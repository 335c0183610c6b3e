"""The differentiable core of the head curvature ops on the CPU: kernels, and rules of derivatives.

The kernels take logits, and give the gradient (with targets), the Hessian's product with a vector
for each domain or for all (with vectors) or its diagonal (with neither), and the first derivative
of each. The second derivative is composed of eager torch operations; a third raises. Forward mode
and ``torch.func`` transforms do not come here: they take the composition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend
from transfuse._autograd import (
    Differentiable,
    Tensors,
    function,
    needs_derivative,
    transformed,
)
from transfuse.ops import _head_reference
from transfuse.ops._head_call import Batch, Segments


class Static(NamedTuple):
    """What a call has besides tensors; then the gradients that are wanted."""

    offsets: tuple[int, ...]
    ones: bool
    x_grad: bool = True
    vectors_grad: bool = True


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """The result and u of (x, logits, targets, vectors)."""
    return torch.ops.transfuse.head_forward(*tensors, static.offsets, static.ones)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by x, logits and vectors, of (grad, u, x, logits, targets, vectors)."""
    grad, *rest = tensors
    return torch.ops.transfuse.head_backward(grad.contiguous(), *rest, *static)


def composed(batch: Batch, targets: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """What :func:`forward` gives, in eager torch."""
    if targets is not None:
        return _head_reference.gradient(batch, targets)
    if vectors is not None:
        shared = vectors.shape[0] == 1
        return _head_reference.product(batch, vectors if shared else vectors[:, None])[:, 0]
    return _head_reference.diagonal(batch)


def _second(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by grad, x, logits and vectors, of (their cotangents but the first, grad, x,
    logits, vectors, targets)."""
    *given, targets = tensors
    cotangents, originals = given[:3], given[3:]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in originals]
        grad, x, logits, vectors = leaves
        batch = Batch(x, logits, static.ones, Segments(static.offsets, True))
        out = composed(batch, targets, vectors)
        moved = [(t, c) for t, c in zip(leaves[1:], cotangents, strict=True) if c is not None]
        first = torch.autograd.grad(
            out, [t for t, _ in moved], grad, create_graph=True, materialize_grads=True
        )
        present = [t for t in leaves if t is not None]
        found = iter(
            torch.autograd.grad(first, present, [c for _, c in moved], materialize_grads=True)
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
        if grads[0] is None or not (needs[0] or needs[1] or needs[3]):
            return [None] * 4
        wanted = static._replace(x_grad=bool(needs[0]), vectors_grad=bool(needs[3]))
        to_x, to_logits, to_vectors = table().backward(wanted, (grads[0], outputs[1], *tensors))
        found = (to_x, to_logits, None, to_vectors)
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    def backward_vjp(static, tensors, outputs, cotangents, needs):
        grad, _, x, logits, targets, vectors = tensors
        # Results that were not wanted, or are not there, are empty tensors.
        there = (static.x_grad, True, static.vectors_grad and vectors is not None)
        cotangents = [c if flag else None for c, flag in zip(cotangents, there, strict=True)]
        if all(c is None for c in cotangents):
            return [None] * 6
        found = second(static, (*cotangents, grad, x, logits, vectors, targets))
        to_grad, to_x, to_logits, to_vectors = found
        return [to_grad, None, to_x, to_logits, None, to_vectors]

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


def run(batch: Batch, targets: Tensor | None = None, vectors: Tensor | None = None) -> Tensor:
    """The kernel's result with whatever derivatives are asked for: the gradient (with targets), the
    product with vectors (E, C, D) or (1, C, D), or the diagonal; (E, C, D)."""
    tensors = [
        None if t is None else t.contiguous()
        for t in (batch.features, batch.logits, targets, vectors)
    ]
    static = Static(batch.segments.bounds, batch.ones)
    if needs_derivative(tensors) and not torch.compiler.is_compiling():
        return functions.forward(static, tensors)[0]
    return forward(static, tensors)[0]


def chosen(op: str, backend: str | None, like: Tensor) -> str:
    """The backend that runs. Transforms and forward mode take the composition, whose derivatives of
    any order and direction are torch's own."""
    found = _backend.choose(op, backend, like.device, like.dtype)
    return "composed" if found != "cpu" or transformed() else "cpu"


def runner(op: str, backend: str | None, like: Tensor) -> Callable[..., Tensor]:
    """:func:`run` or :func:`composed`."""
    return run if chosen(op, backend, like) == "cpu" else composed


# ---- what torch.compile sees --------------------------------------------------------------------

_RULES = rules(lambda: Calls(forward, backward))


def _fake_forward(x, logits, targets, vectors, offsets, ones):
    samples, classes = logits.shape
    out = x.new_empty((len(offsets) - 1, classes, x.shape[1] + ones))
    return out, x.new_empty((0 if vectors is None else samples, classes))


def _fake_backward(grad, u, x, logits, targets, vectors, offsets, ones, x_grad, vectors_grad):
    def result(wanted, like):
        return torch.empty_like(like) if wanted and like is not None else x.new_empty((0,))

    return result(x_grad, x), torch.empty_like(logits), result(vectors_grad, vectors)


def _setup_forward(ctx, inputs, output):
    *tensors, offsets, ones = inputs
    ctx.static = Static(tuple(offsets), ones)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of_forward(ctx, *grads):
    saved = ctx.saved_tensors
    found = _RULES["forward"](ctx.static, saved[:4], saved[4:], grads, ctx.needs_input_grad[:4])
    return (*found, None, None)


def _setup_backward(ctx, inputs, output):
    *tensors, offsets, ones, x_grad, vectors_grad = inputs
    ctx.static = Static(tuple(offsets), ones, x_grad, vectors_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_of_backward(ctx, *grads):
    found = _RULES["backward"](ctx.static, ctx.saved_tensors, None, grads, ctx.needs_input_grad)
    return (*found, None, None, None, None)


def register() -> None:
    """Attach fakes and autograd to the C++ ops; called once, after the library is loaded."""
    for name, fake, setup, rule in (
        ("forward", _fake_forward, _setup_forward, _backward_of_forward),
        ("backward", _fake_backward, _setup_backward, _backward_of_backward),
    ):
        torch.library.register_fake(f"transfuse::head_{name}", fake)
        torch.library.register_autograd(f"transfuse::head_{name}", rule, setup_context=setup)
