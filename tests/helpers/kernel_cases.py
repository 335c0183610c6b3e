"""A case of an OpSpec by a named backend, held against the float64 oracle."""

from __future__ import annotations

import torch

from transfuse.testing import oracle
from transfuse.testing.spec import Case, OpSpec, Tensors

# Ways to look at a kernel, with the widths of their bands.
WAYS = {
    "value": oracle.VALUE_UNITS,
    "gradient": oracle.GRADIENT_UNITS,
    "tangent": oracle.TANGENT_UNITS,
}


def check_kernel(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    way: str,
    *,
    backend: str = "triton",
    tensors: Tensors | None = None,
    units: float | None = None,
) -> None:
    """Values (``way="value"``), gradients (``"gradient"``) or derivatives along a direction
    (``"tangent"``) within the library's tolerance rule.

    ``tensors``: inputs other than the case's own. ``units``: of a narrower band.
    """
    args = case.build(dtype)
    tensors = args.tensors if tensors is None else tensors
    names = case.differentiable
    kernel = oracle.function(args, spec.op, backend)
    reference = oracle.function(args, spec.reference)
    eager = oracle.values(reference, tensors)
    generator = torch.Generator().manual_seed(1)
    cotangents = oracle.directions(eager, generator)
    moves = oracle.directions([tensors[n] for n in names], generator)

    def compute(fn, at, *, double=False):
        along = [t.double() if double else t for t in (moves if way == "tangent" else cotangents)]
        if way == "value":
            return oracle.values(fn, at)
        if way == "gradient":
            return oracle.gradients(fn, at, names, along)
        results, found = oracle.tangents(fn, at, names, along)
        # -inf (nothing allowed) does not move.
        return [torch.where(r == -torch.inf, 0.0, t) for r, t in zip(results, found, strict=True)]

    found = compute(kernel, tensors)
    exact = compute(reference, oracle.widen(tensors), double=True)
    terms = {"value": tensors.values(), "gradient": exact, "tangent": moves}[way]
    problems = oracle.compare_all(
        found,
        exact,
        eager if way == "value" else compute(reference, tensors),
        units=WAYS[way] if units is None else units,
        terms=oracle.magnitude(*terms),
        names=[f"{way} {i}" for i in range(len(found))],
        dtype=None if way == "value" else dtype,
    )
    assert not problems, "\n".join(problems)
