"""The small claim of the Cauchy-Schwarz bottleneck: less kept of the input, as good a fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from transfuse.methods.information_theory.cs_ib import CSIBLoss
from transfuse.ops import cs_qmi

EPOCHS, BATCH = 40, 66
SEEDS = (0, 1)


def data():
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_diabetes()
    x, y = torch.tensor(found.data).float(), torch.tensor(found.target).float()[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    split = order[:330], order[330:]
    stats = [(t[split[0]].mean(0), t[split[0]].std(0)) for t in (x, y)]
    x, y = ((t - mean) / std for t, (mean, std) in zip((x, y), stats, strict=True))
    return (x[split[0]], y[split[0]]), (x[split[1]], y[split[1]])


def train(loss, seed):
    """Test error in standard deviations, and information kept, after training."""
    (x, y), (test_x, test_y) = data()
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 16))
    decoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            t = encoder(x[part])
            optimizer.zero_grad()
            loss(x[part], y[part], decoder(t), t).backward()
            optimizer.step()
    with torch.no_grad():
        t = encoder(test_x)
        error = (decoder(t) - test_y).square().mean().sqrt().item()
        kept = cs_qmi(test_x, t, normalized=True).item()
    return error, kept


@pytest.mark.claim
def test_compression_without_a_worse_regression():
    def squared(x, y, yhat, t):
        return (y - yhat).square().mean()

    losses = {"mse": squared, 0.0: CSIBLoss(0.0), 0.1: CSIBLoss(0.1), 1.0: CSIBLoss(1.0)}
    found = {k: [train(f, seed) for seed in SEEDS] for k, f in losses.items()}
    error = {k: sum(e for e, _ in runs) / len(SEEDS) for k, runs in found.items()}
    for seed in SEEDS:
        kept = [found[beta][seed][1] for beta in (0.0, 0.1, 1.0)]
        assert kept[0] - kept[1] >= 0.15, found
        assert kept[1] > kept[2], found
    assert abs(error[0.1] - error["mse"]) <= 0.03, found


def test_the_picture_is_drawn(tmp_path):
    gallery = pytest.importorskip("transfuse.bench.gallery.cs_ib", exc_type=ImportError)
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    assert gallery.main(["--out", str(path), "--epochs", "1"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        gallery.main(["--out", str(path), "--epochs", "0"])
