"""Hessian alignment: the official code's numbers, closed forms, options and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfuse.methods.domain_generalization.hessian_alignment import DEFAULTS, HessianAlignment
from transfuse.testing import golden

GOLDEN = golden.load("hessian_alignment")
PARAMS = GOLDEN.params()


def linear(weight, bias):
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head


def official(dtype=torch.float64):
    """Head, features and labels of the recording."""
    domains = [GOLDEN.inputs(f"dom{e}", dtype) for e in range(PARAMS["domains"])]
    given = GOLDEN.inputs("head", dtype)
    features = [d["features"].requires_grad_() for d in domains]
    return linear(given["weight"], given["bias"]), features, [d["labels"] for d in domains]


def recorded_probes(case):
    given = GOLDEN.inputs(case)
    shape = tuple(given["probe_shape"].tolist())
    bits = np.unpackbits(given["probe_bits"].numpy())[: int(np.prod(shape))]
    return torch.from_numpy(2.0 * bits.reshape(shape) - 1.0)


def as_head(flat, classes):
    """Numbers in the recording's order (weight by rows, then bias) as (..., C, d + 1)."""
    size = flat.shape[-1] - classes
    weight, bias = flat[..., :size], flat[..., size:]
    return torch.cat((weight.unflatten(-1, (classes, -1)), bias[..., None]), -1)


def flat(rows):
    return torch.cat((rows[..., :-1].flatten(-2), rows[..., -1]), -1)


def criterion(method, **options):
    return HessianAlignment(method=method, alpha=PARAMS["alpha"], beta=PARAMS["beta"], **options)


def check_gradients(case, features, head):
    for e, x in enumerate(features):
        GOLDEN.check(x.grad, f"dfeatures{e}", case)
    GOLDEN.check(head.weight.grad, "dweight", case)
    if f"out_{case}__dbias" in GOLDEN.arrays:
        GOLDEN.check(head.bias.grad, "dbias", case)


@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "repeated differentiation"])
class TestOfficial:
    def head(self, head, closed):
        return head if closed else nn.Sequential(head)

    def test_hgp(self, closed):
        head, features, labels = official()
        terms = criterion("hgp").terms(self.head(head, closed), features, labels)
        terms.loss.backward()
        order = flat if closed else (lambda rows: rows)
        GOLDEN.check(order(terms.gradients), "grad", "hgp")
        GOLDEN.check(order(terms.signatures), "hg", "hgp")
        GOLDEN.check(terms.gradients.flatten(1).norm(dim=1), "gradnorm", "hgp")
        for name in ("nll", "penalty", "loss"):
            GOLDEN.check(getattr(terms, name), name, "hgp")
        check_gradients("hgp", features, head)

    def test_hgp_in_float32(self, closed):
        head, features, labels = official(torch.float32)
        terms = criterion("hgp").terms(self.head(head, closed), features, labels)
        terms.loss.backward()
        limits, expected = GOLDEN.meta["float32"], GOLDEN.outputs("hgp32")
        found = {"penalty": terms.penalty, "loss": terms.loss, "dweight": head.weight.grad}
        found |= {f"dfeatures{e}": x.grad for e, x in enumerate(features)}
        for name, value in found.items():
            torch.testing.assert_close(value.detach(), expected[name], **limits)

    def test_hutchinson(self, closed):
        head, features, labels = official()
        probes = recorded_probes("hutch")
        probes = as_head(probes, PARAMS["C"]) if closed else probes
        terms = criterion("hutchinson").terms(
            self.head(head, closed), features, labels, probes=probes
        )
        terms.loss.backward()
        GOLDEN.check(flat(terms.signatures) if closed else terms.signatures, "diag", "hutch")
        for name in ("nll", "penalty", "loss"):
            GOLDEN.check(getattr(terms, name), name, "hutch")
        check_gradients("hutch", features, head)

    def test_binary_script(self, closed):
        given = GOLDEN.inputs("binary")
        head = linear(given["weight"], given["bias"])
        features = [given[f"features{e}"].requires_grad_() for e in range(2)]
        probes = recorded_probes("binary")
        script = HessianAlignment(
            method="hutchinson", alpha=1.0, beta=1.0, reduction="sum", detach_mean=False
        )
        terms = script.terms(
            self.head(head, closed),
            features,
            [given[f"labels{e}"] for e in range(2)],
            probes=as_head(probes, 1) if closed else probes,
        )
        terms.penalty.backward()
        GOLDEN.check(flat(terms.signatures) if closed else terms.signatures, "diag", "binary")
        GOLDEN.check(terms.penalty, "penalty", "binary")
        check_gradients("binary", features, head)


