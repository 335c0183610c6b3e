"""The differentiable core of the head curvature ops: kernels by backend, and rules of derivatives.

The kernels give the gradient (with targets), the Hessian's product with a vector for each domain or
for all (with vectors) or its diagonal (with neither), and the first derivative of each. The second
derivative is composed of eager torch operations; a third raises. Forward mode and ``torch.func``
transforms do not come here: the wrappers run the composition for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse._autograd import Differentiable, Tensors, function
from transfuse.ops import _head_reference
from transfuse.ops._head_call import Head, Segments


class Static(NamedTuple):
    """What a call has besides tensors, and the gradients that are wanted."""

    offsets: tuple[int, ...]
    backend: str = "cpu"
    x_grad: bool = True
    head_grad: bool = True
    vectors_grad: bool = True


class Kernels(NamedTuple):
    """The raw ops of a backend, with the arguments of the C++ schemas."""

    forward: Callable
    backward: Callable


def kernels(backend: str) -> Kernels:
    """The raw ops of a backend."""
    names = ("head_forward", "head_backward")
    return Kernels(*_triton_ops.raw_ops("head_curvature", backend, *names))


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """The result, p, 1 - p and u of (x, weight, bias, targets, vectors)."""
    return kernels(static.backend).forward(*tensors, static.offsets)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by x, weight, bias and vectors, of (grad, p, 1 - p, u, x, weight, bias, targets,
    vectors)."""
    grad, *rest = tensors
    wanted = (static.x_grad, static.head_grad, static.vectors_grad)
    return kernels(static.backend).backward(grad.contiguous(), *rest, static.offsets, *wanted)


def composed(head: Head, targets: Tensor | None, vectors: Tensor | None) -> Tensor:
    """What :func:`forward` gives, in eager torch."""
    if targets is not None:
        return _head_reference.gradient(head, targets)
    if vectors is not None:
        shared = vectors.shape[0] == 1
        return _head_reference.product(head, vectors if shared else vectors[:, None])[:, 0]
    return _head_reference.diagonal(head)


def _second(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients by grad, x, weight, bias and vectors, of (their cotangents but the first, grad, x,
    weight, bias, vectors, targets)."""
    *given, targets = tensors
    cotangents, originals = given[:4], given[4:]
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in originals]
        grad, x, weight, bias, vectors = leaves
        out = composed(Head(x, weight, bias, Segments(static.offsets, True)), targets, vectors)
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
        wanted = (bool(needs[0]), bool(needs[1] or needs[2]), bool(needs[4]))
        if grads[0] is None or not any(wanted):
            return [None] * 5
        _, *rest = outputs
        to_x, to_weight, to_bias, to_vectors = table().backward(
            Static(static.offsets, static.backend, *wanted), (grads[0], *rest, *tensors)
        )
        found = (to_x, to_weight, to_bias, None, to_vectors)
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    def backward_vjp(static, tensors, outputs, cotangents, needs):
        grad, _, _, _, x, weight, bias, targets, vectors = tensors
        # Results that were not wanted, or are not there, are empty tensors.
        there = (
            static.x_grad,
            static.head_grad,
            static.head_grad and bias is not None,
            static.vectors_grad and vectors is not None,
        )
        cotangents = [c if flag else None for c, flag in zip(cotangents, there, strict=True)]
        if all(c is None for c in cotangents):
            return [None] * 9
        found = second(static, (*cotangents, grad, x, weight, bias, vectors, targets))
        to_grad, *to_head, to_vectors = found
        return [to_grad, None, None, None, *to_head, None, to_vectors]

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


def _fake_forward(x, weight, bias, targets, vectors, offsets):
    width, classes = x.shape[1] + int(bias is not None), weight.shape[0]
    p = x.new_empty((x.shape[0], classes))
    u = x.new_empty((0 if vectors is None else x.shape[0], classes))
    return x.new_empty((len(offsets) - 1, classes, width)), p, torch.empty_like(p), u


def _fake_backward(
    grad, p, rest, u, x, weight, bias, targets, vectors, offsets, x_grad, head_grad, vectors_grad
):
    def result(wanted, like):
        return torch.empty_like(like) if wanted and like is not None else x.new_empty((0,))

    return (
        result(x_grad, x),
        result(head_grad, weight),
        result(head_grad, bias),
        result(vectors_grad, vectors),
    )


def _setup_forward(backend, ctx, inputs, output):
    *tensors, offsets = inputs
    ctx.static = Static(tuple(offsets), backend)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_of_forward(ctx, *grads):
    saved = ctx.saved_tensors
    found = _RULES["forward"](ctx.static, saved[:5], saved[5:], grads, ctx.needs_input_grad[:5])
    return (*found, None)


def _setup_backward(backend, ctx, inputs, output):
    *tensors, offsets, x_grad, head_grad, vectors_grad = inputs
    ctx.static = Static(tuple(offsets), backend, x_grad, head_grad, vectors_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_of_backward(ctx, *grads):
    found = _RULES["backward"](ctx.static, ctx.saved_tensors, None, grads, ctx.needs_input_grad)
    return (*found, None, None, None, None)


_HEAD = "Tensor x, Tensor weight, Tensor? bias, Tensor? targets, Tensor? vectors, int[] offsets"
_FOUR = "(Tensor, Tensor, Tensor, Tensor)"
_SCHEMAS = {
    "head_forward": f"({_HEAD}) -> {_FOUR}",
    "head_backward": f"(Tensor grad, Tensor p, Tensor rest, Tensor u, {_HEAD}, bool x_grad, "
    f"bool head_grad, bool vectors_grad) -> {_FOUR}",
}


def register(backend: str) -> None:
    """Attach fakes and autograd to the C++ ops, or make those of the Triton kernels with theirs;
    called once for each."""
    compiled = backend == _triton_ops.COMPILED
    for name, fake, setup, rule in (
        ("head_forward", _fake_forward, _setup_forward, _backward_of_forward),
        ("head_backward", _fake_backward, _setup_backward, _backward_of_backward),
    ):
        if compiled:
            _triton_ops.define("head_curvature", name, _SCHEMAS[name], recorded=False)
        full = f"transfuse::{name}_triton" if compiled else f"transfuse::{name}"
        torch.library.register_fake(full, fake)
        torch.library.register_autograd(full, rule, setup_context=partial(setup, backend))
