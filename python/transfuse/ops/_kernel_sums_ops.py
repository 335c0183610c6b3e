"""Fakes and autograd of the raw kernel sum ops, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import functools

import torch

from transfuse import _triton_ops
from transfuse.ops._kernel_sums_call import Plan, working_dtype
from transfuse.ops._kernel_sums_core import NAME, Static, backward, to_weights

_registered: set[str] = set()
_PLAN = (
    "Tensor[] points, int[] distances, int[] kernels, Tensor bandwidths, int[] products, "
    "Tensor? weights, bool inverse, bool exclude"
)


def _fake(points, distances, kernels, bandwidths, products, weights, inverse, exclude):
    shape = (points[0].shape[0], len(products), points[distances[0]].shape[1])
    return bandwidths.new_empty(shape)


def _fake_backward(
    grad,
    points,
    distances,
    kernels,
    bandwidths,
    products,
    weights,
    inverse,
    exclude,
    wanted,
    bandwidths_wanted,
):
    found = [
        p.new_empty((p.shape[0] if w else 0, *p.shape[1:]), dtype=working_dtype(p.dtype))
        for p, w in zip(points, wanted, strict=True)
    ]
    return found, bandwidths.new_empty(
        (bandwidths.shape[0] if bandwidths_wanted else 0, len(kernels))
    )


def _setup(ctx, inputs, output, backend: str) -> None:
    points, distances, kernels, bandwidths, products, weights, inverse, exclude = inputs
    pairs = tuple(zip(distances[::2], distances[1::2], strict=True))
    plan = Plan(pairs, tuple(kernels), tuple(products), inverse, exclude)
    ctx.static = Static(plan, backend)
    ctx.weighted = weights is not None
    ctx.save_for_backward(*points, bandwidths, *(() if weights is None else (weights,)))


def _backward(ctx, grad):
    tensors = list(ctx.saved_tensors)
    if not ctx.weighted:
        tensors.append(None)
    needs = [*ctx.needs_input_grad[0], ctx.needs_input_grad[3], False]
    found = backward(ctx.static, tensors, grad, needs)
    by_weights = None
    if ctx.weighted and ctx.needs_input_grad[5]:
        by_weights = to_weights(ctx.static, tensors, grad)
    return found[:-2], None, None, found[-2], None, by_weights, None, None


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "kernel_sums: second derivatives of a compiled call are not implemented; call it outside "
        'the compiled region, or pass backend="reference"'
    )


def register() -> None:
    """Attach fakes and derivatives to the C++ ops; called once, after the library is loaded."""
    _attach("", "cpu")


def register_triton() -> None:
    """Make the Triton kernels ops of torch, as the C++ ones are. Imports no Triton."""
    if _triton_ops.COMPILED in _registered:
        return
    for name, signature in (
        ("kernel_sums", f"({_PLAN}) -> Tensor"),
        (
            "kernel_sums_backward",
            f"(Tensor grad, {_PLAN}, int[] wanted, bool bandwidths_wanted) -> (Tensor[], Tensor)",
        ),
    ):
        _triton_ops.define("kernel_sums", name, signature, recorded=True)
    _attach("_triton", _triton_ops.COMPILED)


def _attach(ending: str, backend: str) -> None:
    if backend in _registered:
        return
    _registered.add(backend)
    setup = functools.partial(_setup, backend=backend)
    sums, gradients = (f"transfuse::{NAME}{part}{ending}" for part in ("", "_backward"))
    torch.library.register_fake(sums, _fake)
    torch.library.register_autograd(sums, _backward, setup_context=setup)
    torch.library.register_fake(gradients, _fake_backward)
    torch.library.register_autograd(gradients, _refuse)
