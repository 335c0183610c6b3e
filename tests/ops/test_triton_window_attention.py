"""The Triton windowed attention under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_window_attention.py``.
"""

import pytest
import torch

from transfuse.testing import oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 40

else:
    SPEC = find_spec("window_attention")
    CASES = [case for case in SPEC.cases if "real" not in case.tags]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
    def test_value(case, dtype):
        args = case.build(dtype)
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

    @pytest.mark.parametrize("name", ["small", "swin", "uneven, masked", "extra keys"])
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
