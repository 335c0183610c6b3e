"""The differentiable core of patch_gram: kernels by backend, and the rules of its derivatives.

S(x) = P(x) P(x)^T for the patches P (n, L), linear in x. With a cotangent G the gradient is the
fold of (G + G^T) P(x); the tangent along y is P(x) P(y)^T plus its transpose. Both are torch
operations, so further derivatives are torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _autograd, _triton_ops
from transfuse._autograd import Differentiable, Tensors, refuse_forward_over_forward
from transfuse.ops._patch_gram_call import Geometry
from transfuse.ops._patch_gram_reference import composed, patches, working_dtype


class Static(NamedTuple):
    """What a call has besides its tensor, (G, B, C, H, W)."""

    geometry: Geometry
    backend: str


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(G, B, C, H, W) -> (G, n, n)."""
    (x,) = tensors
    if static.backend == "composed":
        return (composed(x, static.geometry),)
    return (_kernel(static.backend)(x, *static.geometry),)


def _kernel(backend: str) -> Callable:
    if backend == "triton":
        return _triton_ops.kernel("patch_gram", "patch_gram")
    ops = torch.ops.transfuse
    return ops.patch_gram_triton if backend == _triton_ops.COMPILED else ops.patch_gram


def gradient(x: Tensor, cotangent: Tensor, geometry: Geometry) -> Tensor:
    """Gradient with respect to x (G, B, C, H, W) of <cotangent (G, n, n), S>."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    kernel, stride, padding, dilation = geometry
    weight = cotangent + cotangent.mT
    # Products of patches and not a convolution: torch's vary with the number of threads.
    p = patches(x.to(weight.dtype).flatten(0, 1), geometry).unflatten(0, x.shape[:2])
    turned = (weight[:, None] @ p).flatten(0, 1)
    image = F.fold(turned, x.shape[3:], kernel, dilation, padding, stride)
    return image.unflatten(0, x.shape[:2]).to(x.dtype)


def _vjp(static: Static, tensors: Tensors, outputs: Tensors, grads: Tensors, needs) -> list:
    if grads[0] is None:
        return [None]
    return [gradient(tensors[0], grads[0], static.geometry)]


def _jvp(static: Static, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> list[Tensor]:
    refuse_forward_over_forward("patch_gram")
    (x,), (moved,) = tensors, tangents
    dtype = working_dtype(x.dtype)
    if x.numel() == 0 or moved is None:
        return [torch.zeros_like(outputs[0])]
    p, q = (
        patches(t.to(dtype).flatten(0, 1), static.geometry).unflatten(0, t.shape[:2])
        for t in (x, moved)
    )
    half = torch.einsum("gbil,gbjl->gij", p, q)
    return [half + half.mT]


def _vmap(static: Static, tensors: Tensors, dims, size):
    (x,), (dim,) = tensors, dims
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    groups = x.shape[1]

    def unfold(outputs: Tensors) -> tuple[Tensor, ...]:
        return tuple(y.unflatten(0, (size, groups)) for y in outputs)

    return static, [x.flatten(0, 1)], unfold


function = _autograd.function(
    Differentiable(name="patch_gram", forward=forward, vjp=_vjp, jvp=_jvp, vmap=_vmap)
)
