"""Calls that the simplex ops must refuse."""

from __future__ import annotations

import torch

from transfuse.testing.spec import BadCase

_EYE = torch.eye(3)
_ONES = torch.ones(3)

MIN_NORM = (
    BadCase("list", lambda op: op([[1.0]]), TypeError, "gramian: expected a tensor, got an object"),
    BadCase("integers", lambda op: op(_EYE.long()), TypeError, "gramian: expected float32"),
    BadCase("sparse", lambda op: op(_EYE.to_sparse()), TypeError, "gramian: expected a dense"),
    BadCase("vector", lambda op: op(_ONES), ValueError, r"gramian: expected shape \(..., T, T\)"),
    BadCase("oblong", lambda op: op(torch.ones(2, 3)), ValueError, r"got \(2, 3\)"),
    BadCase("no tasks", lambda op: op(torch.ones(2, 0, 0)), ValueError, "T of at least 1"),
    BadCase("too many", lambda op: op(torch.eye(257)), ValueError, "at most 256 rows, got 257"),
    BadCase("solver", lambda op: op(_EYE, solver="lp"), ValueError, "solver: expected one of"),
    BadCase("iterations", lambda op: op(_EYE, iterations=0), ValueError, "iterations: expected"),
    BadCase("tolerance", lambda op: op(_EYE, tolerance=0.0), ValueError, "tolerance: expected"),
    BadCase("backend", lambda op: op(_EYE, backend="gpu"), ValueError, "backend: expected one of"),
    BadCase(
        "backend without kernel",
        lambda op: op(_EYE, backend="cuda"),
        RuntimeError,
        "min_norm_simplex has no cuda kernel",
    ),
)
PARETO = (
    BadCase("matrix", lambda op: op(None, _ONES, mode="guide"), TypeError, "gramian: expected"),
    BadCase("guidance", lambda op: op(_EYE, 1.0, mode="guide"), TypeError, "guidance: expected"),
    BadCase(
        "length",
        lambda op: op(_EYE, torch.ones(2), mode="guide"),
        ValueError,
        r"expected shape \(3,",
    ),
    BadCase(
        "batch", lambda op: op(_EYE, _EYE, mode="guide"), ValueError, r"guidance: .*got \(3, 3\)"
    ),
    BadCase("mode", lambda op: op(_EYE, _ONES, mode="up"), ValueError, "mode: expected one of"),
    BadCase(
        "too many",
        lambda op: op(torch.eye(7), torch.ones(7), mode="guide"),
        ValueError,
        "at most 6 rows, got 7",
    ),
)
NONNEGATIVE = (
    BadCase("matrix", lambda op: op(torch.ones(2, 3), _ONES), ValueError, r"g: expected shape"),
    BadCase("vector", lambda op: op(_EYE, torch.ones(4)), ValueError, r"q: expected shape \(3,\)"),
    BadCase("integers", lambda op: op(_EYE, _ONES.int()), TypeError, "q: expected float32"),
    BadCase("tolerance", lambda op: op(_EYE, _ONES, tolerance=-1), ValueError, "greater than 0"),
    BadCase("iterations", lambda op: op(_EYE, _ONES, iterations=1.5), TypeError, "iterations"),
)
