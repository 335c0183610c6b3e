"""Grad-CAM and its relatives on a trained network and a photograph, as one picture.

``python -m transfuse.bench.gallery.grad_cam --out grad_cam.png``
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from transfuse.methods.saliency.grad_cam import GradCAM

from ._pictures import new_figure, run
from ._saliency import LAYERS, NOTE, overlay, question, show_question

METHODS = ("gradcam", "gradcam++", "xgradcam", "layercam", "hirescam", "elementwise")
SMALLEST = 64


def draw(size: tuple[int, int], *, backend: str | None = None):
    """The picture as a matplotlib figure."""
    of = question(size)
    figure = new_figure(
        r"Grad-CAM:  $m = \mathrm{ReLU}\left(\sum_c \overline{g_c}\, a_c\right)$,  $g = dy/da$",
        NOTE,
        height=7.4,
        note_at=0.885,
    )
    axes = figure.subplots(3, 4)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.84, bottom=0.02, wspace=0.06, hspace=0.2)
    flat = list(axes.flat)
    show_question(flat[0], of)
    with warnings.catch_warnings():
        # A map that is zero is shown as such.
        warnings.filterwarnings("ignore", message=".*saliency maps are constant")
        for axis, method in zip(flat[1:7], METHODS, strict=True):
            cam = GradCAM(of.model, LAYERS[-1], method=method, backend=backend)
            overlay(axis, of.picture, cam(of.x, of.score)[0], f"{method}, last layer")
        against = GradCAM(of.model, LAYERS[-1], counterfactual=True, backend=backend)
        overlay(flat[7], of.picture, against(of.x, of.score)[0], "counterfactual (-g)")
        for axis, layer in zip(flat[8:11], LAYERS[1:4], strict=True):
            cam = GradCAM(of.model, layer, backend=backend)
            overlay(axis, of.picture, cam(of.x, of.score)[0], f"gradcam, {layer}")
        smooth = GradCAM(of.model, LAYERS[-1], eigen_smooth=True, augment=True, backend=backend)
        overlay(flat[11], of.picture, smooth(of.x, of.score)[0], "eigen-smoothed, augmented")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    return run(
        draw,
        argv,
        prog="python -m transfuse.bench.gallery.grad_cam",
        description="Draw maps of Grad-CAM and its relatives on a photograph.",
        smallest=SMALLEST,
        size=(224, 320),
    )


if __name__ == "__main__":
    sys.exit(main())
