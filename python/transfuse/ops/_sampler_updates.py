"""Sampler updates as data, and the coefficients that they stand for.

A model output m of a prediction type and the latent x give the clean latent x0 = p x + q m; an
update moves x to ``a x + b m + c noise``. All five are numbers, or float64 tensors of one number
per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

Number = float | Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")
VARIANCES = ("small", "large")


@dataclass(frozen=True, kw_only=True, eq=False)
class Predict:
    """No move: the result is the guided model output itself.

    Args:
        alpha: cumulative alpha of the latent's noise level, in [0, 1]: a number or (B,). Needed
            only where the clean latent is.
    """

    alpha: float | Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DDIM:
    """DDIM (Song et al. 2021, equation 12) from cumulative alpha ``alpha`` to ``alpha_next``.

    Args:
        alpha: in (0, 1): a number or (B,).
        alpha_next: in [0, 1]: a number or (B,). Less than alpha inverts (with eta 0).
        eta: 0 deterministic, 1 as noisy as DDPM; at least 0.
    """

    alpha: float | Tensor
    alpha_next: float | Tensor
    eta: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class DDPM:
    """Ancestral step (Ho et al. 2020, equations 6 and 7) from ``alpha`` to ``alpha_next``.

    Args:
        alpha: cumulative alpha in (0, 1): a number or (B,).
        alpha_next: cumulative alpha in [alpha, 1]: a number or (B,). No noise is added at 1.
        variance: ``"small"``, of the posterior, or ``"large"``, of the forward step.
    """

    alpha: float | Tensor
    alpha_next: float | Tensor
    variance: str = "small"


@dataclass(frozen=True, kw_only=True, eq=False)
class Euler:
    """Euler step of the probability-flow ODE (Karras et al. 2022) in x = x0 + sigma noise.

    With ``prediction="epsilon"`` it is also the step of flow matching, whose velocity is then the
    model output.

    Args:
        sigma: noise level, greater than 0: a number or (B,).
        sigma_next: noise level to move to, at least 0: a number or (B,).
    """

    sigma: float | Tensor
    sigma_next: float | Tensor


Update = Predict | DDIM | DDPM | Euler


class Move(NamedTuple):
    """Coefficients of x0 = ``p`` x + ``q`` m and of the next latent ``a`` x + ``b`` m + ``c``
    noise. ``p`` and ``q`` are None where no noise level is known."""

    p: Number | None
    q: Number | None
    a: Number
    b: Number
    c: Number


def sqrt(x: Number) -> Number:
    """Root of a number or tensor."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def per_sample(
    name: str, value: object, like: Tensor, of: str, within: tuple[float, float], bounds: str
) -> Number:
    """A number, or a floating tensor () or (B,) as float64 of shape (1,) or (B,), in a range.

    ``bounds``: the range as a message says it, ``"(0, 1]"``; brackets count. The values of a tensor
    are read on the CPU only; elsewhere that would wait for the queue.
    """
    if isinstance(value, Tensor):
        numbers = _checked(name, value, like, of)
        for number in numbers:
            _inside(name, number, within, bounds)
        return value.reshape(-1).to(torch.float64)
    number = _checks.number(name, value)
    _inside(name, number, within, bounds)
    return number


def sample_numbers(name: str, value: object, like: Tensor, of: str) -> float | list[float]:
    """A finite number, or one per sample from a tensor that may be read now; checked alike."""
    if not isinstance(value, Tensor):
        return _checks.number(name, value)
    numbers = _checked(name, value, like, of)
    for number in numbers:
        _inside(name, number, (-math.inf, math.inf), "(-inf, inf)")
    return numbers


def _checked(name: str, value: Tensor, like: Tensor, of: str) -> list[float]:
    """The numbers of a tensor () or (B,), where they may be read."""
    _checks.auxiliary(name, value, of, like)
    batch = like.shape[0]
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, batch)):
        raise ValueError(
            f"{name}: expected a number or a tensor of shape ({batch},) (one per sample), "
            f"got shape {tuple(value.shape)}"
        )
    return _read(value)


def _read(value: Tensor) -> list[float]:
    if torch.compiler.is_compiling() or type(value) is not Tensor or value.device.type != "cpu":
        return []
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return []
    numbers = value.detach().tolist()
    return numbers if isinstance(numbers, list) else [numbers]


def _inside(name: str, number: float, within: tuple[float, float], bounds: str) -> None:
    low, high = within
    above = number > low if bounds[0] == "(" else number >= low
    below = number < high if bounds[-1] == ")" else number <= high
    if not (above and below):
        raise ValueError(f"{name}: expected a number in {bounds}, got {number}")


def coefficients(update: object, prediction: object, like: Tensor, of: str) -> Move:
    """Check an update and give what it stands for."""
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        options = ", ".join(repr(p) for p in PREDICTIONS)
        raise ValueError(
            f"prediction: expected one of {options}, got {_checks.describe(prediction)}"
        )
    for kind, make in _MOVES.items():
        if isinstance(update, kind):
            return make(update, prediction, like, of)
    raise TypeError(
        f"update: expected a Predict, DDIM, DDPM or Euler, got {_checks.describe(update)}"
    )


