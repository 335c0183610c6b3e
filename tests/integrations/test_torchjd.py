"""Weights against torchjd, another implementation, one problem after the other."""

from __future__ import annotations

import pytest
import torch

from transfuse.ops import (
    aligned_mtl_weights,
    min_norm_simplex,
    pcgrad_weights,
)

aggregation = pytest.importorskip("torchjd.aggregation")


def _gramians(count, problems=20):
    generator = torch.Generator().manual_seed(count)
    g = torch.randn(problems, count, count + 2, generator=generator, dtype=torch.float64)
    return g @ g.mT


def _value(c, w):
    return (w * (c @ w[..., None])[..., 0]).sum(-1)


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_mgda_is_what_frank_wolfe_approaches(count):
    c = _gramians(count, 5)
    peer = torch.stack([aggregation.MGDAWeighting(1e-4, 500)(own) for own in c])
    ours = min_norm_simplex(c)
    value, better = _value(c, peer), _value(c, ours)
    # Twice its duality gap is how far its value can be from the minimum.
    gap = value - (c @ peer[..., None])[..., 0].amin(-1)
    assert (better <= value + 1e-12).all()
    assert (better >= value - 2 * gap - 1e-12).all()
    assert (gap < 0.3 * value + 0.05).all()
    if count == 2:  # where its line search is exact
        torch.testing.assert_close(ours, peer)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("scale", "theirs"), [("min", "min"), ("median", "median"), ("mean", "rmse")]
)
def test_aligned_mtl(count, scale, theirs):
    c = _gramians(count)
    peer = torch.stack([aggregation.AlignedMTLWeighting(scale_mode=theirs)(own) for own in c])
    torch.testing.assert_close(aligned_mtl_weights(c, scale=scale), peer)


def test_pcgrad_of_two_tasks():
    c = _gramians(2)
    peer = torch.stack([aggregation.PCGradWeighting()(own) for own in c])
    torch.testing.assert_close(pcgrad_weights(c), peer)


def test_pcgrad_of_three_tasks_on_average():
    c = _gramians(3, 1)[0]
    torch.manual_seed(0)
    weighting = aggregation.PCGradWeighting()
    peer = torch.stack([weighting(c) for _ in range(600)])
    ours = pcgrad_weights(c.expand(4000, 3, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.mean(0), peer.mean(0), rtol=0, atol=0.05)
