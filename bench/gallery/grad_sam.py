"""Grad-SAM on two photographs, as one picture: keep the subject, take the rest from a reference.

``python -m transfuse.bench.gallery.grad_sam --out grad_sam.png``

No pretrained network is involved. The tokens of the "prompt" are four colours, found by k-means on
a photograph, and its pixels attend to them; the "denoiser" behind the attention is a random 3 x 3
convolution of SiLU. So the picture shows how scores and masks follow from attention and Jacobian,
not what a diffusion model makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.diffusion_control.grad_sam import (
    attention_columns,
    attention_jacobian_scores,
    blend_latents,
    make_mask,
)
from transfuse.ops import KV, attend_with_lse

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import CONTENT, STYLE, new_figure, run, show, shrink

COLOURS = 4
SHARPNESS = 24.0
RULES = ("paper", "official", "mean")
NOTE = (
    f"No pretrained network: the pixels of {STYLE}.jpg attend to {COLOURS} colours found in it; "
    "the subject is the most orange one. Behind the attention lies a random\n3 x 3 convolution of "
    "SiLU. Scores: sum of A |d output / d A| over heads and queries, for each element and channel."
)


class Scene(NamedTuple):
    """A photograph whose pixels attend to colours."""

    picture: Tensor  # (1, 3, H, W)
    attention: Tensor  # (1, H W, colours)
    subject: int
    denoise: Callable[[Tensor], Tensor]  # attention -> (3, H, W)


def palette(pixels: Tensor, count: int = COLOURS, rounds: int = 20) -> Tensor:
    """Colours of k-means on (N, 3) pixels, started from spread brightness; no random numbers."""
    order = pixels.sum(1).argsort(stable=True)
    centres = pixels[order[torch.linspace(0, len(order) - 1, count).long()]]
    for _ in range(rounds):
        nearest = torch.cdist(pixels, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, pixels)
        counts = nearest.bincount(minlength=count)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def scene(size: tuple[int, int], *, backend: str | None = None) -> Scene:
    picture = shrink(STYLE, size)
    pixels = picture[0].flatten(1).T
    centres = palette(pixels)
    # |p - c|^2 up to what all colours share: 2 p c - c c, as a dot product of four entries.
    query = F.pad(2 * pixels, (0, 1), value=1.0)[None, None]
    key = torch.cat([centres, -centres.square().sum(1, keepdim=True)], 1)[None, None]
    lse = attend_with_lse(query, KV(key, key), scale=SHARPNESS, backend=backend).lse
    attention = attention_columns(query, key, torch.arange(COLOURS), lse, scale=SHARPNESS)[0]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(COLOURS, 8, generator=generator)
    kernel = torch.randn(3, 8, 3, 3, generator=generator) / 72**0.5

    def denoise(weights: Tensor) -> Tensor:
        hidden = F.silu((weights[0] @ value).T.unflatten(1, size))
        return F.conv2d(hidden[None], kernel, padding=1)[0]

    subject = int((centres[:, 0] - centres[:, 2]).argmax())
    return Scene(picture, attention, subject, denoise)


def scores(of: Scene) -> Tensor:
    """(1, 1, 3, H, W): one layer, one subject."""
    return attention_jacobian_scores(of.denoise, of.attention, [of.subject], chunk=256)[None]


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    figure = new_figure(
        r"Grad-SAM:  $S = \sum_{h,q} A_{hqs}\,|\partial e / \partial A_{hqs}|$,   "
        r"$z \leftarrow M z + (1-M)\,z_{ref}$",
        NOTE,
        height=7.2,
        note_at=0.885,
    )
    own = scene(size, backend=backend)
    values = scores(own)
    reference = shrink(CONTENT, size)
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.03, wspace=0.06, hspace=0.22)
    show(axes[0, 0], own.picture, size, f"being generated ({STYLE}.jpg)")
    show(axes[0, 1], reference, size, f"reference ({CONTENT}.jpg)")
    show(axes[0, 2], own.attention[0, :, own.subject].reshape(size), size, "attention to subject")
    mean = values[0, 0].mean(0)
    show(axes[0, 3], mean / mean.max(), size, "scores, mean of channels")
    masks = [make_mask(values, rule=rule) for rule in RULES]
    for column, (rule, mask) in enumerate(zip(RULES, masks, strict=True)):
        title = f'mask, rule "{rule}" ({mask.float().mean():.0%})'
        show(axes[1, column], mask.float().mean(0), size, title)
        show(axes[2, column], blend_latents(own.picture, reference, mask), size, "blended")
    everywhere = masks[0].any(0).expand(3, -1, -1)
    show(axes[1, 3], everywhere[0].float(), size, '"paper", any channel')
    show(axes[2, 3], blend_latents(own.picture, reference, everywhere), size, "blended")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.grad_sam",
        description="Draw scores and masks of Grad-SAM on two photographs.",
        size=(40, 60),
    )


if __name__ == "__main__":
    sys.exit(main())
