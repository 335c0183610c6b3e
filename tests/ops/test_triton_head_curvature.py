"""The Triton kernels of the head curvature under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch
from kernel_cases import check_kernel

import transfuse
from transfuse import ops
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 20

else:
    from transfuse.triton_kernels import _head_blocks, _head_wide, head_curvature

    # The interpreter runs programs one after the other, so a few of every kernel.
    CASES = [
        pytest.param(find_spec(op), case, id=f"{op}-{case}".replace(" ", "_"))
        for op, cases in {
            "head_gradient": ("domains", "binary, no bias", "no columns"),
            "head_hessian_diagonal": (
                "domains", "no bias", "binary", "primes", "no columns", "one sample", "saturated",
            ),
            "head_hessian_product": ("domains", "one domain", "binary", "no columns"),
            "head_hgp": ("domains",),
        }.items()
        for case in cases
    ]  # fmt: skip
    BOUNDS = [0, 3, 4, 26, 41]

    @pytest.mark.parametrize(("spec", "case"), CASES)
    def test_values_and_gradients(spec, case):
        for way in ("value", "gradient"):
            check_kernel(spec, spec.case(case), torch.float32, way)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [("head_hessian_diagonal", torch.float16), ("head_hessian_product", torch.bfloat16)],
    )
    def test_half_precision(name, dtype):
        for way in ("value", "gradient"):
            check_kernel(find_spec(name), find_spec(name).case("domains"), dtype, way)

    def _batch(classes, columns=35, samples=41):
        generator = torch.Generator().manual_seed(classes)
        x = torch.randn(samples, columns, generator=generator)
        weight = torch.randn(classes, columns, generator=generator) / columns**0.5
        bias = 0.3 * torch.randn(classes, generator=generator)
        return x, weight, bias

    def _all(head, vectors, bounds, backend, wide=False):
        """Product and diagonal for domains, and gradients of both."""
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (*head, vectors)]
        product = ops.head_hessian_product(*leaves, segments=bounds, backend=backend)
        diagonal = ops.head_hessian_diagonal(*leaves[:3], segments=bounds, backend=backend)
        grads = torch.autograd.grad(product.square().sum() + diagonal.square().sum(), leaves)
        return [product.detach(), diagonal.detach(), *grads]

    @pytest.mark.parametrize(
        ("classes", "apart", "chunks"),
        [(9, False, True), (9, True, True), (33, False, False), (33, True, True)],
    )
    def test_columns_in_parts_and_batches_in_chunks(classes, apart, chunks, monkeypatch):
        """Products of two stretches of the columns, blocks of classes, and sums of several
        stretches of a domain, that are added in a launch of their own."""
        monkeypatch.setattr(_head_blocks, "COLUMNS", 16)
        bounds = [0, 17, 20] if chunks else [0, 3, 7]
        if chunks:
            for module in (_head_blocks, _head_wide, head_curvature):
                monkeypatch.setattr(module, "LOOP", 1)
        head = _batch(classes, samples=bounds[-1])
        sizes = (bounds[-1], 35, classes)
        blocks = _head_blocks.blocks_of(2, *sizes, tuple(bounds), head[0].device)
        assert blocks.splits == 2
        assert (len(blocks.tables.chunks) > len(bounds)) == chunks
        domains = (len(bounds) - 1, 1) if apart else ()
        vectors = torch.randn(*domains, classes, 36, generator=torch.Generator().manual_seed(2))
        found = _all(head, vectors, bounds, "triton")
        truth = _all(head, vectors, bounds, "reference", wide=True)
        for own, want in zip(found, truth, strict=True):
            torch.testing.assert_close(own, want.float(), rtol=1e-4, atol=2e-6 * want.abs().max())

    def test_strides():
        x, weight, bias = _batch(5, columns=7)
        plain = ops.head_hessian_diagonal(x, weight, bias, segments=BOUNDS, backend="triton")
        turned = (x.T.contiguous().T, weight.T.contiguous().T, torch.stack((bias, bias), 1)[:, 0])
        again = ops.head_hessian_diagonal(*turned, segments=BOUNDS, backend="triton")
        assert torch.equal(again, plain)

    @pytest.mark.parametrize("classes", [1, 3])
    def test_a_saturated_softmax_keeps_its_digits(classes):
        x = torch.ones(2, 1)
        weight = torch.tensor([[46.0], [3.0], [0.0]])[:classes]
        result = ops.head_hessian_diagonal(x, weight, None, backend="triton")
        truth = ops.head_hessian_diagonal(x.double(), weight.double(), None, backend="reference")
        assert 0 < truth.max() < 1e-15
        torch.testing.assert_close(result, truth.float(), rtol=1e-4, atol=0)

    def test_nan_stays_in_its_domain():
        head = [t.requires_grad_() for t in _batch(4)]
        with torch.no_grad():
            head[0][12, 1] = torch.nan
        labels = torch.zeros(41, dtype=torch.int64)
        for result in (
            ops.head_gradient(*head, labels, segments=BOUNDS, backend="triton"),
            ops.head_hessian_diagonal(*head, segments=BOUNDS, backend="triton"),
        ):
            assert result.isnan().flatten(1).all(1).tolist() == [False, False, True, False]
            assert result[[0, 1, 3]].isfinite().all()
            (moved,) = torch.autograd.grad(result[[0, 1, 3]].sum(), head[:1])
            assert moved[:4].isfinite().all()
            assert moved[26:].isfinite().all()

    def test_second_derivatives_are_composed():
        x, *head = _batch(4)
        x.requires_grad_()

        def twice(backend):
            result = ops.head_hessian_diagonal(x, *head, segments=BOUNDS, backend=backend)
            (first,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x)[0]

        torch.testing.assert_close(twice("triton"), twice("reference"), rtol=1e-3, atol=1e-5)

    def test_what_is_refused():
        x, weight, bias = _batch(4)
        with pytest.raises(RuntimeError, match="float64 is not one of"):
            ops.head_hessian_diagonal(x.double(), weight, bias, backend="triton")
        many = torch.zeros(1025, 35)
        with pytest.raises(RuntimeError, match="1025 classes are more than 1024"):
            ops.head_hessian_diagonal(x, many, None, backend="triton")
        assert "1025 classes" in transfuse.explain("head_gradient", x, many)
        large, head = torch.zeros(1, 1).expand(2**17, 256), torch.zeros(17, 256)
        assert "torch's matrix products" in transfuse.explain("head_gradient", large, head)
        assert "torch's matrix" not in transfuse.explain("head_gradient", large, head[:16])
