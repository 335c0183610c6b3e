"""Traces with a low-rank part taken exactly: Hutch++ and XTrace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._matrix_like import Matrix, MatrixLike, as_matrix
from transfuse.ops._probes import DISTRIBUTIONS, check_seed, make_probes
from transfuse.ops._progress import Progress, reporter
from transfuse.ops.trace_estimators import Estimate, mean_and_error

__all__ = ["hutchpp_trace", "xtrace"]

DEFAULT_MEMORY = 2**32


def hutchpp_trace(
    operator: MatrixLike,
    matvecs: int = 99,
    *,
    distribution: str = "rademacher",
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = False,
) -> Estimate:
    r"""Trace of a symmetric matrix: exact on a random range, Hutchinson on the rest.

    .. math:: \operatorname{tr} A \approx \operatorname{tr} Q^\top A Q + \frac{1}{k} \sum_{r=1}^{k}
              z_r^\top (I - Q Q^\top) A (I - Q Q^\top) z_r, \qquad Q = \operatorname{orth}(A S)

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        matvecs: products that are used, 3 k; rounded down to a multiple of 3, at least 3.
        distribution: of the entries of S and z: ``"rademacher"`` or ``"normal"``.
        seed: 64-bit integer that names the probes.
        memory: bytes that the basis and its products may take.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`Estimate`; the standard error is that of the second term, ``probes`` is k.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        MemoryError: the basis does not fit ``memory``; :func:`hutchinson_trace` needs none.

    Notes:
        The error falls as 1 / matvecs for a positive semidefinite matrix, against 1 / sqrt(matvecs)
        of Hutchinson; for eigenvalues that hardly decay it gains nothing.

    Reference:
        Meyer, Musco, Musco and Woodruff 2021, Hutch++: optimal stochastic trace estimation
        (arXiv:2010.09649), algorithm 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import hutchpp_trace
        >>> low_rank = torch.ones(50, 50, dtype=torch.float64)
        >>> round(hutchpp_trace(low_rank, 9).mean, 6)
        50.0
    """
    matrix = as_matrix(operator)
    each = _checks.positive_int("matvecs", matvecs) // 3
    if each == 0:
        raise ValueError(f"matvecs: expected at least 3, got {matvecs}")
    each = min(each, matrix.size)
    _distribution(distribution)
    _check_memory(matrix, 3 * each, memory, "hutchpp_trace")
    report = reporter(progress, "hutchpp_trace", 3 * each)

    sketch = _probes(matrix, each, 0, check_seed(seed), distribution)
    basis = orthonormal(matrix.products(sketch))
    report(each)
    products = matrix.products(basis)
    head = math.fsum(_dots(basis, products))
    report(2 * each)
    rest = _probes(matrix, each, each, seed, distribution)
    # Twice, against cancellation.
    for _ in range(2):
        rest = rest - (rest @ basis.mT) @ basis
    mean, stderr = mean_and_error(matrix.forms(rest))
    report(3 * each)
    return Estimate(head + mean, 0.0 if each == matrix.size else stderr, each)


def xtrace(
    operator: MatrixLike,
    matvecs: int = 100,
    *,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = False,
) -> Estimate:
    r"""Trace of a symmetric matrix by the exchangeable estimator XTrace.

    Each of k = matvecs / 2 normal vectors takes its turn as the Hutchinson probe of what the range
    of the products with the others leaves over:

    .. math:: t_i = \operatorname{tr} Q_i^\top A Q_i + \frac{P - k + 1}{\|\mu_i\|^2}
              \mu_i^\top A \mu_i, \qquad \mu_i = (I - Q_i Q_i^\top)\, \omega_i

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        matvecs: products that are used, 2 k, at least 4; an odd one is rounded down.
        seed: 64-bit integer that names the probes.
        memory: bytes that the basis, the probes and their products may take.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`Estimate`: mean of t, sample deviation / sqrt k (the t_i are not independent, so it
        is an indication), and k.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        MemoryError: the basis does not fit ``memory``; :func:`hutchinson_trace` needs none.

    Reference:
        Epperly, Tropp and Webber 2024, XTrace: making the most of every sample in stochastic trace
        estimation (arXiv:2301.07825), sections 2.1 and 2.3.

    Example:
        >>> import torch
        >>> from transfuse.ops import xtrace
        >>> low_rank = torch.ones(50, 50, dtype=torch.float64)
        >>> round(xtrace(low_rank, 10).mean, 6)
        50.0
    """
    matrix = as_matrix(operator)
    count = _checks.positive_int("matvecs", matvecs) // 2
    if count < 2:
        raise ValueError(f"matvecs: expected at least 4, got {matvecs}")
    count = min(count, matrix.size)
    _check_memory(matrix, 4 * count, memory, "xtrace")
    report = reporter(progress, "xtrace", 2 * count)

    probes = _probes(matrix, count, 0, check_seed(seed), "normal")
    sketch = matrix.products(probes)
    basis = orthonormal(sketch)
    report(count)
    products = matrix.products(basis)
    report(2 * count)
    core = _gram(basis, products)
    core = (core + core.mT) / 2
    if basis.shape[0] < count or basis.shape[0] == matrix.size:
        # The matrix has rank r < k, or the basis is complete: nothing is left over.
        return Estimate(float(core.trace()), 0.0, count)

    inner = _gram(basis, probes)  # Q^T omega
    cross = _gram(products, probes)  # Q^T A omega
    factor = _gram(basis, sketch)  # R
    # Column i: the direction of the basis that only probe i brought, orthogonal to the other
    # columns of R.
    own = torch.linalg.inv(factor).mT
    own = own / own.norm(dim=0)
    rest = inner - own * (own * inner).sum(0)
    heads = core.trace() - (own * (core @ own)).sum(0)
    forms = torch.tensor(_dots(probes, sketch), dtype=torch.float64, device=matrix.device)
    forms = forms - 2 * (cross * rest).sum(0) + (rest * (core @ rest)).sum(0)
    norms = torch.tensor(_dots(probes, probes), dtype=torch.float64, device=matrix.device)
    norms = norms - rest.square().sum(0)
    ones = heads + forms * (matrix.size - count + 1) / norms
    return Estimate(*mean_and_error(ones.tolist()), count)


def orthonormal(rows: Tensor) -> Tensor:
    """An orthonormal basis of the span of rows, as rows; fewer where they are dependent."""
    basis, factor = torch.linalg.qr(rows.mT)
    sizes = factor.diagonal().abs()
    scale = factor.norm()
    limit = scale * max(rows.shape) * torch.finfo(rows.dtype).eps
    if float(scale) > 0 and bool((sizes > limit).all()):
        return basis.mT
    left, values, _ = torch.linalg.svd(rows.mT, full_matrices=False)
    keep = values > values[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
    return left[:, keep].mT


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """first second^T in float64, in slices: neither is widened as a whole."""
    total = torch.zeros(first.shape[0], second.shape[0], dtype=torch.float64, device=first.device)
    for a, b in zip(first.split(2**16, dim=1), second.split(2**16, dim=1), strict=True):
        total += a.double() @ b.double().mT
    return total


def _dots(first: Tensor, second: Tensor) -> list[float]:
    return [float(a.double() @ b.double()) for a, b in zip(first, second, strict=True)]


def _probes(matrix: Matrix, count: int, start: int, seed: int, distribution: str) -> Tensor:
    return make_probes(
        count,
        matrix.size,
        start=start,
        seed=seed,
        distribution=distribution,
        dtype=matrix.dtype,
        device=matrix.device,
    )


def _distribution(value: object) -> None:
    if value is None:
        raise ValueError("distribution: expected 'rademacher' or 'normal', got None")
    _checks.choice("distribution", value, DISTRIBUTIONS)


def _check_memory(matrix: Matrix, vectors: int, memory: int, name: str) -> None:
    needed = vectors * matrix.size * matrix.dtype.itemsize
    if needed > memory:
        raise MemoryError(
            f"{name}: {vectors} vectors of {matrix.size} numbers take {needed} bytes, more than "
            f"memory = {memory}; use fewer matvecs, raise memory, or use hutchinson_trace, which "
            "stores none"
        )
