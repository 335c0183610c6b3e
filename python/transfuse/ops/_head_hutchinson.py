"""Hutchinson's estimate of the diagonal of a head's Hessians, a few probes at a time.

With probes z_r (C, D), T_r = t of ``_head_reference`` for V = z_r, and a domain of n samples,

    Q = (1 / R) sum_r z_r * (T_r^T X / n).

Neither probes nor products (R, C, D) are kept: a chunk of probes is made, used for every domain
and dropped, in the backward once more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse._autograd import Differentiable, Tensors, function
from transfuse.ops._head_call import Segments
from transfuse.ops._head_reference import outputs
from transfuse.ops._rademacher import rademacher

CHUNK = 1 << 20  # numbers of one chunk of probes


class Static(NamedTuple):
    """What a call has besides tensors: probes ``start`` to ``start + count - 1`` of a seed, or
    given ones (the last tensor)."""

    segments: Segments
    bias: bool
    count: int  # type: ignore[assignment]  # a field, not tuple.count
    seed: int
    start: int


def _chunks(static: Static, p: Tensor, width: int, given: Tensor | None) -> Iterator[Tensor]:
    """Probes as (r, C, D)."""
    classes = p.shape[1]
    size = classes * width
    step = max(1, CHUNK // max(size, 1))
    for first in range(0, static.count, step):
        count = min(step, static.count - first)
        if given is not None:
            yield given[first : first + count]
        else:
            signs = rademacher(static.seed, static.start + first, count, size, p.dtype, p.device)
            yield signs.reshape(count, classes, width)


def _centred(features: Tensor, p: Tensor, probes: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """u - p.u and u, (N, r, C)."""
    u = outputs(features, probes.flatten(0, 1), bias).unflatten(1, probes.shape[:2])
    return u - (p[:, None] * u).sum(-1, keepdim=True), u


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Q (E, C, D) of (features, p, given probes or None)."""
    features, p, given = tensors
    bounds, width = static.segments.bounds, features.shape[1] + static.bias
    result = features.new_zeros((static.segments.domains, p.shape[1], width))
    for probes in _chunks(static, p, width, given):
        centred, _ = _centred(features, p, probes, static.bias)
        t = (p[:, None] * centred).flatten(1)
        for domain, (first, last) in enumerate(itertools.pairwise(bounds)):
            rows = t[first:last] * (1.0 / ((last - first) * static.count))
            products = (rows.mT @ features[first:last]).unflatten(0, probes.shape[:2])
            inner = features.shape[1]
            result[domain, :, :inner] += (products * probes[..., :inner]).sum(0)
            if static.bias:
                sums = rows.sum(0).unflatten(0, probes.shape[:2])
                result[domain, :, -1] += (sums * probes[..., -1]).sum(0)
    return (result,)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients of (features, p) from (grad, features, p, given probes or None)."""
    grad, features, p, given = tensors
    bounds, width = static.segments.bounds, features.shape[1] + static.bias
    inner = features.shape[1]
    to_features, to_p = torch.zeros_like(features), torch.zeros_like(p)
    for probes in _chunks(static, p, width, given):
        centred, u = _centred(features, p, probes, static.bias)
        t = p[:, None] * centred
        to_t = torch.empty_like(t)
        for domain, (first, last) in enumerate(itertools.pairwise(bounds)):
            scale = 1.0 / ((last - first) * static.count)
            marked = (probes * (grad[domain] * scale)).flatten(0, 1)
            x = features[first:last]
            to_t[first:last] = outputs(x, marked, static.bias).unflatten(1, probes.shape[:2])
            to_features[first:last] += t[first:last].flatten(1) @ marked[:, :inner]
        # t = p * (u - p.u)
        along = (p[:, None] * to_t).sum(-1, keepdim=True)
        to_p += (to_t * centred - along * u).sum(1)
        to_u = p[:, None] * (to_t - along)
        to_features += to_u.flatten(1) @ probes.flatten(0, 1)[:, :inner]
    return to_features, to_p


_backward = function(Differentiable(name="head_hutchinson_diagonal_backward", forward=backward))


def _vjp(static, tensors, outputs, grads, needs):
    if grads[0] is None:
        return [None] * 3
    return (*_backward(static, (grads[0], *tensors)), None)


estimate = function(Differentiable(name="head_hutchinson_diagonal", forward=forward, vjp=_vjp))
