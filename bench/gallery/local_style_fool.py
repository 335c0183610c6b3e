"""Regional style transfer and its refinement by queries, on a photograph, as one picture.

``python -m transfuse.bench.gallery.local_style_fool --out local_style_fool.png``

The classifier and the style features are small random convolutions, no pretrained network is
involved: the picture shows what the method does to pixels (which region, which colours, how large
the refinement is, how often it asks), not how well a real classifier resists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.methods.diffusion_control.local_style_fool import (
    AttackResult,
    LocalStyleAttack,
    LocalStyleOptions,
    composite,
    stylize_clip,
)

from ..cases import Unavailable
from ._pictures import parser_of, save, shrink

CLIP, STYLE = "china", "flower"
ROWS, COLUMNS = 2, 3  # regions: the cells of a grid
MARGIN = 0.14  # by which the first class leads on the clean clip
WEIGHTS = {"content": 20.0, "style": 20.0, "temporal": 0.0, "variation": 1e-3}


class Scene(NamedTuple):
    """Everything that is drawn."""

    clip: Tensor
    stylised: Tensor
    masks: Tensor
    start: Tensor
    result: AttackResult


class Network(nn.Module):
    """Random convolutions: style features, and logits of a clip."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, classes)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps by name."""
        first = self.first(x).tanh()
        return {"first": first, "second": self.second(first).tanh()}

    def forward(self, clips: Tensor) -> Tensor:
        maps = self.features(clips.flatten(0, 1))["second"].mean((2, 3))
        return self.head(maps.unflatten(0, clips.shape[:2]).mean(1))


def scene(size: tuple[int, int], *, iterations: int = 40, budget: int = 6000) -> Scene:
    """Attack a shrunken photograph."""
    generator = torch.Generator().manual_seed(0)
    network = Network().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    clip, style = shrink(CLIP, size), shrink(STYLE, size)[0]
    # The classes are as close on this picture as those of a classifier in doubt.
    logits = network(clip[None])[0]
    network.head.bias -= logits
    network.head.bias[0] += MARGIN
    masks = torch.zeros(ROWS * COLUMNS, 1, *size, dtype=torch.bool)
    for cell, mask in enumerate(masks):
        row, column = divmod(cell, COLUMNS)
        mask[
            :,
            row * size[0] // ROWS : (row + 1) * size[0] // ROWS,
            column * size[1] // COLUMNS : (column + 1) * size[1] // COLUMNS,
        ] = True
    stylised = stylize_clip(
        clip,
        style,
        network.features,
        content_layers=("second",),
        style_layers=("first", "second"),
        weights=WEIGHTS,
        iterations=(iterations, iterations),
    )
    options = LocalStyleOptions(max_regions=2, budget=budget)
    attack = LocalStyleAttack(network, surrogate=network, options=options)
    result = attack.attack(clip, masks, label=0, stylised=stylised, generator=generator)
    start = composite(clip, stylised, masks[list(result.regions)])
    return Scene(clip, stylised, masks, start, result)


def draw(size: tuple[int, int], *, iterations: int = 40):
    """The picture as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("pictures need matplotlib: pip install 'transfuse[plot]'") from error
    found = scene(size, iterations=iterations)
    result = found.result
    figure = Figure(figsize=(12.5, 5.6), facecolor="white")
    outcome = "changes the class" if result.success else "does not change the class"
    figure.suptitle(
        f"Regional style transfer on {CLIP}.jpg in the style of {STYLE}.jpg: {outcome} after "
        f"{result.queries} queries, regions {list(result.regions)} of {ROWS * COLUMNS}",
        fontsize=12,
    )
    axes = figure.subplots(2, 3).flatten()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.02, wspace=0.03, hspace=0.14)
    refinement = (result.clip - found.start).abs()
    largest = refinement.max().item()
    pictures = (
        (found.clip, "the clip (one frame)"),
        (found.stylised, "stylised as a whole"),
        (result.mask[:, None].expand_as(found.clip).float(), "chosen regions"),
        (found.start, "composite"),
        (result.clip, "after refinement"),
        (refinement / max(largest, 1e-9), f"refinement, white = {largest:.3f}"),
    )
    for axis, (picture, title) in zip(axes, pictures, strict=True):
        pixels = picture[0].permute(1, 2, 0).clamp(0, 1).numpy()
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=9.5, pad=4)
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "python -m transfuse.bench.gallery.local_style_fool",
        "Draw regional style transfer and its refinement on a photograph.",
    )
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--iterations", type=int, default=40, metavar="N", help="of L-BFGS")
    args = parser.parse_args(argv)
    if min(args.size) < 12:
        parser.error("--size: expected at least 12 rows and columns")
    return save(lambda: draw(tuple(args.size), iterations=args.iterations), args.out)


if __name__ == "__main__":
    sys.exit(main())
