"""Every instruction set that this processor has, and that the other tests do not take."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from transfuse.testing import levels
from transfuse.testing.children import ISA_LEVELS, isa_supported, run_at_isa_level
from transfuse.testing.specs import find_spec

_C = pytest.importorskip("transfuse._C")


@pytest.mark.parametrize("level", ISA_LEVELS)
def test_every_instruction_set(level):
    if not isa_supported(level):
        pytest.skip(f"this processor does not run {level}")
    if level == _C.isa_in_use():
        pytest.skip(f"{level} is what all other tests run at")
    tried = re.fullmatch(rf"{level}: (\d+) calls, 0 differences\n", run_at_isa_level(level))
    assert int(tried[1]) > 500


def test_a_difference_is_found():
    spec = find_spec("adain")
    case = spec.case(spec.gradcheck[0])
    assert levels.problems(spec, case, torch.float32) == []
    wrong = dataclasses.replace(spec, op=lambda *args, **options: 1.001 * spec.op(*args, **options))
    found = levels.problems(wrong, case, torch.float32)
    assert {problem.split(":")[0] for problem in found} >= {"result 0", "gradient by content"}
    assert levels.main(["no such op"]) == 2
