"""A case of an OpSpec by a named backend, held against the float64 oracle."""

from __future__ import annotations

import torch

from transfuse.testing import oracle
from transfuse.testing.spec import Case, OpSpec


def check_kernel(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    way: str,
    *,
    backend: str = "triton",
    by_results: bool = False,
) -> None:
    """Values (``way="value"``) or gradients (``"gradient"``) within the library's tolerance rule.

    ``by_results``: gradients are measured by their own size, not by that of the tensors.
    """
    args = case.build(dtype)
    kernel = oracle.function(args, spec.op, backend)
    reference = oracle.function(args, spec.reference)
    shapes = [t.shape for t in oracle.values(reference, args.tensors)]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(s, generator=generator) for s in shapes]
    value = way == "value"

    def compute(fn, tensors):
        results = oracle.values(fn, tensors)
        if value:
            return results
        own = [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
        return oracle.gradients(fn, tensors, case.differentiable, own)

    found = compute(kernel, args.tensors)
    exact = compute(reference, oracle.widen(args.tensors))
    terms = exact if by_results and not value else args.tensors.values()
    problems = oracle.compare_all(
        found,
        exact,
        compute(reference, args.tensors),
        units=oracle.VALUE_UNITS if value else oracle.GRADIENT_UNITS,
        terms=oracle.magnitude(*terms),
        names=[str(i) for i in range(len(found))],
        dtype=None if value else dtype,
    )
    assert not problems, problems
