"""Eigenvalues of a symmetric matrix that is known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._matrix_like import Matrix, MatrixLike, as_matrix
from transfuse.ops._probes import check_seed, make_probes
from transfuse.ops._progress import Progress, reporter

__all__ = ["EigenPairs", "Lanczos", "lanczos", "lanczos_eigenpairs", "power_iteration"]

DEFAULT_MEMORY = 2**32
# Tolerance for finding out on which side of zero the largest absolute value lies.
_ROUGH = 0.05
_WHICH = {"magnitude": 0, "algebraic": 1}


class EigenPairs(NamedTuple):
    """Eigenvalues with their signs, (k,) float64, largest first; unit vectors (P, k); for each the
    norm of A v - lambda v, and whether it met the tolerance; products that were used."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    matvecs: int


class Lanczos(NamedTuple):
    """Tridiagonal T = Q^T A Q: diagonal alpha (m,) and off-diagonal beta (m - 1,), float64; the
    orthonormal columns of Q (P, m); and the norm of what the last step left over."""

    alpha: Tensor
    beta: Tensor
    basis: Tensor
    remainder: float


def power_iteration(
    operator: MatrixLike,
    k: int = 1,
    *,
    which: str = "magnitude",
    tol: float = 1e-3,
    iterations: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    progress: Progress = False,
) -> EigenPairs:
    r"""Leading eigenpairs by power iteration, one after the other with deflation.

    .. math:: v \leftarrow \frac{A v}{\|A v\|}, \qquad \lambda = v^\top A v

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        k: number of pairs, at most P.
        which: ``"magnitude"``, the largest absolute values, each with its sign; ``"algebraic"``,
            the largest values (A is shifted by its largest absolute value where that is negative).
        tol: stop when the quotient changes by at most ``tol`` relative to itself.
        iterations: the most for each pair.
        seed: names the random start, as in :func:`hutchinson_trace`.
        start: (P,) to start from instead, for the first pair; not zero.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`EigenPairs`, in the order found.

    Raises:
        TypeError, ValueError: an argument that does not fit, such as a start that is zero.

    Notes:
        Converges as (second / first eigenvalue) ^ iterations: :func:`lanczos_eigenpairs` needs far
        fewer products. Vectors are normalised without an epsilon. A random vector whose product is
        exactly zero ends its pair with eigenvalue 0; for a given start that is an error.

    Example:
        >>> import torch
        >>> from transfuse.ops import power_iteration
        >>> matrix = torch.diag(torch.tensor([1.0, -5.0, 3.0]))
        >>> power_iteration(matrix, 2, tol=1e-6).values
        tensor([-5.0000,  3.0000], dtype=torch.float64)
    """
    matrix, k = as_matrix(operator), _count("k", k, operator)
    _which(which)
    _checks.number("tol", tol, positive=True)
    iterations = _checks.positive_int("iterations", iterations)
    seed = check_seed(seed)
    report = reporter(progress, "power_iteration", None)
    found: list[Tensor] = []
    values, residuals, converged, used = [], [], [], 0
    for index in range(k):
        given = start if index == 0 else None
        vector = _start(matrix, given, seed, index, found)
        if given is not None and _norm(matrix.product(vector)) == 0.0:
            raise ValueError(
                "start: expected a vector with a product that is not zero, got one that the "
                "operator maps to zero"
            )
        run = _Power(matrix, vector, found, report, used)
        if which == "algebraic":
            # Roughly the largest absolute value: where it is negative, it belongs to the lower end
            # of the spectrum, which is moved up beyond zero.
            run.go(iterations, max(tol, _ROUGH))
            if run.value < 0:
                run.restart(_start(matrix, None, seed, index + k, found), 1.1 * run.value)
        run.go(iterations, tol)
        used = run.matvecs
        values.append(run.value)
        residuals.append(run.residual)
        converged.append(run.converged)
        found.append(run.vector)
    return EigenPairs(
        torch.tensor(values, dtype=torch.float64, device=matrix.device),
        torch.stack(found, dim=1),
        torch.tensor(residuals, dtype=torch.float64, device=matrix.device),
        torch.tensor(converged, device=matrix.device),
        used,
    )


class _Power:
    """Power iteration on A - shift I, in the complement of the vectors found."""

    def __init__(
        self,
        matrix: Matrix,
        vector: Tensor,
        found: list[Tensor],
        report: Callable[[int], None],
        matvecs: int,
    ) -> None:
        self._matrix, self._found, self._report = matrix, found, report
        self.vector, self._shift = vector, 0.0
        self.value, self.residual = 0.0, math.inf
        self.converged, self.matvecs = False, matvecs

    def restart(self, vector: Tensor, shift: float) -> None:
        self.vector, self._shift = vector, shift

    def go(self, iterations: int, tol: float) -> None:
        """Until the quotient moves by at most ``tol`` of itself; the vector is the one it is of."""
        self.converged = False
        for step in range(iterations):
            product = _orthogonal(self._matrix.product(self.vector), self._found)
            self.matvecs += 1
            self._report(self.matvecs)
            value = _dot(self.vector, product)
            self.converged = step > 0 and abs(value - self.value) <= tol * abs(value)
            self.value = value
            self.residual = _norm(product - value * self.vector)
            moved = product - self._shift * self.vector if self._shift != 0.0 else product
            norm = _norm(moved)
            if norm == 0.0:
                self.converged = True
            if self.converged or step == iterations - 1:
                return
            vector = _orthogonal(moved / norm, self._found)
            self.vector = vector / _norm(vector)


