"""Forward noising: a sample and noise mixed with coefficients of each sample."""

from __future__ import annotations

from torch import Tensor

from transfuse import _backend, _native
from transfuse.ops import _mix_ops
from transfuse.ops._mix_core import mix, read_at_once
from transfuse.ops._noise_mix_reference import NoisyVelocity, composed, levels, pair
from transfuse.ops._sampler_updates import sample_numbers

__all__ = ["NoisyVelocity", "noise_mix", "noise_mix_with_velocity"]

_backend.declare("noise_mix", ("reference", "cpu", "triton", "cuda"))
_mix_ops.register_triton()
if _native.status().loaded:
    _mix_ops.register()


def noise_mix(
    sample: Tensor,
    noise: Tensor,
    *,
    alpha: float | Tensor,
    sigma: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    r"""Adds noise to samples, each at its own level.

    .. math:: x_t = \alpha\, x_0 + \sigma\, \mathrm{noise}

    Args:
        sample: clean x0, (B, ...), float32, float64, bfloat16 or float16.
        noise: shape, dtype and device of sample.
        alpha: signal coefficient, a number or a tensor (B,): the root of the cumulative alpha on a
            variance-preserving schedule, 1 on a variance-exploding one, 1 - t in flow matching.
        sigma: noise coefficient, a number or a tensor (B,).
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        Shape and dtype of sample.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Both tensors are read once, the result is written once; one with coefficient 0 is not read.
        Derivatives of any order, in reverse and forward mode, reach all tensors. Deterministic.

    Example:
        >>> import torch
        >>> from transfuse.ops import noise_mix
        >>> noise_mix(torch.ones(2, 3), torch.ones(2, 3), alpha=torch.tensor([0.5, 1.0]), sigma=2.0)
        tensor([[2.5000, 2.5000, 2.5000],
                [3.0000, 3.0000, 3.0000]])
    """
    sample, noise = pair(sample, noise)
    chosen = _choose(sample, backend)
    alpha, sigma = _levels(sample, noise, alpha, sigma, chosen)
    if chosen is None:
        return composed(sample, noise, alpha, sigma)
    return mix((sample, noise), ((alpha, sigma, 0.0),), (), chosen).outputs[0]


def noise_mix_with_velocity(
    sample: Tensor,
    noise: Tensor,
    *,
    alpha: float | Tensor,
    sigma: float | Tensor,
    backend: str | None = None,
) -> NoisyVelocity:
    r"""As :func:`noise_mix`, with the training target of v-prediction, in one pass.

    .. math:: v = \alpha\, \mathrm{noise} - \sigma\, x_0

    Args:
        sample: clean x0, (B, ...).
        noise: shape, dtype and device of sample.
        alpha: signal coefficient, a number or a tensor (B,).
        sigma: noise coefficient, a number or a tensor (B,).
        backend: see :func:`noise_mix`.

    Returns:
        ``NoisyVelocity(noisy, velocity)``, each in the shape and dtype of sample.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Reference:
        Salimans & Ho 2022, Progressive distillation for fast sampling of diffusion models
        (arXiv:2202.00512), appendix D.

    Example:
        >>> import torch
        >>> from transfuse.ops import noise_mix_with_velocity
        >>> x0, noise = torch.ones(1, 2), torch.zeros(1, 2)
        >>> noise_mix_with_velocity(x0, noise, alpha=0.6, sigma=0.8).velocity
        tensor([[-0.8000, -0.8000]])
    """
    sample, noise = pair(sample, noise)
    chosen = _choose(sample, backend)
    alpha, sigma = _levels(sample, noise, alpha, sigma, chosen)
    if chosen is None:
        return NoisyVelocity(
            composed(sample, noise, alpha, sigma), composed(sample, noise, -sigma, alpha)
        )
    back = [-s for s in sigma] if isinstance(sigma, list) else -sigma
    rows = ((alpha, sigma, 0.0), (back, alpha, 0.0))
    return NoisyVelocity(*mix((sample, noise), rows, (), chosen).outputs)


def _levels(sample: Tensor, noise: Tensor, alpha: object, sigma: object, backend: str | None):
    """The checked levels; as lists of numbers where that is the cheapest way to hand them on."""
    if backend is not None and read_at_once(backend, (sample, noise, alpha, sigma)):
        return (
            sample_numbers("alpha", alpha, sample, "sample"),
            sample_numbers("sigma", sigma, sample, "sample"),
        )
    return levels(sample, alpha, sigma)


def _choose(sample: Tensor, backend: str | None) -> str | None:
    """The backend with kernels that runs; None for eager torch."""
    if backend == "reference":
        return None
    chosen = _backend.choose("noise_mix", backend, sample.device, sample.dtype)
    return None if chosen == "composed" else chosen
