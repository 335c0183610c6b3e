"""The Triton patch_gram kernel under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton. The interpreter computes ``tl.dot`` of bfloat16 wrongly.
"""

import pytest
import torch

from transfuse.ops import patch_gram
from transfuse.testing import oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 20

else:
    SPEC = find_spec("patch_gram")
    CASES = [c for c in SPEC.cases if not c.tags & {"bench", "real"}]
    HALF = ["3x3", "stride and dilation", "many channels", "channels last"]

    def _check(case, dtype):
        args = case.build(dtype)
        kernel = oracle.function(args, SPEC.op, "triton")
        reference = oracle.function(args, SPEC.reference)
        problems = oracle.compare_all(
            oracle.values(kernel, args.tensors),
            oracle.values(reference, oracle.widen(args.tensors)),
            oracle.values(reference, args.tensors),
            units=oracle.VALUE_UNITS,
            terms=1.0,
            names=["S"],
        )
        assert not problems, problems

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "_"))
    def test_values(case):
        _check(case, torch.float32)

    @pytest.mark.parametrize("name", HALF)
    def test_half_precision(name):
        _check(SPEC.case(name), torch.float16)

    def test_stretches_and_groups(monkeypatch):
        from transfuse.triton_kernels import patch_gram as kernels

        monkeypatch.setattr(kernels, "STRETCH", 64)
        x = torch.randn(3, 2, 3, 9, 11)
        together = torch.vmap(lambda one: patch_gram(one, 3, padding=1, backend="triton"))(x)
        for one, got in zip(x, together, strict=True):
            torch.testing.assert_close(got, patch_gram(one, 3, padding=1, backend="reference"))
            assert torch.equal(got, got.T)
        assert kernels.stretches_of(2 * 99, 27, 3) == 4

    def test_float64_is_refused():
        with pytest.raises(RuntimeError, match="float64 is not one of"):
            patch_gram(torch.ones(1, 1, 3, 3).double(), 2, backend="triton")
