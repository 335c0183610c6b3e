"""DiffStyler on photographs, as one picture: what rho does to attention, and masks to noise.

``python -m transfuse.bench.gallery.diff_styler --out diff_styler.png``

No pretrained network is involved. The tokens are pixels of two shrunken photographs (see
``style_injection``): one is the source, whose queries and keys are injected, the other stands for
the image under way, whose values stay. Below, two recolourings of the source stand for the
predictions of two LoRAs and are put together by their masks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.methods.diffusion_control.diff_styler import (
    fuse_noise,
    injected_self_attention,
    region_masks,
)

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import (
    CONTENT,
    LOGIT_SCALE,
    STYLE,
    Tokens,
    new_figure,
    run,
    show,
    shrink,
    tokens,
)

SHARPEN = 3.0
RATES = (0.0, 0.4, 0.7, 1.0)
NOTE = (
    f"No pretrained network: attention between the pixels of a photograph. The source is "
    f"{CONTENT}.jpg, the image under way {STYLE}.jpg: its values stay, so its colours\\nmove along "
    "the structure of the source. Below, two recolourings stand for the predictions of two LoRAs "
    "and are put together by masks."
).replace("\\n", "\n")


def injected(content: Tokens, own: Tokens, rate: float, *, backend: str | None = None) -> Tensor:
    """RGB of the image under way when its queries and keys are mixed with the source's."""
    both = torch.cat([content.patches, own.patches])
    values = torch.cat([content.rgb, own.rgb])
    return injected_self_attention(
        both, both, values, rate=rate, n_source=1, scale=SHARPEN * LOGIT_SCALE, backend=backend
    )[1:]


def distance_of_maps(content: Tokens, own: Tokens, rate: float) -> float:
    """Mean difference between the two attentions, as seen in what they make of the source."""
    both = torch.cat([content.patches, own.patches])
    probe = content.rgb.expand(2, -1, -1, -1)
    out = injected_self_attention(
        both, both, probe, rate=rate, n_source=1, scale=SHARPEN * LOGIT_SCALE
    )
    return (out[1] - out[0]).abs().mean().item()


def recoloured(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Two stand-ins for styles: warm monochrome, and posterised with channels turned."""
    grey = picture.mean(1, keepdim=True)
    warm = grey * torch.tensor([1.15, 0.85, 0.5])[:, None, None]
    poster = ((picture * 4).round() / 4).roll(1, dims=1)
    return warm, poster


def regions(size: tuple[int, int]) -> list[Tensor]:
    """An ellipse around the centre left (soft and hard) and the lower third."""
    ys, xs = (torch.linspace(-1, 1, n) for n in (4 * size[0], 4 * size[1]))
    radius = (ys[:, None] / 0.95) ** 2 + ((xs[None] + 0.4) / 0.45) ** 2
    lower = (ys > 0.4)[:, None].expand(-1, len(xs))
    return [(1.5 - radius).clamp(0, 1), radius < 1, lower]


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    figure = new_figure(
        r"DiffStyler:  $q, k \leftarrow \rho\,(q, k)_{src} + (1-\rho)\,(q, k)$,   "
        r"$\epsilon[m_l] \leftarrow \epsilon_l[m_l]$",
        NOTE,
        height=7.2,
        note_at=0.885,
    )
    content, own = tokens(CONTENT, size), tokens(STYLE, size)
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.03, wspace=0.06, hspace=0.22)
    for column, rate in enumerate(RATES):
        out = injected(content, own, rate, backend=backend)
        title = rf"$\rho$ = {rate:g}    maps off {distance_of_maps(content, own, rate):.2f}"
        show(axes[0, column], out, size, title)
    base = shrink(CONTENT, size)
    styled = recoloured(base)
    soft, hard, lower = regions(size)
    show(axes[1, 0], base, size, f"source and base ({CONTENT}.jpg)")
    show(axes[1, 1], own.rgb, size, f"under way ({STYLE}.jpg)")
    show(axes[1, 2], styled[0], size, "first style")
    show(axes[1, 3], styled[1], size, "second style")
    masks = region_masks([hard, lower], size)
    show(axes[2, 0], (masks[0] + 2.0 * masks[1]).clamp(max=2) / 2, size, "masks: ellipse, lower")
    show(axes[2, 1], fuse_noise(base, styled, masks), size, "the last one wins")
    swapped = fuse_noise(base, styled[::-1], masks.flip(0))
    show(axes[2, 2], swapped, size, "in the other order")
    blurred = region_masks([soft, lower.float()], size)
    mixed = fuse_noise(base, styled, blurred, overlap="normalised")
    show(axes[2, 3], mixed, size, "soft ellipse, normalised")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.diff_styler",
        description="Draw injected self-attention and fused predictions on photographs.",
    )


if __name__ == "__main__":
    sys.exit(main())
