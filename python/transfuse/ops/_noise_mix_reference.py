"""noise_mix written out: its checks, its specification, its oracle, and its fallback."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse.ops._cfg_call import ANY, batched, companion
from transfuse.ops._sampler_updates import Number, per_sample


class NoisyVelocity(NamedTuple):
    """A noisy sample and the velocity that a v-predicting model is trained on."""

    noisy: Tensor
    velocity: Tensor


def pair(sample: object, noise: object) -> tuple[Tensor, Tensor]:
    """Check the tensors of noise_mix."""
    sample = batched("sample", sample)
    return sample, companion("noise", noise, "sample", sample)


def levels(sample: Tensor, alpha: object, sigma: object) -> tuple[Number, Number]:
    """Check the coefficients of noise_mix."""
    return (
        per_sample("alpha", alpha, sample, "sample", ANY, "(-inf, inf)"),
        per_sample("sigma", sigma, sample, "sample", ANY, "(-inf, inf)"),
    )


def noise_mix_reference(
    sample: Tensor, noise: Tensor, *, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """As ``transfuse.ops.noise_mix``."""
    sample, noise = pair(sample, noise)
    return composed(sample, noise, *levels(sample, alpha, sigma))


def noise_mix_with_velocity_reference(
    sample: Tensor, noise: Tensor, *, alpha: float | Tensor, sigma: float | Tensor
) -> NoisyVelocity:
    """As ``transfuse.ops.noise_mix_with_velocity``."""
    sample, noise = pair(sample, noise)
    alpha, sigma = levels(sample, alpha, sigma)
    return NoisyVelocity(
        composed(sample, noise, alpha, sigma), composed(sample, noise, -sigma, alpha)
    )


def composed(sample: Tensor, noise: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """``alpha * sample + sigma * noise``, in float32 (float64 for float64), rounded once."""
    wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
    terms = []
    for number, tensor in ((alpha, sample), (sigma, noise)):
        if isinstance(number, Tensor):
            number = number.to(wide).view(-1, *([1] * (sample.dim() - 1)))
        terms.append(number * tensor.to(wide))
    return (terms[0] + terms[1]).to(sample.dtype)
