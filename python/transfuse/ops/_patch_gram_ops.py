"""Fake kernel and autograd of the raw C++ patch_gram op: what ``torch.compile`` sees."""

from __future__ import annotations

import torch

from transfuse.ops._patch_gram_call import Geometry
from transfuse.ops._patch_gram_core import gradient
from transfuse.ops._patch_gram_reference import working_dtype

_registered = False


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
    global _registered
    if _registered:
        return
    _registered = True
    torch.library.register_fake("transfuse::patch_gram", _fake)
    torch.library.register_autograd("transfuse::patch_gram", _backward, setup_context=_setup)