def test_exact_diagonal():
    head, features, labels = official()
    terms = criterion("exact").terms(head, features, labels)
    GOLDEN.check(flat(terms.signatures), "diag", "exact")


def dense_hessians(head, features, labels):
    found = []
    for x, y in zip(features, labels, strict=True):

        def loss(rows, x=x, y=y):
            return F.cross_entropy(x @ rows[:, :-1].T + rows[:, -1], y)

        rows = torch.cat((head.weight, head.bias[:, None]), 1).detach()
        size = rows.numel()
        found.append(torch.func.hessian(loss)(rows).reshape(size, size).detach())
    return torch.stack(found)


def test_full_and_spectral_are_norms_of_hessians():
    head, features, labels = official()
    hessians = dense_hessians(head, [x.detach() for x in features], labels)
    gaps = hessians - hessians.mean(0)
    full = criterion("full").terms(head, features, labels)
    torch.testing.assert_close(full.curvature_gap, gaps.square().sum((1, 2)))
    spectral = criterion("spectral", iterations=400).terms(head, features, labels)
    norms = torch.linalg.eigvalsh(gaps).abs().amax(1)
    torch.testing.assert_close(spectral.curvature_gap, norms.square(), rtol=1e-6, atol=0)
    assert bool((spectral.curvature_gap <= full.curvature_gap).all())


@pytest.mark.parametrize("detach_mean", [True, False])
@pytest.mark.parametrize("method", ["full", "spectral"])
def test_gradients_of_norms(method, detach_mean):
    """By finite differences of dense Hessians, the mean held fixed or not."""
    head, features, labels = official()
    terms = criterion(method, iterations=600, detach_mean=detach_mean).terms(head, features, labels)
    curvature = terms.penalty - PARAMS["beta"] * _gradient_part(head, features, labels, detach_mean)
    (found,) = torch.autograd.grad(curvature, features[1])
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(features[1].shape, generator=generator, dtype=torch.float64)
    fixed = dense_hessians(head, [x.detach() for x in features], labels).mean(0)

    def value(step):
        moved = [x.detach() for x in features]
        moved[1] = moved[1] + step * direction
        hessians = dense_hessians(head, moved, labels)
        gaps = hessians - (fixed if detach_mean else hessians.mean(0))
        if method == "full":
            return gaps.square().sum((1, 2)).mean()
        return torch.linalg.eigvalsh(gaps).abs().amax(1).square().mean()

    step = 1e-5
    truth = PARAMS["alpha"] * (value(step) - value(-step)) / (2 * step)
    torch.testing.assert_close((found * direction).sum(), truth, rtol=1e-4, atol=1e-10)


def _gradient_part(head, features, labels, detach_mean):
    plain = HessianAlignment(method="exact", alpha=0.0, beta=1.0, detach_mean=detach_mean)
    return plain.terms(head, features, labels).penalty


