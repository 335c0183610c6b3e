"""Cauchy-Schwarz information bottleneck: official numbers, closed forms, options and refusals."""

from __future__ import annotations

import pytest
import torch

from transfuse.methods.information_theory.cs_ib import (
    CSIBLoss,
    gaussian_information,
    kde_kl,
    official_sigma,
)
from transfuse.ops import conditional_cs, cs_divergence, cs_qmi, kernel_sums, mmd2
from transfuse.testing import golden

GOLDEN = golden.load("cs_ib")


def recorded():
    given = GOLDEN.inputs("cs")
    return given["x"], given["y"], given["yhat"].requires_grad_(), given["t"].requires_grad_()


class TestOfficial:
    @pytest.mark.parametrize(
        ("row_weight", "array"),
        [("official", "conditional_div"), ("paper", "conditional_div_paper")],
    )
    def test_divergence(self, row_weight, array):
        x, y, yhat, _ = recorded()
        value = conditional_cs(x, y, yhat, 1.0, row_weight=row_weight)
        GOLDEN.check(value, array, "cs")
        if row_weight == "official":
            GOLDEN.check(torch.autograd.grad(value, yhat)[0], "conditional_div_dyhat", "cs")

    def test_information(self):
        x, _, _, t = recorded()
        GOLDEN.check(cs_qmi(x, t), "qmi", "cs")
        value = cs_qmi(x, t, normalized=True)
        GOLDEN.check(value, "qmi_normalized", "cs")
        GOLDEN.check(torch.autograd.grad(value, t)[0], "qmi_normalized_dt", "cs")

    def test_kernels(self):
        x, y, yhat, _ = recorded()
        found = GOLDEN.outputs("cs")
        torch.testing.assert_close(kernel_sums(x), found["gram_x"].sum(1))
        torch.testing.assert_close(kernel_sums(y, yhat), found["gram_y_yhat"].sum(1))

    def test_bandwidth(self):
        x, _, _, t = recorded()
        GOLDEN.check(official_sigma(x) / 10, "sigma_estimate_x", "cs")
        loss = CSIBLoss(1.0, sigma="official-median", normalized=False)
        y = x[:, :1]
        GOLDEN.check(loss.terms(x, y, y, t).compression, "qmi_auto_sigma", "cs")

    def test_kernel_density_divergence(self):
        _, y, yhat, _ = recorded()
        GOLDEN.check(kde_kl(y, yhat), "kde_kl", "cs")

    def test_two_samples(self):
        given = GOLDEN.inputs("two")
        a, b = given["a"], given["b"].requires_grad_()
        value = cs_divergence(a, b)
        GOLDEN.check(value, "cs_div_nats", "two")
        GOLDEN.check(torch.autograd.grad(value, b)[0], "cs_div_db", "two")
        GOLDEN.check(mmd2(a, b), "mmd2", "two")

    def test_loss_is_the_sum_of_its_terms(self):
        x, y, yhat, t = recorded()
        loss = CSIBLoss(0.3, row_weight="official")
        expected = GOLDEN.outputs("cs")
        total = expected["conditional_div"] + 0.3 * expected["qmi_normalized"]
        torch.testing.assert_close(loss(x, y, yhat, t), total, rtol=1e-6, atol=1e-8)
        by_yhat, by_t = torch.autograd.grad(loss(x, y, yhat, t), (yhat, t))
        GOLDEN.check(by_yhat, "conditional_div_dyhat", "cs")
        GOLDEN.check(by_t / 0.3, "qmi_normalized_dt", "cs")


def test_without_beta_the_compression_is_reported_and_not_trained():
    x, y, _, t = recorded()
    terms = CSIBLoss(0.0).terms(x, y, y, t)
    assert terms.prediction.abs() < 1e-12
    assert terms.compression > 0
    assert not terms.compression.requires_grad


