"""The small claim of aTLAS: a coefficient per tensor composes more than the best one for all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from digits import accuracy, copies, digits, network, trained

from transfuse.methods.model_merging.atlas import Atlas, TaskVector, fit

SEEDS = range(3)
GROUPS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))


def accuracies(seed):
    """Test accuracy: base, best common coefficient, and learned per tensor."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    start, tune, held, test = order.split((150, 600, 250, len(x) - 1000))
    base = trained(network(64, 48, 48, 10, seed=seed), x[start], y[start], steps=20, lr=3e-3)
    tuned = copies(base, x[tune], y[tune], GROUPS, steps=100, lr=3e-3)
    vectors = [TaskVector(base.state_dict(), model.state_dict()) for model in tuned]
    found = [accuracy(base, x[test], y[test])]
    same = Atlas(base, vectors, granularity="task")
    scores = []
    for alpha in torch.linspace(0, 1, 21):
        with torch.no_grad():
            same.coef.fill_(alpha)
        scores.append((accuracy(same, x[held], y[held]), accuracy(same, x[test], y[test])))
    found.append(max(scores)[1])
    composed = Atlas(base, vectors)
    fit(composed, lambda step: F.cross_entropy(composed(x[held]), y[held]), steps=200, lr=0.03)
    return [*found, accuracy(composed, x[test], y[test])]


@pytest.mark.claim
def test_a_coefficient_per_tensor_composes_more():
    rows = torch.tensor([accuracies(seed) for seed in SEEDS])
    base, searched, block = rows.mean(0).tolist()
    assert base < searched, rows
    assert block - searched >= 0.03, rows
