"""References beside a text, as one picture: what lambda does, and why there are two softmaxes.

``python -m transfuse.bench.gallery.easy_ref --out easy_ref.png``

No pretrained network is involved. The tokens are pixels of two shrunken photographs; see
``style_injection`` for how queries, keys and values are made from them. The photograph's own tokens
stand in for the text branch, the most colourful tokens of another for the K references.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.methods.diffusion_control.easy_ref import decoupled_attention

from ..cases import Unavailable  # noqa: F401  (what it raises without its packages)
from ._pictures import CONTENT, LOGIT_SCALE, STYLE, Tokens, new_figure, run, show, tokens

REFERENCES = 64
WEIGHTS = (0.0, 0.25, 0.5, 1.0)
NOTE = (
    "No pretrained network: attention between the pixels of two photographs. Queries and keys are "
    "unit-norm 5 x 5 grey patches without their mean, values are RGB\nwithout their "
    f"mean; the logit scale is {LOGIT_SCALE:g}. The {REFERENCES} references are the "
    f"most colourful pixels of {STYLE}.jpg."
)


def references(photo: Tokens, count: int = REFERENCES) -> Tokens:
    """The most colourful tokens of a photograph (ties to the first)."""
    spread = photo.rgb.amax(-1) - photo.rgb.amin(-1)
    best = spread[0, 0].sort(descending=True, stable=True).indices[:count]
    return Tokens(photo.patches[:, :, best], photo.rgb[:, :, best])


def decoupled(
    content: Tokens,
    reference: Tokens,
    weight: float,
    *,
    repeat: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Two softmaxes: RGB (1, 1, N, 3) of the content under its own and the reference's tokens."""
    key, value = (x.repeat(1, 1, repeat, 1) for x in (reference.patches, reference.rgb - 0.5))
    own = (content.patches, content.rgb - 0.5)
    out = decoupled_attention(
        content.patches, [own, (key, value, weight)], scale=LOGIT_SCALE, backend=backend
    )
    return out + 0.5


def joined(
    content: Tokens, reference: Tokens, *, repeat: int = 1, backend: str | None = None
) -> Tensor:
    """One softmax over both, the usual mistake."""
    key = torch.cat([content.patches, reference.patches.repeat(1, 1, repeat, 1)], 2)
    value = torch.cat([content.rgb, reference.rgb.repeat(1, 1, repeat, 1)], 2) - 0.5
    own = decoupled_attention(content.patches, [(key, value)], scale=LOGIT_SCALE, backend=backend)
    return own + 0.5


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    content, other = tokens(CONTENT, size), tokens(STYLE, size)
    few = references(other)
    figure = new_figure(
        r"Decoupled attention:  softmax$(q k_t^{\top})\,v_t$"
        r"$\,+\,\lambda\,$softmax$(q k_r^{\top})\,v_r$",
        NOTE,
        height=7.2,
        note_at=0.885,
    )
    axes = figure.subplots(3, len(WEIGHTS))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.03, wspace=0.06, hspace=0.22)
    show(axes[0, 0], content.rgb, size, f"queries ({CONTENT}.jpg)")
    show(axes[0, 1], other.rgb, size, f"{STYLE}.jpg")
    side = int(REFERENCES**0.5)
    show(axes[0, 2], few.rgb, (side, side), f"its {REFERENCES} references")
    show(axes[0, 3], joined(content, few, backend=backend), size, "one softmax over both")
    for column, weight in enumerate(WEIGHTS):
        out = decoupled(content, few, weight, backend=backend)
        show(axes[1, column], out, size, rf"$\lambda$ = {weight:g}")
    for column, repeat in enumerate((1, 8)):
        out = decoupled(content, few, 1.0, repeat=repeat, backend=backend)
        show(axes[2, column], out, size, f"two softmaxes, references x {repeat}")
        out = joined(content, few, repeat=repeat, backend=backend)
        show(axes[2, 2 + column], out, size, f"one softmax, references x {repeat}")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.easy_ref",
        description="Draw decoupled attention on two photographs over lambda.",
        smallest=9,
    )


if __name__ == "__main__":
    sys.exit(main())
