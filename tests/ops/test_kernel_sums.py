"""What the contract does not cover: memory, float64 sums, exact diagonals, and compiled calls."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from transfuse.ops import KernelFactor, kernel_product_sums, kernel_sums


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_sample_with_itself_is_the_same_however_it_is_said():
    x = rand(130, 5)
    once = kernel_sums(x, bandwidth=2.0)
    assert torch.equal(kernel_sums(x, x, 2.0), once)
    torch.testing.assert_close(kernel_sums(x, x.clone(), 2.0), once, rtol=1e-5, atol=1e-5)


def test_the_diagonal_is_exact_where_everything_else_underflows():
    x = 1e3 * rand(100, 7)
    assert torch.equal(kernel_sums(x, bandwidth=1e-3), torch.ones(100))
    assert torch.equal(kernel_sums(x, bandwidth=1e-3, exclude_diagonal=True), torch.zeros(100))
    with_it = kernel_sums(x, bandwidth=500.0).double()
    without = kernel_sums(x, bandwidth=500.0, exclude_diagonal=True).double()
    torch.testing.assert_close(with_it - 1, without, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bandwidth", [1e-30, 1e-200, 1e30, 1e200])
@pytest.mark.parametrize("kernel", ["rbf", "imq"])
def test_extreme_bandwidths(bandwidth, kernel):
    x = rand(20, 3).requires_grad_()
    sums = kernel_sums(x, bandwidth=bandwidth, kernel=kernel)
    expected = 1.0 if bandwidth < 1 else 20.0
    assert torch.equal(sums, torch.full((20,), expected))
    (grad,) = torch.autograd.grad(sums.sum(), x)
    torch.testing.assert_close(grad, torch.zeros(20, 3), rtol=0, atol=1e-12)


def test_nan_is_not_hidden():
    x = rand(50, 3)
    x[7, 1] = float("nan")
    assert kernel_sums(x).isnan().all()


def test_bandwidths_share_their_call():
    x, y = rand(60, 4), rand(70, 4, seed=1)
    several = kernel_sums(x, y, [0.5, 1.0, 4.0])
    for h, found in zip((0.5, 1.0, 4.0), several, strict=True):
        assert torch.equal(found, kernel_sums(x, y, h))
    assert torch.equal(several, kernel_sums(x, y, torch.tensor([0.5, 1.0, 4.0])))


def test_a_gaussian_product_is_a_kernel_of_joined_points():
    x, t = rand(70, 3), rand(70, 2, seed=1)
    both = kernel_product_sums([KernelFactor(x, bandwidth=1.5), KernelFactor(t, bandwidth=1.5)])
    joined = kernel_sums(torch.cat((x, t), 1), bandwidth=1.5)
    torch.testing.assert_close(both[0], joined, rtol=1e-5, atol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient():
    points = rand(30, 3), rand(30, 1, seed=1), rand(30, 1, seed=2)

    def grads(*wanted):
        x, y, t = given = [p.detach().requires_grad_(i in wanted) for i, p in enumerate(points)]
        factors = [(x, None, 1.0), (y, None, 1.0), (t, None, 1.0), (t, y, 1.0)]
        sums = kernel_product_sums(factors, [(0,), (0, 1), (0, 2), (0, 3)])
        return torch.autograd.grad(sums.square().sum(), [given[i] for i in wanted])

    every = grads(0, 1, 2)
    for i in range(3):
        torch.testing.assert_close(grads(i)[0], every[i], rtol=1e-5, atol=1e-5)


MEMORY = """
import resource, torch
from transfuse.ops import kernel_sums
x = torch.randn(8192, 8, requires_grad=True)
kernel_sums(x[:64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernel_sums(x, bandwidth=2.0).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_matrix_is_formed():
    """Whose 268 MB a child process would need beyond what it has."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, check=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 32 * 2**20
