"""A diffusion model without training: the exact noise predictions of a Gaussian mixture."""

from __future__ import annotations

import torch
from torch import Tensor


class Mixture:
    """``components`` Gaussians of deviation ``width`` in ``dim`` dimensions.

    Conditional predictions know the component, unconditional ones do not.
    """

    def __init__(self, components: int = 8, dim: int = 16, width: float = 0.3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.means = torch.randn(components, dim, generator=generator, dtype=torch.float64)
        self.width = width

    def _each(self, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Noise predictions of every component (B, K, D), and log densities (B, K)."""
        variance = alpha * self.width**2 + 1 - alpha
        gap = x[:, None] - alpha**0.5 * self.means
        return (1 - alpha) ** 0.5 * gap / variance, -gap.square().sum(-1) / (2 * variance)

    def cond(self, x: Tensor, alpha: float, label: Tensor) -> Tensor:
        """Prediction for samples of known components."""
        noise, _ = self._each(x, alpha)
        return noise[torch.arange(x.shape[0]), label]

    def uncond(self, x: Tensor, alpha: float) -> Tensor:
        """Prediction of the whole mixture."""
        noise, log_density = self._each(x, alpha)
        return (log_density.softmax(-1)[..., None] * noise).sum(1)


def schedule(steps: int, train_steps: int = 1000) -> list[float]:
    """Cumulative alphas of DDIM steps on the linear schedule, noisiest first, and 1 at the end."""
    betas = torch.linspace(1e-4, 0.02, train_steps, dtype=torch.float64)
    alphas = (1 - betas).cumprod(0)
    labels = [round(train_steps * (steps - i) / steps) - 1 for i in range(steps)]
    return [*(alphas[label].item() for label in labels), 1.0]
