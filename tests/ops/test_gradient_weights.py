"""Weights of multi-task methods: what defines each of them, checked on the gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from transfuse.ops import (
    aligned_mtl_weights,
    cagrad_weights,
    nash_weights,
    pcgrad_weights,
    upgrad_weights,
)

ALL = {
    "pcgrad": pcgrad_weights,
    "cagrad": lambda c: cagrad_weights(c, c=0.4),
    "nash": nash_weights,
    "aligned": aligned_mtl_weights,
    "upgrad": upgrad_weights,
}


def _gradients(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_shapes_dtypes_and_constants(name):
    g = _gradients(2, 3, 4, 6)
    c = (g @ g.mT).requires_grad_()
    whole = ALL[name](c)
    assert whole.shape == (2, 3, 4)
    assert not whole.requires_grad
    torch.testing.assert_close(ALL[name](c[1, 2]), whole[1, 2], rtol=1e-12, atol=1e-12)
    single = ALL[name](c.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, whole.float(), rtol=1e-3, atol=1e-4)
    assert ALL[name](torch.zeros(0, 3, 3)).shape == (0, 3)
    assert ALL[name](torch.zeros(2, 3, 3)).isfinite().all()
    assert ALL[name](torch.ones(1, 1)).shape == (1,)
    with pytest.raises(TypeError, match="gramian: expected a tensor"):
        ALL[name](None)
    with pytest.raises(ValueError, match="gramian: expected shape"):
        ALL[name](torch.ones(2, 3))


@pytest.mark.parametrize("name", ALL)
def test_order_of_tasks_and_scale_of_losses(name):
    g = _gradients(5, 3, 7, seed=2)
    order = torch.tensor([2, 0, 1])
    if name != "pcgrad":  # its order is part of the method
        one, two = ALL[name](g @ g.mT), ALL[name](g[:, order] @ g[:, order].mT)
        torch.testing.assert_close(two, one[:, order], rtol=1e-9, atol=1e-9)
    power = -1.0 if name == "nash" else 0.0
    torch.testing.assert_close(
        ALL[name](2.0**40 * (g @ g.mT)), 2.0 ** (20 * power) * ALL[name](g @ g.mT),
        rtol=1e-9, atol=1e-15,
    )  # fmt: skip


def _pcgrad(g, orders):
    """Algorithm 1 of the paper, on gradients."""
    total = torch.zeros_like(g[0])
    for i, order in enumerate(orders):
        own = g[i].clone()
        for j in order:
            if own @ g[j] < 0:
                own = own - (own @ g[j]) / (g[j] @ g[j]) * g[j]
        total = total + own
    return total


def test_pcgrad_projects_gradients():
    g = _gradients(3, 4, seed=5)
    g[1] -= 1.5 * g[0]
    orders = [[j for j in range(3) if j != i] for i in range(3)]
    torch.testing.assert_close(pcgrad_weights(g @ g.T) @ g, _pcgrad(g, orders))
    every = list(itertools.product(*(itertools.permutations(order) for order in orders)))
    directions = torch.stack([_pcgrad(g, own) for own in every])
    distinct = torch.unique(directions.round(decimals=9), dim=0)
    assert len(distinct) > 1
    generator = torch.Generator().manual_seed(0)
    drawn = pcgrad_weights((g @ g.T).expand(400, 3, 3), generator=generator) @ g
    seen = (drawn[:, None] - distinct).norm(dim=2).min(1)
    assert seen.values.max() < 1e-8
    assert set(seen.indices.tolist()) == set(range(len(distinct)))
    again = pcgrad_weights((g @ g.T).expand(400, 3, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again @ g, drawn)


def test_pcgrad_without_conflict_adds():
    assert torch.equal(pcgrad_weights(torch.eye(4)), torch.ones(4))
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator"):
        pcgrad_weights(torch.eye(2), generator=3)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.9, 2.0])
def test_cagrad_improves_the_worst_loss_most(c):
    generator = torch.Generator().manual_seed(1)
    for trial in range(8):
        count = 2 + trial % 3
        g = _gradients(count, 3, seed=trial)
        d = cagrad_weights(g @ g.T, c=c) @ g
        mean = g.mean(0)
        radius = c * mean.norm()
        if float(d.norm()) == 0.0:  # stationary: no direction helps all
            steps = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
            assert (steps @ g.T).amin(1).max() <= 1e-9
            continue
        assert (d - mean).norm() <= radius + 1e-9
        steps = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
        steps = steps / steps.norm(dim=1, keepdim=True)
        size = torch.rand(20000, 1, generator=generator, dtype=torch.float64).sqrt()
        ball = mean + radius * torch.cat((steps, size * steps))
        assert (ball @ g.T).amin(1).max() <= (g @ d).min() + 1e-9


def test_cagrad_refuses_a_negative_radius():
    with pytest.raises(ValueError, match="c: expected a number of at least 0, got -1"):
        cagrad_weights(torch.eye(2), c=-1.0)


def test_nash_is_a_fixed_point():
    for count, seed in ((1, 0), (2, 1), (3, 2), (8, 3), (40, 4)):
        g = _gradients(20, count, count + 5, seed=seed)
        # Gradients of very different size.
        g = g * torch.logspace(-3, 3, count, dtype=torch.float64)[:, None]
        c = g @ g.mT
        w = nash_weights(c)
        assert (w > 0).all()
        product = w * (c @ w[..., None])[..., 0]
        torch.testing.assert_close(product, torch.ones_like(product), rtol=1e-9, atol=0)
    with_zero = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(nash_weights(with_zero), torch.tensor([0.5, 0.0]))
    assert nash_weights(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).isfinite().all()


@pytest.mark.parametrize(("scale", "of"), [("min", 0), ("median", 1), ("mean", None)])
def test_aligned_gradients_are_orthogonal_and_of_one_length(scale, of):
    g = _gradients(4, 9, seed=3)
    c = g @ g.T
    values, vectors = torch.linalg.eigh(c)
    size = values.mean() if of is None else values[of]
    balance = size.sqrt() * vectors @ torch.diag(values.rsqrt()) @ vectors.T
    w = aligned_mtl_weights(c, scale=scale)
    torch.testing.assert_close(w, balance.mean(1))
    aligned = balance @ g
    torch.testing.assert_close(aligned @ aligned.T, size * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(w @ g, aligned.mean(0))
    # Two tasks with one gradient are one direction.
    double = g[[0, 0, 1]]
    w = aligned_mtl_weights(double @ double.T, scale=scale)
    assert torch.isclose(w[0], w[1])
    assert torch.equal(aligned_mtl_weights(torch.zeros(3, 3)), torch.full((3,), 1 / 3))
    with pytest.raises(ValueError, match="scale: expected one of"):
        aligned_mtl_weights(c, scale="max")


def test_upgrad_increases_no_loss():
    g = _gradients(30, 4, 5, seed=4)
    c = g @ g.mT
    preference = torch.tensor([0.1, 0.4, 0.0, 0.5], dtype=torch.float64)
    for w in (upgrad_weights(c), upgrad_weights(c, preference=preference)):
        assert ((c @ w[..., None])[..., 0] >= -1e-9).all()
    # No conflict: the weighted mean itself.
    torch.testing.assert_close(upgrad_weights(torch.eye(4), preference=preference.float()),
                               preference.float())  # fmt: skip
    for bad in (torch.ones(3), torch.tensor([1.0, -1.0, 0.0, 0.0])):
        with pytest.raises(ValueError, match="preference: expected"):
            upgrad_weights(c[0].float(), preference=bad)


def test_upgrad_projects_each_gradient():
    """Onto the cone of directions d with G d >= 0: the nearest point there, by definition."""
    generator = torch.Generator().manual_seed(0)
    g = _gradients(2, 2, seed=7)
    g[1] = g[1] - 2.0 * g[0]
    grid = torch.randn(200000, 2, generator=generator, dtype=torch.float64) * 3
    cone = grid[(grid @ g.T).amin(1) >= 0]
    total = torch.zeros(2, dtype=torch.float64)
    for own in g:
        total += cone[(cone - own).norm(dim=1).argmin()]
    d = upgrad_weights(g @ g.T) @ g
    torch.testing.assert_close(d, total / 2, rtol=0, atol=0.05)
