"""Negative token merging on two photographs, as one picture.

``python -m transfuse.bench.gallery.neg_to_me --out neg_to_me.png``

No pretrained network is involved. The tokens are 3 x 3 colour patches of shrunken photographs, and
a pushed token shows as its middle pixel. So the picture shows which tokens are pushed, from what
and how far, not what a diffusion model makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from transfuse.methods.diffusion_control.neg_to_me import push_from_reference
from transfuse.ops import nearest_tokens

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import CONTENT, STYLE, new_figure, run, show, shrink

PATCH = 3
STRENGTHS = (0.3, 0.6, 0.9)
THRESHOLDS = (0.9, 0.8, 0.65)
NOTE = (
    f"No pretrained network: the patches of {CONTENT}.jpg are pushed from those of {STYLE}.jpg, "
    "where their cosine exceeds the threshold. Above: three strengths at the\n"
    f"threshold {THRESHOLDS[-1]:g}; below: what is pushed (white) at three thresholds, and each "
    "pixel replaced by the one of the reference that its patch is pushed from."
)


def patches(picture: Tensor) -> Tensor:
    """Colour patches around grey 0.5 of a picture (1, 3, H, W): (1, N, 27), channels first."""
    padded = F.pad(picture - 0.5, (PATCH // 2,) * 4, mode="reflect")
    return F.unfold(padded, PATCH).mT.contiguous()


def pixels(tokens: Tensor) -> Tensor:
    """The middle pixel of each patch, (1, 1, N, 3)."""
    return tokens.unflatten(2, (3, PATCH**2))[:, None, :, :, PATCH**2 // 2] + 0.5


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    x, reference = (patches(shrink(name, size)) for name in (CONTENT, STYLE))
    found = nearest_tokens(x, reference, backend=backend)
    figure = new_figure(
        r"Negative token merging: $y = x + \alpha\,(x - r)$", NOTE, height=4.6, note_at=0.83
    )
    axes = figure.subplots(2, 1 + len(STRENGTHS))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.76, bottom=0.03, wspace=0.06, hspace=0.2)
    show(axes[0, 0], pixels(x), size, f"{CONTENT}.jpg")
    matched = pixels(reference)[0, 0].index_select(0, found.index[0])
    show(axes[1, 0], matched[None, None], size, f"matched pixels of {STYLE}.jpg")
    for axis, alpha in zip(axes[0, 1:], STRENGTHS, strict=True):
        y = push_from_reference(
            x, reference, alpha=alpha, threshold=THRESHOLDS[-1], backend=backend
        )
        show(axis, pixels(y), size, rf"$\alpha$ = {alpha:g}")
    for axis, threshold in zip(axes[1, 1:], THRESHOLDS, strict=True):
        pushed = (found.similarity > threshold).float()
        title = f"cosine > {threshold:g}: {100 * pushed.mean():.0f} %"
        show(axis, pushed.view(size), size, title)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.neg_to_me",
        description="Push the patches of a photograph away from another's and draw it.",
        size=(48, 72),
    )


if __name__ == "__main__":
    sys.exit(main())
