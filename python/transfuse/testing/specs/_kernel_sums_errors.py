"""Calls of the kernel sum ops that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import KernelFactor
from transfuse.testing.spec import BadCase


def _one(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments = {"x": torch.zeros(4, 3), "y": torch.zeros(5, 3), "bandwidth": 1.0, **changes}

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        return op(given.pop("x"), given.pop("y"), given.pop("bandwidth"), **given)

    return BadCase(name, call, error, match)


SUMS = (
    _one("class", TypeError, "x: expected a tensor, got None", x=None),
    _one("one axis", ValueError, r"x: expected 2 dimensions \(N, d\), got 1", x=torch.zeros(4)),
    _one("integers", TypeError, "x: expected float32.* got int64", x=torch.zeros(4, 3).long()),
    _one("width", ValueError, r"y: expected 3 in dimension 1 \(width of x\)", y=torch.zeros(5, 2)),
    _one("dtypes", TypeError, "y: expected dtype float32", y=torch.zeros(5, 3).double()),
    _one("sparse", TypeError, "y: expected a dense", y=torch.zeros(5, 3).to_sparse()),
    _one("zero bandwidth", ValueError, "bandwidth: expected a number greater than 0", bandwidth=0),
    _one("NaN", ValueError, "bandwidth: expected a finite number, got nan", bandwidth=float("nan")),
    _one("one of them", ValueError, r"bandwidth\[1\]: expected a number gr", bandwidth=[1.0, -2.0]),
    _one("none", ValueError, "bandwidth: expected 1 to 16 bandwidths, got 0", bandwidth=[]),
    _one(
        "no bandwidth", TypeError, "bandwidth: expected a Python number, got None", bandwidth=None
    ),
    _one(
        "zero tensor",
        ValueError,
        "bandwidth: expected finite numbers greater than 0, got 0.0",
        bandwidth=torch.tensor([1.0, 0.0]),
    ),
    _one("matrix", ValueError, "bandwidth: expected a number or 1", bandwidth=torch.ones(1, 1)),
    _one("weights", ValueError, r"weights: expected shape \(5,\)", weights=torch.ones(4)),
    _one("weights class", TypeError, "weights: expected a tensor or None", weights=[1.0] * 5),
    _one("kernel", ValueError, "kernel: expected one of 'rbf', 'imq', got 'cos'", kernel="cos"),
    _one("diagonal", ValueError, "exclude_diagonal: .* got 4 rows and 5", exclude_diagonal=True),
    _one("flag", TypeError, "exclude_diagonal: expected True or False", exclude_diagonal=1),
    _one("backend", ValueError, "backend: expected one of", backend="opencl"),
    _one("backend cuda", RuntimeError, "kernel_sums has no cuda kernel", backend="cuda"),
)


def _many(
    name: str, error: type[Exception], match: str, factors: object, products: object = None
) -> BadCase:
    return BadCase(name, lambda op: op(factors, products), error, match)


_X, _T = torch.zeros(4, 3), torch.zeros(4, 2)

PRODUCTS = (
    _many("class", TypeError, "factors: expected a sequence, got None", None),
    _many("one", TypeError, "factors: .* got one of them", KernelFactor(_X)),
    _many("none", ValueError, "factors: expected 1 to 16 factors, got 0", []),
    _many("a tensor", TypeError, r"factors\[0\]: expected a KernelFactor", [_X]),
    _many("rows", ValueError, r"factors\[1\].x: expected 4 rows", [(_X,), (torch.zeros(5, 2),)]),
    _many("columns", ValueError, r"factors\[1\].y: expected 4 c", [(_X,), (_X, torch.zeros(5, 3))]),
    _many("width", ValueError, r"factors\[0\].y: expected 3 in dimension 1", [(_X, _T)]),
    _many("dtypes", TypeError, "factors: expected points of one dtype", [(_X,), (_T.double(),)]),
    _many("axes", ValueError, r"factors\[0\].x: expected 2 dim", [(torch.zeros(4),)]),
    _many("bandwidth", ValueError, r"factors\[0\].bandwidth: .* than 0", [(_X, None, 0.0)]),
    _many("product", TypeError, r"products\[0\]: expected at least one", [(_X,)], [()]),
    _many("number", ValueError, r"products\[0\]: expected different", [(_X,), (_T,)], [(0, 2)]),
    _many("twice", ValueError, r"products\[0\]: expected different", [(_X,)], [(0, 0)]),
    _many("no products", ValueError, "products: expected 1 to 16", [(_X,)], []),
    _many("not a list", TypeError, "products: expected sequences", [(_X,)], 3),
)
