"""The small claim of the information plane: a tanh network fits, and then compresses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from transfuse.methods.information_theory.information_plane import InformationPlane

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
STEPS, BATCH = 3000, 256


def patterns():
    """All patterns of 12 signs; the label is a quadratic form above its median."""
    x = 2.0 * ((torch.arange(4096)[:, None] >> torch.arange(12)) & 1) - 1
    form = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    value = ((x @ form) * x).sum(1)
    return x, (value > value.median()).long()


@pytest.mark.claim
@pytest.mark.filterwarnings("ignore:layer")
def test_fitting_and_compression():
    x, y = patterns()
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(n, m), nn.Tanh()]
    net, head = nn.Sequential(*layers), nn.Linear(2, 2)
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    with InformationPlane(net, ["1", "11"], x, y) as plane:
        plane.record(0)
        for step in range(1, STEPS + 1):
            part = torch.randint(0, 4096, (BATCH,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(net(x[part])), y[part]).backward()
            optimizer.step()
            if step % 100 == 0:
                plane.record(step)
    found = plane.result().information
    assert (found[:, 0, 0] - 12).abs().max() < 1e-9
    last = found[:, 1, 0]
    assert last.max() - last[0] >= 2, last
    assert last.max() - last[-1] >= 0.3, last
    assert found[-1, 1, 1] >= 0.8, found[:, 1, 1]


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.information_plane", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--steps", "20", "--records", "3"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--records", "1"])