def lanczos(
    operator: MatrixLike,
    steps: int = 100,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = False,
) -> Lanczos:
    r"""Lanczos tridiagonalisation with full re-orthogonalisation.

    .. math:: A Q = Q T + \beta_m q_{m+1} e_m^\top, \qquad Q^\top Q = I

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        steps: m, products used; capped at P.
        seed: names the normal random start, as in :func:`hutchinson_trace`.
        start: (P,) to start from instead; not zero. It is normalised.
        memory: bytes that the basis may take.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`Lanczos`. Shorter than ``steps`` where the Krylov space is exhausted.

    Raises:
        TypeError, ValueError: an argument that does not fit, such as a start that is zero.
        MemoryError: the basis does not fit ``memory``.

    Notes:
        Every vector is orthogonalised twice against all before it, so that no ghost eigenvalues
        appear; coefficients are float64. Cost beside the products: 8 m^2 P flops.

    Reference:
        Golub and Van Loan 2013, Matrix computations, section 10.1 and 10.3.

    Example:
        >>> import torch
        >>> from transfuse.ops import lanczos
        >>> result = lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 3)
        >>> t = torch.diag(result.alpha) + torch.diag(result.beta, 1) + torch.diag(result.beta, -1)
        >>> torch.linalg.eigvalsh(t).round(decimals=5)
        tensor([1., 2., 3.], dtype=torch.float64)
    """
    matrix = as_matrix(operator)
    steps = min(_checks.positive_int("steps", steps), matrix.size)
    report = reporter(progress, "lanczos", steps)
    run = Tridiagonal(matrix, steps, _start(matrix, start, check_seed(seed), 0, []), memory)
    while run.steps < steps and run.advance():
        report(run.steps)
    return Lanczos(
        torch.tensor(run.alpha, dtype=torch.float64, device=matrix.device),
        torch.tensor(run.beta[: run.steps - 1], dtype=torch.float64, device=matrix.device),
        run.basis[: run.steps].mT,
        run.beta[-1],
    )


def lanczos_eigenpairs(
    operator: MatrixLike,
    k: int = 1,
    *,
    which: str = "magnitude",
    tol: float = 1e-3,
    steps: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = False,
) -> EigenPairs:
    r"""Leading eigenpairs from one Krylov space that grows until they are there.

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        k: number of pairs, at most P.
        which: ``"magnitude"`` (largest absolute values, with their signs) or ``"algebraic"``.
        tol: a pair is there when the norm of A v - lambda v is at most ``tol`` x \|lambda\|.
        steps: products at most; capped at P, at least k.
        seed: names the normal random start.
        start: (P,) to start from instead; not zero.
        memory: bytes that the basis may take.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`EigenPairs`; residuals are those of the Lanczos recurrence.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        MemoryError: the basis does not fit ``memory``; :func:`power_iteration` needs k vectors.

    Notes:
        Error of the eigenvalue itself: at most the residual, and about its square over the gap to
        the next one. A Krylov space holds one vector of a multiple eigenvalue: further copies are
        found only when it is exhausted and another start is taken because pairs are missing.

    Example:
        >>> import torch
        >>> from transfuse.ops import lanczos_eigenpairs
        >>> matrix = torch.diag(torch.linspace(-1, 1, 200, dtype=torch.float64) ** 9)
        >>> lanczos_eigenpairs(matrix, 2, which="algebraic", tol=1e-6).values.round(decimals=4)
        tensor([1.0000, 0.9131], dtype=torch.float64)
    """
    matrix, k, seed = as_matrix(operator), _count("k", k, operator), check_seed(seed)
    _which(which)
    _checks.number("tol", tol, positive=True)
    steps = min(_checks.positive_int("steps", steps), matrix.size)
    if steps < k:
        raise ValueError(f"steps: expected at least k = {k}, got {steps}")
    report = reporter(progress, "lanczos_eigenpairs", None)
    run = Tridiagonal(matrix, steps, _start(matrix, start, seed, 0, []), memory)
    while True:
        grown = run.advance()
        report(run.steps)
        if not grown and run.steps < k:
            grown = run.restart(seed)
        ended = not grown or run.steps == steps
        if run.steps < k and not ended:
            continue
        values, weights = torch.linalg.eigh(run.tridiagonal())
        order = (values.abs() if which == "magnitude" else values).argsort(descending=True)[:k]
        values, weights = values[order], weights[:, order]
        residuals = run.beta[-1] * weights[-1].abs()
        converged = residuals <= tol * values.abs()
        if ended or (bool(converged.all()) and run.steps >= min(2 * k, matrix.size)):
            break
    vectors = run.basis[: run.steps].mT @ weights.to(matrix.device, matrix.dtype)
    vectors = vectors / vectors.norm(dim=0)
    device = matrix.device
    return EigenPairs(
        values.to(device), vectors, residuals.to(device), converged.to(device), run.steps
    )


