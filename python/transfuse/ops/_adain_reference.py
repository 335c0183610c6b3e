"""adain written out: its specification, its oracle, and its fallback.

Arithmetic is float64 for float64 inputs and float32 for all others, rounded once at the end. Plain
autograd differentiates it to any order, forward and reverse; the standard deviation of a constant
plane has derivative 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.ops._adain_call import normalise


def adain_reference(
    content: Tensor, style: Tensor, *, dims: Sequence[int] = (-2, -1), eps: float = 1e-4
) -> Tensor:
    """``std_s * (content - mean_c) / (std_c + eps) + mean_s``, as ``transfuse.ops.adain``."""
    axes, eps = normalise(content, style, dims, eps)
    return composed(content, style, axes, eps)


def composed(content: Tensor, style: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """The formula for checked arguments."""
    if content.numel() == 0:
        # No statistics to take; the empty sum keeps the result a function of the style.
        return content.clone() + 0.0 * style.sum().to(content.dtype)
    accumulate = torch.float64 if content.dtype == torch.float64 else torch.float32
    _, centred, std = moments(content.to(accumulate), axes)
    style_mean, _, style_std = moments(style.to(accumulate), axes)
    result = style_std * inverse(std + eps) * centred + style_mean
    return result.to(content.dtype)


def moments(x: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, centred numbers and unbiased standard deviation over some axes, which stay as 1."""
    count, pivot = 1, x.detach()
    for axis in axes:
        count *= x.shape[axis]
        pivot = pivot.narrow(axis, 0, 1)
    # About an element of the plane, the mean of a constant plane is exact and its deviation 0.
    mean = pivot + (x - pivot).mean(dim=tuple(axes), keepdim=True)
    centred = x - mean
    if count < 2:
        return mean, centred, torch.zeros_like(mean)
    variance = centred.square().sum(dim=tuple(axes), keepdim=True) / (count - 1)
    # The root is taken of 1 where the variance is 0: its derivative there is 0, not infinite.
    positive = variance != 0.0
    std = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
    return mean, centred, std


def inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 for 0."""
    nonzero = x != 0.0
    return torch.where(nonzero, 1.0 / torch.where(nonzero, x, 1.0), 0.0)
