"""The Triton attention kernels under Triton's interpreter, against float64 dense oracles.

The interpreter must be chosen before Triton is imported and would affect every other test of the
process, so this file has two faces. Collected normally, its one test runs this same file (and that
of the fused op) in a child process with ``TRITON_INTERPRET=1``; in that child the tests below are
defined. To run one of them:
``TRITON_INTERPRET=1 pytest tests/ops/test_triton_attention.py -k name``.

Block sizes are set to 16 x 16 so that small shapes cross many block boundaries. bfloat16 is left
out: the interpreter multiplies it wrongly.
"""

import math
from pathlib import Path

import pytest
import torch

from transfuse.testing.children import INTERPRETED, run_under_interpreter

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        fused = Path(__file__).with_name("test_triton_fused_attention.py")
        child = run_under_interpreter(__file__, fused)
        assert child.passed > 50
        assert "skipped" not in child.output

else:
    from triton_attention import (
        DTYPES,
        SMALL_BLOCKS,
        Problem,
        by_call,
        causal_lower_long,
        causal_upper,
        check,
        check_all,
        column_major,
        flat,
        framed,
        key_bias,
        masked_rows,
        mixture,
        names_of,
        normal,
        packed,
        plain,
        single_token,
        split,
        tangents_like,
    )

    from transfuse.ops import KV, attend
    from transfuse.triton_kernels import _attention_plan, attention

    @pytest.fixture(autouse=True)
    def _small_blocks(monkeypatch):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", SMALL_BLOCKS)
        torch.manual_seed(0)

    @by_call
    def test_forward(make, dtype):
        problem = make(dtype)
        actual = attention.attention_forward(*problem.arguments())
        assert actual[0].dtype == dtype
        assert actual[1].dtype == torch.float32
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            results.append(function(*tensors))
        check_all(["out", "lse"], actual, *results, dtype)

    @by_call
    def test_backward(make, dtype):
        problem = make(dtype)
        with_lse = make is not causal_upper
        out, lse = attention.attention_forward(*problem.arguments())
        grad_out = framed(torch.randn(out.shape).to(dtype))
        grad_lse = torch.randn(lse.shape) if with_lse else None
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            dense_out, dense_lse = function(*tensors)
            loss = (dense_out * grad_out.to(precision)).sum()
            if with_lse:
                finite = torch.where(torch.isinf(dense_lse), 0.0, dense_lse)
                loss = loss + (finite * grad_lse.to(precision)).sum()
            results.append(torch.autograd.grad(loss, tensors))
        flags = [b is not None for b in problem.biases]
        if with_lse:
            # Nothing depends on the log-sum-exp of a fully masked row, whatever its gradient.
            grad_lse = torch.where(torch.isinf(lse), math.nan, grad_lse)
        actual = flat(
            attention.attention_backward(grad_out, grad_lse, *problem.arguments(), out, lse, flags)
        )
        assert all(t.dtype == dtype for t in actual)
        check_all(names_of(problem), actual, *results, dtype, 8)

    @by_call
    def test_jvp(make, dtype):
        problem = make(dtype)
        out, lse = attention.attention_forward(*problem.arguments())
        tangents = tangents_like(problem)
        query_t, keys_t, values_t, biases_t = split(problem, tangents)
        actual = attention.attention_jvp(
            *problem.arguments(),
            out,
            lse,
            query_t,
            keys_t,
            [framed(t) for t in values_t],
            problem.expand(biases_t),
        )
        assert actual[0].dtype == dtype
        assert actual[1].dtype == torch.float32
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            cast = tuple(t.to(precision) for t in tangents)
            _, (out_t, lse_t) = torch.func.jvp(function, tuple(tensors), cast)
            results.append((out_t, lse_t))
        check_all(["out_t", "lse_t"], actual, *results, dtype, 8)

    def jvp_backward_pair(problem, dtype, zero_bias_tangent=False):
        """(actual, [oracle, eager]) gradients of a random pairing with the tangents."""
        out, lse = attention.attention_forward(*problem.arguments())
        tangents = tangents_like(problem)
        query_t, keys_t, values_t, biases_t = split(problem, tangents)
        given = problem.expand(biases_t)
        if zero_bias_tangent:
            biases = 1 + 2 * len(problem.keys)
            tangents[biases:] = [torch.zeros_like(t) for t in tangents[biases:]]
            given = [None] * len(given)
        rest = (*problem.arguments(), out, lse, query_t, keys_t, values_t, given)
        out_t, lse_t = attention.attention_jvp(*rest)
        grad_out = torch.randn(out.shape).to(dtype)
        grad_lse = torch.randn(lse.shape)
        results = []
        for precision in (torch.float64, dtype):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            cast = tuple(t.to(precision) for t in tangents)
            _, (dense_out_t, dense_lse_t) = torch.func.jvp(function, tuple(tensors), cast)
            loss = (dense_out_t * grad_out.to(precision)).sum()
            loss = loss + (dense_lse_t * grad_lse.to(precision)).sum()
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
            results.append(
                [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(tensors, gradients, strict=True)
                ]
            )
        flags = [b is not None for b in problem.biases]
        actual = attention.attention_jvp_backward(grad_out, grad_lse, *rest, out_t, lse_t, flags)
        return flat(actual), results

    # The most kernels of all: problems that differ in more than their sizes.
    @pytest.mark.parametrize(
        "make", [plain, causal_lower_long, mixture, masked_rows, key_bias, single_token]
    )
    def test_jvp_backward(make):
        problem = make(torch.float32)
        actual, results = jvp_backward_pair(problem, torch.float32)
        check_all(names_of(problem), actual, *results, torch.float32, 8)

    @pytest.mark.parametrize("make", [plain, causal_upper])
    def test_jvp_backward_half(make):
        problem = make(torch.float16)
        actual, results = jvp_backward_pair(problem, torch.float16)
        check_all(names_of(problem), actual, *results, torch.float16, 8)

    def test_absent_bias_tangents_are_zero():
        problem = key_bias(torch.float32)
        actual, results = jvp_backward_pair(problem, torch.float32, zero_bias_tangent=True)
        check_all(names_of(problem), actual, *results, torch.float32, 8)

    # Bit i: whether axis i of the bias is full.
    @pytest.mark.parametrize("own", [0, 2, 8, 12, 15])
    def test_bias_gradient_has_the_shape_the_bias_has(own):
        full = (2, 2, 17, 18)
        shape = [size if own >> axis & 1 else 1 for axis, size in enumerate(full)]
        problem = Problem(
            normal(2, 2, 17, 8),
            [normal(2, 2, 18, 8)],
            [normal(2, 2, 18, 8)],
            biases=[normal(*shape)],
        )
        out, lse = attention.attention_forward(*problem.arguments())
        grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        results = []
        for precision in (torch.float64, torch.float32):
            function, tensors = problem.dense(precision)
            tensors = [t.requires_grad_() for t in tensors]
            dense_out, dense_lse = function(*tensors)
            loss = (dense_out * grad_out).sum() + (dense_lse * grad_lse).sum()
            results.append(torch.autograd.grad(loss, tensors)[-1])
        *_, (actual,) = attention.attention_backward(
            grad_out, grad_lse, *problem.arguments(), out, lse, [True]
        )
        check("dbias", actual, *results, torch.float32, 8)

    def test_no_bias_gradient_where_none_is_asked_for():
        problem = key_bias(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        *_, none = attention.attention_backward(
            torch.ones_like(out), None, *problem.arguments(), out, lse, [False, False]
        )
        assert none == []

    def test_expanded_gradients():
        problem = plain(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        one = torch.ones(())
        expanded = attention.attention_backward(
            one.expand(out.shape), one.expand(lse.shape), *problem.arguments(), out, lse, [False]
        )
        dense = attention.attention_backward(
            torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse, [False]
        )
        for a, b in zip(flat(expanded), flat(dense), strict=True):
            assert torch.equal(a, b)

    def test_strides_do_not_change_results():
        problem = plain(torch.float32)
        expected = attention.attention_forward(*problem.arguments())
        for layout in (framed, packed, column_major):
            moved = Problem(
                layout(problem.query),
                [layout(t) for t in problem.keys],
                [layout(t) for t in problem.values],
            )
            for a, b in zip(attention.attention_forward(*moved.arguments()), expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize(("rows", "lengths"), [(0, [5]), (3, [0]), (3, [0, 0]), (0, [0])])
    def test_empty(rows, lengths):
        problem = Problem(
            normal(2, 2, rows, 8),
            [normal(2, 1, m, 8) for m in lengths],
            [normal(2, 1, m, 4) for m in lengths],
            biases=[normal(1, 2, 1, m) for m in lengths],
        )
        out, lse = attention.attention_forward(*problem.arguments())
        assert torch.equal(out, torch.zeros(2, 2, rows, 4))
        assert torch.equal(lse, torch.full((2, 2, rows), -math.inf))
        flags = [True] * len(lengths)
        given = (torch.randn_like(out), torch.randn_like(lse), *problem.arguments(), out, lse)
        shapes = [t.shape for t in problem.tensors()]
        for t, shape in zip(flat(attention.attention_backward(*given, flags)), shapes, strict=True):
            assert torch.equal(t, torch.zeros(shape))
        query_t, keys_t, values_t, biases_t = split(problem, tangents_like(problem))
        given += (query_t, keys_t, values_t, problem.expand(biases_t))
        out_t, lse_t = attention.attention_jvp(*given[2:])
        assert torch.equal(out_t, torch.zeros_like(out))
        assert torch.equal(lse_t, torch.zeros_like(lse))
        for t, shape in zip(
            flat(attention.attention_jvp_backward(*given, out_t, lse_t, flags)),
            shapes,
            strict=True,
        ):
            assert torch.equal(t, torch.zeros(shape))

    @pytest.mark.parametrize("how", ["key mask", "query mask", "causal"])
    def test_blocks_without_pairs_are_not_read(how):
        # NaN keys and values would reach the results through 0 * NaN if their block were read.
        def make(poison):
            torch.manual_seed(1)
            query, key, value = normal(1, 1, 16, 8), normal(1, 1, 48, 8), normal(1, 1, 48, 8)
            key[:, :, 16:] = poison
            value[:, :, 16:] = poison
            mask = torch.zeros(1, 1, 1 if how == "key mask" else 16, 48, dtype=torch.bool)
            mask[..., :16] = True
            causal = 1 if how == "causal" else 0
            return Problem(query, [key], [value], masks=[None if causal else mask], causal=[causal])

        results = []
        for poison in (math.nan, 1.0):
            problem = make(poison)
            out, lse = attention.attention_forward(*problem.arguments())
            given = (torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse)
            dq, (dk,), (dv,), _ = attention.attention_backward(*given, [False])
            tangents = (normal(1, 1, 16, 8), [problem.keys[0]], [problem.values[0]], [None])
            out_t, lse_t = attention.attention_jvp(*given[2:], *tangents)
            gradients = attention.attention_jvp_backward(*given, *tangents, out_t, lse_t, [False])
            second_dq, (second_dk,), (second_dv,), _ = gradients
            results.append([out, lse, dq, dk, dv, out_t, lse_t, second_dq, second_dk, second_dv])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert torch.isfinite(results[0][0]).all()

    def test_runs_are_bitwise_equal():
        problem = key_bias(torch.float32)
        out, lse = attention.attention_forward(*problem.arguments())
        flags = [b is not None for b in problem.biases]
        runs = [
            flat(
                attention.attention_backward(
                    torch.ones_like(out), None, *problem.arguments(), out, lse, flags
                )
            )
            for _ in range(2)
        ]
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_table_block_sizes(monkeypatch, dtype):
        monkeypatch.delenv("TRANSFUSE_TRITON_CONFIG")
        problem = Problem(
            normal(1, 2, 70, 40, dtype=dtype),
            [normal(1, 2, 77, 40, dtype=dtype), normal(1, 2, 4, 40, dtype=dtype)],
            [normal(1, 2, 77, 40, dtype=dtype), normal(1, 2, 4, 40, dtype=dtype)],
            biases=[None, normal(1, 1, 1, 4, dtype=dtype)],
        )
        actual = attention.attention_forward(*problem.arguments())
        results = [f(*t) for f, t in (problem.dense(torch.float64), problem.dense(dtype))]
        check_all(["out", "lse"], actual, *results, dtype)
        gradients, results = jvp_backward_pair(problem, dtype)
        check_all(names_of(problem), gradients, *results, dtype, 8)

    def test_wide_offsets(monkeypatch):
        huge = torch.empty_strided((1, 1, 9, 8), (0, 0, 2**27, 1), device="meta")
        assert _attention_plan.is_wide(_attention_plan.operand(huge))
        problem = key_bias(torch.float32)
        assert not _attention_plan.is_wide(*map(_attention_plan.operand, problem.keys))
        flags = [b is not None for b in problem.biases]

        def everything():
            out, lse = attention.attention_forward(*problem.arguments())
            torch.manual_seed(1)
            query_t, keys_t, values_t, biases_t = split(problem, tangents_like(problem))
            given = (torch.ones_like(out), torch.ones_like(lse), *problem.arguments(), out, lse)
            tangents = (query_t, keys_t, values_t, problem.expand(biases_t))
            out_t, lse_t = attention.attention_jvp(*given[2:], *tangents)
            first = flat(attention.attention_backward(*given, flags))
            second = flat(attention.attention_jvp_backward(*given, *tangents, out_t, lse_t, flags))
            return [out, lse, out_t, lse_t, *first, *second]

        narrow = everything()
        for module in ("forward", "backward", "jvp"):
            target = f"transfuse.triton_kernels.attention_{module}.is_wide"
            monkeypatch.setattr(target, lambda *records: True)
        for a, b in zip(everything(), narrow, strict=True):
            assert torch.equal(a, b)

    def test_gradient_of_an_expanded_bias():
        query, key, value = normal(2, 2, 3, 8), normal(2, 1, 5, 8), normal(2, 1, 5, 4)
        bias = normal(1, 2, 1, 5).requires_grad_()

        def gradient(given, backend):
            out = attend(query, KV(key, value, bias=given), backend=backend)
            return torch.autograd.grad(out.square().sum(), bias)[0]

        found = gradient(bias.expand(2, 2, 3, 5), "triton")
        torch.testing.assert_close(found, gradient(bias, "reference"), rtol=1e-4, atol=1e-5)

    # Errors.

    def test_float64_is_refused():
        problem = plain(torch.float64)
        with pytest.raises(TypeError, match=r"query.*float32, float16 and bfloat16.*float64"):
            attention.attention_forward(*problem.arguments())

    def test_mixed_dtypes_are_refused():
        problem = plain(torch.float32)
        problem.values = [problem.values[0].half()]
        with pytest.raises(TypeError, match=r"values.*float32.*float16"):
            attention.attention_forward(*problem.arguments())
        query, keys, values, biases, _, *rest = plain(torch.float32).arguments()
        mask = torch.ones(2, 2, 17, 35)
        with pytest.raises(TypeError, match=r"masks.*bool.*float32"):
            attention.attention_forward(query, keys, values, biases, [mask], *rest)

    def test_wide_head_dimensions_are_refused():
        problem = Problem(normal(1, 1, 2, 257), [normal(1, 1, 2, 257)], [normal(1, 1, 2, 4)])
        with pytest.raises(ValueError, match=r"head dimension.*256.*257"):
            attention.attention_forward(*problem.arguments())

    @pytest.mark.parametrize(
        "text",
        [
            "forward:64=64,64,4",
            "forward=64,64,4,2",
            "sideways:64=64,64,4,2",
            "forward:64=48,64,4,2",
            "forward:65=64,64,4,2",
            "forward:64:double=64,64,4,2",
            "forward:64=8,64,4,2",
            "nonsense",
        ],
    )
    def test_bad_configuration_is_refused(monkeypatch, text):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", text)
        with pytest.raises(ValueError, match=r"TRANSFUSE_TRITON_CONFIG.*direction:bucket"):
            attention.attention_forward(*plain(torch.float32).arguments())

    def test_configuration_is_used(monkeypatch):
        text = "forward:64:half=32,16,2,1; dkey:64=16,32,1,1"
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", text)
        chosen = _attention_plan.choose("forward", torch.float16, 40, 100, 100)
        assert chosen == (32, 16, 2, 1)
        chosen = _attention_plan.choose("dkey", torch.float32, 64, 100, 100)
        assert chosen == (16, 32, 1, 1)
        table = _attention_plan.TABLE["forward"]["single"][64]
        assert _attention_plan.choose("forward", torch.float32, 64, 1000, 1000) == table

    def test_bad_precision_is_refused(monkeypatch):
        monkeypatch.setenv("TRANSFUSE_TRITON_PRECISION", "fast")
        with pytest.raises(ValueError, match=r"TRANSFUSE_TRITON_PRECISION.*ieee.*fast"):
            attention.attention_forward(*plain(torch.float32).arguments())
