"""The definition of the saliency maps in eager torch, differentiable at every order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.ops._saliency_call import METHODS, Geometry, Plan, layer, plan, working_dtype

PLUS_EPS, POOLED_EPS = 1e-6, 1e-7


def grad_weighted_map_reference(
    act: Tensor, grad: Tensor, *, method: str = "gradcam", layout: str = "nchw"
) -> Tensor:
    """Sum over channels of weights times activations, as ``transfuse.ops.grad_weighted_map``."""
    from transfuse import _checks

    code = _checks.choice("method", method, METHODS)
    found = layer(act, grad, layout, alike=True)
    return weighted_map(found.act, found.grad, code).unflatten(1, found.space)


def normgrad_map_reference(
    act: Tensor,
    grad: Tensor,
    *,
    phase1: str = "conv1x1",
    phase2: str = "norm",
    layout: str = "nchw",
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Phase 2 over the entries of the outer products, as ``transfuse.ops.normgrad_map``."""
    found = layer(act, grad, layout, alike=phase1 != "conv")
    given = {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    which = plan(found, act, grad, phase1, phase2, layout, given)
    return normgrad(found.act, found.grad, which).unflatten(1, found.out_space)


# ---- gradient-weighted maps ----------------------------------------------------------------------


def away_from_zero(x: Tensor, eps: float) -> Tensor:
    """x with its size enlarged by eps."""
    return x + torch.where(x < 0, -eps, eps)


def channel_weights(act: Tensor, grad: Tensor, method: int) -> Tensor:
    """What activations are multiplied with: (B, C, 1) where it is pooled, else (B, C, L)."""
    if method == METHODS["gradcam"]:
        return grad.mean(2, keepdim=True)
    if method == METHODS["gradcam++"]:
        square = grad * grad
        below = square * (2 + act.sum(2, keepdim=True) * grad)
        return (grad.relu() * (square / away_from_zero(below, PLUS_EPS))).sum(2, keepdim=True)
    if method == METHODS["xgradcam"]:
        below = away_from_zero(act.sum(2, keepdim=True), POOLED_EPS)
        return (grad * act).sum(2, keepdim=True) / below
    return grad.relu() if method == METHODS["layercam"] else grad


def weighted_channels(act: Tensor, grad: Tensor, method: int) -> Tensor:
    """(B, C, L), what the map is the sum of."""
    terms = channel_weights(act, grad, method) * act
    return terms.relu() if method == METHODS["elementwise"] else terms


def weighted_map(act: Tensor, grad: Tensor, method: int) -> Tensor:
    """(B, C, L) twice -> (B, L), for checked arguments."""
    dtype = working_dtype(act.dtype)
    return weighted_channels(act.to(dtype), grad.to(dtype), method).sum(1)


# ---- NormGrad ------------------------------------------------------------------------------------


def normgrad(act: Tensor, grad: Tensor, which: Plan) -> Tensor:
    """(B, C, L) and (B, C', L') -> (B, L'), for checked arguments."""
    dtype = working_dtype(act.dtype)
    act, grad = act.to(dtype), grad.to(dtype)
    if which.phase1 == 0:
        return _own(act * grad, which.phase2)
    if which.phase1 == 1:
        return _own(grad, which.phase2)
    grid, out_grid = which.grid, which.out_grid
    act, grad = act.unflatten(2, grid), grad.unflatten(2, out_grid)
    make = _product if which.phase1 == 2 else _depthwise
    return make(act, grad, which.phase2, which.geometry).flatten(1)


def _own(x: Tensor, phase2: int) -> Tensor:
    """Phase 2 over channels."""
    if phase2 < 2:
        return _root((x if phase2 == 0 else x.relu()).square().sum(1))
    return x.sum(1) if phase2 == 2 else x.amax(1)


def _product(act: Tensor, grad: Tensor, phase2: int, geometry: Geometry) -> Tensor:
    """Over all pairs of an entry of the neighbourhood and a channel of the gradient."""
    if phase2 == 0:
        return _root(_box(act.square().sum(1), geometry)) * _root(grad.square().sum(1))
    if phase2 == 1:
        parts = [
            _root(_box((sign * act).relu().square().sum(1), geometry))
            * _root((sign * grad).relu().square().sum(1))
            for sign in (1, -1)
        ]
        # Their squares may leave the range; the result does not depend on the scale.
        scale = torch.maximum(*parts).detach()
        scale = torch.where(scale == 0, 1.0, scale)
        return scale * _root((parts[0] / scale).square() + (parts[1] / scale).square())
    if phase2 == 2:
        return _box(act.sum(1), geometry) * grad.sum(1)
    high, low = _extremes(act.amax(1), act.amin(1), geometry)
    top, bottom = grad.amax(1), grad.amin(1)
    return torch.stack([high * top, high * bottom, low * top, low * bottom]).amax(0)


def _depthwise(act: Tensor, grad: Tensor, phase2: int, geometry: Geometry) -> Tensor:
    """Over channels, and over the neighbourhood of each."""
    if phase2 == 0:
        return _root((_box(act.square(), geometry) * grad.square()).sum(1))
    if phase2 == 1:
        parts = [
            (_box((sign * act).relu().square(), geometry) * (sign * grad).relu().square()).sum(1)
            for sign in (1, -1)
        ]
        return _root(parts[0] + parts[1])
    if phase2 == 2:
        return (_box(act, geometry) * grad).sum(1)
    high, low = _extremes(act, act, geometry)
    return torch.maximum(high * grad, low * grad).amax(1)


def _root(x: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where a norm has none."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def _shifts(x: Tensor, geometry: Geometry) -> Iterator[Tensor]:
    """What each entry of the kernel sees: (..., *grid) -> (..., *out_grid), zeros outside."""
    padding = [p for p in reversed(geometry.padding) for _ in range(2)]
    outputs = geometry.outputs(x.shape[-3:])
    padded = F.pad(x, padding)
    for entry in itertools.product(*(range(k) for k in geometry.kernel)):
        part = padded
        for axis, (at, d, s, n) in enumerate(
            zip(entry, geometry.dilation, geometry.stride, outputs, strict=True), start=-3
        ):
            index = [slice(None)] * part.dim()
            index[axis] = slice(at * d, at * d + max(0, n - 1) * s + min(1, n), s)
            part = part[tuple(index)]
        yield part


def _box(x: Tensor, geometry: Geometry) -> Tensor:
    return sum(_shifts(x, geometry), start=x.new_zeros(()))


def _extremes(high: Tensor, low: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    tops = torch.stack(list(_shifts(high, geometry))).amax(0)
    return tops, torch.stack(list(_shifts(low, geometry))).amin(0)
