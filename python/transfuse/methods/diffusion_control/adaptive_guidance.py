"""Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models.

Angela Castillo, Jonas Kohler, Juan C. Perez, Juan Pablo Perez, Albert Pumarola, Bernard Ghanem,
Pablo Arbelaez, Ali Thabet; AAAI 2025; arXiv 2312.12487. The authors published no code; the
community's is asagi4/ComfyUI-Adaptive-Guidance.

Classifier-free guidance g = u + s (c - u) evaluates the network twice per step. After every guided
step, for every sample, with c and u the two predictions or the clean latents they imply,

    gamma = <c, u> / (|c| |u|);       gamma >= threshold: c alone for all later steps.

The step that reaches the threshold stays guided; guidance does not come back. LinearAG replaces
single unconditional evaluations by a linear combination of what the trajectory already holds,

    u~(i) = sum_{j <= i} b_j c_j + sum_{j < i} d_j u_j,

with coefficients of step i from least squares over stored trajectories
(``_linear_guidance.LinearGuidance``).

Deviations from paper and community code, all deliberate:

- The cosine is by default that of clean latents (``space="original"``), as in the community's code.
  The paper takes noise predictions, which are alike at BOTH ends of a trajectory, so that
  ``space="prediction"`` needs ``min_guided_steps``.
- Every sample switches for itself (``reduce="sample"``), and the unconditional network runs on the
  samples still guided. ``reduce="batch"``: one cosine over the flattened batch, as in the
  community's code.
- ``start``: a share of the steps without guidance at the beginning, which do not test the
  threshold (there a noise level).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.diffusion_control._linear_guidance import LinearGuidance
from transfuse.ops import Predict, cfg_step, cfg_step_with_cosine
from transfuse.ops._sampler_updates import PREDICTIONS

__all__ = ["AdaptiveGuidance", "LinearGuidance"]

SPACES = ("original", "prediction")
REDUCTIONS = ("sample", "batch")


@register(
    title="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
    authors=(
        "Angela Castillo",
        "Jonas Kohler",
        "Juan C. Perez",
        "Juan Pablo Perez",
        "Albert Pumarola",
        "Bernard Ghanem",
        "Pablo Arbelaez",
        "Ali Thabet",
    ),
    year=2025,
    venue="AAAI",
    arxiv="2312.12487",
    repository="https://github.com/asagi4/ComfyUI-Adaptive-Guidance",
    kind="guidance",
    ops=("cfg_step", "cfg_step_with_cosine"),
)
class AdaptiveGuidance:
    r"""Classifier-free guidance that stops by itself, sample by sample.

    .. math:: \gamma = \frac{\langle c, u\rangle}{\lVert c\rVert \lVert u\rVert}, \qquad
              \gamma \ge \text{threshold: no unconditional prediction from the next step on}

    Args:
        scale: guidance strength s, any number; at 1 the unconditional network never runs.
        threshold: in (0, 1]. 0.991 takes about three quarters of the evaluations of full guidance,
            1 all of them.
        space: ``"original"`` or ``"prediction"``, see the module.
        reduce: ``"sample"`` or ``"batch"``.
        min_guided_steps: guided steps before the threshold is tested, at least 0.
        start: share of the steps, in [0, 1], that are conditional only at the beginning; needs
            ``num_steps``.
        num_steps: number of steps of the sampler; None if ``start`` is 0.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``: what the model predicts.
        rescale: of ``transfuse.ops.cfg_step``, while guided.
        backend: of ``transfuse.ops.cfg_step``.

    Raises:
        ValueError, TypeError: an option outside its range.

    Notes:
        The saving is whole network evaluations. What is left per guided step is one pass over the
        predictions, which guides and measures together, and one read of B numbers on the host.
        Deterministic. Samplers that evaluate the model several times per step call with the same
        ``i``: the decision is made once, after the step's first evaluation.

    Example:
        >>> guidance = AdaptiveGuidance(scale=3.0, threshold=0.95)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> guided = guidance.step(0, lambda x, at: x, lambda x, at: 0.9 * x, x, alpha=0.5)
        >>> guidance.nfe.tolist(), guidance.switched_at.tolist()
        ([2, 2], [0, 0])
        >>> guided = guidance.step(1, lambda x, at: x, lambda x, at: 0.9 * x, x, alpha=0.6)
        >>> torch.equal(guided, x), guidance.nfe.tolist()
        (True, [3, 3])
    """

    def __init__(
        self,
        *,
        scale: float = 7.5,
        threshold: float = 0.991,
        space: str = "original",
        reduce: str = "sample",
        min_guided_steps: int = 0,
        start: float = 0.0,
        num_steps: int | None = None,
        prediction: str = "epsilon",
        rescale: float = 0.0,
        backend: str | None = None,
    ) -> None:
        self.scale = _checks.number("scale", scale)
        self.threshold = _checks.number("threshold", threshold)
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
        for name, value, options in (
            ("space", space, SPACES),
            ("reduce", reduce, REDUCTIONS),
            ("prediction", prediction, PREDICTIONS),
        ):
            if value not in options:
                raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
        self.start = _checks.number("start", start)
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"start: expected a number in [0, 1], got {start}")
        _at_least("min_guided_steps", min_guided_steps, 0)
        if num_steps is not None:
            _at_least("num_steps", num_steps, 1)
        elif self.start > 0.0:
            raise ValueError("num_steps: expected the number of steps where start > 0, got None")
        self.rescale = _checks.number("rescale", rescale)
        if not 0.0 <= self.rescale <= 1.0:
            raise ValueError(f"rescale: expected a number in [0, 1], got {rescale}")
        self.space, self.reduce, self.prediction = space, reduce, prediction
        self.min_guided_steps, self.num_steps, self.backend = min_guided_steps, num_steps, backend
        self.reset()

    def reset(self) -> None:
        """Forget the trajectory; call before every new one."""
        # Tensors from the first step on.
        self._guided: Any = None
        self._nfe: Any = None
        self._switched: Any = None
        self._cosine: Any = None
        self._count, self._last = 0, -1

    @property
    def nfe(self) -> Tensor:
        """Network evaluations so far, (B,) int64 on the CPU."""
        return self._started(self._nfe)

    @property
    def switched_at(self) -> Tensor:
        """The step whose cosine reached the threshold, (B,) int64 on the CPU; -1: none yet."""
        return self._started(self._switched)

    @property
    def cosine(self) -> Tensor:
        """Last cosine of every sample, (B,) on the CPU; NaN before the first guided step."""
        return self._started(self._cosine)

    @property
    def still_guided(self) -> Tensor:
        """Which samples still take guidance, (B,) bool on the CPU."""
        return self._started(self._guided)

    def _started(self, state: Tensor | None) -> Tensor:
        if state is None:
            raise RuntimeError("no step was taken since the guidance was made or reset")
        return state.clone()

    def begin(self, batch: int) -> Tensor:
        """Which samples are guided, (B,) bool, for a batch of this size; begins a trajectory."""
        if self._guided is None:
            self._guided = torch.full((batch,), self.scale != 1.0)
            self._nfe = torch.zeros(batch, dtype=torch.int64)
            self._switched = torch.full((batch,), -1, dtype=torch.int64)
            self._cosine = torch.full((batch,), float("nan"))
        if self._guided.shape[0] != batch:
            raise ValueError(
                f"x: expected batch {self._guided.shape[0]} (that of the trajectory's first step; "
                f"reset() begins another), got {batch}"
            )
        return self._guided

    def in_range(self, i: int) -> bool:
        """Whether step ``i`` lies behind the unguided start."""
        return self.num_steps is None or i >= self.start * self.num_steps

    @torch.no_grad()
    def step(
        self,
        i: int,
        cond_fn: Callable[[Tensor, Tensor | None], Tensor],
        uncond_fn: Callable[[Tensor, Tensor | None], Tensor],
        x: Tensor,
        *,
        alpha: float | None = None,
    ) -> Tensor:
        """The prediction of step ``i``, guided where guidance is still on.

        Args:
            i: number of the step, from 0; it never goes down.
            cond_fn: ``cond_fn(x, None)`` is the model output with the condition.
            uncond_fn: ``uncond_fn(x_part, at)`` is the model output without it, or with a negative
                prompt, for a part of the batch: ``at`` int64 holds the samples' numbers, None means
                all.
            x: latent, (B, ...).
            alpha: cumulative alpha of the step, where ``space`` is ``"original"``.

        Returns:
            The prediction, in the shape and dtype of x.

        Raises:
            ValueError: a batch, step or prediction that does not fit.
        """
        guided = self.begin(x.shape[0])
        cond = cond_fn(x, None)
        if not self._counts(i) or not bool(guided.any()):
            self._nfe += 1
            return cond
        everyone = bool(guided.all())
        at = None if everyone else guided.nonzero().flatten().to(x.device)
        part = x if at is None else x.index_select(0, at)
        own = cond if at is None else cond.index_select(0, at)
        uncond = uncond_fn(part, at)
        out = self.combine(i, part, own, uncond, alpha=alpha)
        return out if at is None else cond.index_copy(0, at, out)

    def _counts(self, i: int) -> bool:
        """Check the number of a step; whether it may be guided."""
        _at_least("i", i, max(self._last, 0))
        return self.in_range(i)

    def combine(
        self, i: int, x: Tensor | None, cond: Tensor, uncond: Tensor, *, alpha: float | None = None
    ) -> Tensor:
        """Guide given predictions of the samples that are still guided, and decide on each.

        For samplers that call the network themselves; see :meth:`step`.

        Args:
            i: number of the step.
            x: latents of the guided samples, where ``space`` is ``"original"``.
            cond: their predictions with the condition.
            uncond: their predictions without it.
            alpha: cumulative alpha of the step, where ``space`` is ``"original"``.

        Returns:
            The guided prediction of these samples.
        """
        guided = self.begin(cond.shape[0] if self._guided is None else self._guided.shape[0])
        at = guided.nonzero().flatten()
        if cond.shape[0] != at.shape[0]:
            raise ValueError(
                f"cond: expected batch {at.shape[0]} (the samples still guided), "
                f"got {cond.shape[0]}"
            )
        if i != self._last:
            self._count += 1
        decide = i != self._last and self._count > self.min_guided_steps
        self._last = i
        self._nfe += 1
        self._nfe[at] += 1
        update = Predict(alpha=alpha if self.space == "original" else None)
        options: dict[str, Any] = {
            "scale": self.scale,
            "rescale": self.rescale,
            "prediction": self.prediction,
            "backend": self.backend,
        }
        if self.reduce == "batch":
            # The batch's one cosine is that of its samples in a row.
            row = None if x is None else x.reshape(1, -1)
            own, other = cond.reshape(1, -1), uncond.reshape(1, -1)
            plain = {**options, "rescale": 0.0}
            measured = cfg_step_with_cosine(row, own, other, update, space=self.space, **plain)
            out = measured.sample.reshape(cond.shape)
            if self.rescale > 0.0:
                out = cfg_step(None, cond, uncond, Predict(), **options)
            cosine = measured.cosine.expand(at.shape[0])
        else:
            measured = cfg_step_with_cosine(x, cond, uncond, update, space=self.space, **options)
            out, cosine = measured.sample, measured.cosine
        if decide:
            cosine = cosine.detach().to("cpu", torch.float32)
            self._cosine[at] = cosine
            # 1 is full guidance: a cosine of 1 may be a rounded one.
            reached = at[(cosine >= self.threshold) & (self.threshold < 1.0)]
            self._switched[reached] = i
            self._guided[reached] = False
        return out

    def __repr__(self) -> str:
        return (
            f"AdaptiveGuidance(scale={self.scale}, threshold={self.threshold}, "
            f"space={self.space!r}, reduce={self.reduce!r}, "
            f"min_guided_steps={self.min_guided_steps}, start={self.start})"
        )


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
