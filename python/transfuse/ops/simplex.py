"""Small programmes that combine gradients: weights on a simplex, and non-negative unknowns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend, _checks, _native, _triton_ops
from transfuse.ops import _simplex_call as call

__all__ = ["NonnegativeSolution", "ParetoSolution", "min_norm_simplex", "nonneg_qp", "pareto_lp"]

# Kernels compute in float64, whatever the matrix has.
_WIDE = {"triton": (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
_backend.declare("nonneg_qp", ("reference", "cpu"))
_backend.declare("pareto_lp", ("reference", "cpu", "triton"), dtypes=_WIDE)
_backend.declare(
    "min_norm_simplex",
    ("reference", "cpu", "triton"),
    dtypes=_WIDE,
    limits={"triton": call.triton_limit},
)

_SOLVERS: dict[object, int] = {"exact": 0, "frank_wolfe": 1}
_MODES: dict[object, int] = {"guide": 1, "descent": 0}


class NonnegativeSolution(NamedTuple):
    """Solution (..., n), and how far it is from optimal (...): see :func:`nonneg_qp`."""

    x: Tensor
    residual: Tensor


class ParetoSolution(NamedTuple):
    """Weights (..., T), and int64 status (...): 0 solved, 1 infeasible, 2 not finite."""

    weights: Tensor
    status: Tensor


def min_norm_simplex(
    gramian: Tensor,
    *,
    solver: str = "exact",
    iterations: int = 2000,
    tolerance: float = 1e-10,
    backend: str | None = None,
) -> Tensor:
    r"""Weights of the point of smallest norm in the convex hull of T gradients (MGDA).

    .. math:: \arg\min_{w \ge 0,\; \sum_i w_i = 1} w^\top C w, \qquad C_{ij} = g_i \cdot g_j

    Args:
        gramian: (..., T, T) symmetric and positive semidefinite, floating: inner products of the
            gradients; any number of problems at once.
        solver: ``"exact"`` (T at most 256) or ``"frank_wolfe"`` (any T).
        iterations: at most, of ``"frank_wolfe"``.
        tolerance: of ``"frank_wolfe"``: duality gap relative to the value at which a problem
            stops.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"`` (T up to 8); a named one never
            falls back. For the exact solver; ``"frank_wolfe"`` is composed of torch operations.

    Returns:
        (..., T) float32 (float64 for float64), at least 0, sum 1. NaN where the matrix is not
        finite.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        The matrix is divided by its largest entry and solved in float64, so weights depend neither
        on the scale of the losses nor, up to a ratio of 1e8, on the ratio of the gradients' norms.
        Exact means an active-set method (CPU kernel) or enumeration of the faces (eager torch and
        Triton, T up to 8): right to rounding, not to a number of iterations. Where several weights
        attain the minimum, those of the smallest norm are returned: equal gradients, or several
        zeros, share their weight equally. (Eager torch with T > 8 returns one of the tied solutions
        instead, and so may enumeration where norms differ by a factor of 1000.)
        Each problem is solved on its own, in a fixed order: the same bits every time.

        ``"frank_wolfe"`` is the pairwise variant with exact line search.

        The weights are constants for autograd: a matrix that requires a gradient is detached. That
        is the convention of multiple-gradient descent.

    Reference:
        Désidéri 2012, Multiple-gradient descent algorithm (MGDA) for multiobjective optimization;
        Sener & Koltun 2018, Multi-task learning as multi-objective optimization (arXiv:1810.04650),
        equation 3; Lacoste-Julien & Jaggi 2015, On the global linear convergence of Frank-Wolfe
        optimization variants (arXiv:1511.05932), algorithm 2.

    Example:
        >>> import torch
        >>> from transfuse.ops import min_norm_simplex
        >>> gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> min_norm_simplex(gradients @ gradients.T)
        tensor([0.8000, 0.2000])
    """
    gramian = call.check_matrix("gramian", gramian)
    exact = _checks.choice("solver", solver, _SOLVERS) == 0
    iterations = _checks.positive_int("iterations", iterations)
    tolerance = _checks.number("tolerance", tolerance, positive=True)
    if exact:
        call.check_size("gramian", gramian, call.EXACT_MOST, '; solver="frank_wolfe" has no limit')
        (found,) = call.solve("min_norm_simplex", backend, (call.flatten(gramian, 2),))
    else:
        tensors = (call.flatten(gramian, 2),)
        (found,) = call.solve("frank_wolfe", backend, tensors, iterations, tolerance)
    return call.unflatten(found, gramian)


def pareto_lp(
    gramian: Tensor, guidance: Tensor, *, mode: str, backend: str | None = None
) -> ParetoSolution:
    r"""Weights of T losses that follow a guiding gradient without harming the losses.

    With C the inner products of the losses' gradients and a those with a guiding gradient:

    .. math:: \text{guide:}\quad \max_{w \in \Delta} a^\top w \quad\text{subject to}\quad
              (C w)_j \ge \begin{cases} 0 & a_j = \max_k a_k \text{, or no } a_k > 0 \\
              a_j & a_j \le 0 \\ -\infty & \text{else} \end{cases}

    .. math:: \text{descent:}\quad \max_{w \in \Delta} \mathbf{1}^\top C w \quad\text{subject to}
              \quad C w \ge 0, \quad a^\top w \ge \min(\max_k a_k, 0)

    Args:
        gramian: (..., T, T) symmetric and positive semidefinite, floating, T at most 6.
        guidance: (..., T) inner products of each gradient with the guiding one, floating.
        mode: ``"guide"`` or ``"descent"``.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        ``ParetoSolution(weights, status)``: float32 (float64 for float64) weights, at least 0, sum
        1, and int64 status: 0 solved, 1 infeasible (weights 1/T), 2 not finite (weights NaN).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Every vertex is tried, in float64: 21 systems of 3 equations for T = 3, 1287 of 6 for T = 6.
        Constraints are made homogeneous (the weights sum to 1) and scaled one by one, so no scale
        of the losses matters; a constraint counts as met down to -1e-12 of its largest coefficient.
        All maximisers of a share the role of j*. Where several vertices are optimal to 1e-12, the
        one of the smallest norm is returned, and of these the first. Nothing waits for the device,
        and status is a tensor for that reason.

        The weights are constants for autograd: tensors that require a gradient are detached.

    Reference:
        Lv et al. 2021, Pareto domain adaptation (arXiv:2112.04137); Mahapatra & Rajan 2020,
        Multi-task learning with user preferences: gradient descent with controlled ascent in
        Pareto optimization (ICML), section 4.

    Example:
        >>> import torch
        >>> from transfuse.ops import pareto_lp
        >>> g = torch.tensor([[1.0, 0.2], [-0.5, 1.0]])
        >>> weights, status = pareto_lp(g @ g.T, g @ torch.tensor([1.0, 1.0]), mode="guide")
        >>> weights, status
        (tensor([1., 0.]), tensor(0))
    """
    gramian = call.check_matrix("gramian", gramian)
    call.check_size("gramian", gramian, call.PARETO_MOST, ": every vertex is tried")
    guidance = call.check_vector("guidance", guidance, "gramian", gramian)
    guide = _checks.choice("mode", mode, _MODES) == 1
    tensors = (call.flatten(gramian, 2), call.flatten(guidance, 1))
    weights, status = call.solve("pareto_lp", backend, tensors, guide)
    return ParetoSolution(
        call.unflatten(weights, gramian), call.unflatten(status, gramian, torch.int64)
    )


def nonneg_qp(
    g: Tensor,
    q: Tensor,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-12,
    backend: str | None = None,
) -> NonnegativeSolution:
    r"""Solves quadratic programmes over non-negative unknowns.

    .. math:: \min_{x \ge 0} \tfrac{1}{2} x^\top G x + q^\top x

    Args:
        g: (..., n, n) symmetric and positive semidefinite, floating, n at most 256; singular
            matrices are fine.
        q: (..., n) floating.
        iterations: unknowns that may enter, per problem; None: 10 n.
        tolerance: slope, relative to the largest \|q\| (with G scaled to a diagonal of 1), below
            which an unknown stays 0.
        backend: None, ``"reference"`` or ``"cpu"``; a named one never falls back.

    Returns:
        ``NonnegativeSolution(x, residual)``, float32 (float64 for float64). The residual is the
        largest violation of the optimality conditions (slope not 0 where x > 0, or negative where
        x = 0) in the units of the tolerance: rounding where solved, large where the iterations ran
        out, inf where the programme is unbounded, NaN where it is not finite.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Active-set method in float64; each step costs n^2 operations in the kernel, and a solution
        with p positive unknowns takes about p steps. Unknowns beyond 1e12 (with a diagonal and a
        largest \|q\| of 1) count as unbounded: their curvature is rounding. Where several x are
        optimal, one of them is returned, always the same. Each problem is solved by one thread: the
        same bits every time.

        The solution is a constant for autograd: tensors that require a gradient are detached.

    Reference:
        Lawson & Hanson 1974, Solving least squares problems, chapter 23; Bro & de Jong 1997, A fast
        non-negativity-constrained least squares algorithm.

    Example:
        >>> import torch
        >>> from transfuse.ops import nonneg_qp
        >>> g = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> nonneg_qp(g, torch.tensor([-2.0, 1.0])).x
        tensor([1., 0.])
    """
    g = call.check_matrix("g", g, "n")
    call.check_size("g", g, call.EXACT_MOST, "")
    q = call.check_vector("q", q, "g", g)
    count = 10 * g.shape[-1] if iterations is None else iterations
    count = _checks.positive_int("iterations", count)
    tolerance = _checks.number("tolerance", tolerance, positive=True)
    tensors = (call.flatten(g, 2), call.flatten(q, 1))
    x, residual = call.solve("nonneg_qp", backend, tensors, count, tolerance)
    return NonnegativeSolution(call.unflatten(x, g), call.unflatten(residual, g))


def _fake_nonneg(g, q, iterations, tolerance):
    return q.new_empty(q.shape), q.new_empty(q.shape[:1])


def _fake_min_norm(c):
    return c.new_empty(c.shape[:2])


def _fake_pareto(c, a, guide):
    return a.new_empty(a.shape), a.new_empty(a.shape[:1], dtype=torch.int64)


for _name, _schema, _fake in (
    ("min_norm_simplex", "(Tensor c) -> Tensor", _fake_min_norm),
    ("pareto_lp", "(Tensor c, Tensor a, bool guide) -> (Tensor, Tensor)", _fake_pareto),
):
    _triton_ops.define("simplex", _name, _schema, recorded=_name != "pareto_lp")
    torch.library.register_fake(f"transfuse::{_name}_triton", _fake)
if _native.status().loaded:
    torch.library.register_fake("transfuse::nonneg_qp", _fake_nonneg)
    torch.library.register_fake("transfuse::min_norm_simplex", _fake_min_norm)
    torch.library.register_fake("transfuse::pareto_lp", _fake_pareto)
