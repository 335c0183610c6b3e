"""Training curves with and without TrAct, as one picture.

``python -m transfuse.bench.gallery.tract --out tract.png``

A small network learns the digits of scikit-learn, scaled to [0, 1] and not centred, by SGD; only
the weight gradient of the first layer differs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.methods.optimization.tract import tract

from ..cases import Unavailable
from ._pictures import Count, run_counts

BATCH, LEARNING_RATE, MOMENTUM = 64, 0.1, 0.9
LAMBDAS = (0.05, 0.1, 0.2)
COLOURS = ("#f4a582", "#d62728", "#8c1515")


def digits() -> tuple[Tensor, Tensor]:
    """1797 digits of 64 pixels in [0, 1], and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as reason:
        raise Unavailable("digits need scikit-learn: pip install 'transfuse[images]'") from reason
    data = load_digits()
    return torch.tensor(data.data / 16).float(), torch.tensor(data.target)


def train(x: Tensor, y: Tensor, seed: int, epochs: int, lam: float | None) -> Tensor:
    """(epochs, 2): training loss and error rate on a quarter that is held out, per epoch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    if lam is not None:
        tract(model[0], lam)
    order = torch.randperm(x.shape[0], generator=generator)
    count = x.shape[0] * 3 // 4
    x, y, held_x, held_y = x[order[:count]], y[order[:count]], x[order[count:]], y[order[count:]]
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    curve = []
    for _ in range(epochs):
        for part in torch.randperm(count, generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(x), y)
            wrong = (model(held_x).argmax(1) != held_y).double().mean()
        curve.append([loss.item(), wrong.item()])
    return torch.tensor(curve)


def draw(epochs: int, seeds: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    x, y = digits()
    figure = Figure(figsize=(11.4, 4.2), facecolor="white")
    figure.suptitle(
        f"Digits in [0, 1], MLP 64-64-64-10, SGD {LEARNING_RATE:g} / {MOMENTUM:g}, batch {BATCH}: "
        f"first layer as usual (grey) and with TrAct; {seeds} seeds",
        fontsize=11,
    )
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.85, bottom=0.13, wspace=0.2)
    runs = [(None, "#888888", "usual gradient")]
    runs += [(lam, c, f"TrAct, lambda {lam:g}") for lam, c in zip(LAMBDAS, COLOURS, strict=True)]
    steps = torch.arange(1, epochs + 1)
    for lam, colour, label in runs:
        curves = torch.stack([train(x, y, seed, epochs, lam) for seed in range(seeds)])
        for axis, values in zip(axes, curves.unbind(-1), strict=True):
            axis.plot(steps, values.mean(0), color=colour, label=label, linewidth=1.8)
            low, high = values.amin(0), values.amax(0)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("training loss", "error rate, held out"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_yscale("log")
        axis.grid(color="#eeeeee", which="both")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.tract",
        description="Draw training curves with and without TrAct.",
        counts=(Count("epochs", 20), Count("seeds", 3)),
    )


if __name__ == "__main__":
    sys.exit(main())
