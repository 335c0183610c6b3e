"""Specs of ``min_norm_simplex``, ``pareto_lp`` and ``nonneg_qp``.

Their results are constants for autograd, so each case multiplies them with a tensor that gradients
reach, as the direction of a step is made of them. The matrices are made of gradients within the
call: any variant of the tensors then gives a matrix that is positive semidefinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transfuse.ops import min_norm_simplex, nonneg_qp, pareto_lp
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs import _simplex_errors as errors

DTYPES = (torch.float32, torch.float64)
GPU_BACKENDS = ("reference", "cpu", "triton")
REFUSES = {
    "batched backward": "Batching rule not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}
TINY, AWKWARD, REAL = (frozenset({tag}) for tag in ("tiny", "awkward", "real"))


@dataclass(frozen=True)
class Problem:
    """A call for gradients of shape (..., T, P). ``extra``: a second tensor, of shape (..., P), for
    ops that take a vector. ``options``: of the op."""

    shape: tuple[int, ...]
    extra: bool = False
    options: tuple[tuple[str, object], ...] = ()

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> Tensor:
        """Results times losses, bent so that second derivatives show something."""
        dtype = tensors["losses"].dtype
        # In float64, so that strides have no say in the rounding of products.
        gradients = tensors["gradients"].double().contiguous()
        options = dict(self.options) | ({} if backend is None else {"backend": backend})
        arguments = [gradients @ gradients.mT]
        if self.extra:
            arguments.append((gradients @ tensors["extra"].double()[..., None])[..., 0])
        found = op(*(x.to(dtype) for x in arguments), **options)
        result = found if isinstance(found, Tensor) else found[0]
        return result.to(dtype) * tensors["losses"].sin()

    def make(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> CallArgs:
        """The call."""
        shapes = {"gradients": self.shape, "losses": self.shape[:-1]}
        if self.extra:
            shapes["extra"] = (*self.shape[:-2], self.shape[-1])
        tensors = {
            name: torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
            for name, shape in shapes.items()
        }
        return CallArgs(self.call, tensors)

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""
        many = self.shape[-2] > 8 and not self.extra
        refused_by = frozenset({"triton"}) if many else frozenset()
        return Case(name, self.make, ("losses",), tags, refused_by)


def _cases(rows: dict[str, tuple[Problem, frozenset[str]]]) -> tuple[Case, ...]:
    return tuple(problem.case(name, tags) for name, (problem, tags) in rows.items())


_MIN_NORM = {
    "three": (Problem((2, 3, 5)), TINY),
    "one task": (Problem((2, 1, 4)), AWKWARD),
    "no problems": (Problem((0, 3, 5)), AWKWARD),
    "no batch": (Problem((4, 7)), AWKWARD),
    "two axes": (Problem((2, 3, 5, 9)), AWKWARD),
    "active set": (Problem((2, 11, 30)), AWKWARD),
    "many": (Problem((3000, 3, 6)), AWKWARD),
    "eight": (Problem((60, 8, 12)), REAL),
}
_PARETO = {
    "guide": (Problem((3, 3, 5), True, (("mode", "guide"),)), TINY),
    "descent": (Problem((3, 3, 5), True, (("mode", "descent"),)), TINY),
    "one task": (Problem((2, 1, 4), True, (("mode", "guide"),)), AWKWARD),
    "no problems": (Problem((0, 3, 5), True, (("mode", "descent"),)), AWKWARD),
    "no batch": (Problem((2, 7), True, (("mode", "descent"),)), AWKWARD),
    "many": (Problem((2000, 3, 6), True, (("mode", "descent"),)), AWKWARD),
    "five": (Problem((20, 5, 9), True, (("mode", "guide"),)), REAL),
}
_NONNEGATIVE = {
    "four": (Problem((2, 4, 6), True), TINY),
    "one": (Problem((2, 1, 3), True), AWKWARD),
    "no problems": (Problem((0, 3, 5), True), AWKWARD),
    "no batch": (Problem((3, 9), True), AWKWARD),
    "many": (Problem((1000, 5, 8), True), AWKWARD),
    "forty": (Problem((3, 40, 60), True), REAL),
}


def _raw(op: str, backend: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    c, a = g @ g.mT, torch.randn(2, 3, generator=generator, dtype=torch.float64)
    arguments = {
        "min_norm_simplex": (c,),
        "pareto_lp": (c, a, True),
        "nonneg_qp": (c, a, 30, 1e-12),
    }
    return (RawCall(op, getattr(torch.ops.transfuse, op), arguments[op]),)


def _flops(args: CallArgs) -> int:
    """Of the matrix and one factorisation per problem."""
    shape = args.tensors["gradients"].shape
    problems = shape[:-2].numel()
    return problems * (2 * shape[-2] ** 2 * shape[-1] + shape[-2] ** 3 // 3)


def _bytes(args: CallArgs) -> int:
    return sum(t.numel() * t.element_size() for t in args.tensors.values())


_COMMON = {
    "dtypes": DTYPES,
    "flops": _flops,
    "bytes": _bytes,
    "refuses": REFUSES,
}

SPECS = (
    OpSpec(
        name="min_norm_simplex",
        op=min_norm_simplex,
        reference=partial(min_norm_simplex, backend="reference"),
        cases=_cases(_MIN_NORM),
        errors=errors.MIN_NORM,
        gradcheck=("three",),
        backends=GPU_BACKENDS,
        raw_calls=partial(_raw, "min_norm_simplex"),
        **_COMMON,
    ),
    OpSpec(
        name="pareto_lp",
        op=pareto_lp,
        reference=partial(pareto_lp, backend="reference"),
        cases=_cases(_PARETO),
        errors=errors.PARETO,
        gradcheck=("guide",),
        backends=GPU_BACKENDS,
        raw_calls=partial(_raw, "pareto_lp"),
        **_COMMON,
    ),
    OpSpec(
        name="nonneg_qp",
        op=nonneg_qp,
        reference=partial(nonneg_qp, backend="reference"),
        cases=_cases(_NONNEGATIVE),
        errors=errors.NONNEGATIVE,
        gradcheck=("four",),
        backends=("reference", "cpu"),
        raw_calls=partial(_raw, "nonneg_qp"),
        **_COMMON,
    ),
)
