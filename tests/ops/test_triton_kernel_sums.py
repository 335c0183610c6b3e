"""The Triton kernel sums under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch
from kernel_cases import check_kernel

from transfuse.ops import KernelFactor, kernel_product_sums, kernel_sums
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 25

else:
    from transfuse.triton_kernels import kernel_sums as kernels

    CASES = [
        pytest.param(find_spec(name), case, id=f"{name}-{case}".replace(" ", "_"))
        for name, cases in {
            "kernel_sums": (
                "everything", "itself weighted", "imq no diagonal", "one point", "no columns",
                "no rows", "no width", "far from zero", "tiles",
            ),
            "kernel_product_sums": ("conditional", "information", "all"),
        }.items()
        for case in cases
    ]  # fmt: skip

    @pytest.mark.parametrize("way", ["value", "gradient"])
    @pytest.mark.parametrize(("spec", "case"), CASES)
    def test_single_precision(spec, case, way):
        check_kernel(spec, spec.case(case), torch.float32, way)

    @pytest.mark.parametrize("way", ["value", "gradient"])
    def test_half_precision(way):
        spec = find_spec("kernel_sums")
        check_kernel(spec, spec.case("everything"), torch.float16, way)

    def rand(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def both(call, *tensors):
        """Results and gradients of the kernels, and those of the reference in float64."""
        pairs = []
        for backend, wide in (("triton", torch.float32), ("reference", torch.float64)):
            own = [t.to(wide).requires_grad_() for t in tensors]
            result = call(*own, backend=backend)
            slope = torch.cos(torch.arange(result.numel()).reshape(result.shape)).to(wide)
            grads = torch.autograd.grad(result, own, slope, allow_unused=True)
            pairs.append((result, *grads))
        return pairs

    def alike(pairs, rtol=2e-5):
        for found, want in zip(*pairs, strict=True):
            scale = float(want.detach().abs().max())
            torch.testing.assert_close(found.double(), want, rtol=rtol, atol=rtol * scale)

    def test_bands_of_mirrored_tiles(monkeypatch):
        """A sample with itself over three tiles, of which few are held, and of wide points."""
        monkeypatch.setattr(kernels, "MIRRORED", 1)
        weights = rand(150, seed=1)
        alike(both(lambda x, h, w, backend: kernel_sums(
            x, bandwidth=h, weights=w, exclude_diagonal=True, backend=backend
        ), rand(150, 10), torch.tensor([2.0, 5.0]), weights))  # fmt: skip

    def test_stretches_and_widths_of_several_programs(monkeypatch):
        monkeypatch.setattr(kernels, "PROGRAMS", 2)
        monkeypatch.setattr(kernels, "WIDEST", 16)
        x, y = rand(70, 33), rand(140, 33, seed=1)
        pairs = both(lambda x, y, backend: kernel_sums(x, y, 6.0, backend=backend), x, y)
        alike(pairs)

    def test_products_of_points_that_are_rows_and_columns():
        """Every way in which a set of points enters a gradient."""

        def call(x, y, t, backend):
            factors = [
                KernelFactor(x, None, 2.0), KernelFactor(y, t, 2.0), KernelFactor(t, y, 1.5),
                KernelFactor(t, None, 1.0), KernelFactor(t, None, 3.0),
            ]  # fmt: skip
            products = [(0, 1), (2, 4), (3,), (0, 3, 4)]
            return kernel_product_sums(factors, products, kernel="imq", backend=backend)

        alike(both(call, rand(66, 3), rand(66, 9, seed=1), rand(66, 9, seed=2)))

    def test_strides_and_groups():
        x = rand(2, 5, 9).mT[:, ::2]
        assert not x.is_contiguous()
        found = torch.vmap(lambda one: kernel_sums(one, bandwidth=2.0, backend="triton"))(x)
        for one, got in zip(x, found, strict=True):
            want = kernel_sums(one, bandwidth=2.0, backend="reference")
            torch.testing.assert_close(got, want)

    def test_the_diagonal_is_exact_and_nan_shows():
        x = 1e3 * rand(70, 9)
        far = kernel_sums(x, bandwidth=1e-3, backend="triton")
        assert torch.equal(far, torch.ones(70))
        x[3, 1] = torch.nan
        assert kernel_sums(x, backend="triton").isnan().all()

    @pytest.mark.parametrize("bandwidth", [1e-200, 1e200])
    @pytest.mark.parametrize("kernel", ["rbf", "imq"])
    def test_extreme_bandwidths(bandwidth, kernel):
        x = rand(20, 3).requires_grad_()
        sums = kernel_sums(x, bandwidth=bandwidth, kernel=kernel, backend="triton")
        assert torch.equal(sums, torch.full((20,), 1.0 if bandwidth < 1 else 20.0))
        (grad,) = torch.autograd.grad(sums.sum(), x)
        torch.testing.assert_close(grad, torch.zeros(20, 3), rtol=0, atol=1e-12)

    def test_second_gradients():
        x = rand(7, 3).requires_grad_()
        seconds = []
        for backend in ("triton", "reference"):
            sums = kernel_sums(x, bandwidth=1.5, backend=backend)
            (first,) = torch.autograd.grad(sums.square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
        torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)

    def test_float64_is_refused():
        with pytest.raises(RuntimeError, match="float64 is not one of"):
            kernel_sums(torch.ones(2, 2).double(), backend="triton")
