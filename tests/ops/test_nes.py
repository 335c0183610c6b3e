"""Counter-based noise: the published generator, one stream on every backend, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from transfuse import _backend, _native
from transfuse.ops import nes_gradient, nes_perturb
from transfuse.ops._nes_reference import noise, philox

CPU = torch.device("cpu")


@pytest.fixture
def cpu() -> str:
    """The name of the native backend; skips where it is not built."""
    if not _native.status().loaded:
        pytest.skip(_native.status().reason)
    return "cpu"


# -- the generator --------------------------------------------------------------------------------


def test_philox_gives_the_published_words():
    """Known answers of Philox 4x32-10 from the authors' library: counter and key all 0, all 1."""
    zero = [int(w) for w in philox(0, 0, torch.zeros(1, dtype=torch.int64))]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = torch.full((1,), -1, dtype=torch.int64)
    every = [int(w) for w in philox(2**64 - 1, 2**64 - 1, ones)]
    assert every == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_noise_is_standard_normal():
    sample = noise(7, 3, 400_000, CPU)
    for power, want, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = sample.pow(power).mean().item()
        assert abs(got - want) < 4 * (spread / 400_000) ** 0.5
    shifted = (sample[:-1] * sample[1:]).mean().item()
    assert abs(shifted) < 4 / 400_000**0.5
    for other in (noise(7, 4, 400_000, CPU), noise(8, 3, 400_000, CPU)):
        assert abs((sample * other).mean().item()) < 4 / 400_000**0.5


# -- one stream everywhere ------------------------------------------------------------------------

