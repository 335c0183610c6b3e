"""The Triton kernels of the saliency maps under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton.
"""

import pytest
import torch

from transfuse.ops import grad_weighted_map, normgrad_map
from transfuse.testing import oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 20

else:
    # The interpreter runs programs one after the other, so a few of every kernel.
    CASES = [
        pytest.param(find_spec(name), case, id=f"{name}-{case}".replace(" ", "_"))
        for name, cases in {
            "grad_weighted_map": (
                "gradcam", "gradcam++", "xgradcam", "layercam", "elementwise", "tokens",
                "no locations", "many channels",
            ),
            "normgrad_map": (
                "norm", "sum", "3x3 filter norm", "3x3 max", "depthwise sum", "selective",
                "scaling max", "bias norm", "proper", "proper max", "no batch",
            ),
        }.items()
        for case in cases
    ]  # fmt: skip
    HALF = [
        pytest.param(find_spec(name), case, id=f"{name}-{case}".replace(" ", "_"))
        for name, case in (
            ("grad_weighted_map", "xgradcam"),
            ("grad_weighted_map", "layercam"),
            ("normgrad_map", "3x3 max"),
            ("normgrad_map", "depthwise norm"),
        )
    ]

    def _check(spec, case, dtype):
        args = case.build(dtype)
        kernel = oracle.function(args, spec.op, "triton")
        reference = oracle.function(args, spec.reference)
        problems = oracle.compare_all(
            oracle.values(kernel, args.tensors),
            oracle.values(reference, oracle.widen(args.tensors)),
            oracle.values(reference, args.tensors),
            units=oracle.VALUE_UNITS,
            terms=1.0,
            names=["map"],
        )
        assert not problems, problems

    @pytest.mark.parametrize(("spec", "case"), CASES)
    def test_values(spec, case):
        _check(spec, spec.case(case), torch.float32)

    @pytest.mark.parametrize(("spec", "case"), HALF)
    def test_half_precision(spec, case):
        for dtype in (torch.float16, torch.bfloat16):
            _check(spec, spec.case(case), dtype)

    def test_nan_stays_where_it_is_seen():
        act, grad = torch.randn(2, 1, 2, 3, 5).unbind()
        act[0, 1, 0, 0] = torch.nan
        for phase1, seen in (("conv1x1", 1), ("conv3x3", 4), ("conv3x3_depthwise", 4)):
            for phase2 in ("norm", "filter_norm", "sum", "max"):
                found = normgrad_map(act, grad, phase1=phase1, phase2=phase2, backend="triton")
                want = normgrad_map(act, grad, phase1=phase1, phase2=phase2, backend="reference")
                assert torch.equal(found.isnan(), want.isnan())
                assert found.isnan().sum() == seen
        found = grad_weighted_map(act, grad, method="elementwise", backend="triton")
        assert found.isnan().sum() == 1

    def test_float64_is_refused():
        x = torch.ones(1, 1, 2, 2).double()
        with pytest.raises(RuntimeError, match="float64 is not one of"):
            grad_weighted_map(x, x, backend="triton")
