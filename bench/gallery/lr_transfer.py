"""Sharpness along training over widths, and where the spectrum ends up, as one picture.

``python -m transfuse.bench.gallery.lr_transfer --out lr_transfer.png``

Residual networks in mean-field form learn 256 of scikit-learn's digits by full-batch gradient
descent. Left and middle: gamma^2-sharpness of several widths under depth-muP and under NTP, with
the edge of stability 2 / eta0. Right: density of the Hessian's eigenvalues, times gamma^2, before
and after training under depth-muP.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.optimization.lr_transfer import (
    MeanFieldNet,
    MeanFieldOptions,
    half_squared_error,
    spectral_density,
    transfer_report,
)

from ..cases import Unavailable
from ._pictures import new_figure, parser_of, save

SAMPLES, DEPTH, LR = 256, 2, 0.5
COLOURS = ("#fdae61", "#f46d43", "#d73027", "#7f0000")


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 64) in [0, 1] and one-hot targets (n, 10)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable(
            "the digits come with scikit-learn: pip install 'transfuse[bench]'"
        ) from (error)
    data = load_digits()
    x = torch.from_numpy(data.data[:SAMPLES]).float() / 16
    return x, F.one_hot(torch.from_numpy(data.target[:SAMPLES]), 10).float()


def _curves(axis, x: Tensor, y: Tensor, mode: str, widths: Sequence[int], steps: int) -> None:
    report = transfer_report(
        x,
        y,
        widths=widths,
        depths=[DEPTH],
        lrs=[LR],
        options=MeanFieldOptions(mode=mode, alpha=0.5),
        steps=steps,
        every=max(1, steps // 16),
    )
    for run, colour in zip(report.runs, COLOURS, strict=False):
        axis.plot(
            run.steps, run.sharpness, "o-", color=colour, markersize=3, label=f"N = {run.width}"
        )
    axis.axhline(2 / LR, color="black", linewidth=0.8, linestyle="--")
    axis.annotate("2 / eta0", (0, 2 / LR), fontsize=8, va="bottom")
    axis.set_ylim(0, 2.2 / LR)
    axis.set_xlabel("step of gradient descent")
    axis.legend(fontsize=8, loc="upper right")


def _density(axis, x: Tensor, y: Tensor, width: int, steps: int) -> None:
    net = MeanFieldNet(x.shape[1], y.shape[1], width=width, depth=DEPTH)
    optimizer = torch.optim.SGD(net.param_groups(LR))
    for label, colour, updates in (("before", "#1f77b4", 0), ("after", "#d62728", steps)):
        for _ in range(updates):
            optimizer.zero_grad()
            half_squared_error(net(x), y).backward()
            optimizer.step()
        found = spectral_density(net, half_squared_error, [(x, y)], steps=60, runs=4)
        scale = net.gamma**2
        axis.semilogy(
            scale * found.grid, found.density / scale, color=colour, linewidth=1.0, label=label
        )
    axis.set_ylim(bottom=1e-6)
    axis.set_xlabel("gamma^2 x eigenvalue")
    axis.legend(fontsize=8)


def draw(widths: Sequence[int], steps: int):
    """The picture as a matplotlib figure."""
    x, y = digits()
    figure = new_figure(
        "Learning-rate transfer: sharpness along training, by width",
        f"{SAMPLES} digits, depth {DEPTH}, eta0 = {LR}; both with branches scaled by depth^-1/2",
        height=4.6,
        note_at=0.9,
    )
    left, middle, right = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.05, right=0.98, top=0.82, bottom=0.12, wspace=0.22)
    _curves(left, x, y, "depth_mup", widths, steps)
    left.set_title("depth-muP: curves of all widths coincide", fontsize=9.5)
    left.set_ylabel("gamma^2 x largest eigenvalue")
    _curves(middle, x, y, "ntp", widths, steps)
    middle.set_title("NTP: no progressive sharpening", fontsize=9.5)
    _density(right, x, y, widths[-1], steps)
    right.set_title(f"density of the spectrum, N = {widths[-1]}", fontsize=9.5)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "python -m transfuse.bench.gallery.lr_transfer",
        "Draw sharpness along training over widths.",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N")
    parser.add_argument("--steps", type=int, default=160)
    args = parser.parse_args(argv)
    if min(args.widths) < 1 or args.steps < 1 or len(args.widths) > len(COLOURS):
        parser.error(f"expected positive --steps and at most {len(COLOURS)} positive --widths")
    return save(lambda: draw(args.widths, args.steps), args.out)


if __name__ == "__main__":
    sys.exit(main())
