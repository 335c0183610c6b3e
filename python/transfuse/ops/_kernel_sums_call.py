"""Checks of a call of the kernel sum ops, and the flat form that their kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

KERNELS = ("rbf", "imq")
MOST_POINTS, MOST_DISTANCES, MOST_KERNELS, MOST_PRODUCTS = 8, 8, 16, 16


class KernelFactor(NamedTuple):
    """A kernel between the rows of ``x`` (N, d) and of ``y`` (M, d), or of ``x`` with itself.

    Factors that name the same tensors share their distances.
    """

    x: Tensor
    y: Tensor | None = None
    bandwidth: float | Tensor = 1.0


class Plan(NamedTuple):
    """What a call has besides its tensors.

    ``distances`` are pairs of numbers of point sets, ``kernels`` the distance of each kernel,
    ``products`` masks of kernels.
    """

    distances: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...]
    products: tuple[int, ...]
    inverse: bool
    exclude: bool


class Call(NamedTuple):
    """Point sets (each (count, width)), bandwidths (F,) float64, weights (M,) float64 or None."""

    plan: Plan
    points: list[Tensor]
    bandwidths: Tensor
    weights: Tensor | None


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def of_one(
    x: object, y: object, bandwidth: object, weights: object, kernel: object, exclude: object
) -> tuple[Call, bool]:
    """A call with one distance and any number of bandwidths, and whether there are several."""
    several = isinstance(bandwidth, Sequence) or (
        isinstance(bandwidth, Tensor) and bandwidth.dim() > 0
    )
    if isinstance(bandwidth, Tensor) and bandwidth.dim() > 1:
        raise ValueError(
            f"bandwidth: expected a number or 1 dimension (B,), got shape {tuple(bandwidth.shape)}"
        )
    given = list(bandwidth) if several else [bandwidth]  # type: ignore[call-overload]
    if not 1 <= len(given) <= MOST_KERNELS:
        raise ValueError(f"bandwidth: expected 1 to {MOST_KERNELS} bandwidths, got {len(given)}")
    names = [f"bandwidth[{i}]" if several else "bandwidth" for i in range(len(given))]
    points = [_points("x", x)]
    if y is not None and y is not x:
        points.append(_points("y", y))
        _alike("y", points[1], "x", points[0])
    if not isinstance(bandwidth, Tensor):
        bandwidths = _stack(
            [_bandwidth(n, h) for n, h in zip(names, given, strict=True)], points[0]
        )
    else:
        _checks.auxiliary("bandwidth", bandwidth, "x", points[0])
        _positive("bandwidth", bandwidth)
        bandwidths = bandwidth.reshape(-1).to(torch.float64)
    plan = Plan(
        ((0, len(points) - 1),),
        (0,) * len(given),
        tuple(1 << i for i in range(len(given))),
        _inverse(kernel),
        _flag("exclude_diagonal", exclude),
    )
    return _finish(plan, points, bandwidths, weights), several


def of_factors(
    factors: object, products: object, weights: object, kernel: object, exclude: object
) -> Call:
    """A call with any factors and products."""
    if not isinstance(factors, Sequence) or isinstance(factors, (str, Tensor)):
        raise TypeError(f"factors: expected a sequence, got {_checks.describe(factors)}")
    if isinstance(factors, KernelFactor):
        raise TypeError("factors: expected a sequence of KernelFactor, got one of them")
    if not 1 <= len(factors) <= MOST_KERNELS:
        raise ValueError(f"factors: expected 1 to {MOST_KERNELS} factors, got {len(factors)}")
    points: list[Tensor] = []
    numbers: dict[int, int] = {}

    def number(name: str, value: object) -> int:
        known = numbers.get(id(value))
        if known is None:
            points.append(_points(name, value))
            known = numbers[id(value)] = len(points) - 1
        return known

    distances: list[tuple[int, int]] = []
    kernels, bandwidths = [], []
    for i, factor in enumerate(factors):
        if not isinstance(factor, (KernelFactor, tuple)) or not 1 <= len(factor) <= 3:
            raise TypeError(
                f"factors[{i}]: expected a KernelFactor, got {_checks.describe(factor)}"
            )
        x, y, bandwidth = KernelFactor(*factor)
        row = number(f"factors[{i}].x", x)
        pair = (row, row if y is None else number(f"factors[{i}].y", y))
        _alike(f"factors[{i}].y", points[pair[1]], f"factors[{i}].x", points[row])
        for side, at, axis in (("x", 0, "rows"), ("y", 1, "columns")):
            have, want = points[pair[at]], points[distances[0][at] if distances else pair[at]]
            if have.shape[0] != want.shape[0]:
                raise ValueError(
                    f"factors[{i}].{side}: expected {want.shape[0]} {axis} (as factors[0]), "
                    f"got {have.shape[0]}"
                )
        if pair not in distances:
            distances.append(pair)
        kernels.append(distances.index(pair))
        bandwidths.append(_bandwidth(f"factors[{i}].bandwidth", bandwidth))
    if len(points) > MOST_POINTS or len(distances) > MOST_DISTANCES:
        raise ValueError(
            f"factors: expected at most {MOST_POINTS} point sets and {MOST_DISTANCES} distances, "
            f"got {len(points)} and {len(distances)}"
        )
    for i, p in enumerate(points[1:], 1):
        if p.dtype != points[0].dtype:
            raise TypeError(
                f"factors: expected points of one dtype, got {_checks.dtype_name(points[0].dtype)} "
                f"and {_checks.dtype_name(p.dtype)}"
            )
        _checks.same_device(f"point set {i} of factors", p, "the first", points[0])
    plan = Plan(
        tuple(distances),
        tuple(kernels),
        _masks(products, len(factors)),
        _inverse(kernel),
        _flag("exclude_diagonal", exclude),
    )
    return _finish(plan, points, _stack(bandwidths, points[0]), weights)


def _points(name: str, value: object) -> Tensor:
    # Within the backward of a Function, torch.compile does not let layouts be asked for.
    if torch.compiler.is_compiling() and isinstance(value, Tensor):
        return value
    value = _checks.tensor(name, value, ("N", "d"))
    _checks.floating(name, value)
    return value


def _alike(name: str, value: Tensor, of: str, reference: Tensor) -> None:
    _checks.same_dtype(name, value, of, reference)
    _checks.same_device(name, value, of, reference)
    _checks.size(name, value, 1, reference.shape[1], f"width of {of}")


def _inverse(kernel: object) -> bool:
    return bool(_checks.choice("kernel", kernel, {"rbf": 0, "imq": 1}))


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_checks.describe(value)}")
    return value


def _bandwidth(name: str, value: object) -> float | Tensor:
    if not isinstance(value, Tensor):
        return _checks.number(name, value, positive=True)
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or 0 dimensions, got {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating tensor, got {_checks.describe(value)}")
    _positive(name, value)
    return value


def _positive(name: str, value: Tensor) -> None:
    """Read on the CPU only, where that waits for nothing; not while a graph is traced."""
    if (
        torch.compiler.is_compiling()
        or type(value) not in (Tensor, torch.nn.Parameter)
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
        or value.device.type != "cpu"
    ):
        return
    entries = value.detach().reshape(-1).tolist()
    bad = [h for h in entries if not 0.0 < h < float("inf")]
    if bad:
        raise ValueError(f"{name}: expected finite numbers greater than 0, got {bad[0]}")


def _stack(bandwidths: list[float | Tensor], like: Tensor) -> Tensor:
    if like.device.type == "cpu" and not any(isinstance(h, Tensor) for h in bandwidths):
        return torch.tensor(bandwidths, dtype=torch.float64)
    # Numbers are written where they are needed: a copy would wait for the device.
    return torch.stack(
        [
            h.to(device=like.device, dtype=torch.float64)
            if isinstance(h, Tensor)
            else torch.full((), h, dtype=torch.float64, device=like.device)
            for h in bandwidths
        ]
    )


def _masks(products: object, factors: int) -> tuple[int, ...]:
    if products is None:
        return ((1 << factors) - 1,)
    if not isinstance(products, Sequence) or isinstance(products, str):
        raise TypeError(
            f"products: expected sequences of factor numbers, got {_checks.describe(products)}"
        )
    if not 1 <= len(products) <= MOST_PRODUCTS:
        raise ValueError(f"products: expected 1 to {MOST_PRODUCTS} products, got {len(products)}")
    masks = []
    for i, product in enumerate(products):
        if not isinstance(product, Sequence) or isinstance(product, str) or not product:
            raise TypeError(
                f"products[{i}]: expected at least one factor number, "
                f"got {_checks.describe(product)}"
            )
        mask = 0
        for f in product:
            if isinstance(f, bool) or not isinstance(f, int):
                raise TypeError(f"products[{i}]: expected integers, got {_checks.describe(f)}")
            if not 0 <= f < factors or mask >> f & 1:
                raise ValueError(
                    f"products[{i}]: expected different numbers in [0, {factors}), "
                    f"got {tuple(product)}"
                )
            mask |= 1 << f
        masks.append(mask)
    return tuple(masks)


def _finish(plan: Plan, points: list[Tensor], bandwidths: Tensor, weights: object) -> Call:
    row, column = plan.distances[0]
    rows, columns = points[row].shape[0], points[column].shape[0]
    if plan.exclude and rows != columns:
        raise ValueError(
            f"exclude_diagonal: expected as many columns as rows, got {rows} rows and "
            f"{columns} columns"
        )
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: expected a tensor or None, got {_checks.describe(weights)}")
        if tuple(weights.shape) != (columns,):
            raise ValueError(
                f"weights: expected shape ({columns},) (columns), got {tuple(weights.shape)}"
            )
        _checks.floating("weights", weights)
        _checks.same_device("weights", weights, "the points", points[0])
        weights = weights.to(torch.float64)
    return Call(plan, points, bandwidths, weights)
