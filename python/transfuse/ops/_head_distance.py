"""Inner products of domain Hessians in blocks of rows, and their first derivative.

The N x N matrix of ``_head_reference.squared_distance`` is formed a block of rows at a time, and
again in the backward, so that memory does not grow with N^2. The kernel of a pair is symmetric, so
a block of rows has everything that the gradient of these rows needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse._autograd import Differentiable, Tensors, function
from transfuse.ops._head_call import Segments

BLOCK = 1 << 20  # pairs per block; a block has about six temporaries of this size


class Static(NamedTuple):
    """What a call has besides tensors."""

    segments: Segments
    bias: bool


def _blocks(count: int) -> Iterator[slice]:
    rows = max(1, BLOCK // max(count, 1))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _membership(segments: Segments, like: Tensor) -> Tensor:
    """(N, E): 1/n_e where the sample is of domain e, so that means are products."""
    result = like.new_zeros((segments.bounds[-1], segments.domains))
    for domain, (first, last) in enumerate(zip(segments.bounds, segments.bounds[1:], strict=False)):
        result[first:last, domain] = 1.0 / (last - first)
    return result


class _Pairs(NamedTuple):
    """One block of rows against all samples."""

    inner: Tensor  # x.y
    overlap: Tensor  # p.q
    classes: Tensor  # <A, B>


def _pairs(static: Static, rows: slice, features: Tensor, p: Tensor, spread: Tensor) -> _Pairs:
    inner = features[rows] @ features.mT
    if static.bias:
        inner += 1.0
    overlap = p[rows] @ p.mT
    squares = p * p
    classes = overlap * overlap
    classes.addmm_(spread[rows], spread.mT).addmm_(squares[rows], squares.mT, alpha=-1.0)
    return _Pairs(inner, overlap, classes)


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(E, E) inner products of (features, p, p (1 - p))."""
    features, bounds, lengths = tensors[0], static.segments.bounds, static.segments.lengths
    result = features.new_zeros((static.segments.domains,) * 2)
    for rows in _blocks(features.shape[0]):
        pairs = _pairs(static, rows, *tensors)
        products = pairs.inner.square_() * pairs.classes
        # Sums of stretches, not products with indicators: a NaN stays in its domain.
        columns = torch.stack([part.mean(1) for part in products.split(lengths, dim=1)], dim=1)
        for domain, (first, last) in enumerate(itertools.pairwise(bounds)):
            own = columns[max(first - rows.start, 0) : max(last - rows.start, 0)]
            result[domain] += own.sum(0) / (last - first)
    return (result,)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Gradients of (features, p, p (1 - p)) from (grad, features, p, p (1 - p))."""
    grad, features, p, spread = tensors
    means = _membership(static.segments, features)
    weights = means @ (grad + grad.mT)
    results = tuple(torch.empty_like(t) for t in (features, p, spread))
    squares = p * p
    for rows in _blocks(features.shape[0]):
        pairs = _pairs(static, rows, features, p, spread)
        weight = weights[rows] @ means.mT
        to_inner = 2.0 * weight * pairs.inner * pairs.classes
        to_classes = weight * pairs.inner.square_()
        results[0][rows] = to_inner @ features
        results[2][rows] = to_classes @ spread
        to_p = (to_classes * pairs.overlap) @ p - p[rows] * (to_classes @ squares)
        results[1][rows] = 2.0 * to_p
    return results


_backward = function(Differentiable(name="head_hessian_distance_backward", forward=backward))


def _vjp(static, tensors, outputs, grads, needs):
    return [None] * 3 if grads[0] is None else _backward(static, (grads[0], *tensors))


inner_products = function(Differentiable(name="head_hessian_distance", forward=forward, vjp=_vjp))
