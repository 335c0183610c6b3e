"""What a regression network keeps of its input under the Cauchy-Schwarz bottleneck, as a picture.

``python -m transfuse.bench.gallery.cs_ib --out cs_ib.png``

A noisy curve in one of eight inputs, the others distractors: representations trained with several
beta, their first two principal axes coloured by the relevant and by an irrelevant input, and test
error against normalised information.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.methods.information_theory.cs_ib import CSIBLoss
from transfuse.ops import cs_qmi

from ..cases import Unavailable
from ._pictures import Count, run_counts

BETAS = (0.0, 0.01, 0.1, 1.0)
COUNT, WIDTH = 512, 8


class Trained(NamedTuple):
    """Test error in standard deviations, normalised information, representation on two axes."""

    error: float
    kept: float
    axes: Tensor


def data() -> tuple[Tensor, Tensor]:
    """Standardised inputs and targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * COUNT, WIDTH, generator=generator)
    y = torch.sin(2 * x[:, :1]) + 0.1 * torch.randn(2 * COUNT, 1, generator=generator)
    return x, (y - y.mean()) / y.std()


def train(beta: float, epochs: int) -> Trained:
    """A small network under one beta."""
    x, y = data()
    generator = torch.Generator().manual_seed(1)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    torch.random.set_rng_state(state)
    loss = CSIBLoss(beta)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(COUNT, generator=generator).split(64):
            t = encoder(x[part])
            optimizer.zero_grad()
            loss(x[part], y[part], decoder(t), t).backward()
            optimizer.step()
    with torch.no_grad():
        t = encoder(x[COUNT:])
        error = (decoder(t) - y[COUNT:]).square().mean().sqrt().item()
        kept = cs_qmi(x[COUNT:], t, normalized=True).item()
        centred = t - t.mean(0)
        axes = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    return Trained(error, kept, axes)


def draw(epochs: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    x, _ = data()
    runs = [train(beta, epochs) for beta in BETAS]
    figure = Figure(figsize=(12.6, 5.6), facecolor="white")
    figure.suptitle(
        "Cauchy-Schwarz information bottleneck: y = sin(2 x1) + noise, seven inputs do not matter. "
        "Representation of test points on its first two axes",
        fontsize=11,
    )
    grid = figure.subplots(2, len(BETAS) + 1, width_ratios=[1] * len(BETAS) + [1.35])
    figure.subplots_adjust(left=0.04, right=0.98, top=0.86, bottom=0.1, wspace=0.22, hspace=0.16)
    for column, (beta, run) in enumerate(zip(BETAS, runs, strict=True)):
        for row, (feature, name) in enumerate(((0, "x1"), (1, "x2"))):
            axis = grid[row, column]
            axis.scatter(*run.axes.T, c=x[COUNT:, feature], s=5, cmap="coolwarm", vmin=-2, vmax=2)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(f"coloured by {name}", fontsize=9)
            if row == 0:
                axis.set_title(f"beta = {beta:g}", fontsize=10)
    for axis, label, values in (
        (grid[0, -1], "information kept of x, normalised", [r.kept for r in runs]),
        (grid[1, -1], "test error (std of y)", [r.error for r in runs]),
    ):
        axis.bar([f"{b:g}" for b in BETAS], values, color="#1f77b4")
        axis.set_title(label, fontsize=9)
    grid[0, -1].tick_params(labelbottom=False)
    grid[1, -1].set_xlabel("beta")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.cs_ib",
        description="Draw representations under the Cauchy-Schwarz information bottleneck.",
        counts=(Count("epochs", 60),),
    )


if __name__ == "__main__":
    sys.exit(main())
