"""Curvature along training: sharpness, trace, spectrum, and the part of it that is the NTK's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse import ops
from transfuse.methods.optimization._mean_field import MeanFieldNet
from transfuse.ops._curvature_operator import Batches


class Sharpness(NamedTuple):
    """Scaled eigenvalues of largest magnitude (k,), float64, with their signs; whether each met the
    tolerance; the factor gamma^2 that is in them; products used."""

    values: Tensor
    converged: Tensor
    scale: float
    matvecs: int


class CurvatureSplit(NamedTuple):
    """Top eigenvalues of H, of its Gauss-Newton part G and of the rest R = H - G, unscaled."""

    hessian: float
    gauss_newton: float
    residual: float


def sharpness(
    model: nn.Module,
    loss: Any,
    data: Batches,
    k: int = 1,
    iters: int = 100,
    tol: float = 1e-3,
    *,
    solver: str = "lanczos",
    which: str = "magnitude",
    seed: int = 0,
) -> Sharpness:
    r"""Sharpness :math:`s = \gamma^2 \lambda_{max}(\nabla^2 L)`, comparable over width and depth.

    Gradient descent with eta0 is linearly stable iff s < 2 / eta0.

    Args:
        model: a :class:`MeanFieldNet` brings its gamma; any other module counts with gamma = 1.
        loss: mean loss of outputs and targets.
        data: batches of (inputs, targets), weighted by their sizes.
        k: number of eigenvalues.
        iters: products at most (for each eigenvalue under ``"power"``).
        tol: of the residual (``"lanczos"``) or of the change (``"power"``), relative.
        solver: ``"lanczos"``, or ``"power"``, which stores k vectors and needs more products.
        which: ``"magnitude"`` or ``"algebraic"``; early in training they can differ.
        seed: names the start.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    operator = ops.HessianOperator.from_module(model, loss, data)
    if solver == "lanczos":
        steps = min(iters, operator.shape[0])
        pairs = ops.lanczos_eigenpairs(operator, k, which=which, tol=tol, steps=steps, seed=seed)
    elif solver == "power":
        pairs = ops.power_iteration(operator, k, which=which, tol=tol, iterations=iters, seed=seed)
    else:
        raise ValueError(f"solver: expected 'lanczos' or 'power', got {solver!r}")
    scale = model.gamma**2 if isinstance(model, MeanFieldNet) else 1.0
    return Sharpness(scale * pairs.values, pairs.converged, scale, pairs.matvecs)


def hessian_trace(
    model: nn.Module,
    loss: Any,
    data: Batches,
    probes: int = 100,
    *,
    tol: float | None = None,
    seed: int = 0,
) -> ops.Estimate:
    """Trace of the Hessian in the raw weights: :func:`transfuse.ops.hutchinson_trace`."""
    operator = ops.HessianOperator.from_module(model, loss, data)
    return ops.hutchinson_trace(operator, probes, tol=tol, seed=seed)


def spectral_density(
    model: nn.Module,
    loss: Any,
    data: Batches,
    steps: int = 100,
    runs: int = 1,
    *,
    seed: int = 0,
) -> ops.SpectralDensity:
    """Density of the Hessian's eigenvalues: :func:`transfuse.ops.spectral_density`."""
    operator = ops.HessianOperator.from_module(model, loss, data)
    return ops.spectral_density(operator, runs, steps=steps, seed=seed)


def ntk_top(
    model: nn.Module, data: Batches, k: int = 1, *, steps: int = 100, tol: float = 1e-3,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    r"""Largest eigenvalues (k,) of the scaled NTK matrix :math:`\frac{2}{nO} J J^\top`.

    They are those of the Gauss-Newton matrix :math:`\frac{2}{nO} J^\top J` of a squared error that
    is averaged over all n O entries, from which they are computed.
    """
    operator = ops.GGNOperator.from_module(model, "mse", data)
    steps = min(steps, operator.shape[0])
    return ops.lanczos_eigenpairs(
        operator, k, which="algebraic", tol=tol, steps=steps, seed=seed
    ).values


def curvature_split(
    model: nn.Module, loss: Any, data: Batches, *, steps: int = 100, tol: float = 1e-3
) -> CurvatureSplit:
    """Largest eigenvalues of the Hessian, its Gauss-Newton part and the rest."""
    hessian = ops.HessianOperator.from_module(model, loss, data)
    gauss_newton = ops.GGNOperator.from_module(model, loss, data)
    parts = (hessian, gauss_newton, _Difference(hessian, gauss_newton))
    tops = [
        ops.lanczos_eigenpairs(
            part, which="algebraic", tol=tol, steps=min(steps, hessian.shape[0])
        ).values.item()
        for part in parts
    ]
    return CurvatureSplit(*tops)


class _Difference:
    def __init__(self, first: ops.HessianOperator, second: ops.GGNOperator) -> None:
        self._first, self._second = first, second
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return torch.sub(self._first @ vectors, self._second @ vectors)  # type: ignore[arg-type]
