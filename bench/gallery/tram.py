"""What TRAM's ascent does to the loss, and the radius it takes, as one picture.

``python -m transfuse.bench.gallery.tram --out tram.png``

A small network learns the digits of scikit-learn. At every step the loss rises by d |theta g| to
first order if the perturbation points uphill; the released code's does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.methods.optimization.tram import TRAM, Ema, Frozen, PreviousStep, divergence

from ..cases import Unavailable
from ._pictures import Count, run_counts
from .tract import digits

BATCH, LEARNING_RATE, MOMENTUM = 64, 0.2, 0.9
# Trained from the start, the first weights know nothing: their distance needs a limit.
TARGETS = {
    "previous step": (PreviousStep, None, "#d62728"),
    "average, decay 0.9": (lambda: Ema(0.9), None, "#9467bd"),
    "first weights, d at most 0.2": (Frozen, 0.2, "#1f77b4"),
}


def run(
    x: Tensor, y: Tensor, steps: int, target: object, limit: float | None, ascent: str
) -> Tensor:
    """(steps, 4): loss before the ascent, its rise, d |theta g|, and d."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = TRAM(
        model.parameters(),
        lambda groups: torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM),
        target=target,
        max_radius=limit,
        ascent=ascent,
    )
    rows = []
    for _ in range(steps):
        part = torch.randint(0, x.shape[0], (BATCH,), generator=generator)
        logits = model(x[part])
        loss = nn.functional.cross_entropy(logits, y[part])
        loss.backward()
        with torch.no_grad(), optimizer.target_weights():
            other = model(x[part])
        size = optimizer.ascend(divergence(other, logits))
        uphill = nn.functional.cross_entropy(model(x[part]), y[part])
        uphill.backward()
        optimizer.descend()
        radius = optimizer.radius.item()
        rows.append([loss.item(), uphill.item() - loss.item(), radius * size.item(), radius])
    return torch.tensor(rows, dtype=torch.float64)


def draw(steps: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    x, y = digits()
    figure = Figure(figsize=(12.5, 4.2), facecolor="white")
    figure.suptitle(
        f"Digits, MLP 64-48-10, SGD {LEARNING_RATE:g} / {MOMENTUM:g}, batch {BATCH}, {steps} steps",
        fontsize=11,
    )
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.84, bottom=0.13, wspace=0.28)
    runs = {
        name: run(x, y, steps, make(), limit, "gradient")
        for name, (make, limit, _) in TARGETS.items()
    }
    released = run(x, y, steps, PreviousStep(), None, "released")
    for name, rows in runs.items():
        colour = TARGETS[name][2]
        left.plot(rows[:, 0], color=colour, linewidth=1.2, label=name)
        right.plot(rows[1:, 3], color=colour, linewidth=1.0, label=name)
    left.set_title("loss before each step, by target", fontsize=9.5)
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    right.set_title("radius d: distance of the predictions to the target's", fontsize=9.5)
    right.set_yscale("log")
    for rows, colour, name in (
        (released, "#888888", "released ascent"),
        (runs["previous step"], "#d62728", "with the gradient"),
    ):
        seen = rows[rows[:, 3] > 0]
        rises = 100 * (seen[:, 1] > 0).double().mean().item()
        label = f"{name}: rises in {rises:.0f}%"
        middle.scatter(seen[:, 2], seen[:, 1], s=7, color=colour, label=label, linewidth=0)
    top = runs["previous step"][:, 2].max().item()
    middle.plot([0, top], [0, top], color="black", linewidth=0.8, linestyle="--")
    middle.set_title("rise of the loss by the ascent over d |theta g|", fontsize=9.5)
    middle.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.set_xlabel("step")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.tram",
        description="Draw TRAM's ascents.",
        counts=(Count("steps", 200, least=2),),
    )


if __name__ == "__main__":
    sys.exit(main())
