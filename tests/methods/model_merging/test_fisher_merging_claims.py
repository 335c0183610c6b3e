"""The small claim of Fisher merging: two halves of the digits, merged better than by averages."""

from __future__ import annotations

import pytest
import torch
from digits import accuracy, copies, digits, network, trained

from transfuse.methods.model_merging.fisher_merging import diagonal_fisher, fisher_merge

SEEDS = range(5)
HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))


def accuracies(seed):
    """Test accuracy of the base, each copy, their average and their Fisher merge."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    start, tune, test = order[:200], order[200:1100], order[1100:]
    base = trained(network(64, 48, 10, seed=seed), x[start], y[start], steps=40, lr=3e-3)
    tuned = copies(base, x[tune], y[tune], HALVES, steps=100, lr=1e-3)
    fishers = []
    for model, classes in zip(tuned, HALVES, strict=True):
        own = tune[torch.isin(y[tune], torch.tensor(classes))][:80]
        fishers.append(diagonal_fisher(model, [x[own]]))
    states = [model.state_dict() for model in tuned]
    merged = network(64, 48, 10, seed=seed)
    found = [accuracy(m, x[test], y[test]) for m in (base, *tuned)]
    for importance in (None, fishers):
        merged.load_state_dict(fisher_merge(states, importance))
        found.append(accuracy(merged, x[test], y[test]))
    return found


@pytest.mark.claim
def test_certainty_weighs_better_than_averages():
    rows = torch.tensor([accuracies(seed) for seed in SEEDS])
    base, first, second, plain, weighted = rows.unbind(1)
    assert float(torch.maximum(first, second).max()) < 0.7, "a copy knows both halves"
    assert float(plain.mean()) > float(base.mean())
    gains = weighted - plain
    assert float(gains.mean()) >= 0.005, rows
    assert float(gains.min()) >= -0.005, rows
