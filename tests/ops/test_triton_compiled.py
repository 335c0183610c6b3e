"""Triton kernels as ops of torch, which is how ``torch.compile`` calls them, under the interpreter.

One file for all families, since torch's compiler takes seconds to load. As in
``test_triton_attention.py``, the tests run in a child process that chose the interpreter before
importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_compiled.py``.
"""

import pytest
import torch

from transfuse.ops import KV, _windows, attend
from transfuse.testing import functorch
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 10

else:
    OPS = torch.ops.transfuse

    def normal(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    @pytest.mark.parametrize(
        ("op", "case"),
        [
            ("attend", "groups"),
            ("attend_with_lse", "small"),
            ("window_attention", "small"),
        ],
    )
    def test_values_and_gradients(op, case):
        functorch.assert_compiles(find_spec(op), case, backend="triton")

    def _source():
        """A call with an index map, a bias of one number per key, and a mask."""
        query, key, value = normal(2, 2, 3, 8), normal(3, 1, 5, 8), normal(3, 1, 5, 4)
        mask = normal(2, 1, 3, 5) > -0.5
        return query, key, value, normal(1, 2, 1, 5), mask, torch.tensor([2, 0])

    def test_tensors_that_have_no_gradient():
        *tensors, mask, index = _source()

        def call(query, key, value, bias):
            source = KV(key, value, bias=bias, mask=mask, index=index)
            return attend(query, source, backend="triton").square().sum()

        tensors = [t.requires_grad_() for t in tensors]
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        found, want = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, call))
        assert all(bool(g.any()) for g in want)
        torch.testing.assert_close(found, want)

    def _attention():
        query, key, value, bias, mask, index = _source()
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        core = (query, [key], [value], [bias], [0], [mask], [index], [0.5], [0], [])
        out, lse = OPS.attention_forward_triton(*core)
        grad, none = torch.ones_like(out), [None]
        yield OPS.attention_forward_triton, core
        yield OPS.attention_backward_triton, (grad, None, *core, out, lse, [True])
        blends = (query, None, 0.0, None, None, [key], [value], [key], [0.25], none, none)
        groups = ([bias], [0], [mask], [index], [0.5], [0], [0], [1.0], none)
        yield OPS.attention_fused_triton, (*blends, *groups)

    def _window_attention():
        own = _windows.grid((2, 3), 2, shift=1, wrap="mask")
        query, key = normal(1, 6, 2, 4).transpose(1, 2), normal(1, 2, 6, 4)
        for kind, bias in (
            (_windows.BIAS_NONE, None),
            (_windows.BIAS_FULL, normal(1, 1, 1, own.slots**2)),
        ):
            assert _windows.grid_of(own.numbers(kind)) == (own, kind)
            given = (query, key, key[..., :3], bias, own.numbers(kind), 0.5)
            yield OPS.window_attention_triton, given

    @pytest.mark.parametrize("calls", [_attention, _window_attention])
    def test_what_the_compiler_is_told(calls):
        """Shapes, strides and dtypes of the results, as the kernels have them."""
        for op, given in calls():
            torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))

    def test_second_derivatives_of_attention_are_refused():
        query, key, value, *_, index = _source()
        query.requires_grad_()
        core = (query, [key], [value], [], [-1], [None], [index], [0.5], [0], [])
        out, _ = OPS.attention_forward_triton(*core)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            first.sum().backward()
