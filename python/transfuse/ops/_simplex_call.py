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


def triton_limit(gramian: Tensor, *_: Tensor) -> str | None:
    """Why the Triton kernel of min_norm_simplex does not take a matrix; None if it does."""
    count = gramian.shape[-1] if gramian.dim() > 0 else 0
    if count > composed.FACES_MOST:
        return f"every face is tried, which {count} gradients have too many of (up to 8)"
    return None


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


def _constant(name: str, solver: Callable) -> Callable:
    """A solver as a function whose results do not move with its tensors."""
    return function(
        Differentiable(
            name=name,
            forward=lambda static, tensors: _tuple(solver(*tensors, *static)),
            vjp=lambda static, tensors, outputs, grads, needs: [None] * len(tensors),
            jvp=lambda static, tensors, outputs, tangents: [
                torch.zeros_like(t) if t.is_floating_point() else None for t in outputs
            ],
            vmap=_fold,
        )
    )


def _tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _kernel(name: str) -> Callable:
    # Looked up when called: there is none where the library is not loaded.
    return lambda *arguments: getattr(torch.ops.transfuse, name)(*arguments)


KERNELS = {
    "cpu": ("min_norm_simplex", "nonneg_qp", "pareto_lp"),
    "triton": ("min_norm_simplex", "pareto_lp"),
}
_COMPOSED: dict[str, Callable] = {
    "min_norm_simplex": composed.min_norm,
    "nonneg_qp": composed.nonneg,
    "pareto_lp": composed.pareto,
    "frank_wolfe": composed.frank_wolfe,
}
_SOLVERS = {
    **{(name, "composed"): solver for name, solver in _COMPOSED.items()},
    **{(name, "cpu"): _kernel(name) for name in KERNELS["cpu"]},
    **{(name, "triton"): _kernel(f"{name}_triton") for name in KERNELS["triton"]},
}
_FUNCTIONS = {key: _constant(key[0], solver) for key, solver in _SOLVERS.items()}


def solve(
    name: str, backend: str | None, tensors: tuple[Tensor, ...], *static: object
) -> tuple[Tensor, ...]:
    """The results of an op for flat tensors (see :func:`flatten`), by the backend that runs it."""
    op = "min_norm_simplex" if name == "frank_wolfe" else name
    # Limits of shapes are those of the exact solvers.
    shaped = tensors if name == op else ()
    chosen = _backend.choose(op, backend, tensors[0].device, torch.float64, shaped)
    kernel = chosen in KERNELS and name == op and tensors[0].shape[0] > 0
    key = (name, chosen if kernel else "composed")
    # Detached tensors: only torch.func and forward mode can still be watching.
    if needs_derivative(tensors):
        return _FUNCTIONS[key](static, tensors)
    return _tuple(_SOLVERS[key](*tensors, *static))
