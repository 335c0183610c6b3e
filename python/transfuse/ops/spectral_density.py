"""The density of a spectrum by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._matrix_like import MatrixLike, as_matrix
from transfuse.ops._probes import DISTRIBUTIONS, check_seed, make_probes
from transfuse.ops._progress import Progress, reporter
from transfuse.ops.eigen import DEFAULT_MEMORY, Tridiagonal

__all__ = ["SpectralDensity", "spectral_density"]

_GRID_POINTS = 1024


class SpectralDensity(NamedTuple):
    """Nodes (R, m) and weights (R, m) of every run, float64; rows of weights sum to 1, and padding
    of a run that ended early has weight 0. The density (G,) on a grid (G,), nodes broadened to
    Gaussians of deviation ``sigma``."""

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    sigma: float


def spectral_density(
    operator: MatrixLike,
    runs: int = 1,
    *,
    steps: int = 100,
    distribution: str = "rademacher",
    seed: int = 0,
    grid: Tensor | None = None,
    sigma: float | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress = False,
) -> SpectralDensity:
    r"""Density of the eigenvalues of a symmetric matrix by stochastic Lanczos quadrature.

    .. math:: \phi(t) = \frac{1}{P} \sum_i \delta(t - \lambda_i) \approx \frac{1}{R}
              \sum_{r=1}^{R} \sum_{j=1}^{m} w_{rj}\, \delta(t - \theta_{rj})

    The nodes of a run are the eigenvalues of its tridiagonal matrix, the weights the squared first
    components of their eigenvectors.

    Args:
        operator: (P, P), with ``shape`` and ``@``.
        runs: R, random starts.
        steps: m, products of each run; capped at P.
        distribution: of the entries of a start: ``"rademacher"`` or ``"normal"``.
        seed: names the starts; start r is probe r of :func:`hutchinson_trace`, normalised.
        grid: (G,) where the density is wanted; None for 1024 points that cover all nodes.
        sigma: deviation of the Gaussians; None for 1/100 of the range of the nodes.
        memory: bytes that the Lanczos basis of a run may take.
        progress: True for a line on stderr, or a callable given (task, done, total).

    Returns:
        :class:`SpectralDensity`. ``(weights * f(nodes)).sum(-1).mean()`` estimates tr f(A) / P.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        MemoryError: the basis does not fit ``memory``.

    Notes:
        A run integrates polynomials up to degree 2 m - 1 exactly for its start. Products: R m.

    Reference:
        Ghorbani, Krishnan and Xiao 2019, An investigation into neural net optimization via Hessian
        eigenvalue density (arXiv:1901.10159), section 2; Lin, Saad and Yang 2016, Approximating
        spectral densities of large matrices (arXiv:1308.5467).

    Example:
        >>> import torch
        >>> from transfuse.ops import spectral_density
        >>> result = spectral_density(torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0])), steps=4)
        >>> result.nodes.round(decimals=4), result.weights.round(decimals=4)
        (tensor([[1., 3.]], dtype=torch.float64), tensor([[0.5000, 0.5000]], dtype=torch.float64))
    """
    matrix = as_matrix(operator)
    runs = _checks.positive_int("runs", runs)
    steps = min(_checks.positive_int("steps", steps), matrix.size)
    seed = check_seed(seed)
    if distribution is None:
        raise ValueError("distribution: expected 'rademacher' or 'normal', got None")
    _checks.choice("distribution", distribution, DISTRIBUTIONS)
    if sigma is not None:
        _checks.number("sigma", sigma, positive=True)
    if grid is not None:
        _checks.tensor("grid", grid, ("G",))
        _checks.floating("grid", grid)
    report = reporter(progress, "spectral_density", runs * steps)
    spectra, used = [], 0
    for index in range(runs):
        start = make_probes(
            1,
            matrix.size,
            start=index,
            seed=seed,
            distribution=distribution,
            dtype=matrix.dtype,
            device=matrix.device,
        )[0]
        start = start / torch.linalg.vector_norm(start, dtype=torch.float64).to(start.dtype)
        run = Tridiagonal(matrix, steps, start, memory)
        while run.steps < steps and run.advance():
            report(used + run.steps)
        used += run.steps
        nodes, vectors = torch.linalg.eigh(run.tridiagonal())
        spectra.append((nodes, vectors[0].square()))
    length = max(nodes.shape[0] for nodes, _ in spectra)
    # A node of weight 0 anywhere changes nothing; the last one keeps the range.
    nodes = torch.stack([torch.cat([n, n[-1:].expand(length - len(n))]) for n, _ in spectra])
    weights = torch.stack([torch.cat([w, w.new_zeros(length - len(w))]) for _, w in spectra])
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # One eigenvalue alone has no range to measure by.
        sigma = (high - low) / 100 if high > low else max(abs(high), 1.0) / 100
    if grid is None:
        grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, _GRID_POINTS, dtype=torch.float64)
    points = grid.detach().double().cpu()
    distance = (points[:, None] - nodes.view(-1)) / sigma
    bumps = (-0.5 * distance.square()).exp() / (sigma * math.sqrt(2 * math.pi))
    density = bumps @ weights.view(-1) / runs
    device = matrix.device
    return SpectralDensity(
        nodes.to(device), weights.to(device), points.to(device), density.to(device), sigma
    )
