"""Fakes and autograd of the raw saliency ops, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import torch

from transfuse import _triton_ops
from transfuse.ops._saliency_call import Geometry, Plan, working_dtype
from transfuse.ops._saliency_core import Normed, Weighted, gradients

_registered: set[str] = set()


def _fake_weighted(act, grad, method):
    return act.new_empty((act.shape[0], act.shape[2]), dtype=working_dtype(act.dtype))


def _setup_weighted(ctx, inputs, output) -> None:
    act, grad, method = inputs
    ctx.static = Weighted(method, "composed")
    ctx.save_for_backward(act, grad)


def _backward_weighted(ctx, cotangent):
    return *gradients(ctx.static, *ctx.saved_tensors, cotangent), None


def _fake_normed(act, grad, grid, phase1, phase2, kernel, stride, padding, dilation):
    return act.new_empty((act.shape[0], grad.shape[2]), dtype=working_dtype(act.dtype))


def _setup_normed(ctx, inputs, output) -> None:
    act, grad, grid, phase1, phase2, *geometry = inputs
    plan = Plan(phase1, phase2, tuple(grid), Geometry(*(tuple(t) for t in geometry)))
    ctx.static = Normed(plan, "composed")
    ctx.save_for_backward(act, grad)


def _backward_normed(ctx, cotangent):
    return *gradients(ctx.static, *ctx.saved_tensors, cotangent), *([None] * 7)


_SCHEMAS = {
    "grad_weighted_map": "(Tensor act, Tensor grad, int method) -> Tensor",
    "normgrad_map": "(Tensor act, Tensor grad, int[] grid, int phase1, int phase2, int[] kernel, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor",
}


def register() -> None:
    """Attach fakes and derivatives to the C++ ops; called once, after the library is loaded."""
    _attach("")


def register_triton() -> None:
    """Make the Triton kernels ops of torch, as the C++ ones are. Imports no Triton."""
    if "_triton" in _registered:
        return
    for name, signature in _SCHEMAS.items():
        _triton_ops.define("saliency", name, signature, recorded=True)
    _attach("_triton")


def _attach(ending: str) -> None:
    if ending in _registered:
        return
    _registered.add(ending)
    for name, fake, setup, backward in (
        ("grad_weighted_map", _fake_weighted, _setup_weighted, _backward_weighted),
        ("normgrad_map", _fake_normed, _setup_normed, _backward_normed),
    ):
        op = f"transfuse::{name}{ending}"
        torch.library.register_fake(op, fake)
        torch.library.register_autograd(op, backward, setup_context=setup)