def test_two_points_by_hand():
    """x far apart: K = I, and D = log2 of the means of L1_jj = L2_jj = 1 over those of L21_jj."""
    x = torch.tensor([[0.0], [1e3]], dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    yhat = y + torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    across = torch.exp(torch.tensor([-0.5, -2.0], dtype=torch.float64))
    want = 2 - 2 * across.sum().log2()
    torch.testing.assert_close(conditional_cs(x, y, yhat), want)


def test_one_number_per_sample_is_not_one_point():
    """The released kernel takes (N,) for a point: D is then the squared error over sigma^2 ln 2."""
    x, y, yhat, t = recorded()
    wrong = (y - yhat).square().sum() / torch.log(torch.tensor(2.0))
    assert not torch.isclose(conditional_cs(x, y, yhat), wrong)
    for bad in ((y[:, 0], yhat), (y, yhat[:, 0])):
        with pytest.raises(ValueError, match=r"\[:, None\] is one number per sample"):
            CSIBLoss()(x, *bad, t)


def test_inputs_and_representations_are_flattened():
    x, y, yhat, t = recorded()
    loss = CSIBLoss(0.5)
    square = loss(x.unflatten(1, (2, 4)), y, yhat, t.unflatten(1, (4, 2, 2)))
    assert torch.equal(square, loss(x, y, yhat, t))


def test_bandwidths_of_their_own():
    x, y, yhat, t = recorded()
    terms = CSIBLoss(1.0, sigma=2.0, y_sigma=0.5, t_sigma=3.0).terms(x, y, yhat, t)
    torch.testing.assert_close(terms.prediction, conditional_cs(x, y, yhat, 2.0, 0.5))
    torch.testing.assert_close(terms.compression, cs_qmi(x, t, 2.0, 3.0, normalized=True))
    assert CSIBLoss(sigma="median")(x, y, yhat, t).isfinite()


def test_gaussian_information():
    _, y, yhat, _ = recorded()
    want = 0.5 * torch.log2(y.var(correction=0) / (y - yhat).square().mean())
    torch.testing.assert_close(gaussian_information(y, yhat), want)


def test_far_predictions_still_learn():
    x, y, _, t = recorded()
    yhat = (y.float() + 80.0).requires_grad_()
    value = CSIBLoss()(x.float(), y.float(), yhat, t.float())
    (grad,) = torch.autograd.grad(value, yhat)
    # The nearest pair leads.
    assert grad.isfinite().all()
    assert grad.sum() > 1
    far = kde_kl(y.float(), yhat.detach())
    assert far.isfinite()
    assert far > 1000


def test_described():
    assert repr(CSIBLoss(0.1)) == (
        "CSIBLoss(beta=0.1, sigma=1.0, y_sigma=1.0, t_sigma=1.0, row_weight='paper', "
        "normalized=True)"
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beta": -1.0}, ValueError, "beta: expected a number of at least 0"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a number greater than 0"),
        ({"t_sigma": "mean"}, ValueError, "t_sigma: expected one of 'median', 'official-median'"),
        ({"sigma": None}, TypeError, "sigma: expected a Python number"),
        ({"row_weight": "other"}, ValueError, "row_weight: expected one of"),
        ({"normalized": "yes"}, TypeError, "normalized: expected True or False"),
    ],
)
def test_options_refused(options, error, match):
    with pytest.raises(error, match=match):
        CSIBLoss(**options)


def test_batches_refused():
    x, y, yhat, t = recorded()
    with pytest.raises(ValueError, match="x: expected at least 2 samples, got 1"):
        CSIBLoss()(x[:1], y[:1], yhat[:1], t[:1])
    with pytest.raises(ValueError, match="t: expected 37 in dimension 0"):
        CSIBLoss()(x, y, yhat, t[:9])
    with pytest.raises(ValueError, match="expected finite samples"):
        CSIBLoss()(x, y, yhat * float("nan"), t)
    with pytest.raises(ValueError, match=r'sigma="median": .* give a number'):
        CSIBLoss(t_sigma="median")(x, y, yhat, torch.ones_like(t))
    with pytest.warns(UserWarning, match="t carries no information"):
        assert CSIBLoss().terms(x, y, yhat, torch.ones_like(t)).compression == 0