def _alpha(name: str, value: object, like: Tensor, of: str, bounds: str) -> Number:
    return per_sample(f"update.{name}", value, like, of, (0.0, 1.0), bounds)


def _original(alpha: Number, prediction: str) -> tuple[Number, Number]:
    """x0 = p x + q m on the variance-preserving schedule."""
    signal, noise = sqrt(alpha), sqrt(1.0 - alpha)
    if prediction == "epsilon":
        return 1.0 / signal, -noise / signal
    if prediction == "v_prediction":
        return signal, -noise
    return 0.0, 1.0


def _noise(alpha: Number, prediction: str) -> tuple[Number, Number]:
    """Noise in x, as r x + s m."""
    signal, noise = sqrt(alpha), sqrt(1.0 - alpha)
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return noise, signal
    return 1.0 / noise, -signal / noise


def _predict(update: Predict, prediction: str, like: Tensor, of: str) -> Move:
    if update.alpha is None:
        return Move(None, None, 0.0, 1.0, 0.0)
    bounds = "(0, 1]" if prediction == "epsilon" else "[0, 1]"
    alpha = _alpha("alpha", update.alpha, like, of, bounds)
    return Move(*_original(alpha, prediction), 0.0, 1.0, 0.0)


def _ddim(update: DDIM, prediction: str, like: Tensor, of: str) -> Move:
    alpha = _alpha("alpha", update.alpha, like, of, "(0, 1)")
    after = _alpha("alpha_next", update.alpha_next, like, of, "[0, 1]")
    eta = _checks.number("update.eta", update.eta)
    if eta < 0.0:
        raise ValueError(f"update.eta: expected a number of at least 0, got {eta}")
    p, q = _original(alpha, prediction)
    r, s = _noise(alpha, prediction)
    if eta == 0.0:
        spread: Number = 0.0
        direction = sqrt(1.0 - after)
    else:
        variance = eta * eta * (1.0 - after) / (1.0 - alpha) * (1.0 - alpha / after)
        left = 1.0 - after - variance
        for number in _numbers(variance):
            if number < 0.0:
                raise ValueError(
                    "update.alpha_next: expected at least update.alpha where eta > 0, got a "
                    "step towards more noise"
                )
        for number in _numbers(left):
            if number < -1e-12:
                raise ValueError(
                    f"update.eta: expected a variance of at most 1 - alpha_next, got eta {eta}, "
                    "which leaves none for the predicted noise"
                )
        spread = sqrt(variance)
        direction = sqrt(left.clamp(min=0.0) if isinstance(left, Tensor) else max(left, 0.0))
    signal = sqrt(after)
    return Move(p, q, signal * p + direction * r, signal * q + direction * s, spread)


def _numbers(value: Number) -> Sequence[float]:
    return _read(value) if isinstance(value, Tensor) else [value]


def _ddpm(update: DDPM, prediction: str, like: Tensor, of: str) -> Move:
    alpha = _alpha("alpha", update.alpha, like, of, "(0, 1)")
    after = _alpha("alpha_next", update.alpha_next, like, of, "[0, 1]")
    _checks.choice("update.variance", update.variance, {name: 0 for name in VARIANCES})
    p, q = _original(alpha, prediction)
    ratio = alpha / after  # alpha of this step alone
    beta = 1.0 - ratio
    for number in _numbers(beta):
        if number < 0.0:
            raise ValueError("update.alpha_next: expected at least update.alpha, got less")
    left = (1.0 - after) / (1.0 - alpha)
    of_original, of_sample = sqrt(after) * beta / (1.0 - alpha), sqrt(ratio) * left
    variance = beta * left if update.variance == "small" else beta
    if isinstance(after, Tensor):
        variance = torch.where(after == 1.0, 0.0, variance)
    elif after == 1.0:
        variance = 0.0 * variance
    return Move(p, q, of_original * p + of_sample, of_original * q, sqrt(variance))


def _euler(update: Euler, prediction: str, like: Tensor, of: str) -> Move:
    anything = (0.0, math.inf)
    sigma = per_sample("update.sigma", update.sigma, like, of, anything, "(0, inf)")
    after = per_sample("update.sigma_next", update.sigma_next, like, of, anything, "[0, inf)")
    p: Number = 1.0
    q: Number = -sigma
    if prediction == "v_prediction":
        p = 1.0 / (sigma * sigma + 1.0)
        q = -sigma * sqrt(p)
    elif prediction == "sample":
        p, q = 0.0, 1.0
    keep = after / sigma
    return Move(p, q, keep + (1.0 - keep) * p, (1.0 - keep) * q, 0.0)


_MOVES: dict[type, Callable[..., Move]] = {
    Predict: _predict,
    DDIM: _ddim,
    DDPM: _ddpm,
    Euler: _euler,
}
