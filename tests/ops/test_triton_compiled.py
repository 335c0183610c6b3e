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
from transfuse.testing.specs import all_specs, find_spec

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
            ("nearest_tokens", "shared reference"),
            ("merge_tokens", "mean, weighted, curved"),
            ("merge_tokens", "amax, curved"),
            ("push_tokens", "shared reference"),
            ("adain", "shared style"),
            ("noise_mix", "per sample"),
            ("normgrad_map", "norm"),
            ("grad_weighted_map", "xgradcam"),
            ("patch_gram", "stride"),
        ],
    )
    def test_values_and_gradients(op, case):
        spec = find_spec(op)
        given = (functorch.COMPILED, spec, spec.case(case))
        outcome = functorch.run(*given, backend="triton", dtype=torch.float32)
        assert outcome.status == "right", outcome.detail

    @pytest.mark.parametrize(("op", "case"), [("attend", "groups"), ("window_attention", "small")])
    def test_values_of_kernels_without_derivatives(op, case):
        """Blends and groups, and windows, are fused only where no gradient is wanted."""
        spec = find_spec(op)
        (check,) = (c for c in functorch.CHECKS if c.name == "compile, dynamic")
        outcome = functorch.run(check, spec, spec.case(case), backend="triton", dtype=torch.float32)
        assert outcome.status == "right", outcome.detail

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

    def _told(op, *given):
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))

    def _raw_calls():
        """The sample calls of the C++ ops whose Triton kernel is an op too."""
        for spec in all_specs():
            for call in () if spec.raw_calls is None else spec.raw_calls("cpu"):
                twin = getattr(OPS, f"{call.op.__name__}_triton", None)
                if twin is not None:
                    yield pytest.param(twin, call, id=f"{twin.__name__}, {call.name}")

    @pytest.mark.parametrize(("op", "call"), list(_raw_calls()))
    def test_what_the_compiler_is_told(op, call):
        """Shapes, strides and dtypes of the results, as the kernels have them."""
        _told(op, *call.args)

    def test_what_the_compiler_is_told_of_attention():
        query, key, value, bias, mask, index = _source()
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        core = (query, [key], [value], [bias], [0], [mask], [index], [0.5], [0], [])
        out, lse = OPS.attention_forward_triton(*core)
        _told(OPS.attention_forward_triton, *core)
        grad = torch.ones_like(out)
        _told(OPS.attention_backward_triton, grad, None, *core, out, lse, [True])
        blends = (query, None, 0.0, None, None, [key], [value], [key], [0.25], [None], [None])
        groups = ([bias], [0], [mask], [index], [0.5], [0], [0], [1.0], [None])
        _told(OPS.attention_fused_triton, *blends, *groups)

    @pytest.mark.parametrize("kind", [_windows.BIAS_NONE, _windows.BIAS_FULL])
    def test_what_the_compiler_is_told_of_windows(kind):
        own = _windows.grid((2, 3), 2, shift=1, wrap="mask")
        query, key = normal(1, 6, 2, 4).transpose(1, 2), normal(1, 2, 6, 4)
        bias = None if kind == _windows.BIAS_NONE else normal(1, 1, 1, own.slots**2)
        assert _windows.grid_of(own.numbers(kind)) == (own, kind)
        given = (query, key, key[..., :3], bias, own.numbers(kind), 0.5)
        _told(OPS.window_attention_triton, *given)

    def test_second_derivatives_of_attention_are_refused():
        query, key, value, *_, index = _source()
        query.requires_grad_()
        core = (query, [key], [value], [], [-1], [None], [index], [0.5], [0], [])
        out, _ = OPS.attention_forward_triton(*core)
        (first,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            first.sum().backward()
