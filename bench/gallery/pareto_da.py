"""How Pareto weights keep three losses from working against each other, as one picture.

``python -m transfuse.bench.gallery.pareto_da --out pareto_da.png``

Digits of scikit-learn to the same digits, shifted and of low contrast: a small network, DANN and
the target surrogate. Left: the weights of every step. Middle: how fast each loss changes along the
step, to first order, with Pareto weights and with equal ones. Right: the losses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.methods.domain_adaptation.pareto_da import (
    ClasswiseDiscriminator,
    DomainAdversarialAlignment,
    ParetoDALoss,
)

from ..cases import Unavailable
from ._pictures import Count, run_counts
from .tract import digits

BATCH, LEARNING_RATE, MOMENTUM = 32, 0.05, 0.9
BLOCK = 5
LOSSES = (("source", "#1f77b4"), ("alignment", "#d62728"), ("surrogate", "#2ca02c"))
# A change below this part of the largest squared gradient is rounding.
ROUNDING = 1e-6


class Training(NamedTuple):
    """Of every step: weights, rates of descent C w over the largest squared gradient, and losses,
    each (steps, 3); the share of programmes without a solution, and the accuracy on the source."""

    weights: Tensor
    rates: Tensor
    losses: Tensor
    infeasible: float
    accuracy: float

    @property
    def conflicting(self) -> float:
        """The share of steps that increase at least one loss to first order."""
        return (self.rates < -ROUNDING).any(dim=1).double().mean().item()


def train(images: Tensor, labels: Tensor, *, steps: int, seed: int, uniform: bool) -> Training:
    """Train by descent alone, with Pareto weights or with equal ones.

    Args:
        images: (N, 64) digits in [0, 1], N over 1000.
        labels: (N,) their classes.
    """
    images = images.unflatten(1, (8, 8))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    source, rest = order[:900], order[900:]
    shifted = 0.4 * images.roll(1, dims=2) + 0.3
    target, held_out = rest[90:], rest[:90]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        )
        discriminator = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        criterion = ParetoDALoss(
            nn.Linear(32, 10),
            DomainAdversarialAlignment(discriminator),
            ClasswiseDiscriminator(32, 10, hidden=32, batch_norm=False),
        )
    criterion.weights.form = "official"  # descent alone
    shared = list(body.parameters())
    optimizer = torch.optim.SGD(
        [*shared, *criterion.parameters()], lr=LEARNING_RATE, momentum=MOMENTUM
    )

    def draw(of: Tensor) -> Tensor:
        return of[torch.randint(len(of), (BATCH,), generator=generator)]

    rows = []
    for _ in range(steps):
        s, t, v = draw(source), draw(target), draw(held_out)
        losses = criterion(body(images[s]), labels[s], body(shifted[t]), body(shifted[v]))
        optimizer.zero_grad()
        if uniform:
            gradients = [torch.autograd.grad(x, shared, retain_graph=True) for x in losses[:3]]
            flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients])
            gram = flat.double() @ flat.double().mT
            weights = torch.full((3,), 1 / 3, dtype=torch.float64)
            (sum(losses[:3]) + losses.classwise).backward()
        else:
            step = criterion.backward(losses, shared)
            gram, weights = step.gramian.double(), step.weights.double()
        rates = gram @ weights / gram.diagonal().max()
        rows.append(torch.stack([weights, rates, torch.stack(losses[:3]).detach().double()]))
        optimizer.step()
    with torch.no_grad():
        predicted = criterion.classifier(body(images[source])).argmax(1)
    weights, rates, curves = torch.stack(rows).unbind(1)
    return Training(
        weights,
        rates,
        curves,
        int(criterion.weights.infeasible) / steps,
        (predicted == labels[source]).double().mean().item(),
    )


def draw(steps: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    images, labels = digits()
    runs = {
        name: train(images, labels, steps=steps, seed=0, uniform=name == "equal")
        for name in ("Pareto", "equal")
    }
    figure = Figure(figsize=(12.5, 4.2), facecolor="white")
    figure.suptitle(
        f"Digits to shifted digits of low contrast, MLP 64-64-32, DANN, {steps} steps", fontsize=11
    )
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.98, top=0.84, bottom=0.13, wspace=0.22)
    blocks = runs["Pareto"].weights.split(BLOCK)
    left.stackplot(
        [BLOCK * number for number in range(len(blocks))],
        *torch.stack([block.mean(0) for block in blocks]).mT.tolist(),
        labels=[name for name, _ in LOSSES],
        colors=[colour for _, colour in LOSSES],
        alpha=0.8,
        linewidth=0,
    )
    left.set_title(f"Pareto weights, means of {BLOCK} steps", fontsize=9.5)
    left.set_xlim(0, max(BLOCK * (len(blocks) - 1), 1))
    left.set_ylim(0, 1)
    left.legend(fontsize=8, loc="upper right")
    for (name, training), colour in zip(runs.items(), ("#1f77b4", "#888888"), strict=True):
        worst = training.rates.min(dim=1).values
        share = 100 * training.conflicting
        middle.plot(
            worst,
            ".",
            markersize=3,
            color=colour,
            label=f"{name} weights: a loss rises in {share:.0f}% of the steps",
        )
    middle.axhline(0.0, color="black", linewidth=0.8)
    middle.set_yscale("symlog", linthresh=1e-3)
    middle.set_title("slowest descent among the losses, first order", fontsize=9.5)
    middle.legend(fontsize=8, frameon=False, loc="lower right")
    for number, (loss, colour) in enumerate(LOSSES):
        for (name, training), style in zip(runs.items(), ("-", ":"), strict=True):
            right.plot(
                training.losses[:, number],
                style,
                color=colour,
                linewidth=1.0,
                label=f"{loss}, {name}",
            )
    right.set_title("losses", fontsize=9.5)
    right.margins(y=0.3)
    right.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper center")
    for axis in (left, middle, right):
        axis.set_xlabel("step")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.pareto_da",
        description="Draw Pareto weights.",
        counts=(Count("steps", 250, least=2),),
    )


if __name__ == "__main__":
    sys.exit(main())
