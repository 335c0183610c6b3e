"""Coefficients that aTLAS learns, and what they gain over one for all tensors, as one picture.

``python -m transfuse.bench.gallery.atlas --out atlas.png``

A small network learns a few digits of scikit-learn; three copies are fine-tuned on the classes 0-3,
4-6 and 7-9. Left: accuracy on all classes against a common coefficient, and with learned ones.
Right: the learned coefficients, task by tensor.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.methods.model_merging.atlas import Atlas, TaskVector, fit

from ..cases import Unavailable
from ._pictures import Count, run_counts
from .fisher_merging import digits, train

GROUPS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))


def compose(seed: int, steps: int) -> tuple[Tensor, list[float], Tensor, list[str]]:
    """(2, 21): common coefficients and their accuracy; accuracies learned per task, per tensor and
    in four partitions; the coefficients per tensor, and its names."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    start, tune, held, test = order.split((150, 600, 250, len(x) - 1000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = nn.Sequential(
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
        )
    train(base, x[start], y[start], 40, 3e-3)
    vectors = []
    for classes in GROUPS:
        own = tune[torch.isin(y[tune], torch.tensor(classes))]
        tuned = copy.deepcopy(base)
        train(tuned, x[own], y[own], 100, 3e-3)
        vectors.append(TaskVector(base.state_dict(), tuned.state_dict()))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return (model(x[test]).argmax(1) == y[test]).double().mean().item()

    same = Atlas(base, vectors, granularity="task")
    alphas = torch.linspace(0, 1, 21)
    searched = []
    for alpha in alphas:
        with torch.no_grad():
            same.coef.fill_(alpha)
        searched.append(accuracy(same))
    learned = []
    for granularity in ("task", 4, "block"):
        composed = Atlas(base, vectors, granularity=granularity)

        def loss(step: int, composed: Atlas = composed) -> Tensor:
            return F.cross_entropy(composed(x[held]), y[held])

        fit(composed, loss, steps=steps, lr=0.03)
        learned.append(accuracy(composed))
    return (
        torch.stack((alphas, torch.tensor(searched))),
        learned,
        composed.coef.detach(),
        list(composed.names),
    )


def draw(seed: int, steps: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    curve, learned, coefficients, names = compose(seed, steps)
    figure = Figure(figsize=(11.4, 4.2), facecolor="white")
    figure.suptitle(
        "Digits, MLP 64-48-48-10: three fine-tuned copies composed by task vectors", fontsize=11
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    figure.subplots_adjust(left=0.07, right=0.94, top=0.85, bottom=0.2, wspace=0.3)
    left.plot(*curve.numpy(), color="#888888", label="one coefficient for all, searched")
    kinds = ("learned per task", "learned per tensor and partition (4)", "learned per tensor")
    for value, kind, colour in zip(learned, kinds, ("#f4a582", "#8c1515", "#d62728"), strict=True):
        left.axhline(value, color=colour, label=kind)
    left.set_xlabel("coefficient")
    left.set_ylabel("accuracy on all classes")
    left.legend(frameon=False, fontsize=9)
    top = float(coefficients.abs().max())
    shown = right.imshow(coefficients.numpy(), cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    right.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    right.set_yticks(range(3), ["0-3", "4-6", "7-9"])
    right.set_title("learned coefficients", fontsize=9.5)
    figure.colorbar(shown, ax=right)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.atlas",
        description=__doc__.splitlines()[0],
        counts=(
            Count("seed", 1, least=0, help="of everything"),
            Count("steps", 200, help="of the coefficients' training"),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
