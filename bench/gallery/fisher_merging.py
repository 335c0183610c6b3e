"""Two halves of the digits, merged by averages and by Fisher information, as one picture.

``python -m transfuse.bench.gallery.fisher_merging --out fisher_merging.png``

A small network learns a few digits of scikit-learn; one copy is fine-tuned on the classes 0 to 4,
one on 5 to 9. Left: accuracy on all classes along the grid of coefficients. Right: the Fisher
information of the first layer, per input pixel, of either copy.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.methods.model_merging.fisher_merging import diagonal_fisher, search

from ..cases import Unavailable
from ._pictures import Count, run_counts

HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))


def digits() -> tuple[Tensor, Tensor]:
    """1797 digits of 64 pixels in [0, 1], centred pixel by pixel, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as reason:
        raise Unavailable("digits need scikit-learn: pip install 'transfuse[images]'") from reason
    data = load_digits()
    x = torch.tensor(data.data / 16).float()
    return x - x.mean(0), torch.tensor(data.target)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """Some steps of Adam on all samples."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def merge(seed: int, points: int) -> tuple[Tensor, list[Tensor]]:
    """(3, points): weight of the second copy, accuracy of averages and of Fisher merges; and the
    Fisher information of the first layers (48, 64)."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    start, tune, test = order[:200], order[200:1100], order[1100:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    train(model, x[start], y[start], 40, 3e-3)
    states, fishers = [], []
    for classes in HALVES:
        own = tune[torch.isin(y[tune], torch.tensor(classes))]
        tuned = copy.deepcopy(model)
        train(tuned, x[own], y[own], 100, 1e-3)
        states.append(tuned.state_dict())
        fishers.append(diagonal_fisher(tuned, [x[own[:80]]]))

    @torch.no_grad()
    def score(state: dict[str, Tensor]) -> float:
        logits = torch.func.functional_call(model, state, (x[test],))
        return (logits.argmax(1) == y[test]).double().mean().item()

    curves = [list(search(states, f, points=points, score=score)) for f in (None, fishers)]
    weights = [float(c.coefficients[1]) for c in curves[0]]
    return (
        torch.tensor([weights, *([c.score for c in curve] for curve in curves)]),
        [f["0.weight"] for f in fishers],
    )


def draw(seeds: int, points: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    runs = [merge(seed, points) for seed in range(seeds)]
    curves = torch.stack([curve for curve, _ in runs])
    figure = Figure(figsize=(11.4, 4.2), facecolor="white")
    figure.suptitle(
        f"Digits, MLP 64-48-10: copies fine-tuned on 0-4 and on 5-9, merged; {seeds} seeds",
        fontsize=11,
    )
    left, *maps = figure.subplots(1, 3, width_ratios=(2.4, 1, 1))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.85, bottom=0.13, wspace=0.15)
    for row, (name, colour) in enumerate((("averages", "#888888"), ("Fisher", "#d62728")), 1):
        left.plot(curves[:, 0].T.numpy(), curves[:, row].T.numpy(), color=colour, lw=0.6, alpha=0.5)
        left.plot(curves[0, 0], curves[:, row].mean(0), color=colour, lw=2.2, label=name)
    left.set_xlabel("weight of the copy that knows 5-9")
    left.set_ylabel("accuracy on all classes")
    left.legend(frameon=False)
    for axis, fisher, half in zip(maps, runs[0][1], ("0-4", "5-9"), strict=True):
        axis.imshow(fisher.sum(0).reshape(8, 8).sqrt().numpy(), cmap="magma")
        axis.set_title(f"certainty per pixel, {half}", fontsize=9.5)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.fisher_merging",
        description=__doc__.splitlines()[0],
        counts=(
            Count("seeds", 5, help="runs"),
            Count("points", 51, help="settings of the coefficients"),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
