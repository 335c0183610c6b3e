"""The definition of kernel sums in eager torch, and what serves without a kernel: by rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transfuse.ops._kernel_sums_call import Plan, of_factors, of_one, working_dtype

# Numbers in the matrices that are held at a time.
CHUNK = 2**23


def kernel_sums_reference(
    x: Tensor,
    y: Tensor | None = None,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    *,
    weights: Tensor | None = None,
    kernel: str = "rbf",
    exclude_diagonal: bool = False,
) -> Tensor:
    """``sum_j w_j k(x_i, y_j)``, as ``transfuse.ops.kernel_sums``."""
    call, several = of_one(x, y, bandwidth, weights, kernel, exclude_diagonal)
    found = defined(call.plan, call.points, call.bandwidths, call.weights)
    return found if several else found[0]


def kernel_product_sums_reference(
    factors: Sequence[object],
    products: Sequence[Sequence[int]] | None = None,
    *,
    weights: Tensor | None = None,
    kernel: str = "rbf",
    exclude_diagonal: bool = False,
) -> Tensor:
    """``sum_j w_j prod_f k_f(x_i, y_j)``, as ``transfuse.ops.kernel_product_sums``."""
    call = of_factors(factors, products, weights, kernel, exclude_diagonal)
    return defined(call.plan, call.points, call.bandwidths, call.weights)


def defined(
    plan: Plan, points: Sequence[Tensor], bandwidths: Tensor, weights: Tensor | None
) -> Tensor:
    """Sums (P, N) of points (count, width), in their working dtype."""
    wide = [p.to(working_dtype(p.dtype)) for p in points]
    squares = []
    for row, column in plan.distances:
        squares.append((wide[row][:, None] - wide[column][None]).square().sum(-1))
    return _sums(plan, squares, bandwidths, weights, slice(None))


def _sums(
    plan: Plan,
    squares: Sequence[Tensor],
    bandwidths: Tensor,
    weights: Tensor | None,
    rows: slice,
) -> Tensor:
    dtype = squares[0].dtype
    kernels = []
    for number, h in zip(plan.kernels, bandwidths.unbind(-1), strict=True):
        h = h.to(dtype)[..., None, None]
        if plan.inverse:
            kernels.append(1.0 / (1.0 + (squares[number] / h) / h))
        else:
            kernels.append(torch.exp(-0.5 * (squares[number] / h) / h))
    if plan.exclude:
        size, columns = squares[0].shape[-2:]
        start = 0 if rows.start is None else rows.start
        here = torch.arange(start, start + size, device=squares[0].device)[:, None]
        same = here == torch.arange(columns, device=here.device)
        kernels = [torch.where(same, 0.0, k) for k in kernels]
    found = []
    for mask in plan.products:
        chosen = [k for f, k in enumerate(kernels) if mask >> f & 1]
        product = math.prod(chosen[1:], start=chosen[0])
        if weights is not None:
            product = product * weights.to(dtype)[..., None, :]
        found.append(product.sum(-1))
    return torch.stack(found, -2)


def chunks(plan: Plan, points: Sequence[Tensor]) -> Iterator[slice]:
    """Stretches of rows whose matrices fit."""
    row, column = plan.distances[0]
    rows, columns = points[row].shape[-2], points[column].shape[-2]
    groups = 1 if points[0].dim() == 2 else points[0].shape[0]
    each = groups * columns * (len(plan.distances) + len(plan.kernels) + len(plan.products))
    step = max(1, CHUNK // max(1, each))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(rows, start + step))


def by_rows(
    plan: Plan,
    points: Sequence[Tensor],
    bandwidths: Tensor,
    weights: Tensor | None,
    rows: slice,
) -> Tensor:
    """Sums (G, P, rows) of points (G, count, width) by matrix products, for some of the rows.

    Differentiable to any order.
    """
    wide = [p.to(working_dtype(p.dtype)) for p in points]
    squares = []
    for row, column in plan.distances:
        x, y = wide[row], wide[column]
        # Distances do not change, and products lose less.
        centre = _mean(x if row == column else torch.cat((x, y), -2)).detach()
        x, y = x[..., rows, :] - centre, y - centre
        norms = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
        d = norms - 2.0 * (x @ y.mT)
        # Rounding makes some negative; their derivatives are no others.
        d = d + (d.clamp_min(0.0) - d).detach()
        if row == column:
            size, columns = d.shape[-2:]
            here = torch.arange(rows.start, rows.start + size, device=d.device)[:, None]
            d = torch.where(here == torch.arange(columns, device=d.device), 0.0, d)
        squares.append(d)
    return _sums(plan, squares, bandwidths, weights, rows)


def _mean(x: Tensor) -> Tensor:
    return (
        x.mean(-2, keepdim=True) if x.shape[-2] > 0 else x.new_zeros(*x.shape[:-2], 1, x.shape[-1])
    )
