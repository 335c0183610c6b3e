"""The information plane of a small tanh network during training, with its bound, as one picture.

``python -m transfuse.bench.gallery.information_plane --out information_plane.png``

All patterns of 12 signs, a label from a quadratic form: every hidden layer's information on input
and label over the steps, the information bottleneck bound, and how gradients drift and scatter.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.methods.information_theory.information_plane import (
    InformationPlane,
    PlaneResult,
    information_bound,
)

from ..cases import Unavailable
from ._pictures import Count, run_counts

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
BATCH = 256


def data() -> tuple[Tensor, Tensor]:
    """All patterns of 12 signs; labels by a quadratic form above its median."""
    x = 2.0 * ((torch.arange(4096)[:, None] >> torch.arange(12)) & 1) - 1
    form = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    value = ((x @ form) * x).sum(1)
    return x, (value > value.median()).long()


def train(steps: int, records: int) -> PlaneResult:
    """The plane at logarithmically spaced steps."""
    x, y = data()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(WIDTHS):
        layers.append(nn.Sequential(nn.Linear(n, m), nn.Tanh()))
    net, head = nn.Sequential(*layers), nn.Linear(2, 2)
    torch.random.set_rng_state(state)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    at = {0, *(round(steps ** (i / (records - 1))) for i in range(records))}
    names = [str(i) for i in range(len(layers))]
    outputs = InformationPlane(net, names, x, y)
    weights = InformationPlane(net, [f"{i}.0" for i in names], x, y, range="minmax")
    with outputs, weights, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs.record(0)
        for step in range(1, steps + 1):
            part = torch.randint(0, 4096, (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(net(x[part])), y[part]).backward()
            weights.add_gradients()
            optimizer.step()
            if step in at:
                outputs.record(step)
                weights.record(step)
    found = outputs.result()
    first = torch.full_like(found.gradients[:1], float("nan"))
    return found._replace(gradients=torch.cat((first, weights.result().gradients)))


def draw(steps: int, records: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    import matplotlib

    found = train(steps, records)
    bound = information_bound(*data(), [1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0, 16.0, 200.0])
    colours = matplotlib.colormaps["viridis"]
    figure = Figure(figsize=(11.4, 4.6), facecolor="white")
    figure.suptitle(
        f"Information plane of a {'-'.join(map(str, WIDTHS))} tanh network on 4,096 patterns, "
        f"30 bins, {steps} steps of Adam",
        fontsize=11,
    )
    plane, drift = figure.subplots(1, 2, width_ratios=[1.3, 1])
    figure.subplots_adjust(left=0.06, right=0.98, top=0.88, bottom=0.12, wspace=0.2)
    for layer in range(len(WIDTHS) - 1):
        colour = colours(layer / (len(WIDTHS) - 2))
        kept, said = found.information[:, layer].T
        plane.plot(kept, said, color=colour, linewidth=1.2, marker="o", markersize=2.5)
        plane.plot(
            kept[-1:], said[-1:], "o", color=colour, markersize=7, label=f"layer {layer + 1}"
        )
        mean, spread = found.gradients[1:, layer].T
        drift.loglog(found.epochs[1:], mean, color=colour)
        drift.loglog(found.epochs[1:], spread, color=colour, linestyle="--")
    # From nothing kept; a label that the input determines makes it a straight line.
    order = bound.input.argsort()
    kept, said = (torch.cat((v.new_zeros(1), v[order])) for v in (bound.input, bound.label))
    plane.plot(kept, said, color="#888888", linewidth=1, label="bound")
    plane.set_xlabel("I(X; T), bits")
    plane.set_ylabel("I(T; Y), bits")
    plane.legend(fontsize=8, frameon=False, loc="lower right")
    plane.grid(color="#eeeeee")
    drift.set_title("gradient over weight: norm of mean (line), of deviation (dashed)", fontsize=9)
    drift.set_xlabel("step")
    drift.grid(color="#eeeeee")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.information_plane",
        description="Draw the information plane of a small network during training.",
        counts=(Count("steps", 3000), Count("records", 40, least=2)),
    )


if __name__ == "__main__":
    sys.exit(main())
