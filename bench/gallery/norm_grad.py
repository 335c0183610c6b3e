"""NormGrad on a trained network and a photograph, as one picture.

``python -m transfuse.bench.gallery.norm_grad --out norm_grad.png``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transfuse.methods.saliency.norm_grad import NormGrad

from ._pictures import new_figure, run
from ._saliency import LAYERS, NOTE, overlay, question, show_question

PHASES = (
    ("conv1x1", "norm"),
    ("conv3x3", "norm"),
    ("conv3x3_depthwise", "norm"),
    ("scaling", "filter_norm"),
    ("scaling", "sum"),
)
LAYER = LAYERS[3]
SMALLEST = 64


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    of = question(size)
    figure = new_figure(
        r"NormGrad:  $m_u = \Vert g_u a_u^T \Vert = \Vert g_u \Vert\, \Vert a_u \Vert$",
        NOTE,
        height=7.4,
        note_at=0.885,
    )
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.02, wspace=0.06, hspace=0.2)
    flat = list(axes.flat)
    show_question(flat[0], of)
    for axis, (phase1, phase2) in zip(flat[1:6], PHASES, strict=True):
        saliency = NormGrad(of.model, LAYER, phase1=phase1, phase2=phase2, backend=backend)
        overlay(axis, of.picture, saliency(of.x, of.score)[0], f"{phase1}, {phase2}")
    for axis, layer in zip(flat[6:10], (LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[4]), strict=True):
        saliency = NormGrad(of.model, layer, backend=backend)
        overlay(axis, of.picture, saliency(of.x, of.score)[0], f"NormGrad, {layer}")
    for axis, combine in zip(flat[10:], ("product", "mean"), strict=True):
        saliency = NormGrad(of.model, LAYERS[:5], combine=combine, backend=backend)
        overlay(axis, of.picture, saliency(of.x, of.score)[0], f"five layers, {combine}")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.norm_grad",
        description="Draw NormGrad maps on a photograph.",
        smallest=SMALLEST,
        size=(224, 320),
    )


if __name__ == "__main__":
    sys.exit(main())
