"""Checks of a call of adain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _checks

# The kernels take 12; a mapped dimension of each vmap around the call is one more.
MAX_RANK = 8


def normalise(
    content: Tensor, style: Tensor, dims: Sequence[int], eps: float
) -> tuple[tuple[int, ...], float]:
    """Check the arguments; ``dims`` as ascending axes from 0, ``eps`` as a number."""
    for name, value in (("content", content), ("style", style)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
        if value.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    _checks.floating("content", content)
    _checks.same_dtype("style", style, "content", content)
    _checks.same_device("style", style, "content", content)
    rank = content.dim()
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"content: expected 1 to {MAX_RANK} dimensions, got {rank}")
    if style.dim() != rank:
        raise ValueError(
            f"style: expected {rank} dimensions (those of content), got {style.dim()} "
            f"(shape {tuple(style.shape)})"
        )
    axes = _axes(dims, rank)
    for axis in range(rank):
        if axis in axes or style.shape[axis] == content.shape[axis]:
            continue
        if axis == 0 and style.shape[0] == 1:
            continue
        expected = f"{content.shape[axis]} or 1" if axis == 0 else f"{content.shape[axis]}"
        raise ValueError(
            f"style: expected {expected} in dimension {axis} (which is not in dims), "
            f"got {style.shape[axis]} (shape {tuple(style.shape)})"
        )
    if style.numel() == 0 and content.numel() != 0:
        raise ValueError(
            f"style: expected at least one element per statistic, got shape {tuple(style.shape)}"
        )
    eps = _checks.number("eps", eps)
    if eps < 0.0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    return axes, eps


def _axes(dims: Sequence[int], rank: int) -> tuple[int, ...]:
    if isinstance(dims, (str, Tensor)) or not isinstance(dims, Sequence):
        raise TypeError(f"dims: expected a sequence of integers, got {_checks.describe(dims)}")
    axes = []
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dims: expected integers, got {_checks.describe(dim)}")
        if not -rank <= dim < rank:
            raise ValueError(f"dims: expected entries in [{-rank}, {rank}), got {dim}")
        axes.append(dim % rank)
    if not axes:
        raise ValueError("dims: expected at least one dimension, got none")
    if len(set(axes)) != len(axes):
        raise ValueError(f"dims: expected different dimensions, got {tuple(dims)}")
    return tuple(sorted(axes))
