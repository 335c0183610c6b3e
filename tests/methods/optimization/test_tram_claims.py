"""The small claim of TRAM: every ascent raises the loss, by what the first order says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfuse.methods.optimization.tram import TRAM, divergence

STEPS, BATCH = 200, 64


def rises(ascent):
    """(rise of the loss) and d |theta g| of every ascent but the first."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10))
    optimizer = TRAM(
        model.parameters(),
        lambda groups: torch.optim.SGD(groups, lr=0.2, momentum=0.9),
        ascent=ascent,
    )
    rows = []
    for step in range(STEPS):
        part = torch.randint(0, x.shape[0], (BATCH,), generator=generator)
        logits = model(x[part])
        loss = nn.functional.cross_entropy(logits, y[part])
        loss.backward()
        with torch.no_grad(), optimizer.target_weights():
            other = model(x[part])
        size = optimizer.ascend(divergence(other, logits))
        uphill = nn.functional.cross_entropy(model(x[part]), y[part])
        uphill.backward()
        optimizer.descend()
        if step > 0:
            rows.append([uphill.item() - loss.item(), (optimizer.radius * size).item()])
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


@pytest.mark.claim
def test_every_ascent_raises_the_loss_as_the_gradient_says():
    rise, expected = rises("gradient")
    assert (rise > 0).double().mean() >= 0.99
    assert 0.95 <= (rise / expected).median() <= 1.05
    released, _ = rises("released")
    assert (released > 0).double().mean() < 0.9, "the gradient matters"


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.tram", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--steps", "4"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--steps", "1"])
