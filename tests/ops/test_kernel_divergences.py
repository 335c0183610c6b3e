"""Divergences and dependence by kernels: dense formulas, known values, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch

from transfuse.ops import (
    cka,
    conditional_cs,
    cs_divergence,
    cs_qmi,
    hsic,
    median_bandwidth,
    mmd2,
)
from transfuse.ops._kernel_samples import log_row_sums


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram(a, b, h, kernel="rbf"):
    d = (a[:, None] - b[None]).square().sum(-1) / h**2
    return torch.exp(-0.5 * d) if kernel == "rbf" else 1 / (1 + d)


A, B, X, T = rand(23, 3), rand(31, 3, seed=1), rand(40, 4, seed=2), rand(40, 2, seed=3)


def off(k):
    return k - torch.diag(k.diag())


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd(kernel, unbiased):
    def dense(a, b):
        total = 0
        for h in (0.5, 1.0, 3.0):
            k, q, c = gram(a, a, h, kernel), gram(b, b, h, kernel), gram(a, b, h, kernel)
            if unbiased:
                n, m = a.shape[0], b.shape[0]
                total += off(k).sum() / (n * (n - 1)) + off(q).sum() / (m * (m - 1)) - 2 * c.mean()
            else:
                total += k.mean() + q.mean() - 2 * c.mean()
        return total

    def ours(a, b):
        return mmd2(a, b, (0.5, 1.0, 3.0), kernel=kernel, unbiased=unbiased)

    results = []
    for fn in (ours, dense):
        given = [t.clone().requires_grad_() for t in (A, B)]
        value = fn(*given)
        results.append((value, *torch.autograd.grad(value, given)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_cs_divergence():
    k, q, c = gram(A, A, 0.9), gram(B, B, 0.9), gram(A, B, 0.9)
    want = k.sum().log() + q.sum().log() - 2 * c.sum().log()
    torch.testing.assert_close(cs_divergence(A, B, 0.9), want)
    assert cs_divergence(A, A, 0.9).abs() < 1e-12


def test_far_samples_go_through_logarithms():
    """With one point each, D = |a - b|^2 / h^2, however far."""
    for dtype in (torch.float32, torch.float64):
        a = torch.zeros(1, 2, dtype=dtype)
        b = torch.full((1, 2), 30.0, dtype=dtype).requires_grad_()
        d = cs_divergence(a, b, 0.5)
        torch.testing.assert_close(d, torch.tensor(1800.0 / 0.25, dtype=dtype))
        (grad,) = torch.autograd.grad(d, b)
        torch.testing.assert_close(grad, 2 * b.detach() / 0.25)
    near = log_row_sums([(A, B, 0.9)])
    torch.testing.assert_close(near, gram(A, B, 0.9).sum(1).log())
    x = rand(6, 2)
    y = rand(6, 1).requires_grad_()
    far = conditional_cs(x, y + 200.0, y, 1.0)
    assert far > 1e4
    (grad,) = torch.autograd.grad(far, y)
    assert grad.isfinite().all()
    with pytest.raises(ValueError, match="a larger bandwidth"):
        cs_divergence(torch.zeros(1, 1), torch.full((1, 1), 1e30), 1e-3)
    with pytest.raises(ValueError, match="expected finite samples"):
        cs_divergence(torch.zeros(2, 1), torch.full((2, 1), float("nan")))


def dense_qmi(k, q):
    n = k.shape[0]
    return (
        (k * q).mean().log2()
        + (k.mean() * q.mean()).log2()
        - 2 * ((k.sum(1) * q.sum(1)).sum() / n**3).log2()
    )


def test_cs_qmi():
    k, q = gram(X, X, 1.5), gram(T, T, 0.8)
    want = dense_qmi(k, q)
    torch.testing.assert_close(cs_qmi(X, T, 1.5, 0.8), want)
    want = want / (dense_qmi(k, k) * dense_qmi(q, q)).sqrt()
    torch.testing.assert_close(cs_qmi(X, T, 1.5, 0.8, normalized=True), want)
    torch.testing.assert_close(cs_qmi(X, X, 1.5, normalized=True), torch.ones_like(want))


def test_a_constant_representation_carries_nothing():
    constant = torch.ones(40, 2, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="cs_qmi: t carries no information"):
        value = cs_qmi(X, constant, normalized=True)
    assert value == 0
    (grad,) = torch.autograd.grad(value, constant)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert cs_qmi(X, constant.detach()).abs() < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs_qmi(X, T, normalized=True)


@pytest.mark.parametrize("row_weight", ["paper", "official"])
def test_conditional_cs(row_weight):
    y, yhat = rand(40, 1, seed=5), rand(40, 1, seed=6)
    k = gram(X, X, 1.2)
    w = k.sum(1) ** -2 if row_weight == "paper" else 1 / k.square().sum(1)
    one, two, across = (
        (w * (k * g).sum(1)).sum().log2()
        for g in (gram(y, y, 0.7), gram(yhat, yhat, 0.7), gram(yhat, y, 0.7))
    )
    found = conditional_cs(X, y, yhat, 1.2, 0.7, row_weight=row_weight)
    torch.testing.assert_close(found, one + two - 2 * across)
    assert conditional_cs(X, y, y, row_weight=row_weight).abs() < 1e-12


def test_hsic():
    k, q, n = gram(X, X, 1.5), gram(T, T, 0.8), 40
    h = torch.eye(n, dtype=k.dtype) - 1 / n
    torch.testing.assert_close(hsic(X, T, 1.5, 0.8), torch.trace(k @ h @ q @ h) / (n - 1) ** 2)
    k, q, ones = off(k), off(q), torch.ones(n, dtype=k.dtype)
    want = torch.trace(k @ q) + k.sum() * q.sum() / ((n - 1) * (n - 2))
    want = (want - 2 / (n - 2) * ones @ k @ q @ ones) / (n * (n - 3))
    torch.testing.assert_close(hsic(X, T, 1.5, 0.8, unbiased=True), want)
    # Of a sample with itself it is not negative: the diagonal is left out, not a row.
    assert hsic(X, X, 1.5, unbiased=True) > 0


def test_unbiased_hsic_averages_to_zero_where_nothing_depends():
    values = torch.stack(
        [hsic(rand(8, 2, seed=s), rand(8, 2, seed=99 + s), unbiased=True) for s in range(400)]
    )
    assert values.mean().abs() < 4 * values.std() / 20


def test_linear_cka():
    for x, y in ((X, T), (rand(6, 50), rand(6, 70, seed=1))):
        n = x.shape[0]
        h = torch.eye(n, dtype=x.dtype) - 1 / n
        k, q = x @ x.T, y @ y.T

        def biased(a, b, h=h):
            return torch.trace(a @ h @ b @ h)

        def unbiased(a, b, n=n):
            a, b, ones = off(a), off(b), torch.ones(n, dtype=a.dtype)
            first = torch.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2))
            return first - 2 / (n - 2) * ones @ a @ b @ ones

        for debiased, estimate in ((False, biased), (True, unbiased)):
            want = estimate(k, q) / (estimate(k, k) * estimate(q, q)).sqrt()
            torch.testing.assert_close(cka(x + 3.0, y - 2.0, debiased=debiased), want)
    q, _ = torch.linalg.qr(rand(4, 4))
    torch.testing.assert_close(cka(X, 3 * X @ q + 1), X.new_ones(()))


def test_rbf_cka():
    for debiased in (False, True):
        want = (
            hsic(X, T, 1.5, 0.8, unbiased=debiased)
            / (hsic(X, X, 1.5, unbiased=debiased) * hsic(T, T, 0.8, unbiased=debiased)).sqrt()
        )
        found = cka(X, T, 1.5, 0.8, kernel="rbf", debiased=debiased)
        torch.testing.assert_close(found, want)


def test_gradients_of_all():
    x, t = X[:6].clone().requires_grad_(), T[:6].clone().requires_grad_()
    h = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for fn in (
        lambda x, t, h: cs_qmi(x, t, h, normalized=True),
        lambda x, t, h: hsic(x, t, h, unbiased=True),
        lambda x, t, h: cka(x, t, h, kernel="rbf", debiased=False),
        lambda x, t, h: cka(x, t, debiased=True) + 0.0 * h,
        lambda x, t, h: conditional_cs(x, t[:, :1], t[:, 1:], h),
        lambda x, t, h: mmd2(x[:, :2], t[:4], h, unbiased=True),
    ):
        assert torch.autograd.gradcheck(fn, (x, t, h), fast_mode=True)


def test_half_precision_and_mixed():
    x, t = X.bfloat16(), T.float()
    for fn in (cs_qmi, hsic, cka):
        value = fn(x, t)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, fn(x.float(), t))


class TestMedian:
    def test_small_and_large_agree(self, monkeypatch):
        import sys

        module = sys.modules["transfuse.ops.median_bandwidth"]
        for n in (2, 3, 40, 41):
            x = rand(n, 3, dtype=torch.float32)
            want = torch.tensor(torch.pdist(x).numpy()).double().quantile(0.5)
            torch.testing.assert_close(median_bandwidth(x).double(), want, rtol=1e-5, atol=0)
            monkeypatch.setattr(module, "AT_ONCE", 1)
            monkeypatch.setattr(module, "CHUNK", 100)
            torch.testing.assert_close(median_bandwidth(x).double(), want, rtol=1e-5, atol=0)
            monkeypatch.undo()

    def test_squared_and_subsampled(self):
        x = rand(51, 3)
        squared = median_bandwidth(x, squared=True)
        torch.testing.assert_close(squared.sqrt(), median_bandwidth(x), rtol=1e-2, atol=0)
        drawn = [
            median_bandwidth(x, subsample=20, generator=torch.Generator().manual_seed(3))
            for _ in range(2)
        ]
        assert torch.equal(*drawn)
        assert not torch.equal(drawn[0], median_bandwidth(x))

    def test_refused(self):
        with pytest.raises(ValueError, match="most differ, got a median distance of 0"):
            median_bandwidth(torch.ones(5, 2))
        with pytest.raises(ValueError, match="expected finite numbers"):
            median_bandwidth(torch.tensor([[0.0], [float("nan")]]))
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            median_bandwidth(torch.ones(1, 2))
        with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator"):
            median_bandwidth(X, subsample=3)


REFUSED = {
    "one axis": (lambda: conditional_cs(X, T[:, 0], T), ValueError, r"y\[:, None\] is one number"),
    "counts": (lambda: cs_qmi(X, T[:5]), ValueError, r"t: expected 40 in dimension 0"),
    "one sample": (lambda: conditional_cs(X[:1], T[:1], T[:1]), ValueError, "at least 2 samples"),
    "few": (lambda: hsic(X[:3], T[:3], unbiased=True), ValueError, "at least 4 samples, got 3"),
    "none": (lambda: mmd2(A[:0], B), ValueError, "a: expected at least 1 samples, got 0"),
    "one, unbiased": (lambda: mmd2(A[:1], B, unbiased=True), ValueError, "at least 2 samples"),
    "width": (lambda: mmd2(A, X), ValueError, r"b: expected 3 in dimension 1 \(width of a\)"),
    "widths": (lambda: conditional_cs(X, T, T[:, :1]), ValueError, "yhat: expected 2 in dimen"),
    "zero": (lambda: cs_divergence(A, B, 0.0), ValueError, "bandwidth: expected a number greater"),
    "weight": (lambda: conditional_cs(X, T, T, row_weight="x"), ValueError, "row_weight: expected"),
    "flag": (lambda: cs_qmi(X, T, normalized=1), TypeError, "normalized: expected True or False"),
    "kernel": (lambda: cka(X, T, kernel="cos"), ValueError, "kernel: expected one of 'linear'"),
    "backend": (lambda: cka(X, T, backend="cpu"), RuntimeError, "the linear kernel is composed"),
    "integers": (lambda: mmd2(A.long(), B), TypeError, "a: expected float32"),
    "class": (lambda: mmd2([1.0], B), TypeError, "a: expected a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        call()
