"""The four shifts of windowed attention on a photograph, as one picture.

``python -m transfuse.bench.gallery.hi_diffusion --out hi_diffusion.png``

No pretrained network is involved. The tokens are pixels of a shrunken photograph; see
``style_injection`` for how queries, keys and values are made from them. So the picture shows which
tokens meet under each shift, and how far each is from global attention, not what a diffusion model
makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transfuse.methods.diffusion_control.hi_diffusion import msw_shift
from transfuse.ops import KV, attend, window_attention, window_reverse

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import CONTENT, LOGIT_SCALE, Tokens, new_figure, run, show, tokens

SHIFTS = range(4)
SCALE = 3.0
WIDTH = 256  # most columns of one head
TINTS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.7, 0.2], [0.2, 0.4, 1.0], [1.0, 0.8, 0.1]])
NOTE = (
    f"No pretrained network: attention between the pixels of {CONTENT}.jpg. Queries and keys are "
    "unit-norm 5 x 5 grey patches without their mean, values are RGB; the logit\n"
    f"scale is {LOGIT_SCALE:g}. Middle: what the pixel under the white cross attends to, square "
    "root. Below: mean difference from global attention, three times."
)


def windowed(
    photo: Tokens, value: Tensor, size: tuple[int, int], index: int, *, backend: str | None = None
) -> Tensor:
    """Attention in windows of one shift."""
    return window_attention(
        photo.patches,
        photo.patches,
        value,
        size=size,
        shift=msw_shift(size, index),
        scale=LOGIT_SCALE,
        backend=backend,
    )


def whole(photo: Tokens, value: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention to all tokens."""
    return attend(photo.patches, KV(photo.patches, value), scale=LOGIT_SCALE, backend=backend)


def tinted(photo: Tokens, size: tuple[int, int], index: int) -> Tensor:
    """The photograph in the colours of its windows, (1, 1, N, 3)."""
    slots = -(-size[0] // 2) * -(-size[1] // 2)
    windows = TINTS[:, None].expand(-1, slots, -1)
    tint = window_reverse(windows, size=size, shift=msw_shift(size, index))
    return 0.55 * photo.rgb.mean(-1, keepdim=True) + 0.45 * tint[None]


def weights(
    photo: Tokens,
    position: int,
    size: tuple[int, int],
    attention: Callable[[Tokens, Tensor], Tensor],
) -> Tensor:
    """One row of the attention matrix as an image, brightest 1, square root."""
    count = size[0] * size[1]
    # With unit vectors as values the output is the matrix; heads share the columns among them.
    heads = -(-count // WIDTH)
    every = torch.eye(count, heads * WIDTH).view(1, count, heads, WIDTH).transpose(1, 2)
    patches = photo.patches.expand(-1, heads, -1, -1)
    out = attention(Tokens(patches, photo.rgb), every.contiguous())
    row = out[0, :, position].flatten()[:count].sqrt()
    return (row / row.max()).view(size)


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    photo = tokens(CONTENT, size)
    row, column = 5 * size[0] // 8, 3 * size[1] // 8
    position = row * size[1] + column
    plain = whole(photo, photo.rgb, backend=backend)
    outs = [windowed(photo, photo.rgb, size, k, backend=backend) for k in SHIFTS]

    def difference(out: Tensor) -> Tensor:
        return SCALE * (out - plain).abs().mean(-1).view(size)

    figure = new_figure(
        r"Windowed attention, shifted by $k\,(\lfloor w_y/4 \rfloor, \lfloor w_x/4 \rfloor)$",
        NOTE,
        height=5.6,
        note_at=0.86,
    )
    axes = figure.subplots(3, 1 + len(SHIFTS))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.8, bottom=0.03, wspace=0.06, hspace=0.22)
    show(axes[0, 0], photo.rgb, size, f"{CONTENT}.jpg")

    def everything(photo: Tokens, value: Tensor) -> Tensor:
        return whole(photo, value, backend=backend)

    show(axes[1, 0], weights(photo, position, size, everything), size, "global")
    average = torch.stack(outs).mean(0)
    title = "mean over k"
    show(
        axes[2, 0], difference(average), size, f"{title}: {difference(average).mean() / SCALE:.4f}"
    )
    for k in SHIFTS:
        show(axes[0, 1 + k], tinted(photo, size, k), size, f"windows, k = {k}")

        def window(photo: Tokens, value: Tensor, k: int = k) -> Tensor:
            return windowed(photo, value, size, k, backend=backend)

        show(axes[1, 1 + k], weights(photo, position, size, window), size, f"k = {k}")
        own = difference(outs[k])
        show(axes[2, 1 + k], own, size, f"k = {k}: {own.mean() / SCALE:.4f}")
    for axis in axes[1]:
        axis.plot(column, row, marker="+", color="white", markersize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.hi_diffusion",
        description="Draw the four shifts of windowed attention on a photograph.",
        size=(32, 48),
    )


if __name__ == "__main__":
    sys.exit(main())
