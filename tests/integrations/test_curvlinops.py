"""Curvature operators and estimators against those of curvlinops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transfuse.ops import (
    GGNOperator,
    HessianOperator,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    xtrace,
)

curvlinops = pytest.importorskip("curvlinops")


def convolutional() -> nn.Module:
    # No layer_norm with a weight: curvlinops takes a jvp of jacrev, whose batching rule for the
    # backward of layer_norm is wrong in torch 2.13 (pytorch/functorch#534).
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def problem(loss: nn.Module):
    generator = torch.Generator().manual_seed(0)
    model = convolutional().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        model[1].running_var.uniform_(0.5, 2.0, generator=generator)
    x = torch.randn(8, 2, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.arange(8) % 3
    if not isinstance(loss, nn.CrossEntropyLoss):
        y = torch.rand(8, 3, generator=generator, dtype=torch.float64)
    return model, list(zip(x.split(3), y.split(3), strict=True))


LOSSES = [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_hessian_and_gauss_newton(loss):
    model, batches = problem(loss)
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    vectors = torch.randn(size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for ours, theirs in (
        (HessianOperator, curvlinops.HessianLinearOperator),
        (GGNOperator, curvlinops.GGNLinearOperator),
    ):
        operator = ours.from_module(model, loss, batches)
        expected = theirs(model, loss, params, batches) @ vectors
        torch.testing.assert_close(operator @ vectors, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            operator.quadratic_forms(vectors), (vectors * expected).sum(0), rtol=1e-9, atol=1e-10
        )


def test_estimators_agree_within_their_errors():
    model, batches = problem(LOSSES[0])
    operator = HessianOperator.from_module(model, LOSSES[0], batches)
    theirs = curvlinops.HessianLinearOperator(model, LOSSES[0], list(model.parameters()), batches)
    exact = (theirs @ torch.eye(theirs.shape[0], dtype=torch.float64)).trace()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for ours, other, products in (
            (hutchinson_trace, curvlinops.hutchinson_trace, 60),
            (hutchpp_trace, curvlinops.hutchpp_trace, 60),
            (xtrace, curvlinops.xtrace, 60),
        ):
            estimate = ours(operator, products)
            assert abs(estimate.mean - exact) < 4 * estimate.stderr
            gap = abs(estimate.mean - float(other(theirs, products)))
            assert gap < 4 * math.sqrt(2) * estimate.stderr
        ours = hutchinson_diagonal(operator, 100)
        gaps = (ours.mean - curvlinops.hutchinson_diag(theirs, 100)) / ours.stderr.clamp(min=1e-12)
        assert gaps.square().mean().sqrt() < 1.6 * math.sqrt(2)