@pytest.mark.parametrize("method", ["exact", "full", "hutchinson"])
def test_mean_of_signatures_held_fixed_or_not_is_the_same(method):
    grads = []
    for detach_mean in (True, False):
        head, features, labels = official()
        criterion(method, detach_mean=detach_mean)(head, features, labels).backward()
        grads.append(head.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_hutchinson_tends_to_exact():
    head, features, labels = official()
    exact = criterion("exact").terms(head, features, labels).signatures
    estimate = criterion("hutchinson", probes=4000, seed=3).terms(head, features, labels)
    assert (estimate.signatures - exact).norm() < 0.06 * exact.norm()


def test_shared_probes_cancel_where_domains_agree():
    head, features, labels = official()
    shared = criterion("hutchinson", probes=20)
    apart = criterion("hutchinson", probes=20, independent=True)
    same = ([features[0]] * 3, [labels[0]] * 3)
    assert shared.terms(head, *same).curvature_gap.max() < 1e-25
    assert apart.terms(head, *same).curvature_gap.min() > 1e-5


@pytest.mark.parametrize("method", DEFAULTS)
def test_one_domain_has_no_penalty(method):
    head, features, labels = official(torch.float32)
    terms = criterion(method).terms(head, features[:1], labels[:1])
    assert terms.penalty == 0
    assert terms.loss == terms.nll
    terms.penalty.backward()
    assert head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("method", DEFAULTS)
def test_domains_in_any_order(method):
    """Lists, segments and shuffled domain numbers are the same call."""
    head, features, labels = official()
    x, y = torch.cat(features).detach(), torch.cat(labels)
    expected = criterion(method)(head, features, labels)
    segments = [0, 9, 15, 22]
    torch.testing.assert_close(criterion(method)(head, x, y, segments=segments), expected)
    number = torch.tensor([7] * 9 + [9] * 6 + [30] * 7)
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    found = criterion(method)(head, x[order], y[order], domains=number[order])
    torch.testing.assert_close(found, expected)


def test_a_gradient_of_zero_is_no_exception():
    """|g| grad |g| would be 0 / 0."""
    head = linear(torch.zeros(1, 2), None)
    x = torch.ones(4, 2, requires_grad=True)
    for module in (head, nn.Sequential(head)):
        terms = HessianAlignment(method="hgp").terms(
            module, x, torch.full((4, 1), 0.5), segments=[0, 2, 4]
        )
        assert terms.penalty == 0
        terms.loss.backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("method", ["hgp", "hutchinson"])
def test_any_head(method):
    """A head of two layers: gradients reach its parameters and the features, and agree less with
    more weight on the penalty's terms."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x, y = torch.randn(12, 5, dtype=torch.float64, requires_grad=True), torch.arange(12) % 3
    loss = HessianAlignment(method=method, alpha=1.0, beta=1.0, probes=4)
    terms = loss.terms(head, x, y, segments=[0, 5, 12])
    parameters = list(head.parameters())
    found = torch.autograd.grad(terms.loss, [x, *parameters])
    assert all(g.abs().max() > 0 for g in found)
    step = 1e-6
    with torch.no_grad():
        for p, g in zip(parameters, found[1:], strict=True):
            p -= step * g
    again = HessianAlignment(method=method, alpha=1.0, beta=1.0, probes=4)
    after = again.terms(head, x, y, segments=[0, 5, 12])
    # Only the terms without a fixed mean descend exactly; the nll and most of the penalty do.
    assert after.loss < terms.loss


def test_probes_are_new_at_every_call_and_resume():
    head, features, labels = official()
    first = criterion("hutchinson", probes=5, seed=2)
    a, b = first(head, features, labels), first(head, features, labels)
    assert a != b
    second = criterion("hutchinson", probes=5, seed=2)
    assert second(head, features, labels) == a
    resumed = criterion("hutchinson", probes=5, seed=2)
    resumed.load_state_dict(second.state_dict())
    assert resumed(head, features, labels) == b


def test_autocast_and_half_features_stay_in_float32():
    head, features, labels = official(torch.float32)
    x, y = torch.cat(features).detach(), torch.cat(labels)
    plain = criterion("hgp")(head, x.bfloat16(), y, segments=[0, 9, 22])
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion("hgp")(head, x.bfloat16(), y, segments=[0, 9, 22]) == plain


def test_nan_features_show():
    head, features, labels = official()
    with torch.no_grad():
        features[1][2, 3] = torch.nan
    for method in DEFAULTS:
        assert criterion(method)(head, features, labels).isnan(), method


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "fisher"}, ValueError, "method: expected one of hgp, hutchinson"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of mean, sum"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a number of at least 0"),
        ({"beta": "1"}, TypeError, "beta: expected a Python number"),
        ({"beta": float("nan")}, ValueError, "beta: expected a finite number"),
        ({"detach_mean": 1}, TypeError, "detach_mean: expected a bool"),
        ({"probes": 0}, ValueError, "probes: expected an integer of at least 1"),
        ({"iterations": 2.0}, TypeError, "iterations: expected an integer"),
        ({"seed": None}, TypeError, "seed: expected an integer"),
    ],
)
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        HessianAlignment(**options)


X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((X, Y), {}, ValueError, "expected one of them .* got neither"),
        ((X, Y), {"segments": [0, 4], "domains": Y}, ValueError, "got both"),
        ((X, Y), {"segments": [0, 2, 2, 4]}, ValueError, "got none in domain 1"),
        ((X[:0], Y[:0]), {"segments": [0]}, ValueError, "features: expected at least one sample"),
        ((X, Y + 1), {"segments": [0, 2, 4]}, ValueError, r"labels: .* \[0, 2\), got 2"),
        ((X[:, :2], Y), {"segments": [0, 4]}, ValueError, "weight: expected 2 in dimension 1"),
        ((X, Y), {"domains": Y.float()}, TypeError, "domains: expected int64"),
        ((X, Y), {"domains": Y[:3]}, ValueError, r"domains: expected shape \(4,\)"),
        ((X, Y[:3]), {"domains": Y}, ValueError, "labels: expected 4 rows"),
        ((X, [Y]), {"segments": [0, 4]}, TypeError, "labels: expected a tensor"),
        (([X], [Y, Y]), {}, ValueError, "expected lists of one length"),
        (([X, X[:0]], [Y, Y[:0]]), {}, ValueError, "domain 1: expected at least one sample"),
        (([X, None], [Y, Y]), {}, TypeError, r"features\[1\]: expected a tensor, got None"),
        (([X], [Y]), {"segments": [0, 4]}, ValueError, "expected None with lists"),
        ((None, Y), {}, TypeError, "expected two tensors or two lists"),
    ],
)
def test_refused_batches(arguments, options, error, match):
    with pytest.raises(error, match=match):
        HessianAlignment(method="exact")(nn.Linear(3, 2), *arguments, **options)


@pytest.mark.parametrize("method", ["exact", "full", "spectral"])
def test_closed_forms_need_a_linear_head(method):
    head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"expects torch.nn.Linear.* got Sequential.* hgp, hutch"):
        HessianAlignment(method=method)(head, X, Y, segments=[0, 2, 4])


def test_other_refusals_of_any_head():
    options = {"segments": [0, 2, 4]}
    loss = HessianAlignment(method="hgp")
    with pytest.raises(ValueError, match="head: expected parameters that require gradients"):
        loss(nn.ReLU(), X, Y, **options)
    with pytest.raises(ValueError, match="head: expected logits"):
        loss(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), X, Y, **options)
    with pytest.raises(ValueError, match=r"labels: .* \[0, 2\), got 2"):
        loss(nn.Sequential(nn.Linear(3, 2)), X, Y + 1, **options)
    with pytest.raises(ValueError, match="probes: expected None for method 'hgp'"):
        loss.terms(nn.Linear(3, 2), X, Y, probes=torch.ones(1, 2, 4), **options)
    with pytest.raises(ValueError, match="probes: expected 8 numbers"):
        HessianAlignment(method="hutchinson").terms(
            nn.Sequential(nn.Linear(3, 2)), X, Y, probes=torch.ones(3, 7), **options
        )
