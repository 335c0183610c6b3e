"""The specification of attention against torch's own attention and against its own algebra."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from transfuse.ops import KV, Blend
from transfuse.ops._attention_reference import (
    attend_reference,
    attend_with_lse_reference,
    core_reference,
    merge_attention_reference,
)

B, H, N, M, D, DV = 2, 4, 7, 9, 6, 5


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def query() -> torch.Tensor:
    return normal(B, H, N, D)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return normal(B, H, M, D), normal(B, H, M, DV)


def same(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_is_scaled_dot_product_attention(query, pair):
    same(attend_reference(query, KV(*pair)), F.scaled_dot_product_attention(query, *pair))
    same(
        attend_reference(query, KV(*pair), scale=0.3),
        F.scaled_dot_product_attention(query, *pair, scale=0.3),
    )


def test_temperature_multiplies_the_scale_and_not_the_bias(query, pair):
    bias = normal(H, 1, M)
    same(
        attend_reference(query, KV(*pair, temperature=1.5, bias=bias)),
        F.scaled_dot_product_attention(
            query, *pair, attn_mask=bias.expand(B, H, N, M), scale=1.5 / math.sqrt(D)
        ),
    )


@pytest.mark.parametrize(
    "shape", [(), (M,), (N, M), (N, 1), (H, 1, M), (B, 1, 1, M), (B, H, N, M), (1, 1, 1, 1)]
)
def test_bias_broadcasts_by_torch_rules(query, pair, shape):
    bias = normal(*shape)
    expanded = bias.expand(B, H, N, M)
    same(
        attend_reference(query, KV(*pair, bias=bias)),
        F.scaled_dot_product_attention(query, *pair, attn_mask=expanded),
    )


@pytest.mark.parametrize("shape", [(M,), (N, M), (B, 1, 1, M), (B, H, N, M)])
def test_mask_allows_where_true(query, pair, shape):
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    expanded = mask.expand(B, H, N, M)
    same(
        attend_reference(query, KV(*pair, mask=mask)),
        F.scaled_dot_product_attention(query, *pair, attn_mask=expanded),
    )


@pytest.mark.parametrize(("n", "m"), [(4, 4), (4, 7), (7, 4)])
@pytest.mark.parametrize("corner", ["upper_left", "lower_right"])
def test_causal_corners(n, m, corner):
    query, key, value = normal(1, 1, n, D), normal(1, 1, m, D), normal(1, 1, m, DV)
    allowed = torch.tensor(
        [[j <= i + (m - n if corner == "lower_right" else 0) for j in range(m)] for i in range(n)]
    )
    same(
        attend_reference(query, KV(key, value, causal=corner)),
        attend_reference(query, KV(key, value, mask=allowed)),
    )


def test_sources_of_one_group_are_a_concatenation(query, pair):
    other = normal(B, H, 3, D), normal(B, H, 3, DV)
    joined = [torch.cat(parts, dim=2) for parts in zip(pair, other, strict=True)]
    bias = normal(3)
    shift = torch.cat([torch.zeros(M, dtype=torch.float64), bias])
    same(
        attend_reference(query, [KV(*pair), KV(*other, bias=bias)]),
        attend_reference(query, KV(*joined, bias=shift)),
    )


def test_groups_are_summed_with_their_gates(query, pair):
    other = normal(B, H, 3, D), normal(B, H, 3, DV)
    gate = normal(B, 1, N)
    expected = attend_reference(query, KV(*pair)) + gate[..., None] * attend_reference(
        query, KV(*other)
    )
    same(attend_reference(query, [KV(*pair), KV(*other, group=1, gate=gate)]), expected)
    swapped = [KV(*other, group=1, gate=gate), KV(*pair)]
    same(attend_reference(query, swapped), expected)


def test_gate_and_blend_ends_are_exact(query, pair):
    plain = attend_reference(query, KV(*pair))
    unused = torch.full_like(query, torch.nan)
    assert torch.equal(attend_reference(query, KV(*pair, gate=1.0)), plain)
    assert torch.equal(attend_reference(query, KV(*pair), blend=Blend(unused, 0.0)), plain)
    assert torch.equal(attend_reference(unused, KV(*pair), blend=Blend(query, 1.0)), plain)
    assert not attend_reference(query, KV(*pair, gate=0.0)).any()


def test_blends_mix_before_the_logits(query, pair):
    key, value = pair
    other, weight = normal(3, H, N, D), torch.rand(B, 1, N, dtype=torch.float64)
    index = torch.tensor([2, 0])
    mixed = (1 - weight[..., None]) * query + weight[..., None] * other[index]
    same(
        attend_reference(query, KV(*pair), blend=Blend(other, weight, index)),
        attend_reference(mixed, KV(*pair)),
    )
    other, weight = normal(1, H, M, D), torch.rand(M, dtype=torch.float64)
    mixed = (1 - weight[:, None]) * key + weight[:, None] * other
    same(
        attend_reference(query, KV(key, value, blend=Blend(other, weight))),
        attend_reference(query, KV(mixed, value)),
    )


def test_index_and_grouped_heads_select_sources(query):
    key, value = normal(3, 2, M, D), normal(3, 2, M, DV)
    index = torch.tensor([2, 2], dtype=torch.int32)
    chosen = [t[index.long()].repeat_interleave(2, dim=1) for t in (key, value)]
    same(attend_reference(query, KV(key, value, index=index)), attend_reference(query, KV(*chosen)))
    shared = key[:1], value[:1]
    repeated = [t.expand(B, -1, -1, -1).repeat_interleave(2, dim=1) for t in shared]
    same(attend_reference(query, KV(*shared)), attend_reference(query, KV(*repeated)))


def test_empty_rows_give_zero_and_minus_infinity(query, pair):
    mask = torch.ones(N, M, dtype=torch.bool)
    mask[2] = False
    out, lse = attend_with_lse_reference(query, KV(*pair, mask=mask))
    assert not out[:, :, 2].any()
    assert torch.equal(lse == -torch.inf, ~mask.any(-1).expand(B, H, N))
    bias = torch.zeros(N, M, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    again, again_lse = attend_with_lse_reference(query, KV(*pair, bias=bias))
    assert torch.equal(again, out)
    assert torch.equal(again_lse, lse)


def test_lse_is_log_sum_exp_of_the_logits(query, pair):
    _, lse = attend_with_lse_reference(query, KV(*pair, temperature=2.0))
    logits = 2.0 / math.sqrt(D) * query @ pair[0].transpose(-1, -2)
    same(lse, torch.logsumexp(logits, dim=-1))


def test_merge_restores_attention_over_the_union(query, pair):
    mask = torch.rand(N, M) < 0.4
    whole = attend_with_lse_reference(query, KV(*pair, mask=mask))
    parts = [
        attend_with_lse_reference(query, KV(pair[0][:, :, s], pair[1][:, :, s], mask=mask[:, s]))
        for s in (slice(0, 2), slice(2, 2), slice(2, M))
    ]
    outs, lses = zip(*parts, strict=True)
    merged = merge_attention_reference(outs, lses)
    same(merged.out, whole.out)
    same(merged.lse, whole.lse)
    again = merge_attention_reference(
        [outs[0], merge_attention_reference(outs[1:], lses[1:]).out],
        [lses[0], merge_attention_reference(outs[1:], lses[1:]).lse],
    )
    same(again.out, whole.out)


def test_merge_gates_scale_contributions_only(query, pair):
    a = attend_with_lse_reference(query, KV(*pair))
    b = attend_with_lse_reference(query, KV(pair[0] + 1.0, pair[1]))
    gate = normal(B, 1, 1)
    plain = merge_attention_reference([a.out, b.out], [a.lse, b.lse])
    first = merge_attention_reference([a.out, b.out], [a.lse, b.lse], [1.0, 0.0])
    second = merge_attention_reference([a.out, b.out], [a.lse, b.lse], [0.0, gate])
    same(second.lse, plain.lse)
    same(first.out + second.out / gate[..., None], plain.out)


def test_core_is_attend_without_wrapping(query, pair):
    bias, mask = normal(N, M), torch.rand(B, 1, N, M) < 0.7
    out, lse = core_reference(query, [pair[0]], [pair[1]], [bias], [mask], [None], [0.3], [1])
    expected = attend_with_lse_reference(
        query, KV(*pair, bias=bias, mask=mask, causal="upper_left"), scale=0.3
    )
    assert torch.equal(out, expected.out)
    assert torch.equal(lse, expected.lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(query, pair, dtype):
    """Inputs in a narrow type, arithmetic in float32: the output is off by its rounding alone."""
    query, key, value = (t.to(dtype) for t in (query, *pair))
    out, lse = attend_with_lse_reference(query, KV(key, value))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = attend_reference(query.double(), KV(key.double(), value.double()))
    error = (out.double() - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * exact.abs().max()


def test_derivatives_of_empty_rows_are_zero_and_finite(query, pair):
    """Fully masked rows and -inf biases must not turn gradients of any order into NaN."""
    mask = torch.rand(B, 1, N, M) < 0.5
    mask[:, :, 0] = False
    bias = normal(H, N, M)
    bias[:, 1] = -torch.inf
    bias[:, 2, 0] = -torch.inf
    inputs = [t.requires_grad_() for t in (query, *pair, bias)]

    def call(query, key, value, bias):
        return attend_with_lse_reference(query, KV(key, value, mask=mask, bias=bias))

    out, lse = call(*inputs)
    # Also through the -inf itself: its derivative is zero, not NaN.
    first = torch.autograd.grad((out.sin().sum(), lse.sum()), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs)
    tangents = torch.func.jvp(
        lambda *args: tuple(call(*args)),
        tuple(inputs),
        tuple(torch.where(t.isfinite(), torch.randn_like(t), 0.0) for t in inputs),
    )[1]
    for tensor in (*first, *second, *tangents):
        assert tensor.isfinite().all()
    assert not first[0][:, :, :2].any()
    assert not first[3][:, :2].any()
