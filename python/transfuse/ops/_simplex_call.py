"""Checks of the simplex ops, and the one way their kernels are called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _backend, _checks
from transfuse._autograd import Differentiable, function, needs_derivative
from transfuse.ops import _simplex_reference as composed

EXACT_MOST = 256
PARETO_MOST = 6
STATUSES = ("solved", "infeasible", "not finite")


def check_matrix(name: str, value: object, axis: str = "T") -> Tensor:
    """A floating (..., n, n) matrix with n of at least 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    _checks.tensor(name, value, ["axis"] * value.dim())
    _checks.floating(name, value)
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected shape (..., {axis}, {axis}) with {axis} of at least 1, "
            f"got {tuple(value.shape)}"
        )
    return value


def check_vector(name: str, value: object, of: str, matrix: Tensor) -> Tensor:
    """A floating vector for each matrix: the shape of the matrix without its last axis."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    _checks.floating(name, value)
    _checks.same_device(name, value, of, matrix)
    if value.shape != matrix.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(matrix.shape[:-1])} (a row of {of}), "
            f"got {tuple(value.shape)}"
        )
    return value


def check_preference(name: str, value: object, of: str, matrix: Tensor) -> Tensor:
    """A floating (n,) vector of finite numbers of at least 0; they are read."""
    value = _checks.tensor(name, value, ("T",))
    _checks.floating(name, value)
    _checks.same_device(name, value, of, matrix)
    _checks.size(name, value, 0, matrix.shape[-1], f"the rows of {of}")
    value = value.detach()
    if not bool((value.isfinite() & (value >= 0)).all()):
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {value.tolist()}")
    return value


def check_size(name: str, matrix: Tensor, most: int, advice: str) -> None:
    """At most so many rows."""
    if matrix.shape[-1] > most:
        raise ValueError(
            f"{name}: expected at most {most} rows, got {matrix.shape[-1]} "
            f"(shape {tuple(matrix.shape)}){advice}"
        )


def result_dtype(value: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def flatten(value: Tensor, axes: int) -> Tensor:
    """Detached, contiguous, float64, one batch axis before the last ``axes``."""
    value = value.detach().to(torch.float64)
    return value.reshape(
        value.shape[: value.dim() - axes].numel(), *value.shape[-axes:]
    ).contiguous()


def unflatten(result: Tensor, matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """With the batch axes of the matrix again."""
    dtype = result_dtype(matrix) if dtype is None else dtype
    return result.reshape((*matrix.shape[:-2], *result.shape[1:])).to(dtype)


def _fold(static, tensors, dims, size):
    """The mapped dimension becomes part of the batch, which is the first one of every tensor."""
    folded = [
        (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1).contiguous()
        for t, dim in zip(tensors, dims, strict=True)
    ]
    return static, folded, lambda outputs: tuple(t.unflatten(0, (size, -1)) for t in outputs)


def _constant(name: str, count: int) -> Callable:
    """A raw op as a function whose results do not move with its ``count`` tensors."""

    def forward(static, tensors):
        found = getattr(torch.ops.transfuse, name)(*tensors, *static)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return function(
        Differentiable(
            name=name,
            forward=forward,
            vjp=lambda static, tensors, outputs, grads, needs: [None] * count,
            jvp=lambda static, tensors, outputs, tangents: [
                torch.zeros_like(t) if t.is_floating_point() else None for t in outputs
            ],
            vmap=_fold,
        )
    )


_FUNCTIONS = {
    "min_norm_simplex": _constant("min_norm_simplex", 1),
    "nonneg_qp": _constant("nonneg_qp", 2),
    "pareto_lp": _constant("pareto_lp", 2),
}
_COMPOSED: dict[str, Callable] = {
    "min_norm_simplex": composed.min_norm,
    "nonneg_qp": composed.nonneg,
    "pareto_lp": composed.pareto,
}


def solve(name: str, backend: str | None, tensors: tuple[Tensor, ...], *static: object) -> tuple:
    """The results of an op for flat tensors (see :func:`flatten`), by the backend that runs it."""
    chosen = _backend.choose(name, backend, tensors[0].device, torch.float64)
    if chosen != "cpu" or tensors[0].shape[0] == 0:
        found = _COMPOSED[name](*tensors, *static)
        return (found,) if isinstance(found, Tensor) else tuple(found)
    # Detached tensors: only torch.func and forward mode can still be watching.
    if needs_derivative(tensors):
        return _FUNCTIONS[name](static, tensors)
    found = getattr(torch.ops.transfuse, name)(*tensors, *static)
    return (found,) if isinstance(found, Tensor) else tuple(found)
