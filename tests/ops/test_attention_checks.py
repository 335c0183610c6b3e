"""``normalise``: what it lays out, and that it stays cheap, traceable and free of copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from transfuse import _checks
from transfuse.ops import KV, Blend, attend
from transfuse.ops._attention_call import hopper_limit
from transfuse.ops._sources import normalise, require_one_softmax

B, H, N, M, D = 2, 4, 5, 6, 8


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def source(**options: object) -> KV:
    return KV(zeros(B, H, M, D), zeros(B, H, M, D), **options)


def test_plain_call_is_the_core():
    call = normalise(zeros(B, H, N, D), source())
    assert call.is_core()
    assert call.scales == [1.0 / math.sqrt(D)]
    assert (call.causal, call.groups, call.gates) == ([0], [0], [1.0])
    assert call.biases == call.masks == call.indices == call.key_others == [None]
    assert call.query_other is None


def test_everything_is_laid_out_in_order():
    gate, bias = zeros(B, 1, N), zeros(M)
    mask = torch.ones(N, M, dtype=torch.bool)
    call = normalise(
        zeros(B, H, N, D),
        [
            source(group=1, gate=gate, temperature=2.0, bias=bias, causal="lower_right"),
            source(mask=mask, causal="upper_left", blend=Blend(zeros(1, H, M, D), zeros(M))),
            source(group=1, gate=gate, index=torch.tensor([1, 1], dtype=torch.int32)),
        ],
        blend=Blend(zeros(3, H, N, D), 1, torch.tensor([2, 0])),
        scale=0.5,
    )
    assert not call.is_core()
    assert call.scales == [1.0, 0.5, 0.5]
    assert call.causal == [2, 1, 0]
    assert call.groups == [1, 0, 1]
    assert call.gates[0] == 1.0
    assert call.gates[1].shape == (B, 1, N)
    assert call.biases[0].shape == (1, 1, 1, M)
    assert call.masks[1].shape == (1, 1, N, M)
    assert call.key_weights[1].shape == (1, 1, M)
    assert call.query_weight == 1.0
    assert isinstance(call.query_weight, float)
    assert call.indices[2].dtype == torch.int64
    assert call.query_index.tolist() == [2, 0]
    for view, own in ((call.biases[0], bias), (call.masks[1], mask), (call.gates[1], gate)):
        assert view.data_ptr() == own.data_ptr()


def test_one_gate_of_a_group_may_be_given_as_int_and_float():
    assert normalise(zeros(B, H, N, D), [source(gate=2), source(gate=2.0)]).gates == [2.0]


def test_sources_may_be_a_tuple():
    assert len(normalise(zeros(B, H, N, D), (source(), source())).keys) == 2


def test_one_softmax_is_required_for_a_log_sum_exp():
    require_one_softmax(normalise(zeros(B, H, N, D), [source(), source()]))
    with pytest.raises(ValueError, match="expected one group"):
        require_one_softmax(normalise(zeros(B, H, N, D), [source(), source(group=1)]))


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 4, 0)]
)
def test_empty_dimensions_are_legal(shape):
    b, h, n, d, m = shape
    normalise(
        zeros(b, h, n, d),
        KV(
            zeros(b, h, m, d),
            zeros(b, h, m, 3),
            bias=zeros(n, 1),
            mask=torch.ones(m, dtype=torch.bool),
            index=torch.arange(b),
        ),
    )


def test_bias_and_gate_may_be_float32_beside_a_narrow_query():
    query = zeros(B, H, N, D).bfloat16()
    key = zeros(B, H, M, D).bfloat16()
    call = normalise(query, KV(key, key, bias=zeros(M), gate=zeros(N)), Blend(query, zeros(N)))
    assert call.biases[0].dtype == torch.float32


def test_number_forms():
    assert _checks.number("x", 3) == 3.0
    with pytest.raises(TypeError, match="x: expected a Python number, got True"):
        _checks.number("x", True)


def test_index_values_are_not_read_where_there_are_none():
    """Fake tensors, and indices that a transform maps over, have no values to check."""
    with FakeTensorMode():
        index = torch.zeros(B, dtype=torch.int64)
        normalise(zeros(B, H, N, D), source(index=index))

    def call(index: torch.Tensor) -> torch.Tensor:
        return normalise(zeros(B, H, N, D), source(index=index)).indices[0]

    assert torch.vmap(call)(torch.tensor([[0, 1], [1, 1]])).tolist() == [[0, 1], [1, 1]]


def test_inference_tensors_as_index():
    with torch.inference_mode():
        index = torch.tensor([0, 2])
        with pytest.raises(ValueError, match="got 2"):
            normalise(zeros(B, H, N, D), source(index=index))


def test_traceable_as_one_graph():
    def call(query, key, bias, gate, index):
        result = normalise(
            query,
            [KV(key, key, bias=bias, index=index), KV(key, key, group=1, gate=gate)],
            Blend(query, 0.5),
        )
        return result.keys[0] * result.scales[0] + result.gates[1].sum()

    arguments = (
        torch.randn(B, H, N, D),
        torch.randn(B, H, M, D),
        torch.randn(M),
        torch.rand(B, 1, 1),
        torch.tensor([1, 0]),
    )
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), call(*arguments))


def test_sources_compare_by_identity():
    """Tensors have no truth value under ==, so neither has a source."""
    one, other = source(), source()
    assert one == one
    assert one != other
    assert len({one, other}) == 2
    with pytest.raises(AttributeError):
        one.gate = 2.0
    with pytest.raises(TypeError):
        KV(zeros(B, H, M, D), zeros(B, H, M, D), 1)


@pytest.mark.parametrize(
    ("width", "value_width", "sources", "word"),
    [
        (40, 128, 8, None),
        (44, 40, 1, "44"),
        (64, 136, 1, "136"),
        (64, 64, 9, "9 sources"),
    ],
)
def test_what_the_cuda_kernel_takes(width, value_width, sources, word):
    key, value = torch.zeros(1, 1, 2, width), torch.zeros(1, 1, 2, value_width)
    reason = hopper_limit(key, *(key, value) * sources)
    assert (reason is None) == (word is None)
    assert word is None or word in reason


def test_the_cuda_kernel_is_refused_with_its_reason():
    query = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        attend(query, KV(query, query), backend="cuda")
    with pytest.raises(RuntimeError, match="float32 is not one of bfloat16, float16"):
        attend(query.float(), KV(query.float(), query.float()), backend="cuda")
