"""Deterministic DDIM steps (eta = 0) in both directions, and the time labels of inversion."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")
VARIANTS = ("ldm", "diffusers")


class DDIMStep(NamedTuple):
    """Result of one step: the moved latent and the clean latent it implies."""

    sample: Tensor
    predicted_original: Tensor


class Transition(NamedTuple):
    """One step of a schedule: the model is called with ``label``; the latent goes from the noise
    level of time ``start`` to that of time ``end``."""

    label: int
    start: int
    end: int


def _coefficients(name: str, alpha: float | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha) and sqrt(1 - alpha), broadcastable to the sample, after checking alpha."""
    value = torch.as_tensor(alpha, dtype=torch.float64)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, sample.shape[0])):
        raise ValueError(
            f"{name}: expected a number or shape ({sample.shape[0]},) to match the batch of "
            f"sample, got shape {tuple(value.shape)}"
        )
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name}: expected cumulative alphas in [0, 1], got {value.tolist()}")
    value = value.reshape(-1, *([1] * (sample.ndim - 1))) if value.ndim == 1 else value
    work = _work_dtype(sample)
    return tuple(  # type: ignore[return-value]
        root.to(device=sample.device, dtype=work) for root in (value.sqrt(), (1 - value).sqrt())
    )


def _work_dtype(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _step(
    sample: Tensor,
    model_output: Tensor,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    prediction: str,
) -> DDIMStep:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if sample.shape != model_output.shape:
        raise ValueError(
            f"model_output: expected the shape of sample {tuple(sample.shape)}, "
            f"got {tuple(model_output.shape)}"
        )
    signal, noise = _coefficients("alpha", alpha, sample)
    signal_next, noise_next = _coefficients("alpha_next", alpha_next, sample)
    work = _work_dtype(sample)
    x, output = sample.to(work), model_output.to(work)
    if prediction == "epsilon":
        if not bool((signal > 0).all()):
            raise ValueError("alpha: a noise prediction needs alpha > 0, got 0")
        epsilon = output
        original = (x - noise * epsilon) / signal
    else:
        original = signal * x - noise * output
        epsilon = signal * output + noise * x
    moved = signal_next * original + noise_next * epsilon
    return DDIMStep(moved.to(sample.dtype), original.to(sample.dtype))


def add_noise(sample: Tensor, noise: Tensor, alpha: float | Tensor) -> Tensor:
    """The latent at a noise level: sqrt(alpha) sample + sqrt(1 - alpha) noise.

    Args:
        sample: Clean latent (B, ...).
        noise: The same shape, or batch 1.
        alpha: Cumulative alpha, a number or (B,).

    Raises:
        ValueError: Shapes that do not fit, or an alpha outside [0, 1].

    Example:
        >>> add_noise(torch.ones(1, 1), torch.zeros(1, 1), 0.25)
        tensor([[0.5000]])
    """
    if noise.shape[1:] != sample.shape[1:] or noise.shape[0] not in (1, sample.shape[0]):
        raise ValueError(
            f"noise: expected the shape of sample {tuple(sample.shape)} or batch 1, "
            f"got {tuple(noise.shape)}"
        )
    signal, scale = _coefficients("alpha", alpha, sample)
    work = _work_dtype(sample)
    return (signal * sample.to(work) + scale * noise.to(work)).to(sample.dtype)


def _check_direction(alpha: float | Tensor, alpha_next: float | Tensor, *, noisier: bool) -> None:
    now, then = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, alpha_next))
    if now.device != then.device:
        then = then.to(now.device)
    if bool((then > now).any() if noisier else (then < now).any()):
        relation = "at most" if noisier else "at least"
        raise ValueError(
            f"alpha_next: expected {relation} alpha ({now.tolist()}), got {then.tolist()}"
        )


