"""Adaptive guidance on a model that is known exactly, as one picture.

``python -m transfuse.bench.gallery.adaptive_guidance --out adaptive_guidance.png``

No network is involved: the noise predictions are those of a mixture of Gaussians in the plane,
conditional ones know the component. The picture shows trajectories of full and of adaptive
guidance, the cosine that decides, and what each threshold costs and saves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse.methods.diffusion_control.adaptive_guidance import AdaptiveGuidance
from transfuse.ops import DDIM, cfg_step

from ..cases import Unavailable
from ._pictures import Count, run_counts

STEPS, SCALE, THRESHOLD, COMPONENTS, WIDTH = 20, 3.0, 0.99, 8, 0.3
THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


class Run(NamedTuple):
    """Latents at every step (S + 1, B, 2), cosines (S, B), mean evaluations per sample."""

    path: Tensor
    cosine: Tensor
    evaluations: float
    switched: Tensor


def alphas() -> list[float]:
    """Cumulative alphas of the steps on the linear schedule, noisiest first, and 1 at the end."""
    table = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return [*(table[1000 * (STEPS - i) // STEPS - 1].item() for i in range(STEPS)), 1.0]


def means() -> Tensor:
    """Component means on a circle."""
    angles = torch.arange(COMPONENTS, dtype=torch.float64) * (2 * math.pi / COMPONENTS)
    return 1.5 * torch.stack([angles.cos(), angles.sin()], dim=1)


def predictions(x: Tensor, alpha: float, label: Tensor | None) -> Tensor:
    """Exact noise prediction of the mixture, or of known components."""
    variance = alpha * WIDTH**2 + 1 - alpha
    gap = x[:, None] - alpha**0.5 * means()
    each = (1 - alpha) ** 0.5 * gap / variance
    if label is not None:
        return each[torch.arange(x.shape[0]), label]
    weights = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
    return (weights[..., None] * each).sum(1)


def sample(guidance: AdaptiveGuidance, count: int) -> Run:
    """DDIM from the same noise with a guidance."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    label = torch.randint(0, COMPONENTS, (count,), generator=generator)
    path, cosines, table = [x], [], alphas()
    for i, alpha in enumerate(table[:-1]):

        def cond(x: Tensor, at: Tensor | None, alpha: float = alpha) -> Tensor:
            return predictions(x, alpha, label)

        def uncond(x: Tensor, at: Tensor | None, alpha: float = alpha) -> Tensor:
            return predictions(x, alpha, None)

        before = guidance.still_guided if i > 0 else torch.ones(count, dtype=torch.bool)
        guided = guidance.step(i, cond, uncond, x, alpha=alpha)
        update = DDIM(alpha=alpha, alpha_next=table[i + 1])
        x = cfg_step(x, guided, None, update, scale=1.0)
        path.append(x)
        cosines.append(torch.where(before, guidance.cosine.double(), torch.nan))
    evaluations = guidance.nfe.double().mean().item()
    return Run(torch.stack(path), torch.stack(cosines), evaluations, guidance.switched_at)


def error(run: Run, full: Run) -> float:
    """Relative distance of the final latents."""
    return ((run.path[-1] - full.path[-1]).norm() / full.path[-1].norm()).item()


def draw(count: int, make: Callable[..., AdaptiveGuidance] = AdaptiveGuidance):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    full = sample(make(scale=SCALE, threshold=1.0), count)
    adaptive = sample(make(scale=SCALE, threshold=THRESHOLD), count)
    plain = sample(make(scale=1.0), count)

    figure = Figure(figsize=(12.5, 4.4), facecolor="white")
    figure.suptitle(
        f"Adaptive guidance of an exact mixture of {COMPONENTS} Gaussians: {STEPS} DDIM steps, "
        f"s = {SCALE:g}, {count} samples",
        fontsize=12,
    )
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.98, top=0.84, bottom=0.13, wspace=0.25)

    for i in range(min(count, 24)):
        left.plot(*full.path[:, i].T, color="#bbbbbb", linewidth=2.2, zorder=1)
        turn = int(adaptive.switched[i]) + 1
        left.plot(*adaptive.path[: turn + 1, i].T, color="#d62728", linewidth=0.8, zorder=2)
        left.plot(*adaptive.path[turn:, i].T, color="#1f77b4", linewidth=0.8, zorder=3)
    left.scatter(*means().T, color="black", s=12, zorder=4)
    left.set_title("grey: full guidance; red: guided, blue: conditional alone", fontsize=9)
    left.set_aspect("equal")

    middle.plot(adaptive.cosine[:, : min(count, 24)], color="#d62728", linewidth=0.6, alpha=0.6)
    middle.axhline(THRESHOLD, color="black", linewidth=0.8, linestyle="--")
    middle.set_title("cosine of clean latents until each sample switches", fontsize=9)
    middle.set_xlabel("step")

    costs, errors = [], []
    for threshold in THRESHOLDS:
        run = sample(make(scale=SCALE, threshold=threshold), count)
        costs.append(run.evaluations)
        errors.append(error(run, full))
    right.semilogy(costs, errors, "o-", color="#d62728", markersize=4)
    for cost, gap, threshold in zip(costs, errors, THRESHOLDS, strict=True):
        right.annotate(f" {threshold:g}", (cost, gap), fontsize=7.5)
    right.axhline(error(plain, full), color="#1f77b4", linewidth=0.8, linestyle="--")
    right.set_title("relative error over evaluations (of 40), by threshold", fontsize=9)
    right.set_xlabel("evaluations per sample; dashed: conditional alone (20)")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.adaptive_guidance",
        description="Draw adaptive guidance on an exact model.",
        counts=(Count("samples", 128, least=2),),
    )


if __name__ == "__main__":
    sys.exit(main())
