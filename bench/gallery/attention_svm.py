"""How training approaches the support vector machine of the selected tokens, as one picture.

``python -m transfuse.bench.gallery.attention_svm --out attention_svm.png``

Random problems, all trained at once by normalised gradient descent: the distance of the direction
of W to that of the smallest separating W, over the steps, with the gradient in the log domain and
as float64 gives it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.optimization.attention_svm import (
    AttentionProbe,
    alignment,
    att_svm,
    normalized_gd,
)

from ..cases import Unavailable
from ._pictures import Count, run_counts

N, TOKENS, WIDTHS = 4, 5, (6, 10, 20)
COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def problem(d: int, runs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit tokens, unit queries, labels and unit heads."""
    generator = torch.Generator().manual_seed(d)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    labels = torch.where(torch.rand(runs, N, generator=generator) > 0.5, 1.0, -1.0).double()
    return unit(runs, N, TOKENS, d), unit(runs, N, d), labels, unit(runs, d)


def distances(d: int, runs: int, steps: int, gradient: str) -> tuple[list[int], Tensor, float]:
    """Numbers of steps; one minus the cosine (k, runs); share of best tokens selected."""
    x, z, y, v = problem(d, runs)
    record = sorted({max(1, round(steps ** (i / 40))) for i in range(41)})
    probe = AttentionProbe(d, v=v)
    ran = normalized_gd(probe, x, z, y, steps=steps, gradient=gradient, record=record)
    selected = probe.log_attention(x, z).argmax(-1)
    best = ((y[..., None] * (x @ v[:, None, :, None])[..., 0]).argmax(-1) == selected).double()
    far = []
    for i in range(runs):
        try:
            svm = att_svm(x[i], z[i], selected[i]).weight
        except ValueError:
            continue
        far.append(1 - alignment(ran.weights[:, i], svm))
    if not far:
        raise Unavailable(f"nothing separates the tokens selected in {steps} steps")
    return record, torch.stack(far, dim=1), best.mean().item()


def draw(steps: int, runs: int):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as reason:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from reason
    figure = Figure(figsize=(11.4, 4.4), facecolor="white")
    figure.suptitle(
        f"1 - cosine of W and the attention support vector machine: {runs} problems of {N} "
        f"sequences of {TOKENS} tokens, medians",
        fontsize=11,
    )
    axes = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.13, wspace=0.08)
    titles = {"stable": "gradient in the log domain", "naive": "gradient as float64 gives it"}
    for axis, (gradient, title) in zip(axes, titles.items(), strict=True):
        for d, colour in zip(WIDTHS, COLOURS, strict=True):
            record, far, best = distances(d, runs, steps, gradient)
            axis.loglog(far.new_tensor(record), far, color=colour, linewidth=0.4, alpha=0.25)
            label = f"d = {d}: {100 * best:.0f}% of the tokens selected are the best"
            axis.loglog(
                far.new_tensor(record), far.median(1).values, color=colour, linewidth=2, label=label
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step of normalised gradient descent")
        axis.legend(fontsize=8, frameon=False, loc="lower left")
        axis.grid(color="#eeeeee")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run_counts(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.attention_svm",
        description="Draw the convergence of attention to its support vector machine.",
        counts=(Count("steps", 4000), Count("runs", 30)),
    )


if __name__ == "__main__":
    sys.exit(main())
