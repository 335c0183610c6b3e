"""Every CPU kernel at the instruction set in use, against the float64 oracle.

``TRANSFUSE_CPU_ISA=portable python -m transfuse.testing.levels`` tries the cases of every op's spec
that are small, values and gradients: all in float32, those named in ``gradcheck`` in the other
dtypes, which only load and store differently. Prints the level and the number of calls; the exit
status counts a difference. Ops to try may be named.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from transfuse.testing import functorch, oracle
from transfuse.testing.spec import Case, OpSpec
from transfuse.testing.specs import all_specs


def calls(specs: Sequence[OpSpec]) -> Iterator[tuple[OpSpec, Case, torch.dtype]]:
    """What is tried."""
    for spec in specs:
        if "cpu" not in spec.backends:
            continue
        for case in spec.cases:
            if case.tags & {"bench", "real"}:
                continue
            for dtype in spec.dtypes:
                if dtype == torch.float32 or case.name in spec.gradcheck:
                    yield spec, case, dtype


def problems(spec: OpSpec, case: Case, dtype: torch.dtype) -> list[str]:
    """What is wrong with one call; an empty list if nothing is."""
    args = case.build(dtype)
    kernel = oracle.function(args, spec.op, "cpu")
    reference = oracle.function(args, spec.reference)
    wide = oracle.widen(args.tensors)
    truth = oracle.values(reference, wide)
    found = oracle.compare_all(
        oracle.values(kernel, args.tensors),
        truth,
        oracle.values(reference, args.tensors),
        units=oracle.VALUE_UNITS,
        terms=oracle.magnitude(*args.tensors.values()),
        names=[f"result {i}" for i in range(len(truth))],
    )
    if spec.underivable is not None or len(case.differentiable) == 0:
        return found
    names = case.differentiable
    probe = functorch.probe_of(reference, args.tensors, names, reference)
    given = list(probe.cotangents)
    truth = oracle.gradients(reference, wide, names, [c.double() for c in given])
    return found + oracle.compare_all(
        oracle.gradients(kernel, args.tensors, names, given),
        truth,
        oracle.gradients(reference, args.tensors, names, given),
        units=oracle.GRADIENT_UNITS,
        terms=oracle.magnitude(*truth),
        names=[f"gradient by {name}" for name in names],
        dtype=dtype,
    )


def main(names: Sequence[str]) -> int:
    """Command line; returns the exit code."""
    from transfuse import _C

    specs = [spec for spec in all_specs() if not names or spec.name in names]
    unknown = sorted(set(names) - {spec.name for spec in specs})
    if unknown:
        print(f"unknown ops: {', '.join(unknown)}", file=sys.stderr)
        return 2
    tried = wrong = 0
    for spec, case, dtype in calls(specs):
        tried += 1
        for problem in problems(spec, case, dtype):
            wrong += 1
            print(f"{spec.name}, {case.name}, {dtype}: {problem}", file=sys.stderr)
    print(f"{_C.isa_in_use()}: {tried} calls, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
