"""Fakes and autograd of the raw patch_gram op, C++ and Triton: what ``torch.compile`` sees."""

from __future__ import annotations

import torch

from transfuse import _triton_ops
from transfuse.ops._patch_gram_call import Geometry
from transfuse.ops._patch_gram_core import gradient
from transfuse.ops._patch_gram_reference import working_dtype

_registered: set[str] = set()


def _fake(x, kernel, stride, padding, dilation):
    n = x.shape[2] * kernel[0] * kernel[1]
    return x.new_empty((x.shape[0], n, n), dtype=working_dtype(x.dtype))


def _setup(ctx, inputs, output) -> None:
    x, *geometry = inputs
    ctx.geometry = Geometry(*(tuple(pair) for pair in geometry))
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return gradient(x, grad, ctx.geometry), None, None, None, None


def register() -> None:
    """Attach fake and derivative to the C++ op; called once, after the library is loaded."""
    _attach("transfuse::patch_gram")


def register_triton() -> None:
    """Make the Triton kernel an op of torch, as the C++ one is. Imports no Triton."""
    if "transfuse::patch_gram_triton" in _registered:
        return
    signature = "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor"
    _triton_ops.define("patch_gram", "patch_gram", signature, recorded=True)
    _attach("transfuse::patch_gram_triton")


def _attach(op: str) -> None:
    if op in _registered:
        return
    _registered.add(op)
    torch.library.register_fake(op, _fake)
    torch.library.register_autograd(op, _backward, setup_context=_setup)
