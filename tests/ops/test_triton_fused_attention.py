"""The fused Triton attention (blends, groups, gates) under Triton's interpreter, against float64.

``test_triton_attention.py`` runs these tests in its child process with ``TRITON_INTERPRET=1``.
"""

import math

import pytest
import torch

from transfuse.testing.children import INTERPRETED

pytest.importorskip("triton")

if INTERPRETED:
    from triton_attention import (
        SMALL_BLOCKS,
        Problem,
        by_dtype,
        check,
        dense_attention,
        framed,
        key_bias,
        many_sources,
        mixture,
        normal,
        plain,
    )

    from transfuse.triton_kernels import attention

    @pytest.fixture(autouse=True)
    def _small_blocks(monkeypatch):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", SMALL_BLOCKS)
        torch.manual_seed(0)

    def mix(x, other, weight, index):
        if other is None or weight is None:
            return x
        other = other if index is None else other[index]
        if isinstance(weight, torch.Tensor):
            weight = weight[..., None].to(x.dtype)
        else:
            weight = torch.tensor(weight, dtype=x.dtype)
        mixed = (1 - weight) * x + weight * other
        return torch.where(weight == 0, x, torch.where(weight == 1, other, mixed))

    def dense_fused(precision, problem, query_blend, key_blends, groups, gates):
        def cast(t):
            return t.to(precision) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

        query = mix(cast(problem.query), *(cast(t) for t in query_blend))
        keys = [
            mix(cast(key), *(cast(t) for t in blend))
            for key, blend in zip(problem.keys, key_blends, strict=True)
        ]
        total = 0.0
        for g, gate in enumerate(gates):
            members = [s for s, group in enumerate(groups) if group == g]

            def pick(items, members=members):
                return [items[s] for s in members]

            part = Problem(
                query,
                pick(keys),
                [cast(t) for t in pick(problem.values)],
                [cast(t) for t in pick(problem.biases)],
                pick(problem.masks),
                pick(problem.indices),
                pick(problem.scales),
                pick(problem.causal),
            )
            out, lse = dense_attention(part, query, part.keys, part.values, part.biases)
            if isinstance(gate, torch.Tensor):
                gate = cast(gate)[..., None]
            total = total + gate * out
        return total, lse

    def fused(problem, query_blend, key_blends, groups, gates):
        query, keys, values, *rest = problem.arguments()
        return attention.attention_fused(
            query, *query_blend, keys, values, *map(list, zip(*key_blends, strict=True)), *rest,
            groups, gates,
        )  # fmt: skip

    def check_fused(problem, query_blend, key_blends, groups, gates):
        dtype = problem.query.dtype
        out, lse = fused(problem, query_blend, key_blends, groups, gates)
        oracle, eager = (
            dense_fused(precision, problem, query_blend, key_blends, groups, gates)
            for precision in (torch.float64, dtype)
        )
        assert out.dtype == dtype
        check("out", out, oracle[0], eager[0], dtype)
        if len(gates) == 1:
            check("lse", lse, oracle[1], eager[1], dtype)

    NO_BLEND = (None, None, None)

    @by_dtype
    def test_fused_without_extras_is_forward(dtype):
        problem = mixture(dtype)
        out, lse = fused(problem, NO_BLEND, [NO_BLEND] * 4, [0] * 4, [1.0])
        expected = attention.attention_forward(*problem.arguments())
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])

    @by_dtype
    @pytest.mark.parametrize("groups", [[0, 0, 1, 1], [1, 0, 1, 0], [3, 2, 1, 0]], ids=str)
    def test_fused_groups_and_gates(groups, dtype):
        problem = mixture(dtype)
        gates = [0.7, torch.rand(2, 1, 18).expand(2, 2, 18), 0.0, torch.rand(2, 1).expand(2, 2, 18)]
        check_fused(problem, NO_BLEND, [NO_BLEND] * 4, groups, gates[: max(groups) + 1])

    @pytest.mark.parametrize("gate", [0.0, 1.0, -0.5], ids=str)
    def test_fused_one_gated_group(gate):
        check_fused(plain(torch.float32), NO_BLEND, [NO_BLEND], [0], [gate])

    def test_fused_all_groups_gated_off():
        problem = key_bias(torch.float32)
        out, _ = fused(problem, NO_BLEND, [NO_BLEND] * 2, [0, 1], [0.0, 0.0])
        assert torch.equal(out, torch.zeros_like(out))

    def test_fused_zero_gates_keep_nan_out():
        problem = Problem(
            normal(1, 2, 18, 8),
            [normal(1, 2, 20, 8), torch.full((1, 2, 7, 8), math.nan)],
            [normal(1, 2, 20, 8), torch.full((1, 2, 7, 8), math.nan)],
        )
        first = Problem(problem.query, problem.keys[:1], problem.values[:1])
        expected, _ = attention.attention_forward(*first.arguments())
        for gate in (0.0, torch.zeros(1, 1, 1).expand(1, 2, 18)):
            out, _ = fused(problem, NO_BLEND, [NO_BLEND] * 2, [0, 1], [1.0, gate])
            assert torch.equal(out, expected)

    def test_fused_many_sources_in_groups():
        problem = many_sources(torch.float32)
        groups = [0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 1]
        gates = [0.3, torch.rand(1, 2, 18), 1.0]
        check_fused(problem, NO_BLEND, [NO_BLEND] * 11, groups, gates)
        # A group that ends exactly where a launch does.
        check_fused(problem, NO_BLEND, [NO_BLEND] * 11, [0] * 8 + [1] * 3, [0.5, 2.0])

    @pytest.mark.parametrize(
        ("index", "weight", "dtype"),
        [
            (None, 0.0, torch.float32),
            (None, 0.3, torch.float32),
            (None, "tensor", torch.float16),
            ([2, 0], 1.0, torch.float16),
            ([2, 0], "tensor", torch.float32),
        ],
        ids=str,
    )
    def test_fused_query_blend(index, weight, dtype):
        problem = mixture(dtype)
        if weight == "tensor":
            weight = torch.rand(2, 1, 18)
            weight[0, :, 3:] = 0.0
            weight[1, :, ::2] = 1.0
            weight = weight.expand(2, 2, 18)
        index = None if index is None else torch.tensor(index)
        other = framed(normal(3 if index is not None else 1, 2, 18, 20, dtype=dtype))
        check_fused(problem, (other, weight, index), [NO_BLEND] * 4, [0] * 4, [1.0])

    @by_dtype
    def test_fused_key_blend(dtype):
        problem = mixture(dtype)
        blends = [
            (normal(1, 1, 33, 20, dtype=dtype), torch.rand(1, 33).expand(2, 1, 33), None),
            (framed(normal(2, 2, 5, 20, dtype=dtype)), 0.25, torch.tensor([1])),
            NO_BLEND,
            (normal(4, 1, 18, 20, dtype=dtype), torch.rand(4, 1, 18), torch.tensor([3, 2, 1, 1])),
        ]
        check_fused(problem, NO_BLEND, blends, [0, 0, 0, 0], [1.0])
        check_fused(problem, NO_BLEND, blends, [0, 1, 0, 1], [1.0, 0.5])

    @pytest.mark.parametrize("tensor", [False, True])
    @pytest.mark.parametrize("weight", [0.0, 1.0])
    def test_fused_blend_ends_are_exact(weight, tensor):
        # The side with weight 0 is NaN: it must not be mixed in, and the other is bit for bit.
        problem = plain(torch.float32)
        nothing = [torch.full_like(t, math.nan) for t in (problem.query, problem.keys[0])]
        expected, _ = attention.attention_forward(*problem.arguments())
        if weight == 0.0:
            others = nothing
        else:
            others = [problem.query, problem.keys[0]]
            problem = Problem(nothing[0], [nothing[1]], problem.values)
        weights = [weight, weight]
        if tensor:
            weights = [torch.full(t.shape[:3], weight) for t in others]
        out, _ = fused(
            problem,
            (others[0], weights[0], None),
            [(others[1], weights[1], None)],
            [0],
            [1.0],
        )
        assert torch.equal(out, expected)
