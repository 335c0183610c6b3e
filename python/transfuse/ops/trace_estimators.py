"""Trace and diagonal of a matrix that is known by its products: Hutchinson, Hutch++, XTrace."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._matrix_like import Matrix, MatrixLike, as_matrix
from transfuse.ops._probes import DISTRIBUTIONS, check_seed, make_probes
from transfuse.ops._progress import Progress, reporter

__all__ = ["DiagonalEstimate", "Estimate", "hutchinson_diagonal", "hutchinson_trace"]

# Rows of a chunk of probes and of their products may hold this much together.
_CHUNK_BYTES = 2**27
# A standard error from fewer probes is too uncertain to stop at.
_LEAST_PROBES = 10


class Estimate(NamedTuple):
    """A mean over probes, its standard error (infinite for one probe), and how many there were."""

    mean: float
    stderr: float
    probes: int


class DiagonalEstimate(NamedTuple):
    """The same for every entry of a diagonal: mean (P,) and stderr (P,)."""

    mean: Tensor
    stderr: Tensor
    probes: int


def hutchinson_trace(
    operator: MatrixLike,
    probes: int = 100,
    *,
    distribution: str = "rademacher",
    seed: int = 0,
    tol: float | None = None,
    progress: Progress = False,
) -> Estimate:
    r"""Trace of a symmetric matrix from its quadratic forms at random vectors.

    .. math:: \operatorname{tr} A \approx \frac{1}{R} \sum_{r=1}^{R} z_r^\top A z_r,
              \qquad E[z z^\top] = I

    Args:
        operator: (P, P), with ``shape`` and ``@``: a :class:`HessianOperator`, a tensor, ...
        probes: R, the most that are used.
        distribution: of the entries of z: ``"rademacher"`` (signs) or ``"normal"``.
        seed: 64-bit integer that names the probes.
        tol: stop as soon as the standard error is at most ``tol`` x \|mean\|, after 10 probes or
            more; None uses all.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`Estimate`: mean, standard error (sample deviation / sqrt R), probes used.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        Unbiased. The variance of one form is :math:`2 (\|A\|_F^2 - \sum_i a_{ii}^2)` for signs and
        :math:`2 \|A\|_F^2` for normal numbers. Probes are made from a counter in chunks and never
        stored together; sums are float64. A :class:`HessianOperator` gives its quadratic forms for
        about half of its products. Stopping early by ``tol`` favours probes that agree by
        chance, which the standard error does not know of.

    Reference:
        Hutchinson 1990, A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines.

    Example:
        >>> import torch
        >>> from transfuse.ops import hutchinson_trace
        >>> hutchinson_trace(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 20)
        Estimate(mean=7.0, stderr=0.0, probes=20)
    """
    matrix = as_matrix(operator)
    forms: list[float] = []

    def use(rows: Tensor) -> bool:
        forms.extend(matrix.forms(rows))
        mean, stderr = mean_and_error(forms)
        return tol is not None and len(forms) >= _LEAST_PROBES and stderr <= tol * abs(mean)

    used = _run(matrix, probes, distribution, seed, tol, progress, "hutchinson_trace", use)
    return Estimate(*mean_and_error(forms), used)


def hutchinson_diagonal(
    operator: MatrixLike,
    probes: int = 100,
    *,
    distribution: str = "rademacher",
    seed: int = 0,
    tol: float | None = None,
    progress: Progress = False,
) -> DiagonalEstimate:
    r"""Diagonal of a symmetric matrix from its products with random vectors.

    .. math:: \operatorname{diag} A \approx \frac{1}{R} \sum_{r=1}^{R} z_r \odot A z_r

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        probes: R, the most that are used.
        distribution: of the entries of z: ``"rademacher"`` (signs) or ``"normal"``.
        seed: 64-bit integer that names the probes.
        tol: stop as soon as the norm of the standard errors is at most ``tol`` x the norm of the
            means, after 10 probes or more; None uses all.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`DiagonalEstimate`: mean (P,), standard error (P,), probes used; float32, or float64
        for such an operator.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        Unbiased. The variance of one entry is :math:`\sum_{j \ne i} a_{ij}^2` for signs, and
        :math:`a_{ii}^2` more than :math:`\sum_j a_{ij}^2` for normal numbers, which are therefore
        never better here. Memory: two vectors beside a chunk of probes.

    Reference:
        Bekas, Kokiopoulou and Saad 2007, An estimator for the diagonal of a matrix.

    Example:
        >>> import torch
        >>> from transfuse.ops import hutchinson_diagonal
        >>> hutchinson_diagonal(torch.diag(torch.tensor([1.0, 2.0, 4.0])), 5).mean
        tensor([1., 2., 4.])
    """
    matrix = as_matrix(operator)
    mean = torch.zeros(matrix.size, dtype=matrix.dtype, device=matrix.device)
    squares, count = torch.zeros_like(mean), 0

    def stderr() -> Tensor:
        if count < 2:
            return torch.full_like(mean, math.inf)
        return (squares / (count * (count - 1))).sqrt()

    def use(rows: Tensor) -> bool:
        nonlocal count
        for z, product in zip(rows, matrix.products(rows), strict=True):
            count += 1
            term = z * product
            gap = term - mean
            mean.add_(gap, alpha=1 / count)
            squares.addcmul_(gap, term - mean)
        if tol is None or count < _LEAST_PROBES:
            return False
        return float(stderr().norm()) <= tol * float(mean.norm())

    used = _run(matrix, probes, distribution, seed, tol, progress, "hutchinson_diagonal", use)
    return DiagonalEstimate(mean, stderr(), used)


def _run(matrix: Matrix, probes, distribution, seed, tol, progress, task, use) -> int:
    """Chunks of probes to ``use`` until it says stop; the number used."""
    probes, seed = _checks.positive_int("probes", probes), check_seed(seed)
    if distribution is None:
        raise ValueError("distribution: expected 'rademacher' or 'normal', got None")
    _checks.choice("distribution", distribution, DISTRIBUTIONS)
    if tol is not None:
        _checks.number("tol", tol, positive=True)
    bytes_each = 2 * matrix.size * matrix.dtype.itemsize
    chunk = max(1, min(probes, _CHUNK_BYTES // bytes_each))
    if tol is not None:
        chunk = min(chunk, _LEAST_PROBES)
    report = reporter(progress, task, probes)
    done = 0
    while done < probes:
        rows = make_probes(
            min(chunk, probes - done),
            matrix.size,
            start=done,
            seed=seed,
            distribution=distribution,
            dtype=matrix.dtype,
            device=matrix.device,
        )
        stop = use(rows)
        done += rows.shape[0]
        report(done)
        if stop:
            break
    return done


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of independent values; the error of one is infinite."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)
