"""The Triton windowed attention under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_window_attention.py``.
"""

import pytest
import torch

from transfuse.testing import CallArgs, oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec
from transfuse.testing.specs.window_attention import Plan

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 40

else:
    SPEC = find_spec("window_attention")
    # The interpreter runs programs one after the other: a window of many keys takes it minutes.
    # Several blocks of keys are tried with small blocks instead.
    CASES = [c for c in SPEC.cases if "real" not in c.tags and c.name != "long window"]

    def _check_value(args):
        kernel = oracle.function(args, SPEC.op, "triton")
        reference = oracle.function(args, SPEC.reference)
        problems = oracle.compare_all(
            oracle.values(kernel, args.tensors),
            oracle.values(reference, oracle.widen(args.tensors)),
            oracle.values(reference, args.tensors),
            units=oracle.VALUE_UNITS,
            terms=oracle.magnitude(*args.tensors.values()),
            names=["out"],
        )
        assert not problems, "\n".join(problems)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
    def test_value(case, dtype):
        _check_value(case.build(dtype))

    @pytest.mark.parametrize("wrap", ["cyclic", "mask"])
    def test_several_blocks(monkeypatch, wrap):
        monkeypatch.setenv("TRANSFUSE_TRITON_CONFIG", "forward:16=16,16,1,1")
        plan = Plan((8, 9), window=(5, 7), shift=2, wrap=wrap, bias="relative", heads=1, width=8)
        generator = torch.Generator().manual_seed(0)
        tensors = plan.draw(torch.float32, torch.device("cpu"), generator)
        _check_value(CallArgs(plan.call, tensors))

    @pytest.mark.parametrize("name", ["small", "uneven, masked", "extra keys"])
    def test_gradient(name):
        case = SPEC.case(name)
        args = case.build(torch.float32)
        kernel = oracle.function(args, SPEC.op, "triton")
        reference = oracle.function(args, SPEC.reference)
        generator = torch.Generator().manual_seed(0)
        cotangents = oracle.directions(oracle.values(reference, args.tensors), generator)
        names = case.differentiable
        truth = oracle.gradients(
            reference, oracle.widen(args.tensors), names, [c.double() for c in cotangents]
        )
        problems = oracle.compare_all(
            oracle.gradients(kernel, args.tensors, names, cotangents),
            truth,
            oracle.gradients(reference, args.tensors, names, cotangents),
            units=oracle.GRADIENT_UNITS,
            terms=oracle.magnitude(*truth),
            names=names,
        )
        assert not problems, "\n".join(problems)