def ddim_invert_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    prediction: str = "epsilon",
) -> DDIMStep:
    """One DDIM inversion step, towards more noise.

    x0 = (x - sqrt(1 - a) e) / sqrt(a);  x_next = sqrt(a_next) x0 + sqrt(1 - a_next) e; for a
    v-prediction x0 = sqrt(a) x - sqrt(1 - a) v and e = sqrt(a) v + sqrt(1 - a) x.

    Args:
        sample: Latent x (B, ...), any floating dtype; the step is computed in float32 or float64.
        model_output: Predicted noise e, or v, of the same shape.
        alpha: Cumulative alpha of the latent's noise level: a number or (B,).
        alpha_next: Cumulative alpha to move to, at most ``alpha``.
        prediction: ``"epsilon"`` or ``"v_prediction"``.

    Returns:
        :class:`DDIMStep` (sample, predicted_original) in the dtype of ``sample``.

    Raises:
        ValueError: Shapes differ, an alpha lies outside [0, 1], the two are in the wrong order,
            or the prediction type is unknown.

    Reference:
        Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, equation 12 with
        sigma = 0.

    Example:
        >>> x, e = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
        >>> ddim_invert_step(x, e, alpha=1.0, alpha_next=0.25).sample.unique()
        tensor([0.5000])
    """
    _check_direction(alpha, alpha_next, noisier=True)
    return _step(sample, model_output, alpha, alpha_next, prediction)


def ddim_reverse_step(
    sample: Tensor,
    model_output: Tensor,
    *,
    alpha: float | Tensor,
    alpha_next: float | Tensor,
    prediction: str = "epsilon",
) -> DDIMStep:
    """One deterministic DDIM sampling step, towards less noise (``alpha_next`` >= ``alpha``).

    Same formula and arguments as :func:`ddim_invert_step`; the order of the alphas is checked the
    other way round, so that a mixed-up direction is an error and not a ruined latent.

    Example:
        >>> x, e = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
        >>> ddim_reverse_step(x, e, alpha=0.25, alpha_next=1.0).sample.unique()
        tensor([2.])
    """
    _check_direction(alpha, alpha_next, noisier=False)
    return _step(sample, model_output, alpha, alpha_next, prediction)


def _labels(num_steps: int, num_train_steps: int) -> tuple[int, list[int]]:
    for name, value in (("num_steps", num_steps), ("num_train_steps", num_train_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    stride = num_train_steps // num_steps
    if stride < 1 or 1 + stride * (num_steps - 1) > num_train_steps - 1:
        raise ValueError(
            f"num_steps: at most {num_train_steps - 1} steps fit a schedule of {num_train_steps} "
            f"noise levels, got {num_steps}"
        )
    return stride, [1 + stride * step for step in range(num_steps)]


def inversion_schedule(
    num_steps: int = 50, *, variant: str = "ldm", num_train_steps: int = 1000
) -> tuple[Transition, ...]:
    """Steps of DDIM inversion from the clean latent up, as the two official versions take them.

    ``"ldm"``: labels 1, 21, ..., 981 (S = 50); the model is evaluated at the label of the step's
    start, and the last step ends at the last noise level. ``"diffusers"``: the label is the END of
    the step, from max(0, t - stride) to t (the official script uses S = 20).

    Raises:
        ValueError: Unknown variant, or a number of steps that does not fit.

    Example:
        >>> inversion_schedule(50)[-1]
        Transition(label=981, start=981, end=999)
        >>> inversion_schedule(20, variant="diffusers")[:2]
        (Transition(label=1, start=0, end=1), Transition(label=51, start=1, end=51))
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    stride, labels = _labels(num_steps, num_train_steps)
    if variant == "diffusers":
        return tuple(Transition(label, max(0, label - stride), label) for label in labels)
    ends = [*labels[1:], num_train_steps - 1]
    return tuple(Transition(label, label, end) for label, end in zip(labels, ends, strict=True))


def reverse_schedule(num_steps: int = 50, *, num_train_steps: int = 1000) -> tuple[Transition, ...]:
    """Steps of DDIM sampling, noisiest first, with the labels of :func:`inversion_schedule`.

    Example:
        >>> reverse_schedule(50)[0], reverse_schedule(50)[-1].end
        (Transition(label=981, start=981, end=961), 0)
    """
    stride, labels = _labels(num_steps, num_train_steps)
    return tuple(Transition(label, label, max(0, label - stride)) for label in reversed(labels))


def time_label(value: object) -> int:
    """The integer time label in a timestep argument: a number, or a tensor of equal integers.

    Raises:
        ValueError: Not integral, empty, or different labels within one batch.
        TypeError: Not a number or tensor.
    """
    if isinstance(value, Tensor):
        distinct = value.detach().flatten().unique().tolist()
        if len(distinct) != 1:
            raise ValueError(f"timestep: expected one label for the whole batch, got {distinct}")
        value = distinct[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"timestep: expected an integer time label, got {type(value).__name__}")
    if not math.isfinite(value) or value != int(value):
        raise ValueError(
            f"timestep: expected an integer time label, got {value}; features are stored per "
            "label, so use a scheduler with integer timesteps"
        )
    return int(value)
