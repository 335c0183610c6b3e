"""The definition of patch_gram in eager torch, and the composition that serves without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.ops._patch_gram_call import Geometry, normalise

# Numbers in the patches that the composition holds at a time.
CHUNK = 2**24


def patch_gram_reference(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``P^T P`` of all patches as rows of P, as ``transfuse.ops.patch_gram``."""
    x, geometry = normalise(x, kernel_size, stride, padding, dilation)
    return defined(x[None], geometry)[0]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """(B, C, H, W) -> (B, n, L), what ``unfold`` gives, also for empty tensors."""
    if x.numel() == 0:
        kernel, (rows, columns) = geometry.kernel, geometry.outputs(*x.shape[2:])
        return x.new_zeros((x.shape[0], x.shape[1] * kernel[0] * kernel[1], rows * columns))
    kernel, stride, padding, dilation = geometry
    return F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)


def defined(x: Tensor, geometry: Geometry) -> Tensor:
    """(G, B, C, H, W) -> (G, n, n), for checked arguments."""
    x = x.to(working_dtype(x.dtype))
    if x.numel() == 0:
        n = x.shape[2] * geometry.kernel[0] * geometry.kernel[1]
        # The empty sum keeps the result a function of x.
        return x.new_zeros((x.shape[0], n, n)) + x.sum()
    p = patches(x.flatten(0, 1), geometry).unflatten(0, x.shape[:2])
    return torch.einsum("gbil,gbjl->gij", p, p)


def composed(x: Tensor, geometry: Geometry) -> Tensor:
    """The same in matrix products of bounded memory; not meant to be differentiated."""
    if x.numel() == 0:
        return defined(x, geometry)
    return torch.stack([_one(images, geometry) for images in x])


def _one(x: Tensor, geometry: Geometry) -> Tensor:
    batch, channels, height, width = x.shape
    dtype = working_dtype(x.dtype)
    rows, columns = geometry.outputs(height, width)
    n = channels * geometry.kernel[0] * geometry.kernel[1]
    if geometry.apart:
        (kh, kw), used = geometry.kernel, x[..., : rows * geometry.kernel[0], :]
        used = used[..., : columns * kw].to(dtype)
        p = used.reshape(batch, channels, rows, kh, columns, kw).permute(0, 2, 4, 1, 3, 5)
        p = p.reshape(-1, n)
        return p.mT @ p
    total = x.new_zeros((n, n), dtype=dtype)
    step = max(1, CHUNK // (n * rows * columns))
    for part in x.split(step):
        p = patches(part.to(dtype), geometry).transpose(0, 1).reshape(n, -1)
        total.addmm_(p, p.mT)
    return total
