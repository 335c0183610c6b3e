"""The small claim of TrAct: digits that are not centred, trained for five epochs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfuse.methods.optimization.tract import tract

EPOCHS, BATCH = 5, 64


def train(x, y, seed, wrap):
    """Mean loss on the training set and accuracy on the rest, after SGD with momentum."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    wrap(model[0])
    count = x.shape[0] * 3 // 4
    order = torch.randperm(x.shape[0], generator=generator)
    train_x, train_y = x[order[:count]], y[order[:count]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for part in torch.randperm(count, generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[part]), train_y[part]).backward()
            optimizer.step()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(train_x), train_y).item()
        found = model(x[order[count:]]).argmax(1)
    return loss, (found == y[order[count:]]).double().mean().item()


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_the_loss_on_inputs_that_are_not_centred(seed):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    plain, plain_accuracy = train(x, y, seed, lambda layer: layer)
    moved, moved_accuracy = train(x, y, seed, tract)
    assert moved <= 0.5 * plain
    assert moved_accuracy > plain_accuracy


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.tract", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--epochs", "1", "--seeds", "1"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--epochs", "0"])
