"""The Triton kernels on lists of tensors under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch
from kernel_cases import check_kernel

from transfuse.ops import lincomb
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 15

else:
    SPEC = find_spec("lincomb")
    CASES = [c for c in SPEC.cases if not c.tags & {"bench", "real"}]
    SMALL = ["base", "ids", "hash"]

    @pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "_"))
    def test_values(case):
        check_kernel(SPEC, case, torch.float32, "value")

    @pytest.mark.parametrize("name", [*SMALL, "half lists", "per list"])
    def test_gradients(name):
        check_kernel(SPEC, SPEC.case(name), torch.float32, "gradient")

    @pytest.mark.parametrize("name", SMALL)
    def test_half_precision(name):
        check_kernel(SPEC, SPEC.case(name), torch.float16, "value")

    def test_partitions_are_those_of_the_definition():
        one = [torch.ones(5000)]
        table = torch.arange(7.0).reshape(1, 1, 7)
        results = [
            lincomb([one], table, partition=seed, backend=backend)[0]
            for backend in ("triton", "reference")
            for seed in (3, -(2**60))
        ]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])

    def test_float64_is_refused():
        one = [torch.ones(3, dtype=torch.float64)]
        with pytest.raises(RuntimeError, match="float64 is not one of"):
            lincomb([one], torch.ones(1), backend="triton")
