"""LinearAG of adaptive guidance: unconditional predictions from linear combinations of a history.

A trajectory's history holds c_j and u_j of the steps so far. For step i the regressors are
c_0 .. c_i and u_0 .. u_{i-1}, one coefficient each, shared by all samples, pixels and channels:
u~_i = R_i beta_i. beta_i minimises |u_i - R_i beta|^2 + ridge |beta|^2 over stored trajectories;
only the Gram matrix R^T R and R^T u are ever formed, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks


class Grid(NamedTuple):
    """What coefficients belong to: labels of the steps, and the guidance strength."""

    steps: tuple[float, ...]
    scale: float


class History:
    """Predictions of one trajectory in one buffer (2 S, B, ...), rows c_0, u_0, c_1, u_1, ..."""

    def __init__(self, num_steps: int, like: Tensor) -> None:
        self._rows = like.new_empty((2 * num_steps, *like.shape))
        self.num_steps, self.cond_count, self.uncond_count = num_steps, 0, 0

    def add_cond(self, cond: Tensor) -> None:
        """Append the conditional prediction of the next step."""
        self._put(cond, 2 * self.cond_count, self.uncond_count == self.cond_count)
        self.cond_count += 1

    def add_uncond(self, uncond: Tensor) -> None:
        """Append the unconditional prediction of the step, evaluated or estimated."""
        self._put(uncond, 2 * self.uncond_count + 1, self.uncond_count == self.cond_count - 1)
        self.uncond_count += 1

    def _put(self, prediction: Tensor, row: int, in_order: bool) -> None:
        if not in_order or row >= self._rows.shape[0]:
            raise ValueError(
                f"history: expected c and u in turn, {self.num_steps} of each, after "
                f"{self.cond_count} c and {self.uncond_count} u"
            )
        if prediction.shape != self._rows.shape[1:]:
            raise ValueError(
                f"prediction: expected shape {tuple(self._rows.shape[1:])}, "
                f"got {tuple(prediction.shape)}"
            )
        self._rows[row] = prediction

    def regressors(self, i: int) -> Tensor:
        """c_0, u_0, ..., c_i as (2 i + 1, B, ...): a view."""
        if self.cond_count < i + 1 or self.uncond_count < i:
            raise ValueError(
                f"history: step {i} needs {i + 1} c and {i} u, got {self.cond_count} and "
                f"{self.uncond_count}"
            )
        return self._rows[: 2 * i + 1]


class LinearGuidance:
    r"""Estimates unconditional predictions from a trajectory's history.

    .. math:: \tilde u_i = \sum_{j \le i} \beta^c_{i,j} c_j + \sum_{j < i} \beta^u_{i,j} u_j

    Args:
        steps: labels of the sampler's steps (timesteps), which the coefficients belong to; at least
            two.
        scale: guidance strength of the trajectories.
        skipped: numbers of the steps whose unconditional evaluation is replaced.
        ridge: weight of |beta|^2 relative to the mean square of the regressors; 0 is plain least
            squares.

    Raises:
        ValueError, TypeError: an option that does not fit.

    Notes:
        Plain least squares on exact trajectories is unstable when used: the regressors are nearly
        collinear, and estimates become regressors of later steps. :meth:`fit` therefore goes step
        by step over trajectories generated with the coefficients fitted so far.

    Example:
        >>> linear = LinearGuidance(steps=(9, 6, 3, 0), scale=3.0, skipped=(1,))
        >>> linear.fitted
        False
    """

    def __init__(
        self,
        *,
        steps: Sequence[float],
        scale: float,
        skipped: Sequence[int],
        ridge: float = 1e-6,
    ) -> None:
        labels = tuple(_checks.number("steps", s) for s in steps)
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise ValueError(f"steps: expected at least two different labels, got {labels}")
        for i in skipped:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(labels):
                raise ValueError(f"skipped: expected numbers in [0, {len(labels)}), got {i!r}")
        if len(set(skipped)) != len(skipped):
            raise ValueError(f"skipped: expected different numbers, got {tuple(skipped)}")
        self.grid = Grid(labels, _checks.number("scale", scale))
        self.skipped = tuple(sorted(skipped))
        self.ridge = _checks.number("ridge", ridge)
        if self.ridge < 0.0:
            raise ValueError(f"ridge: expected a number of at least 0, got {ridge}")
        self.coefficients: dict[int, Tensor] = {}

    @property
    def fitted(self) -> bool:
        """Whether every skipped step has its coefficients."""
        return all(i in self.coefficients for i in self.skipped)

    def check_grid(self, steps: Sequence[float], scale: float) -> None:
        """Refuse a sampler that the coefficients do not belong to (ValueError)."""
        if Grid(tuple(float(s) for s in steps), float(scale)) != self.grid:
            raise ValueError(
                f"steps and scale: the coefficients belong to steps {self.grid.steps} and scale "
                f"{self.grid.scale}; fit others for this sampler"
            )

    def fit(self, run: Callable[[LinearGuidance], Iterable[tuple[History, Mapping[int, Tensor]]]]):
        """Fit the skipped steps one after the other.

        Args:
            run: ``run(linear)`` yields trajectories, each as its history and ``{i: u_i}``, the
                evaluated unconditional prediction of (at least) every skipped step without
                coefficients. It samples with ``linear``: a skipped step that is ``in
                linear.coefficients`` uses :meth:`predict`, the others evaluate.

        Returns:
            self.

        Notes:
            ``run`` is called once per skipped step, so that regressors are what sampling will see.
            One Gram matrix of 2 i + 1 numbers a side is accumulated over the trajectories.
        """
        self.coefficients = {}
        for i in self.skipped:
            width = 2 * i + 1
            gram = torch.zeros(width, width, dtype=torch.float64)
            target = torch.zeros(width, dtype=torch.float64)
            count = 0
            for history, evaluated in run(self):
                if i not in evaluated:
                    raise ValueError(f"run: expected the evaluated u of step {i} in the trajectory")
                rows = history.regressors(i).flatten(1).double()
                gram += (rows @ rows.mT).cpu()
                target += (rows @ evaluated[i].flatten().double()).cpu()
                count += 1
            if count == 0:
                raise ValueError("run: expected at least one trajectory, got none")
            self.coefficients[i] = self._solve(gram, target)
        return self

    def _solve(self, gram: Tensor, target: Tensor) -> Tensor:
        damped = gram + self.ridge * gram.diagonal().mean() * torch.eye(gram.shape[0]).double()
        if self.ridge > 0.0:
            return torch.linalg.solve(damped, target)
        return torch.linalg.lstsq(damped, target[:, None], driver="gelsd").solution[:, 0]

    def predict(self, history: History, i: int) -> Tensor:
        """The estimate of u_i, (B, ...), from a history up to c_i and u_{i-1}.

        Raises:
            ValueError: the history is shorter, or the step has no coefficients.
        """
        if i not in self.coefficients:
            raise ValueError(
                f"i: expected a fitted step, one of {sorted(self.coefficients)}, got {i!r}"
            )
        rows = history.regressors(i)
        weights = self.coefficients[i].to(device=rows.device, dtype=_work(rows))
        estimate = weights @ rows.flatten(1).to(weights.dtype)
        return estimate.to(rows.dtype).view(rows.shape[1:])

    def state_dict(self) -> dict[str, object]:
        """Grid and coefficients, for ``torch.save``."""
        return {
            "steps": list(self.grid.steps),
            "scale": self.grid.scale,
            "skipped": list(self.skipped),
            "coefficients": {i: beta.clone() for i, beta in self.coefficients.items()},
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take the coefficients of :meth:`state_dict` (ValueError for another grid)."""
        self.check_grid(state["steps"], state["scale"])  # type: ignore[arg-type]
        found: Mapping[int, Tensor] = state["coefficients"]  # type: ignore[assignment]
        for i, beta in found.items():
            if i not in self.skipped or tuple(beta.shape) != (2 * i + 1,):
                raise ValueError(f"coefficients: step {i} with shape {tuple(beta.shape)}")
        self.coefficients = {i: beta.double().cpu().clone() for i, beta in found.items()}

    def __repr__(self) -> str:
        return (
            f"LinearGuidance({len(self.grid.steps)} steps, scale={self.grid.scale}, "
            f"skipped={self.skipped}, fitted={self.fitted})"
        )


def _work(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
