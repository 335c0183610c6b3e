"""The Triton adain kernels under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_adain.py`` runs them.
"""

import pytest
import torch
from kernel_cases import check_kernel

from transfuse.ops import adain
from transfuse.ops._adain_reference import adain_reference
from transfuse.testing import inputs, oracle
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 35

else:
    SPEC = find_spec("adain")
    # The interpreter runs programs one after the other: many planes, or long ones, take it long.
    # ("large mean" has planes of several blocks.)
    MANY = {"primes", "long planes", "channels last, wide", "channels last, very wide"}
    CASES = [c for c in SPEC.cases if not c.tags & {"bench", "real"} and c.name not in MANY]
    HALF = ["plain", "shared style", "batch statistics", "channels last", "tokens"]

    def _check(case, dtype, tensors=None):
        check_kernel(SPEC, case, dtype, "value", tensors=tensors)
        for way in ("gradient", "tangent"):
            units = oracle.GRADIENT_UNITS
            check_kernel(SPEC, case, dtype, way, tensors=tensors, units=units)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
    def test_value_gradient_and_tangent(case):
        _check(case, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", HALF)
    def test_half_precision(name, dtype):
        _check(SPEC.case(name), dtype)

    # torch itself refuses forward mode at an expanded tensor. Planes beside each other have many
    # more programs to interpret.
    @pytest.mark.parametrize(
        ("name", "kind"),
        [("plain", k) for k in inputs.STRIDES if k != "expanded"] + [("channels last", "sliced")],
    )
    def test_strides(name, kind):
        case = SPEC.case(name)
        tensors = case.build(torch.float32).tensors
        _check(case, torch.float32, {k: inputs.strided(t, kind) for k, t in tensors.items()})

    def test_more_axes_than_a_kernel_has():
        content = torch.randn(3, 2, 4, 3, 5, 2)[:, :, ::2, :, ::2]
        style = torch.randn(1, 2, 5, 3, 2, 2)
        for dims in ((2, 4), (0, 2, 4), (1, 3, 5)):
            partner = style if dims != (1, 3, 5) else torch.randn(3, 1, 2, 2, 3, 5)
            result = adain(content, partner, dims=dims, backend="triton")
            expected = adain_reference(content.double(), partner.double(), dims=dims)
            torch.testing.assert_close(result, expected.float())

    def test_second_derivatives_are_composed():
        content = torch.randn(2, 3, 3, 2, requires_grad=True)
        style = torch.randn(1, 3, 2, 2, requires_grad=True)

        def twice(backend):
            out = adain(content, style, eps=0.1, backend=backend).pow(3).sum()
            first = torch.autograd.grad(out, (content, style), create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), (content, style))

        for one, other in zip(twice("triton"), twice("reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
