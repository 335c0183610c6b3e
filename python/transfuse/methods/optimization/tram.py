"""TRAM: Bridging Trust Regions and Sharpness Aware Minimization.

Tom Sherborne, Naomi Saphra, Pradeep Dasigi, Hao Peng; ICLR 2024; arXiv 2310.03646; official code
tomsherborne/tram_optimizer.

Sharpness-aware minimisation whose radius is not a constant but a distance d between the model's
predictions and those of a target. A step on one batch:

    g = grad L(theta);   d = KL(p(. | target) || p(. | theta)), without gradient
    eps = d theta^2 g / (|theta g| + 1e-12)     (element-wise; one norm over all parameters)
    theta <- base optimiser from theta with grad L(theta + eps)

Targets: the weights before the previous step (the default, TRAM-theta_{t-1}), the first weights
(TRAM-theta_0), a moving average of weights, or inputs with noise (TRAM-x). TRAM-Fisher has no d:
eps = gamma F^-1 g / sqrt(g^T F^-1 g), F = f^2 + eta for the gradient f of the loss on noisy inputs.

Deviations from the official code, all deliberate:

- The released ascent never multiplies by the gradient, nor uses its radius option, and so does not
  ascend; ``ascent="released"`` reproduces it. The default is the paper's.
- The divergence is the mean over batch (and tokens); the released code divides by B C more:
  ``official_scale=True``. Its L2 distance cannot be called.
- Parameters are restored from a copy, those without a gradient in the first pass included, and the
  radius and the norm never leave the device.
- Batch-norm statistics are recorded in the first pass alone, on both sides of the comparison.
- Steps with a gradient scaler unscale before the ascent and skip what overflowed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.optimization import _sam
from transfuse.methods.optimization._sam_optimizer import SAM, Base, frozen_statistics
from transfuse.methods.optimization._tram_divergence import KINDS, divergence
from transfuse.methods.optimization._tram_targets import (
    Ema,
    Fisher,
    Frozen,
    InputNoise,
    PreviousStep,
    Target,
    exchanged,
)

__all__ = [
    "SAM",
    "TRAM",
    "Ema",
    "Fisher",
    "Frozen",
    "InputNoise",
    "PreviousStep",
    "divergence",
    "frozen_statistics",
]


@register(
    title="TRAM: Bridging Trust Regions and Sharpness Aware Minimization",
    authors=("Tom Sherborne", "Naomi Saphra", "Pradeep Dasigi", "Hao Peng"),
    year=2024,
    venue="ICLR",
    arxiv="2310.03646",
    repository="https://github.com/tomsherborne/tram_optimizer",
    kind="optimizer",
    ops=("multi_norm", "sam_perturb_"),
)
class TRAM(SAM):
    r"""SAM with a trust-region distance of the predictions as radius.

    .. math:: \epsilon = d \, \frac{\theta^2 g}{\lVert \theta g \rVert}, \qquad
              d = \mathrm{KL}\big(p(\cdot \mid x; \theta_{t-1}) \,\|\, p(\cdot \mid x; \theta_t)
              \big)

    Args:
        params: Parameters or parameter groups; a group may have its own ``adaptive``.
        base_optimizer: Makes the optimiser that takes the step from the groups:
            ``lambda groups: torch.optim.AdamW(groups, lr=2e-5)``; or one made for these parameters.
        target: What predictions are compared with: :class:`PreviousStep` (None),
            :class:`Frozen`, :class:`Ema`, :class:`InputNoise` or :class:`Fisher`.
        adaptive: Scale each direction by the parameter squared, as the paper; False: d g / |g|.
        kind, official_scale: The divergence of :meth:`step`; see :func:`divergence`.
        scale: Factor of d.
        max_radius: Largest d.
        ascent: ``"gradient"``, or ``"released"`` for the steps of the released code.
        model: Its batch-norm statistics are left alone by all passes but the first.

    Raises:
        TypeError, ValueError: Options out of range, parameters that are not floating.

    Notes:
        Three forwards and two backwards a step (Fisher: three of each), and three copies of the
        parameters at most; steps whose target is the model itself are plain descent. By hand::

            loss(x).backward()                       # with scaler: scaler.scale(loss(x)).backward()
            with torch.no_grad(), optimizer.target_weights():
                logits_t = model(x)
            optimizer.ascend(divergence(logits_t, logits))
            loss(x).backward()                       # within frozen_statistics(model)
            optimizer.descend()

        A distance of 0 twice in a row is warned of: the target moves with the model, and TRAM is
        its base optimiser. Also see :class:`SAM`, on scalers, clipping and accumulation. The copies
        of the target are part of ``state_dict``.

        On devices other than the CPU, where looking at d would wait for it, a d that is negative or
        not finite is not refused; NaN then shows in the loss.

    Reference:
        Sherborne et al. 2024 (arXiv:2310.03646).

    Example:
        >>> model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
        >>> optimizer = TRAM(model.parameters(), lambda groups: torch.optim.SGD(groups, lr=0.1))
        >>> def closure():
        ...     logits = model(x)
        ...     return nn.functional.cross_entropy(logits, y), logits
        >>> losses = [float(optimizer.step(closure)) for _ in range(3)]
        >>> losses[2] < losses[1] < losses[0]
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Base,
        *,
        target: Target | None = None,
        adaptive: bool = True,
        kind: str = "kl_forward",
        official_scale: bool = False,
        scale: float = 1.0,
        max_radius: float | None = None,
        ascent: str = "gradient",
        model: nn.Module | None = None,
    ) -> None:
        if target is not None and not isinstance(target, Target):
            raise TypeError(f"target: expected a target or None, got {_checks.describe(target)}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if ascent not in ("gradient", "released"):
            raise ValueError(f"ascent: expected gradient or released, got {ascent!r}")
        if not isinstance(official_scale, bool):
            raise TypeError(
                f"official_scale: expected a bool, got {_checks.describe(official_scale)}"
            )
        self.scale = _checks.number("scale", scale, positive=True)
        if max_radius is not None:
            max_radius = _checks.number("max_radius", max_radius, positive=True)
        self.max_radius, self.ascent = max_radius, ascent
        self.kind, self.official_scale = kind, official_scale
        self.target = PreviousStep() if target is None else target
        self.radius: Tensor | None = None
        self._zeros = 0
        self._start(params, base_optimizer, adaptive, model)
        self.target.start(self._params)

    @contextlib.contextmanager
    def target_weights(self) -> Iterator[None]:
        """Context in which the parameters are those of the target; for calls of the model alone.

        Before the first step of :class:`PreviousStep`, and for noisy inputs, nothing changes.
        """
        with exchanged(self._params, self.target.weights), self._still():
            yield

    @torch.no_grad()
    def ascend(  # type: ignore[override]
        self, divergence: Tensor | float, *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """Perturb the parameters, from the gradients of the first pass, which are cleared.

        Args:
            divergence: d, a number or a 0-dimensional tensor of at least 0.
            scaler: The scaler of the loss; the gradients are unscaled first.

        Returns:
            The norm that d was divided by; d itself, scaled and limited, is :attr:`radius`.

        Raises:
            TypeError, ValueError: d is not one number, negative or not finite.
            RuntimeError: The parameters are perturbed already.
        """
        self.radius = self._limited(divergence)
        return self._ascend(self.radius, scaler, released=self.ascent == "released")

    @torch.no_grad()
    def ascend_fisher(
        self, noisy_grads: list[Tensor | None], *, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """The same for :class:`Fisher`: from the gradients there are, and those of noisy inputs.

        Args:
            noisy_grads: Gradients of the loss on noisy inputs, for every parameter once; already
                unscaled.
            scaler: The scaler of the loss, for the gradients of the first pass.

        Returns:
            sqrt(g^T F^-1 g).
        """
        fisher = self._fisher
        parts = self._begin(scaler)
        device = self._params[0].device
        found = dict(zip((id(p) for p in self._params), noisy_grads, strict=True))
        metric: list[list[Tensor]] = []
        for part in parts:
            given = [(found[id(p)], p) for p in part.params]
            grads = [torch.zeros_like(p) if g is None else g for g, p in given]
            squares = list(torch._foreach_mul(grads, grads))
            torch._foreach_add_(squares, fisher.eta)
            metric.append(squares)
        size = _sam.fisher_norm(parts, metric, device)
        factor = self._unless_overflow(fisher.gamma / (size + 1e-12))
        for part, weights in zip(parts, metric, strict=True):
            _sam.add_scaled(part, list(torch._foreach_div(part.grads, weights)), factor)
        self.zero_grad()
        return size

    @property
    def _fisher(self) -> Fisher:
        if not isinstance(self.target, Fisher):
            raise TypeError(f"target: expected Fisher, got {type(self.target).__name__}")
        return self.target

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], tuple[Tensor, Tensor]] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
    ) -> Tensor:
        """One step.

        Args:
            closure: Gives (loss, logits) of the batch, the same at each call; no backward pass. It
                is called for the target too, without gradients.
            scaler: Gradient scaler; call its ``update`` afterwards.
            clip_norm: Largest norm of the gradients of the step.

        Returns:
            The loss before the step.

        Raises:
            TypeError: No closure, or one that gives something else.
        """
        closure = self._checked(closure)
        state = self._random_state()
        loss, logits = self._pass(closure, scaler)
        if isinstance(self.target, Fisher):
            self._fisher_ascent(closure, scaler, state)
        else:
            found = self._target_logits(closure, state)
            if found is None:
                saved = _sam.copies(self._params, self._spare)
                self._spare, self._overflow = None, None
                self._keep(saved, self._step_base(scaler, clip_norm))
                self.zero_grad()
                return loss
            d = divergence(found, logits, kind=self.kind, official_scale=self.official_scale)
            self.ascend(d, scaler=scaler)
        with self._undone_on_error(), self._still():
            self._pass(closure, scaler)
        self.descend(scaler=scaler, clip_norm=clip_norm)
        return loss

    def _pass(
        self, closure: Callable[[], Any], scaler: torch.amp.GradScaler | None
    ) -> tuple[Tensor, Tensor]:
        self.zero_grad()
        with torch.enable_grad():
            result = closure()
            if not isinstance(result, tuple) or len(result) != 2:
                raise TypeError(
                    f"closure: expected a pair (loss, logits), got {_checks.describe(result)}"
                )
            loss, logits = result
            (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach(), logits.detach()

    def _target_logits(self, closure: Callable[[], Any], state: Any) -> Tensor | None:
        """Predictions of the target; None before there is one."""
        if isinstance(self.target, InputNoise):
            with self._still(), self._same_dropout(state), self.target.noise():
                return closure()[1]
        if self.target.weights is None:
            return None
        with self.target_weights():
            return closure()[1]

    def _fisher_ascent(
        self, closure: Callable[[], Any], scaler: torch.amp.GradScaler | None, state: Any
    ) -> None:
        params = self._params
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None
        with (
            self._still(),
            self._same_dropout(state),
            self._fisher.noise.noise(),
            torch.enable_grad(),
        ):
            closure()[0].backward()
        noisy = [p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        self.ascend_fisher(noisy, scaler=scaler)

    def _limited(self, d: Tensor | float) -> Tensor:
        if not isinstance(d, Tensor):
            d = torch.tensor(_checks.number("divergence", d))
        elif d.numel() != 1 or not d.is_floating_point():
            raise ValueError(f"divergence: expected one number, got {_checks.describe(d)}")
        d = d.detach().reshape(())
        if d.device.type == "cpu":
            value = float(d)
            if not 0 <= value < float("inf"):
                raise ValueError(f"divergence: expected a finite number of at least 0, got {value}")
            self._zeros = self._zeros + 1 if value == 0 else 0
            if self._zeros == 2:
                warnings.warn(
                    "the divergence was 0 in two steps: the target moves with the model, and TRAM "
                    "is its base optimiser",
                    stacklevel=4,
                )
        d = d * self.scale
        return d if self.max_radius is None else d.clamp_max(self.max_radius)

    def _random_state(self) -> Any:
        """What dropout of a noisy pass repeats; None where nothing has to."""
        if not isinstance(self.target, (InputNoise, Fisher)):
            return None
        devices = sorted({p.device.index for p in self._params if p.device.type == "cuda"})
        return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}

    @contextlib.contextmanager
    def _same_dropout(self, state: Any) -> Iterator[None]:
        """Context that begins with the random state of the first pass and leaves none behind."""
        host, devices = state
        with torch.random.fork_rng(devices=list(devices)):
            torch.set_rng_state(host)
            for index, found in devices.items():
                torch.cuda.set_rng_state(found, index)
            yield

    def _keep(self, saved: list[Tensor], stepped: bool) -> None:
        self._spare = self.target.keep(saved, stepped)

    def state_dict(self) -> dict[str, Any]:
        """The states of the base optimiser and of the target."""
        return {**super().state_dict(), "target": self.target.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.target.load_state_dict(state_dict["target"])
        params, weights = self._params, self.target.weights
        if weights is None:
            return
        if [w.shape for w in weights] != [p.shape for p in params]:
            raise ValueError(
                f"state_dict: expected target weights of these {len(params)} parameters, got "
                f"{len(weights)} of other shapes"
            )
        self.target.weights = [w.to(p) for w, p in zip(weights, params, strict=True)]
