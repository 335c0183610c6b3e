"""The Triton token merging kernels under Triton's interpreter, against the float64 oracle.

As in ``test_triton_attention.py``, the tests run in a child process that chose the interpreter
before importing Triton: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_token_merging.py`` runs
them. The interpreter computes ``tl.dot`` of bfloat16 wrongly, so the search has no such test.
"""

import pytest
import torch
from kernel_cases import WAYS, check_kernel

from transfuse.ops import match_tokens, merge_tokens, nearest_tokens, unmerge_tokens
from transfuse.testing import inputs
from transfuse.testing.children import INTERPRETED, run_under_interpreter
from transfuse.testing.specs import find_spec

pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_under_the_interpreter():
        assert run_under_interpreter(__file__).passed > 60

else:
    NAMES = ("nearest_tokens", "merge_tokens", "unmerge_tokens", "push_tokens")
    # The interpreter runs programs one after the other: many rows take it long.
    MANY = ("odd grid", "everything", "primes", "deep", "tile and one more", "cells")
    CASES = [
        (find_spec(name), case)
        for name in NAMES
        for case in find_spec(name).cases
        if not case.tags & {"bench", "real"} and not case.name.startswith(MANY)
    ]

    def _identity(entry):
        return f"{entry[0].name}-{entry[1].name}".replace(" ", "_")

    def _check(spec, case, dtype, tensors=None):
        for way in WAYS:
            check_kernel(spec, case, dtype, way, tensors=tensors)

    @pytest.mark.parametrize("entry", CASES, ids=_identity)
    def test_value_gradient_and_tangent(entry):
        _check(*entry, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("entry", CASES, ids=_identity)
    def test_half_precision(entry, dtype):
        searches = entry[0].name in ("nearest_tokens", "push_tokens")
        if "tiny" not in entry[1].tags or (searches and dtype == torch.bfloat16):
            pytest.skip("one case of each kind; the interpreter has no bfloat16 dot product")
        _check(*entry, dtype)

    # torch itself refuses forward mode at an expanded tensor.
    @pytest.mark.parametrize("kind", [k for k in inputs.STRIDES if k != "expanded"])
    @pytest.mark.parametrize("name", NAMES)
    def test_strides(name, kind):
        spec = find_spec(name)
        case = spec.case(spec.gradcheck[0])
        tensors = case.build(torch.float32).tensors
        tensors = {k: inputs.strided(t, kind) for k, t in tensors.items()}
        _check(spec, case, torch.float32, tensors)

    def test_more_than_one_tile_in_every_direction():
        x, reference = torch.randn(2, 131, 70), torch.randn(1, 133, 70)
        mask = torch.rand(2, 133) < 0.5
        found = nearest_tokens(x, reference, mask=mask, backend="triton")
        truth = nearest_tokens(x.double(), reference.double(), mask=mask, backend="reference")
        assert torch.equal(found.index, truth.index)
        torch.testing.assert_close(found.similarity, truth.similarity.float())

    def test_ties_and_bad_numbers():
        x = torch.randn(1, 4, 8).repeat(1, 40, 1)
        found = nearest_tokens(x, x, backend="triton")
        assert torch.equal(found.index, torch.arange(4).repeat(40)[None])
        x = torch.randn(1, 6, 8)
        x[0, 2, 3] = float("nan")
        found = nearest_tokens(x, x, exclude_self=True, backend="triton")
        truth = nearest_tokens(x, x, exclude_self=True, backend="reference")
        assert torch.equal(found.index, truth.index)
        torch.testing.assert_close(found.similarity, truth.similarity, equal_nan=True)

    def test_plans_agree_with_the_reference():
        metric = torch.randn(2, 63, 12)
        for options in ({"protect": (0,)}, {"size": (7, 9)}, {"size": (9, 7), "stride": (3, 2)}):
            plan = match_tokens(metric, 20, backend="triton", **options)
            truth = match_tokens(metric, 20, backend="reference", **options)
            assert all(torch.equal(a, b) for a, b in zip(plan, truth, strict=True))
            y = merge_tokens(metric, plan, backend="triton")
            assert torch.equal(
                unmerge_tokens(y, plan, backend="triton"),
                unmerge_tokens(y, plan, backend="reference"),
            )
