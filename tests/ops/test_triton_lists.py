"""The Triton kernels of norms, products and merging of lists of tensors under Triton's interpreter,
against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch
from kernel_cases import check_kernel

from transfuse.ops import (
    multi_dot,
    multi_gram,
    multi_norm,
    ratio_merge,
    ties_merge,
    trim_largest,
)
from transfuse.ops._multitensor_reference import multi_dot_reference
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 35

else:
    from transfuse.triton_kernels import multitensor, multitensor_merge, multitensor_sums

    NAMES = ("multi_norm", "multi_gram", "ratio_merge", "ties_merge")
    CASES = [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}".replace(" ", "_"))
        for spec in map(find_spec, NAMES)
        for case in spec.cases
    ]
    SHAPES = ((40, 70), (3,), (), (0, 2))

    def lists(count, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
                for _ in range(count)]  # fmt: skip

    @pytest.mark.parametrize(("spec", "case"), CASES)
    def test_values(spec, case):
        check_kernel(spec, case, torch.float32, "value")

    @pytest.mark.parametrize("name", NAMES)
    def test_half_precision(name):
        spec = find_spec(name)
        for case in spec.cases:
            if case.name != "large":
                check_kernel(spec, case, torch.float16, "value")

    @pytest.mark.parametrize("name", ["multi_norm", "multi_gram"])
    def test_gradients(name):
        spec = find_spec(name)
        for case in spec.cases:
            if "tiny" in case.tags:
                check_kernel(spec, case, torch.float32, "gradient")

    # ---- norms and products ----------------------------------------------------------------------

    def test_inner_product_and_its_gradient():
        for dtype in (torch.float32, torch.float16):
            xs, ys = lists(2, dtype)
            exact = multi_dot_reference([x.double() for x in xs], [y.double() for y in ys])
            found = multi_dot(xs, ys, backend="triton")
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
            assert found.dtype == torch.float32
        x, y = torch.randn(2, 5).unbind()
        x.requires_grad_()
        (grad,) = torch.autograd.grad(multi_dot([x], [y], backend="triton"), x)
        torch.testing.assert_close(grad, y)

    @pytest.mark.parametrize("order", [1, 2, float("inf")])
    def test_norms_neither_overflow_nor_vanish(order):
        for size in (1e-30, 1e30):
            x = [torch.full((2, 3), size).mT, torch.full((), size), torch.zeros(0)]
            found = multi_norm(x, ord=order, backend="triton")
            exact = {1: 7 * size, 2: 7**0.5 * size}.get(order, size)
            torch.testing.assert_close(found, torch.tensor(exact))
        assert multi_norm([torch.zeros(0)], ord=order, backend="triton") == 0
        odd = [torch.tensor([1.0, float("nan"), 3.0])]
        assert multi_norm(odd, ord=order, backend="triton").isnan()

    @pytest.mark.parametrize("count", [1, 2, 11])
    def test_products_of_any_number_of_lists_in_long_chunks(count, monkeypatch):
        monkeypatch.setattr(multitensor_sums, "PRODUCTS", count * count)
        given = lists(count)
        given[0][1] = None
        given[-1][0] = given[-1][0].bfloat16().mT.contiguous().mT
        found = multi_gram(given, backend="triton")
        wide = [[None if t is None else t.double() for t in part] for part in given]
        exact = multi_gram(wide, backend="reference")
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-3)
        assert torch.equal(found, found.T)

    # ---- merging ---------------------------------------------------------------------------------

    def test_denominator_of_zero_and_models_that_are_not_read():
        thetas = [[torch.tensor([1.0, 2.0])], [torch.tensor([5.0, 6.0])]]
        fishers = [[torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0])]]
        table = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
        first, second = ratio_merge(thetas, fishers, table, floor=0.0, backend="triton")
        assert first[0].tolist() == [3.0, 2.0]
        assert second[0].tolist() == [5.0, 2.0]
        thetas[1][0].fill_(torch.nan)
        only = ratio_merge(thetas, fishers, torch.tensor([1.0, 0.0]), backend="triton")
        assert only[0].tolist() == [1.0, 2.0]

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
    def test_weights_that_are_none(weight):
        thetas, fishers = lists(2), [[t.abs() for t in part] for part in lists(2, seed=1)]
        fishers[1][0][7, 5] = weight
        with pytest.raises(ValueError, match="at least 0, got 1 that"):
            ratio_merge(thetas, fishers, torch.ones(2), normalize=None, backend="triton")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("density", [1e-9, 0.2, 1.0])
    def test_threshold_is_exact(dtype, density, monkeypatch):
        monkeypatch.setattr(multitensor_merge, "COUNTERS", 2)
        (x,) = lists(1, dtype)
        found = trim_largest(x, density, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(
            found, trim_largest(x, density, backend="cpu"), strict=True
        ))  # fmt: skip

    def test_trimming_of_equal_and_odd_numbers():
        same = torch.full((5000,), -2.0)
        assert torch.equal(trim_largest([same], 0.1, backend="triton")[0], same)
        odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, -1.0])
        found = trim_largest([odd], 0.5, backend="triton")[0]
        assert found[2] == float("inf")
        assert found[3].isnan()
        assert found[[0, 1, 4]].tolist() == [0.0, 0.0, 0.0]
        assert trim_largest([torch.zeros(0)], 0.5, backend="triton")[0].shape == (0,)

    def test_threshold_of_nan():
        few = trim_largest([torch.tensor([float("nan"), 1.0, 2.0, 3.0])], 0.25, backend="triton")[0]
        assert few[0].isnan()
        assert few[1:].tolist() == [0.0, 0.0, 0.0]

    def test_sums_of_some_chunks_at_a_time(monkeypatch):
        """As many partitions as would otherwise need more memory than the lists."""
        kept, grads = lists(2), lists(1, seed=1)[0]
        found = []
        for most in (multitensor.PARTIAL, 12):
            monkeypatch.setattr(multitensor, "PARTIAL", most)
            keys = list(range(len(SHAPES)))
            found.append(multitensor.block_dots(grads, [t for k in kept for t in k], [], keys, 3))
        assert torch.equal(*found)

    def test_election_of_strided_lists_of_several_dtypes():
        one, two, three = lists(3)
        one[0] = one[0].mT.contiguous().mT
        given = [one, [t.half() for t in two], three]
        base = lists(1, torch.float16, seed=5)[0]
        found = ties_merge(given, base=base, density=0.3, backend="triton")
        want = ties_merge(given, base=base, density=0.3, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

    def test_float64_is_refused():
        x = [torch.ones(3, dtype=torch.float64)]
        for call in (
            lambda: multi_norm(x, backend="triton"),
            lambda: multi_dot(x, x, backend="triton"),
            lambda: multi_gram([x, x], backend="triton"),
            lambda: ratio_merge([x, x], [x, x], torch.ones(2), backend="triton"),
            lambda: ties_merge([x], backend="triton"),
        ):
            with pytest.raises(RuntimeError, match="float64 is not one of"):
                call()
