"""The Triton kernel of the sampling ops under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_mix.py`` runs them.
"""

import pytest
import torch
from kernel_cases import WAYS, check_kernel

from transfuse.testing import inputs, oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 80

else:
    NAMES = (
        "cfg_step",
        "cfg_step_with_original",
        "cfg_step_with_cosine",
        "noise_mix",
        "noise_mix_with_velocity",
    )
    CASES = [
        pytest.param(spec, case, id=f"{spec.name}-{case.name}".replace(" ", "_"))
        for spec in map(find_spec, NAMES)
        for case in spec.cases
        # The interpreter runs programs one after the other: many blocks take it long, so one
        # op tries them.
        if not case.tags & {"bench", "real"}
        and case.name != "many samples"
        and (not case.name.startswith("long") or spec.name == "cfg_step")
    ]
    SOME = [
        pytest.param(find_spec(name), find_spec(name).case(case), id=f"{name}-{case}")
        for name, case in (
            ("cfg_step", "everything"),
            ("cfg_step", "euler, v, per sample"),
            ("cfg_step_with_cosine", "everything, original"),
            ("noise_mix", "per sample"),
        )
    ]

    @pytest.mark.parametrize(("spec", "case"), CASES)
    def test_value_gradient_and_tangent(spec, case):
        for way in WAYS:
            check_kernel(spec, case, torch.float32, way)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("spec", "case"), SOME)
    def test_half_precision(spec, case, dtype):
        for way in WAYS:
            check_kernel(spec, case, dtype, way)

    # torch itself refuses forward mode at an expanded tensor.
    @pytest.mark.parametrize("kind", [k for k in inputs.STRIDES if k != "expanded"])
    @pytest.mark.parametrize(("spec", "case"), SOME)
    def test_strides(spec, case, kind):
        tensors = case.build(torch.float32).tensors
        tensors = {k: inputs.strided(t, kind) for k, t in tensors.items()}
        for way in WAYS:
            check_kernel(spec, case, torch.float32, way, tensors=tensors)

    @pytest.mark.parametrize(("spec", "case"), SOME)
    def test_second_derivatives(spec, case):
        args = case.build(torch.float32)
        generator = torch.Generator().manual_seed(0)
        reference = oracle.function(args, spec.reference)
        outputs = oracle.values(reference, args.tensors)
        cotangents = oracle.directions(outputs, generator)
        moves = oracle.directions([args.tensors[n] for n in case.differentiable], generator)
        results = [
            oracle.second_gradients(fn, args.tensors, case.differentiable, cotangents, moves)
            for fn in (oracle.function(args, spec.op, "triton"), reference)
        ]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
