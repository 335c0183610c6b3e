"""Triton kernels as ops of torch, which is how ``torch.compile`` calls them, under the interpreter.

One file for all families, since torch's compiler takes seconds to load. As in
``test_triton_attention.py``, the tests run in a child process that chose the interpreter before
importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_compiled.py``.
"""

import pytest
import torch

from transfuse.ops import (
    _windows,
    kernel_sums,
    lincomb,
    multi_dot,
    multi_gram,
    multi_norm,
    ties_merge,
)
from transfuse.testing import functorch
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import all_specs, find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 40

else:
    OPS = torch.ops.transfuse

    def normal(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))

    @pytest.mark.parametrize(
        ("op", "case"),
        [
            ("attend", "groups"),
            ("window_attention", "small"),
            ("nearest_tokens", "shared reference"),
            ("merge_tokens", "mean, weighted, curved"),
            ("merge_tokens", "amax, curved"),
            ("adain", "shared style"),
            ("noise_mix", "per sample"),
            ("normgrad_map", "norm"),
            ("patch_gram", "patches apart"),
        ],
    )
    def test_values_and_gradients(op, case):
        spec = find_spec(op)
        given = (functorch.COMPILED, spec, spec.case(case))
        outcome = functorch.run(*given, backend="triton", dtype=torch.float32)
        assert outcome.status == "right", outcome.detail

    @pytest.mark.parametrize(
        ("op", "case"),
        [
            ("attend", "groups"),
            ("window_attention", "small"),
            ("nes_perturb", "plain"),
            ("nes_gradient", "plain"),
        ],
    )
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

    def test_kernel_sums():
        x, y = normal(6, 3).requires_grad_(), normal(5, 3)
        weights = normal(5).abs().requires_grad_()

        def call(x, weights):
            return kernel_sums(x, y, 1.5, weights=weights, backend="triton").square().sum()

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        pairs = [torch.autograd.grad(f(x, weights), (x, weights)) for f in (compiled, call)]
        for found, want in zip(*pairs, strict=True):
            torch.testing.assert_close(found, want)

    def test_lists_of_tensors():
        one, two = ([torch.randn(3, 2), torch.randn(4)] for _ in range(2))
        one[0].requires_grad_()

        def call(one, two):
            gram = multi_gram([one, two], backend="triton")
            made = lincomb([one, two], gram[0], backend="triton")
            still = multi_norm(two, backend="triton") + multi_gram([two], backend="triton")[0, 0]
            return multi_dot(made, two, backend="triton") * still

        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        pairs = [torch.autograd.grad(f(one, two), one[0])[0] for f in (compiled, call)]
        torch.testing.assert_close(*pairs)
        merge = torch.compile(
            lambda one: ties_merge([one, two], density=0.5, backend="triton")[0],
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        one = [t.detach() for t in one]
        assert torch.equal(merge(one), ties_merge([one, two], density=0.5, backend="triton")[0])

    def test_head_curvature():
        spec = find_spec("head_hessian_product")
        case = spec.case("domains")
        args = case.build(torch.float32)
        names = ["features", "weight", "vectors"]

        def loss(backend, *tensors):
            given = {**args.tensors, **dict(zip(names, tensors, strict=True))}
            return args.run(spec.op, given, backend)[0].square().sum()

        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        leaves = [args.tensors[n].requires_grad_() for n in names]
        found = torch.autograd.grad(compiled("triton", *leaves), leaves)
        want = torch.autograd.grad(loss("reference", *leaves), leaves)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)

    def _told(op, *given):
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))

    def _raw_calls():
        """The sample calls of the C++ ops whose Triton kernel is an op too, by name. Those with
        gradients are left out: what is told is the same."""
        found = {}
        for spec in all_specs():
            for call in () if spec.raw_calls is None else spec.raw_calls("cpu"):
                twin = getattr(OPS, f"{call.op.__name__}_triton", None)
                leaves = torch.utils._pytree.tree_leaves(call.args)
                still = not any(isinstance(t, torch.Tensor) and t.requires_grad for t in leaves)
                if twin is not None and still:
                    found[f"{twin.__name__}, {call.name}"] = (twin, call.args)
        return found

    RAW = _raw_calls()

    @pytest.mark.parametrize("name", RAW)
    def test_what_the_compiler_is_told(name):
        """Shapes, strides and dtypes of the results, as the kernels have them."""
        op, given = RAW[name]
        _told(op, *given)

    def test_what_the_compiler_is_told_of_row_codes():
        _told(OPS.row_codes_triton, normal(5, 3), normal(4).sort().values, True)

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
