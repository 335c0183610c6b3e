"""Hessians of the head, domain by domain, after training with and without alignment: one picture.

``python -m transfuse.bench.gallery.hessian_alignment --out hessian_alignment.png``

Coloured digits (scikit-learn's 1797 digits of 8 x 8 pixels, red or green): is the digit below 5? A
quarter of the labels is wrong; the colour agrees with the label in 80 % and 90 % of two training
domains, and in 10 % of the test domain. A classifier that goes by colour has, in the test domain,
another Hessian; one that goes by shape has the same in all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.methods.domain_generalization.hessian_alignment import HessianAlignment
from transfuse.ops import head_hessian_diagonal, head_hessian_product

from ..cases import Unavailable
from ._pictures import parser_of, save

FLIPS = (0.2, 0.1, 0.9)
NAMES = ("training, 80 % colour", "training, 90 % colour", "test, 10 % colour")
COLOURS = ("#1f77b4", "#2ca02c", "#d62728")
SHARES = (0.4, 0.8, 1.0)
RAMP, DECAY = 100, 1.1e-3


class Trained(NamedTuple):
    """What is drawn of one training: per domain eigenvalues and diagonal, (3, P), and accuracy."""

    spectra: Tensor
    diagonals: Tensor
    accuracies: list[float]


def coloured_digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """(features, labels) of two training domains and the test domain."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable(
            "the digits need scikit-learn: pip install 'transfuse[images]'"
        ) from error
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float()[order] / 16.0
    classes = (torch.from_numpy(digits.target)[order] < 5).float()
    ends = [0, *(round(share * len(order)) for share in SHARES)]
    domains = []
    for first, last, flip in zip(ends, ends[1:], FLIPS, strict=False):
        noise, tint = (
            (torch.rand(last - first, generator=generator) < share).float()
            for share in (0.25, flip)
        )
        label = (classes[first:last] - noise).abs()
        both = images[first:last, None].repeat(1, 2, 1, 1)
        both[torch.arange(last - first), 1 - (label - tint).abs().long()] = 0.0
        domains.append((both.flatten(1), label))
    return domains


def train(domains: Sequence[tuple[Tensor, Tensor]], weight: float, steps: int) -> Trained:
    """Full-batch training with the penalty's last weight, 0: none."""
    generator = torch.Generator().manual_seed(0)
    body = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    head = nn.Linear(32, 1)
    with torch.no_grad():
        for layer in (body[0], body[2], head):
            scale = (2.0 / layer.in_features) ** 0.5
            layer.weight.copy_(scale * torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    loss = HessianAlignment(method="exact", alpha=1.0, beta=1.0, reduction="sum", detach_mean=False)
    (x0, y0), (x1, y1), _ = domains
    x, y = torch.cat((x0, x1)), torch.cat((y0, y1))
    for step in range(steps):
        terms = loss.terms(head, body(x), y, segments=[0, len(y0), len(y)])
        now = weight if step >= RAMP else min(weight, 1.0)
        total = terms.nll + DECAY * sum(p.square().sum() for p in parameters) + now * terms.penalty
        optimizer.zero_grad()
        (total / max(now, 1.0)).backward()
        optimizer.step()
    with torch.no_grad():
        lengths = [len(label) for _, label in domains]
        segments = [sum(lengths[:e]) for e in range(len(lengths) + 1)]
        features = body(torch.cat([x for x, _ in domains]))
        given = (features, head.weight, head.bias)
        diagonals = head_hessian_diagonal(*given, segments=segments).flatten(1)
        every = torch.eye(diagonals.shape[1]).unflatten(1, (1, -1))
        hessians = head_hessian_product(*given, every, segments=segments).flatten(2)
        right = [((head(body(x))[:, 0] > 0).float() == y).float().mean() for x, y in domains]
    return Trained(torch.linalg.eigvalsh(hessians), diagonals, [r.item() for r in right])


def draw(steps: int, weight: float, seed: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from error
    domains = coloured_digits(seed)
    figure = Figure(figsize=(11.4, 7.2), facecolor="white")
    figure.suptitle("Hessians of the classifier's head, domain by domain", fontsize=15, y=0.975)
    axes = figure.subplots(2, 2, sharey="row")
    figure.subplots_adjust(left=0.08, right=0.985, top=0.87, bottom=0.08, hspace=0.32, wspace=0.06)
    for column, (title, value) in enumerate((("plain training", 0.0), ("aligned", weight))):
        found = train(domains, value, steps)
        above, below = axes[0, column], axes[1, column]
        order = found.diagonals.mean(0).argsort(descending=True)
        for e, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            spectrum = found.spectra[e].flip(0).clamp(min=1e-9)
            label = f"{name}: accuracy {found.accuracies[e]:.2f}"
            above.plot(range(1, len(spectrum) + 1), spectrum, color=colour, lw=1.8, label=label)
            below.plot(found.diagonals[e][order], color=colour, lw=1.5)
        above.set_yscale("log")
        above.set_ylim(bottom=1e-7)
        above.set_title(f"{title}: eigenvalues, largest first", fontsize=11)
        above.legend(fontsize=9, frameon=False)
        below.set_title(f"{title}: diagonal, by the mean over domains", fontsize=11)
        below.set_xlabel("parameter of the head")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "python -m transfuse.bench.gallery.hessian_alignment",
        "Draw the Hessians of domains after plain and after aligned training.",
    )
    parser.add_argument("--steps", type=int, default=400, metavar="N")
    parser.add_argument("--weight", type=float, default=1e4, help="of the penalty, after its ramp")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    return save(lambda: draw(args.steps, args.weight, args.seed), args.out)


if __name__ == "__main__":
    sys.exit(main())
