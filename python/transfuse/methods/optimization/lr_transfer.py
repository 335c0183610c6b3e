"""Why do Learning Rates Transfer? Reconciling Optimization and Scaling Limits for Deep Learning.

Lorenzo Noci, Alexandru Meterez, Thomas Hofmann, Antonio Orvieto; NeurIPS 2024 (later title: Super
Consistency of Neural Network Landscapes and Learning Rate Transfer); arXiv 2402.17457. No public
code; multipliers are checked against microsoft/mup, curvature against amirgholami/PyHessian.

A width-N, depth-L residual network in mean-field form, all weights iid N(0, 1):

    h_1 = W_0 x / sqrt D,  h_{l+1} = tau h_l + L^-a N^-1/2 W_l phi(h_l),
    f = W_out phi(h_{L+1}) / (gamma sqrt N);  NTP gamma = gamma0, muP gamma = gamma0 sqrt N,

trained with eta = eta0 gamma^2 by SGD. Its sharpness s = gamma^2 lambda_max(Hessian) is what
decides stability, s < 2 / eta0, and under (depth-)muP the curves s(t) of all sizes coincide, as
does the best eta0. For networks that exist, :func:`parametrise` finds which dimensions grow and
:func:`mu_param_groups` scales rates.

Deviations, all deliberate:

- Eigenvalues come from Lanczos with full re-orthogonalisation (``solver="power"`` for power
  iteration), normalised without an epsilon; the trace stops by its standard error, if at all.
- The rates of Adam are those that make every update as large as its parameter's contribution asks
  for in this form (hidden eta0 N^-1/2 L^(a - 1)); the paper's table was not at hand.
- A tied read-out weight is not rescaled; a plain ``nn.Linear`` as read-out is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.optimization._mean_field import MeanFieldNet, MeanFieldOptions
from transfuse.methods.optimization._mu_parametrisation import (
    MuReadout,
    MuShape,
    mu_normal_,
    mu_param_groups,
    mu_shape,
    parametrise,
)
from transfuse.methods.optimization._sharpness import (
    CurvatureSplit,
    Sharpness,
    curvature_split,
    hessian_trace,
    ntk_top,
    sharpness,
    spectral_density,
)

__all__ = [
    "CurvatureSplit",
    "MeanFieldNet",
    "MeanFieldOptions",
    "MuReadout",
    "MuShape",
    "Sharpness",
    "TransferReport",
    "TransferRun",
    "curvature_split",
    "half_squared_error",
    "hessian_trace",
    "mu_normal_",
    "mu_param_groups",
    "mu_shape",
    "ntk_top",
    "parametrise",
    "sharpness",
    "spectral_density",
    "transfer_report",
]


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, averaged over samples."""
    return 0.5 * (outputs - targets).square().sum(-1).mean()


@dataclass(frozen=True)
class TransferRun:
    """One training: sizes, eta0, losses of all steps (T + 1,), and at ``steps`` the sharpness.

    Losses end with infinity where the run diverged.
    """

    width: int
    depth: int
    lr: float
    losses: Tensor
    steps: tuple[int, ...]
    sharpness: Tensor


@dataclass(frozen=True)
class TransferReport:
    """All trainings, and how far the best rate moves over the sizes."""

    runs: tuple[TransferRun, ...]

    def best_lr(self) -> dict[tuple[int, int], float]:
        """(width, depth) -> the rate with the lowest final loss."""
        best: dict[tuple[int, int], TransferRun] = {}
        for run in self.runs:
            size = (run.width, run.depth)
            if size not in best or run.losses[-1] < best[size].losses[-1]:
                best[size] = run
        return {size: run.lr for size, run in best.items()}

    def drift(self) -> float:
        """Octaves between the smallest and the largest of the best rates; 0 if they transfer."""
        rates = self.best_lr().values()
        return math.log2(max(rates) / min(rates))


@register(
    title="Why do Learning Rates Transfer? Reconciling Optimization and Scaling Limits for Deep "
    "Learning",
    authors=("Lorenzo Noci", "Alexandru Meterez", "Thomas Hofmann", "Antonio Orvieto"),
    year=2024,
    venue="NeurIPS",
    arxiv="2402.17457",
    repository=None,
    kind="procedure",
    ops=("HessianOperator", "GGNOperator", "lanczos_eigenpairs", "power_iteration",
         "hutchinson_trace", "spectral_density"),
)  # fmt: skip
def transfer_report(
    inputs: Tensor,
    targets: Tensor,
    *,
    widths: Sequence[int],
    depths: Sequence[int],
    lrs: Sequence[float],
    options: MeanFieldOptions | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = half_squared_error,
    steps: int = 160,
    every: int = 20,
    iters: int = 100,
    tol: float = 1e-3,
    seed: int = 0,
) -> TransferReport:
    """Whether learning rates transfer: full-batch gradient descent over widths, depths and rates.

    Args:
        inputs: (n, D).
        targets: (n, O).
        widths, depths, lrs: all combinations are trained; rates are eta0.
        options: the family of networks.
        loss: mean loss of outputs and targets.
        steps: of gradient descent, T.
        every: sharpness is measured before the first, after the last and every so many steps; 0
            for never.
        iters, tol: of :func:`sharpness`.
        seed: of the weights, the same for every rate.

    Returns:
        :class:`TransferReport`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> from transfuse.methods.optimization.lr_transfer import transfer_report
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> report = transfer_report(x, x.square(), widths=[8, 16], depths=[1], lrs=[0.1], steps=4)
        >>> report.drift(), report.runs[0].losses.shape, report.runs[0].steps
        (0.0, torch.Size([5]), (0, 4))
    """
    _checks.tensor("inputs", inputs, ("n", "D"))
    _checks.tensor("targets", targets, ("n", "O"))
    _checks.floating("inputs", inputs)
    _checks.size("targets", targets, 0, inputs.shape[0], "samples of inputs")
    steps = _checks.positive_int("steps", steps)
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"every: expected an integer of at least 0, got {every!r}")
    for name, values in (("widths", widths), ("depths", depths), ("lrs", lrs)):
        if len(values) == 0:
            raise ValueError(f"{name}: expected at least one, got none")
    runs = []
    for width in widths:
        for depth in depths:
            for lr in lrs:
                net = MeanFieldNet(
                    inputs.shape[1],
                    targets.shape[1],
                    width=width,
                    depth=depth,
                    options=options,
                    generator=torch.Generator().manual_seed(seed),
                ).to(inputs)
                runs.append(_train(net, inputs, targets, lr, loss, steps, every, iters, tol))
    return TransferReport(tuple(runs))


def _train(
    net: MeanFieldNet,
    inputs: Tensor,
    targets: Tensor,
    lr: float,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    every: int,
    iters: int,
    tol: float,
) -> TransferRun:
    optimizer = torch.optim.SGD(net.param_groups(lr))
    losses = torch.full((steps + 1,), math.inf, dtype=torch.float64)
    measured, curve = [], []
    for step in range(steps + 1):
        value = loss(net(inputs), targets)
        if not bool(value.isfinite()):
            break
        losses[step] = value.item()
        if every > 0 and (step % every == 0 or step == steps):
            found = sharpness(net, loss, [(inputs, targets)], 1, iters, tol, which="algebraic")
            measured.append(step)
            curve.append(found.values.item())
        if step < steps:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return TransferRun(
        net.width, net.depth, lr, losses, tuple(measured), torch.tensor(curve, dtype=torch.float64)
    )