class Tridiagonal:
    """A Lanczos recurrence that goes on one product at a time.

    ``beta[i]`` is the norm of what step i left over, ``alpha[i]`` its diagonal entry.

    Raises:
        MemoryError: a basis of ``most`` vectors does not fit ``memory``.
    """

    def __init__(self, matrix: Matrix, most: int, start: Tensor, memory: int) -> None:
        needed = most * matrix.size * matrix.dtype.itemsize
        if needed > memory:
            raise MemoryError(
                f"the Lanczos basis, {most} vectors of {matrix.size} numbers, takes {needed} "
                f"bytes, more than memory = {memory}; use fewer steps, raise memory, or use "
                "power_iteration, which keeps only the vectors it found"
            )
        self._matrix = matrix
        self._next = start
        self.basis = torch.empty((most, matrix.size), dtype=matrix.dtype, device=matrix.device)
        self.steps = 0
        self.alpha: list[float] = []
        self.beta: list[float] = []

    def advance(self) -> bool:
        """One step; False when the space is invariant and nothing is left to go on with."""
        self.basis[self.steps] = self._next
        vector = self.basis[self.steps]
        self.steps += 1
        product = self._matrix.product(vector)
        self.alpha.append(_dot(vector, product))
        before = _norm(product)
        basis = self.basis[: self.steps]
        rest = product
        for _ in range(2):
            rest = rest - basis.mT @ (basis @ rest)
        norm = _norm(rest)
        # What is left after rounding errors of the subtraction is no direction.
        floor = 8 * torch.finfo(self._matrix.dtype).eps * max(before, self._largest())
        if norm <= floor:
            self.beta.append(0.0)
            return False
        self.beta.append(norm)
        self._next = rest / norm
        return True

    def restart(self, seed: int) -> bool:
        """Go on from a random vector orthogonal to an invariant space."""
        if self.steps == self._matrix.size:
            return False
        self._next = _start(self._matrix, None, seed, self.steps, list(self.basis[: self.steps]))
        return True

    def _largest(self) -> float:
        return max(max(map(abs, self.alpha)), max(self.beta, default=0.0))

    def tridiagonal(self) -> Tensor:
        """T (m, m), float64, on the CPU."""
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        beta = torch.tensor(self.beta[: self.steps - 1], dtype=torch.float64)
        return torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)


def _start(
    matrix: Matrix, start: Tensor | None, seed: int, index: int, found: list[Tensor]
) -> Tensor:
    """A unit vector to start from, orthogonal to those found."""
    if start is None:
        vector = make_probes(
            1,
            matrix.size,
            start=index,
            seed=seed,
            # Almost surely not in the null space, where signs may lie.
            distribution="normal",
            dtype=matrix.dtype,
            device=matrix.device,
        )[0]
    else:
        _checks.tensor("start", start, ("P",))
        _checks.floating("start", start)
        _checks.size("start", start, 0, matrix.size, "rows of the operator")
        if start.device != matrix.device:
            raise ValueError(f"start: expected device {matrix.device}, got {start.device}")
        vector = start.detach().to(matrix.dtype)
    norm = _norm(vector)
    if norm == 0.0 or not math.isfinite(norm):
        raise ValueError(f"start: expected a finite vector that is not zero, got norm {norm}")
    vector = _orthogonal(vector / norm, found)
    norm = _norm(vector)
    if norm == 0.0:
        # Only where few dimensions are left: any vector orthogonal to those found will do.
        for axis in range(matrix.size):
            unit = torch.zeros_like(vector)
            unit[axis] = 1
            vector = _orthogonal(unit, found)
            norm = _norm(vector)
            if norm > 0.1 / math.sqrt(matrix.size):
                break
    return vector / norm


def _orthogonal(vector: Tensor, found: list[Tensor]) -> Tensor:
    """Without its parts along the vectors found; twice, against cancellation."""
    for _ in range(2):
        for other in found:
            vector = vector - _dot(other, vector) * other
    return vector


def _dot(first: Tensor, second: Tensor) -> float:
    return float(first.double() @ second.double())


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _count(name: str, value: object, operator: MatrixLike) -> int:
    count = _checks.positive_int(name, value)
    if count > operator.shape[0]:
        raise ValueError(f"{name}: expected at most {operator.shape[0]}, got {count}")
    return count


def _which(value: object) -> None:
    if value is None:
        raise ValueError("which: expected 'magnitude' or 'algebraic', got None")
    _checks.choice("which", value, _WHICH)