SHAPES = [(), (1,), (63,), (64,), (65,), (2, 3, 5, 7), (0, 3), (4, 1025), (9001,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree(cpu, shape, dtype, masked):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) > 0.6 if masked else None
    options = {"seed": 2**63 + 12345, "start": 2**40, "mask": mask}
    got = nes_perturb(x, 3, sigma=0.25, backend=cpu, **options)
    want = nes_perturb(x, 3, sigma=0.25, backend="reference", **options)
    assert got.dtype == dtype
    assert got.shape == (6, *shape)
    eps = torch.finfo(dtype).eps
    # A number near a rounding boundary of a 16-bit type may go either way.
    torch.testing.assert_close(got, want, rtol=2 * eps, atol=4 * eps)
    if masked:
        outside = ~mask.expand_as(got)
        assert torch.equal(got[outside], x.expand_as(got)[outside])
    weights = torch.randn(3, generator=generator, dtype=torch.float64)
    got = nes_gradient(weights, x, backend=cpu, **options)
    want = nes_gradient(weights, x, backend="reference", **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=0, atol=32 * eps)
    if masked:
        assert not got[~mask].any()


def test_a_large_sample_keeps_its_digits(cpu):
    """Radii near 0 (words near 2^32) and in the far tail among a million numbers."""
    x = torch.zeros(1 << 20)
    got = nes_gradient(torch.ones(1, dtype=torch.float64), x, seed=11, backend=cpu)
    want = noise(11, 0, x.numel(), CPU)
    assert (got.double() - want).abs().max() < 2e-6
    assert want.abs().max() > 4.5


def test_both_signs_of_one_noise_and_chunks_that_go_on(cpu):
    x = torch.zeros(1000)
    whole = nes_perturb(x, 6, sigma=0.5, seed=3, backend=cpu)
    assert torch.equal(whole[:6], -whole[6:])
    parts = [nes_perturb(x, 2, sigma=0.5, seed=3, start=s, backend=cpu) for s in (0, 2, 4)]
    assert torch.equal(torch.cat([p[:2] for p in parts]), whole[:6])
    weights = torch.arange(6.0)
    got = nes_gradient(weights, x, seed=3, backend=cpu)
    torch.testing.assert_close(got, (weights[:, None] * whole[:6]).sum(0) / 0.5)
    longer = nes_perturb(torch.zeros(5000), 1, sigma=0.5, seed=3, backend=cpu)
    assert torch.equal(longer[0, :1000], whole[0]), "noise depends on the place alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_change_a_bit(cpu, dtype):
    x = torch.rand(40_000, dtype=dtype)
    weights = torch.randn(9, dtype=torch.float64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            (
                nes_perturb(x, 2, sigma=0.1, seed=5, backend=cpu),
                nes_gradient(weights, x, seed=5, backend=cpu),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides_and_broadcast_masks(cpu):
    x = torch.rand(6, 8).t()
    assert torch.equal(
        nes_perturb(x, 1, sigma=0.1, seed=0, backend=cpu),
        nes_perturb(x.contiguous(), 1, sigma=0.1, seed=0, backend=cpu),
    )
    mask = torch.tensor([True, False, True, False, True, False])
    got = nes_gradient(torch.ones(2), x, seed=0, mask=mask, backend=cpu)
    assert not got[:, 1::2].any()
    assert got[:, ::2].all()


def test_the_estimate_points_along_the_gradient(cpu):
    """E cos = sqrt(n / 2 / d), within a few deviations."""
    slope, x, n = torch.randn(2000), torch.zeros(2000), 500
    losses = nes_perturb(x, n, sigma=0.01, seed=2, backend=cpu) @ slope
    weights = (losses[:n] - losses[n:]) / (2 * n * 0.01)
    got = nes_gradient(weights, x, seed=2, backend=cpu)
    cosine = torch.cosine_similarity(got, slope, dim=0).item()
    assert abs(cosine - (n / (n + 2000)) ** 0.5) < 0.05
    assert abs(got.dot(slope) / slope.dot(slope) - 1) < 0.2


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x: expected float32"),
        ({"count": -1}, ValueError, "count: expected an integer of at least 0"),
        ({"count": 1.0}, TypeError, "count: expected an integer"),
        ({"sigma": 0.0}, ValueError, "sigma: expected a number greater than 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer"),
        ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
        ({"start": -1}, ValueError, "start: expected an integer of at least 0"),
        ({"mask": torch.ones(3)}, TypeError, "mask: expected a bool tensor"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask: expected a shape"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ],
)
def test_refused(changes, error, match):
    arguments = {"x": torch.zeros(3), "count": 2, "sigma": 0.1, "seed": 0, **changes}
    with pytest.raises(error, match=match):
        nes_perturb(arguments.pop("x"), arguments.pop("count"), **arguments)


def test_refused_gradients():
    x = torch.zeros(3)
    for weights, error, match in (
        (1.0, TypeError, "weights: expected a tensor"),
        (torch.ones(2, 2), ValueError, "weights: expected 1 dimensions"),
        (torch.ones(2, dtype=torch.int64), TypeError, "weights: expected float32"),
    ):
        with pytest.raises(error, match=match):
            nes_gradient(weights, x, seed=0)


def test_derivatives_are_refused_and_not_zero(cpu):
    x, weights = torch.zeros(3, requires_grad=True), torch.ones(2, requires_grad=True)
    for backend in (cpu, "reference"):
        with pytest.raises(NotImplementedError, match="has no derivative"):
            nes_perturb(x, 2, sigma=0.1, seed=0, backend=backend)
        with pytest.raises(NotImplementedError, match="has no derivative"):
            nes_gradient(weights, x, seed=0, backend=backend)
        with pytest.raises(NotImplementedError):
            torch.func.jvp(
                lambda x, backend=backend: nes_perturb(x, 1, sigma=0.1, seed=0, backend=backend),
                (torch.zeros(3),),
                (torch.ones(3),),
            )
    with torch.no_grad():
        assert nes_perturb(x, 2, sigma=0.1, seed=0, backend=cpu).shape == (4, 3)


def test_compile_and_raw_ops(cpu):
    x = torch.rand(5, 3)
    ops = torch.ops.transfuse
    torch.library.opcheck(ops.nes_perturb, (x, None, 3, 0, 2, 0.1))
    torch.library.opcheck(ops.nes_gradient, (torch.ones(2, dtype=torch.float64), x, x > 0.5, 3, 0))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, weights):
        moved = nes_perturb(x, 2, sigma=0.1, seed=1, backend=cpu)
        return moved, nes_gradient(weights, x, seed=1, backend=cpu)

    with torch.no_grad():
        moved, total = both(x, torch.ones(2))
    assert torch.equal(moved, nes_perturb(x, 2, sigma=0.1, seed=1, backend=cpu))
    assert torch.equal(total, nes_gradient(torch.ones(2), x, seed=1, backend=cpu))
    for call, match in (
        (lambda: ops.nes_perturb(x.t(), None, 0, 0, 1, 0.1), "contiguous"),
        (lambda: ops.nes_perturb(x, x[:1] > 0, 0, 0, 1, 0.1), "mask must be"),
        (lambda: ops.nes_perturb(x, None, 0, 0, -1, 0.1), "samples must not be negative"),
        (lambda: ops.nes_gradient(torch.ones(2), x, None, 0, 0), "weights must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


_TRITON = """
import torch
from transfuse.ops import nes_gradient, nes_perturb
from transfuse.testing import interpreter
interpreter.hasten()
for shape in ((), (65,), (3, 5, 67), (2500,)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.rand(shape).to(dtype)
        for mask in (None, torch.rand(shape) > 0.5):
            for seed, start in ((2**63 + 5, 2**33 + 7),) if mask is None else ((3, 0), (-1, 1)):
                options = {"seed": seed, "start": start, "mask": mask}
                a, b = (nes_perturb(x, 2, sigma=0.3, backend=b, **options)
                        for b in ("triton", "reference"))
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(a, b, rtol=2 * eps, atol=8 * eps)
                w = torch.randn(3)
                a, b = (nes_gradient(w, x, backend=b, **options) for b in ("triton", "reference"))
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
print("done")
"""


def test_triton_under_the_interpreter():
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-c", _TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert child.stdout.strip() == "done"


def test_both_are_declared():
    assert {"nes_perturb", "nes_gradient"} <= set(_backend.declared())
