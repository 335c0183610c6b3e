"""What the gallery's pictures share: two photographs as tokens, panels, and the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Unavailable
from ..inputs import photo

CONTENT, STYLE = "china", "flower"
LOGIT_SCALE = 8.0
PATCH = 5
QUIET, STRONG = "#bbbbbb", "#d62728"


class Tokens(NamedTuple):
    """A photograph as tokens: patches (1, 1, N, 25) for queries and keys, RGB (1, 1, N, 3)."""

    patches: Tensor
    rgb: Tensor


def shrink(name: str, size: tuple[int, int]) -> Tensor:
    """The centre of a photograph at the aspect ratio of ``size``, averaged down: (1, 3, *size)."""
    picture = photo(name).permute(2, 0, 1)[None]
    height, width = picture.shape[-2:]
    unit = min(height / size[0], width / size[1])
    cut = round(size[0] * unit), round(size[1] * unit)
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    window = picture[..., top : top + cut[0], left : left + cut[1]]
    return F.adaptive_avg_pool2d(window, size)


def tokens(name: str, size: tuple[int, int], *, dtype: torch.dtype = torch.float32) -> Tokens:
    """Queries (or keys) and values of a photograph, one token per pixel of the shrunken picture."""
    picture = shrink(name, size).to(dtype)
    grey = F.pad(picture.mean(1, keepdim=True), (PATCH // 2,) * 4, mode="reflect")
    patches = F.unfold(grey, PATCH).mT
    patches = F.normalize(patches - patches.mean(-1, keepdim=True), dim=-1)
    return Tokens(patches[:, None], picture.flatten(2).mT[:, None])


def new_figure(title: str, note: str, *, height: float, note_at: float):
    """An empty matplotlib figure under a title and a note; both places are fractions from below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from error
    figure = Figure(figsize=(11.4, height), facecolor="white")
    figure.suptitle(title, fontsize=15, y=0.985)
    figure.text(0.5, note_at, note, ha="center", fontsize=9, color="#555555", linespacing=1.4)
    return figure


def show(axis, image: Tensor, size: tuple[int, int], title: str, *, frame: str = QUIET) -> None:
    """One panel: RGB tokens (1, 1, N, 3) in rows of ``size``, an image (1, 3, H, W), or (H, W)."""
    if image.ndim == 2:
        pixels = image
    elif image.shape[-1] == 3:
        pixels = image.reshape(*size, 3)
    else:
        pixels = image[0].permute(1, 2, 0)
    axis.imshow(
        pixels.clamp(0, 1).float().numpy(), interpolation="nearest", cmap="gray", vmin=0, vmax=1
    )
    axis.set_title(title, fontsize=9.5, pad=4)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(0.8 if frame == QUIET else 2.4)


def run(
    draw: Callable,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    smallest: int = PATCH + 1,
    size: tuple[int, int] = (64, 96),
) -> int:
    """The command line of a picture: ``draw(size, backend=...)`` gives the figure to save."""
    parser = parser_of(prog, description)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=size,
        metavar=("ROWS", "COLUMNS"),
        help="tokens per photograph",
    )
    parser.add_argument("--backend", help="backend of transfuse.ops.attend")
    args = parser.parse_args(argv)
    if min(args.size) < smallest:
        parser.error(f"--size: expected more than {smallest - 1} rows and columns")
    return save(lambda: draw(tuple(args.size), backend=args.backend), args.out)


class Count(NamedTuple):
    """An option ``--name`` that is a whole number."""

    name: str
    default: int
    least: int = 1
    help: str | None = None


def run_counts(
    draw: Callable,
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    counts: Sequence[Count],
) -> int:
    """The command line of a picture that ``draw`` makes of some numbers, in their order."""
    parser = parser_of(prog, description)
    for count in counts:
        parser.add_argument(
            f"--{count.name}", type=int, default=count.default, metavar="N", help=count.help
        )
    args = parser.parse_args(argv)
    numbers = [getattr(args, count.name) for count in counts]
    for count, number in zip(counts, numbers, strict=True):
        if number < count.least:
            parser.error(f"--{count.name}: expected at least {count.least}")
    return save(lambda: draw(*numbers), args.out)


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """A command line that asks for the file to write."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    return parser


def save(draw: Callable[[], Any], out: Path) -> int:
    """Draw a figure and write it as a PNG; the exit status, 2 where something is missing."""
    try:
        figure = draw()
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    figure.savefig(out, format="png", dpi=88, pil_kwargs={"optimize": True})
    print(f"{out}: {out.stat().st_size // 1024} kB")
    return 0
