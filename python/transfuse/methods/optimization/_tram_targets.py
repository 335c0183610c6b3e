"""What the predictions of a model are compared with: other weights, or other inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse.methods.optimization import _sam


class Target:
    """Base of all targets.

    ``weights`` is what the parameters are exchanged for; None: nothing, or nothing yet.
    """

    weights: list[Tensor] | None = None

    def start(self, params: Sequence[Tensor]) -> None:
        """Called when the optimiser is built."""

    def keep(self, saved: list[Tensor], stepped: bool) -> list[Tensor] | None:
        """Take the parameters from before a step; gives back memory that is free for the next."""
        return saved

    def state_dict(self) -> dict[str, Any]:
        """Copies of weights that later steps need."""
        return {} if self.weights is None else {"weights": _sam.copies(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`."""
        weights = state.get("weights")
        self.weights = None if weights is None else _sam.copies(weights)


class PreviousStep(Target):
    """TRAM-theta_{t-1}: the weights before the previous step. The first step is plain descent."""

    def keep(self, saved: list[Tensor], stepped: bool) -> list[Tensor] | None:
        """The copy of before the step becomes the target; the old target is free."""
        if not stepped:
            return saved
        free, self.weights = self.weights, saved
        return free


class Frozen(Target):
    """TRAM-theta_0: the weights the optimiser was built with."""

    def start(self, params: Sequence[Tensor]) -> None:
        """Copy them."""
        self.weights = _sam.copies(params)


class Ema(Target):
    """A moving average of the weights from before each step: between the two others.

    Args:
        decay: in (0, 1); near 0 as :class:`PreviousStep`, near 1 as :class:`Frozen`.
    """

    def __init__(self, decay: float) -> None:
        self.decay = _checks.number("decay", decay)
        if not 0 < self.decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {decay}")

    def start(self, params: Sequence[Tensor]) -> None:
        """Begin at the weights there are."""
        self.weights = _sam.copies(params)

    def keep(self, saved: list[Tensor], stepped: bool) -> list[Tensor] | None:
        """Move towards the weights from before the step."""
        if stepped and self.weights is not None:
            _sam.blend(self.weights, saved, self.decay)
        return saved


class InputNoise(Target):
    """TRAM-x: the same weights on inputs with Gaussian noise.

    Args:
        module: Whose input gets the noise: the model, for continuous inputs; for tokens, the
            embedding, whose output gets it.
        sigma: Deviation.
        where: ``"input"`` or ``"output"`` of the module; None: the output of ``nn.Embedding``, else
            the input (its first floating tensor).
        generator: For the noise; None: one of its own, seed 0.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma: float = 0.1,
        *,
        where: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a module, got {_checks.describe(module)}")
        if where not in (None, "input", "output"):
            raise ValueError(f"where: expected input, output or None, got {where!r}")
        self.module, self.sigma = module, _checks.number("sigma", sigma, positive=True)
        embeds = isinstance(module, nn.Embedding)
        self.where = where if where is not None else "output" if embeds else "input"
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def _noisy(self, x: Tensor) -> Tensor:
        # Drawn where the generator lives, so that a seed means the same on every device.
        device = self.generator.device
        z = torch.randn(x.shape, generator=self.generator, device=device, dtype=torch.float32)
        return x + self.sigma * z.to(x)

    @contextlib.contextmanager
    def noise(self) -> Iterator[None]:
        """Context in which the module's input or output has noise.

        Raises:
            TypeError: in a call of the module without a floating tensor there.
        """

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            holders: tuple[tuple[Any, Any], ...] = (
                (list(args), range(len(args))),
                (dict(kwargs), tuple(kwargs)),
            )
            for holder, keys in holders:
                for key in keys:
                    if isinstance(holder[key], Tensor) and holder[key].is_floating_point():
                        holder[key] = self._noisy(holder[key])
                        return tuple(holders[0][0]), holders[1][0]
            raise TypeError(
                "module: expected a floating input to add noise to; for tokens give the embedding"
            )

        def after(module: nn.Module, args: tuple, out: Any):
            if not isinstance(out, Tensor) or not out.is_floating_point():
                raise TypeError(f"module: expected a floating output, got {_checks.describe(out)}")
            return self._noisy(out)

        if self.where == "input":
            hook = self.module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = self.module.register_forward_hook(after)
        try:
            yield
        finally:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state of the noise."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`."""
        self.generator.set_state(state["generator"])


class Fisher(Target):
    """TRAM-Fisher: no divergence, but the Fisher information of noisy inputs as the metric.

    Args:
        noise: How inputs get noise.
        gamma: Radius.
        eta: Added to the squared gradients.
    """

    def __init__(self, noise: InputNoise, *, gamma: float = 0.1, eta: float = 0.1) -> None:
        if not isinstance(noise, InputNoise):
            raise TypeError(f"noise: expected InputNoise, got {_checks.describe(noise)}")
        self.noise = noise
        self.gamma = _checks.number("gamma", gamma, positive=True)
        self.eta = _checks.number("eta", eta, positive=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of the noise."""
        return self.noise.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of :meth:`state_dict`."""
        self.noise.load_state_dict(state)


@contextlib.contextmanager
def exchanged(params: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Iterator[None]:
    """Context in which parameters hold other numbers; nothing is copied."""
    if weights is None:
        yield
        return
    mine = [p.data for p in params]
    for p, other in zip(params, weights, strict=True):
        p.data = other
    try:
        yield
    finally:
        for p, own in zip(params, mine, strict=True):
            p.data = own
