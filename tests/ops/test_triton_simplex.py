"""The Triton kernels of small programmes under Triton's interpreter: optimality, ties, scales.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch

import transfuse
from transfuse.ops import min_norm_simplex, nonneg_qp, pareto_lp
from transfuse.testing.children import INTERPRETED, run_under_interpreter

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 20

else:

    def _drawn(*shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def _gramians(*shape, seed=0):
        g = _drawn(*shape, seed=seed)
        return g @ g.mT

    def _violation(c, w):
        """How much a task's slope is below the value, relative to the terms of both."""
        slope, size = ((m @ w[..., None])[..., 0] for m in (c, c.abs()))
        value = (w * slope).sum(-1, keepdim=True)
        return ((value - slope) / (size + (w * size).sum(-1, keepdim=True))).amax(-1)

    @pytest.mark.parametrize(
        ("problems", "count", "rank"),
        [(2, 1, 2), (21, 2, 4), (20, 3, 4), (9, 3, 1), (5, 4, 6), (3, 4, 2), (1, 5, 3)],
    )
    def test_min_norm_is_that_of_the_definition(problems, count, rank):
        c = _gramians(problems, count, rank)
        w = min_norm_simplex(c, backend="triton")
        want = min_norm_simplex(c, backend="reference")
        assert (w >= 0).all()
        torch.testing.assert_close(w.sum(-1), torch.ones(problems, dtype=torch.float64))
        assert _violation(c, w).max() < 1e-12
        torch.testing.assert_close(w, want, rtol=0, atol=1e-9)

    @pytest.mark.parametrize(
        ("rows", "weights"),
        [
            ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3, 1 / 3, 1 / 3]),
            ([[1.0, 2.0]] * 4, [0.25] * 4),
            ([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0.5, 0.5, 0.0]),
            ([[1.0, 0.0], [-1.0, 0.0]], [0.5, 0.5]),
            ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.25] * 4),
            ([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [5.0, 0.0]], [1 / 3, 1 / 3, 1 / 3, 0.0]),
            ([[1.0, 0.0], [-2.0, 0.0], [-2.0, 0.0]], [2 / 3, 1 / 6, 1 / 6]),
            ([[3.0, 4.0]], [1.0]),
        ],
    )
    def test_ties_share_the_weight(rows, weights):
        g = torch.tensor(rows, dtype=torch.float64)
        w = min_norm_simplex(g @ g.T, backend="triton")
        want = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(w, want, rtol=0, atol=1e-12)

    def test_scales_do_not_matter():
        c = _gramians(4, 3, 4)
        w = min_norm_simplex(c, backend="triton")
        for scale in (2.0**-200, 2.0**200):
            moved = min_norm_simplex(scale * c, backend="triton")
            torch.testing.assert_close(moved, w, rtol=0, atol=0)
        sizes = torch.tensor([1e-6, 1.0, 4.0], dtype=torch.float64)
        w = min_norm_simplex(torch.diag(sizes), backend="triton")
        want = sizes.reciprocal() / sizes.reciprocal().sum()
        torch.testing.assert_close(w, want, rtol=1e-9, atol=0)

    def test_a_problem_that_is_not_finite_stays_alone():
        c, a = _gramians(4, 3, 5), _drawn(4, 3, seed=1)
        before = min_norm_simplex(c, backend="triton")
        along = pareto_lp(c, a, mode="descent", backend="triton")
        c[1, 0, 2] = torch.nan
        c[3] = torch.inf
        w = min_norm_simplex(c, backend="triton")
        assert w.isnan().all(-1).tolist() == [False, True, False, True]
        assert torch.equal(w[[0, 2]], before[[0, 2]])
        a[0, 1] = torch.nan
        found = pareto_lp(c, a, mode="descent", backend="triton")
        assert found.status.tolist() == [2, 2, int(along.status[2]), 2]
        assert found.weights.isnan().all(-1).tolist() == [True, True, False, True]
        assert torch.equal(found.weights[2], along.weights[2])

    def test_shapes_and_dtypes():
        c = _gramians(2, 3, 3, 4)
        whole = min_norm_simplex(c, backend="triton")
        assert whole.shape == (2, 3, 3)
        assert torch.equal(min_norm_simplex(c[1, 2], backend="triton"), whole[1, 2])
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            rounded = c.to(dtype)
            w = min_norm_simplex(rounded, backend="triton")
            exact = min_norm_simplex(rounded.double(), backend="triton")
            assert torch.equal(w, exact.float())
        assert min_norm_simplex(torch.ones(0, 2, 2), backend="triton").shape == (0, 2)
        strided = torch.empty(3, 3, 6, dtype=torch.float64).permute(2, 0, 1)
        strided.copy_(c.flatten(0, 1))
        assert torch.equal(min_norm_simplex(strided, backend="triton"), whole.flatten(0, 1))

    @pytest.mark.parametrize(
        ("mode", "count", "problems"),
        [
            ("guide", 1, 4), ("guide", 2, 8), ("guide", 3, 4),
            ("descent", 1, 4), ("descent", 2, 8), ("descent", 3, 4), ("descent", 4, 2),
        ],
    )  # fmt: skip
    def test_linear_programmes_are_those_of_the_definition(mode, count, problems):
        c, a = _gramians(problems, count, count + 1, seed=count), _drawn(problems, count)
        # Ties of the guiding gradient, and programmes without a solution.
        a[0] = a[0, 0]
        c[1] = -torch.eye(count)
        found = pareto_lp(c, a, mode=mode, backend="triton")
        want = pareto_lp(c, a, mode=mode, backend="reference")
        assert torch.equal(found.status, want.status)
        assert found.status.max() == (1 if mode == "descent" or a[1].max() < 0 else 0)
        torch.testing.assert_close(found.weights, want.weights, rtol=0, atol=1e-10)

    def test_transforms():
        c = _gramians(4, 3, 5)
        mapped = torch.func.vmap(lambda c: min_norm_simplex(c, backend="triton"))(c)
        assert torch.equal(mapped, min_norm_simplex(c, backend="triton"))

    def test_what_is_refused():
        with pytest.raises(RuntimeError, match="9 gradients have too many"):
            min_norm_simplex(torch.eye(9), backend="triton")
        assert "9 gradients" in transfuse.explain("min_norm_simplex", torch.eye(9))
        w = min_norm_simplex(torch.eye(9), solver="frank_wolfe", backend="triton")
        torch.testing.assert_close(w, torch.full((9,), 1 / 9))
        with pytest.raises(RuntimeError, match="nonneg_qp has no triton kernel"):
            nonneg_qp(torch.eye(2), torch.ones(2), backend="triton")
