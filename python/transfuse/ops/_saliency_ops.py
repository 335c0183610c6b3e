"""Fake kernels and autograd of the raw C++ saliency ops: what ``torch.compile`` sees."""

from __future__ import annotations

import torch

from transfuse.ops._saliency_call import Geometry, Plan, working_dtype
from transfuse.ops._saliency_core import Normed, Weighted, gradients

_registered = False


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


def register() -> None:
    """Attach fakes and derivatives to the C++ ops; called once, after the library is loaded."""
    global _registered
    if _registered:
        return
    _registered = True
    for name, fake, setup, backward in (
        ("grad_weighted_map", _fake_weighted, _setup_weighted, _backward_weighted),
        ("normgrad_map", _fake_normed, _setup_normed, _backward_normed),
    ):
        torch.library.register_fake(f"transfuse::{name}", fake)
        torch.library.register_autograd(f"transfuse::{name}", backward, setup_context=setup)
