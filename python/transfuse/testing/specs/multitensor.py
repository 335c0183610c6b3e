"""Specs of the ops on lists of tensors.

``multi_dot`` is a sum over the kernel that is the coefficient gradient of ``lincomb``, and
``trim_largest`` is ``ties_merge`` of one list; ``tests/ops/test_multitensor.py`` has their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.ops import (
    lincomb,
    multi_gram,
    multi_norm,
    ratio_merge,
    ties_merge,
)
from transfuse.ops._multitensor_reference import (
    lincomb_reference,
    multi_gram_reference,
    multi_norm_reference,
)
from transfuse.ops.ratio_merge import ratio_merge_reference
from transfuse.ops.ties import ties_merge_reference
from transfuse.testing import backends
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs import _multitensor_errors as errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})

Shapes = tuple[tuple[int, ...], ...]
SMALL: Shapes = ((2, 3), (4,), ())
PAIR: Shapes = ((2, 3), ())
SINGLE: Shapes = ((3,),)
# Beyond a piece and a task of the kernels, and nothing.
LARGE: Shapes = ((1,), (37, 900), (0, 3), (2049,), (5,))


@dataclass(frozen=True)
class Lists:
    """T lists of tensors, with coefficients and a partition for ``lincomb``.

    ``granularity``: "list" or "tensor"; "ids" (uint8), "wide" (uint16) or "hash" with K partitions.
    ``absent``: (list, tensor) entries that are None, for Gram matrices.
    """

    shapes: Shapes = SMALL
    count: int = 2
    base: bool = False
    granularity: str = "tensor"
    partitions: int = 3
    half: bool = False
    absent: tuple[tuple[int, int], ...] = ()

    def tensors(self, dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        """Named ``d0_1`` (list 0, tensor 1), ``base1``, ``ids1`` and ``coefficients``."""

        def draw(shape: tuple[int, ...], dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        own = torch.float16 if self.half and dtype == torch.float32 else dtype
        found = {
            f"d{i}_{j}": draw(shape, own)
            for i in range(self.count)
            for j, shape in enumerate(self.shapes)
            if (i, j) not in self.absent
        }
        if self.base:
            found |= {f"base{j}": draw(shape) for j, shape in enumerate(self.shapes)}
        return found

    def lists(self, tensors: Tensors) -> list[list[Tensor | None]]:
        """The lists again."""
        blocks = range(len(self.shapes))
        return [[tensors.get(f"d{i}_{j}") for j in blocks] for i in range(self.count)]

    def bases(self, tensors: Tensors) -> dict[str, list[Tensor]]:
        """``base`` as an option."""
        blocks = range(len(self.shapes))
        return {"base": [tensors[f"base{j}"] for j in blocks]} if self.base else {}

    @property
    def parted(self) -> bool:
        return self.granularity in ("ids", "wide", "hash")

    def combination(self, name: str, tags: frozenset[str]) -> Case:
        """As a case of ``lincomb``."""

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            found = self.tensors(dtype, generator)
            shape: tuple[int, ...] = (self.count,)
            if self.granularity != "list":
                shape = (*shape, len(self.shapes))
            if self.parted:
                shape = (*shape, self.partitions)
            found["coefficients"] = torch.randn(shape, generator=generator).to(dtype)
            if self.granularity in ("ids", "wide"):
                kind = torch.uint8 if self.granularity == "ids" else torch.uint16
                for j, block in enumerate(self.shapes):
                    # One id too many: no coefficient.
                    ids = torch.randint(self.partitions + 1, block, generator=generator)
                    found[f"ids{j}"] = ids.to(kind)
            return CallArgs(self.combine, {k: t.to(device) for k, t in found.items()})

        names = [n for n in self.tensors(torch.float32, torch.Generator())]
        return Case(name, make, ("coefficients", *names), tags)

    def combine(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """A call of ``lincomb`` with these or similar tensors."""
        options: dict[str, object] = {} if backend is None else {"backend": backend}
        if self.granularity == "hash":
            options["partition"] = 11
        elif self.parted:
            options["partition"] = [tensors[f"ids{j}"] for j in range(len(self.shapes))]
        lists = self.lists(tensors)
        return op(lists, tensors["coefficients"], **self.bases(tensors), **options)

    def case(self, name: str, tags: frozenset[str], call: Callable[..., object]) -> Case:
        """As a case of another op: ``call(op, plan, tensors, options)``."""

        def run(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
            return call(op, self, tensors, {} if backend is None else {"backend": backend})

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            found = self.tensors(dtype, generator)
            return CallArgs(run, {k: t.to(device) for k, t in found.items()})

        return Case(name, make, tuple(self.tensors(torch.float32, torch.Generator())), tags)


def _numbers(args: CallArgs) -> int:
    return sum(t.numel() for name, t in args.tensors.items() if name != "coefficients")


def _bytes(args: CallArgs) -> int:
    return sum(t.numel() * t.element_size() for t in args.tensors.values())


_LINCOMB = {
    "per tensor": (Lists(PAIR), TINY),
    "base": (Lists(base=True, count=3), TINY),
    "per list": (Lists(granularity="list", shapes=((3,),)), TINY),
    "ids": (Lists(PAIR, granularity="ids", base=True), TINY),
    "hash": (Lists(PAIR, granularity="hash"), TINY),
    "half lists": (Lists(base=True, half=True, count=5), AWKWARD),
    "large": (Lists(LARGE, count=7, base=True), AWKWARD),
    "large wide ids": (Lists(LARGE, granularity="wide", partitions=300), AWKWARD),
    "large hash": (Lists(LARGE, count=3, granularity="hash", base=True, partitions=5), AWKWARD),
    "one list": (Lists(((5, 7), (64,)), count=1, base=True), AWKWARD),
}


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    shapes = tuple((choose((0, 1, 3, 8, 31, 65, 2050)),) for _ in range(choose((1, 2, 3))))
    plan = Lists(
        shapes,
        count=choose((1, 2, 3, 4, 6, 8, 9)),
        base=choose((False, True)),
        granularity=choose(("list", "tensor", "ids", "wide", "hash")),
        partitions=choose((1, 2, 7)),
        half=choose((False, True)),
    )
    return plan.combination(f"fuzz {plan}", AWKWARD)


def _lincomb_raw(backend: str) -> tuple[RawCall, ...]:
    if not backends.native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        base, *deltas = (
            [torch.randn(s, generator=generator).requires_grad_(grad) for s in SMALL]
            for _ in range(3)
        )
        flat = [t for part in deltas for t in part]
        table = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_(grad)
        ops = torch.ops.transfuse
        calls.append(RawCall(f"lincomb, {grad}", ops.lincomb, (base, flat, table, [], [1, 2, 3])))
        calls.append(RawCall(f"dots, {grad}", ops.block_dots, (base, flat, [], [1, 2, 3], 2)))
    return tuple(calls)


# What forward over forward and compiled transforms raise.
_REFUSES = {
    "jvp of jvp": "one more forward-mode derivative is not implemented",
    "batched backward": "Batching rule not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}
# The Hessian with respect to their first tensor.
_LINEAR = frozenset({"func.hessian"})
_UNDERIVABLE = "has no derivative|do not support torch.func transforms"


def _norm(order: float, scaled: bool = False) -> Callable[..., object]:
    def call(op, plan, tensors, options):
        found, *rest = plan.lists(tensors)
        factors = {"scale": rest[0]} if scaled else {}
        return op(found, ord=order, **factors, **options)

    return call


def _gram(op, plan, tensors, options):
    return op(plan.lists(tensors), **options)


def _ratio(settings: int = 0, **given: object) -> Callable[..., object]:
    def call(op, plan, tensors, options):
        lists = plan.lists(tensors)
        half = len(lists) // 2
        # Squares: at least 0, and 0 for entries that are 0.
        weights = [[t * t for t in part] for part in lists[half:]]
        shape = (settings, half) if settings else (half,)
        table = torch.arange(1, 1 + max(1, settings) * half, dtype=torch.float64).reshape(shape)
        table = table.to(lists[0][0].device)
        result = op(lists[:half], weights, table, **given, **options)
        return [t for part in result for t in part] if settings else result

    return call


def _ties(op, plan, tensors, options):
    return op(plan.lists(tensors), density=0.4, scale=0.7, **plan.bases(tensors), **options)


def _named(table: dict[str, tuple[Lists, frozenset[str], Callable[..., object]]]) -> tuple:
    return tuple(plan.case(name, tags, call) for name, (plan, tags, call) in table.items())


_ONE, _TWO, _FOUR = Lists(count=1), Lists(count=2), Lists(count=4)
_SOME = Lists(count=3, absent=((0, 1), (2, 0)))


def _spec(op: Callable, reference: Callable, cases: tuple, bad: tuple, **more: object) -> OpSpec:
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=cases,
        dtypes=DTYPES,
        errors=bad,
        flops=lambda args: 2 * _numbers(args),
        bytes=_bytes,
        **more,
    )


SPECS = (
    _spec(
        lincomb,
        lincomb_reference,
        tuple(plan.combination(name, tags) for name, (plan, tags) in _LINCOMB.items()),
        errors.LINCOMB,
        backends=("reference", "cpu", "triton", "cuda"),
        gradcheck=("per tensor", "ids", "hash"),
        refuses=_REFUSES,
        vanishing=_LINEAR,
        fuzz=_fuzz,
        raw_calls=_lincomb_raw,
    ),
    _spec(
        multi_norm,
        multi_norm_reference,
        _named(
            {
                "one tensor": (Lists(SINGLE, count=1), TINY, _norm(2)),
                "two": (_ONE, TINY, _norm(2)),
                "scaled": (_TWO, TINY, _norm(2, scaled=True)),
                "one": (_ONE, AWKWARD, _norm(1)),
                "largest": (_ONE, AWKWARD, _norm(float("inf"))),
                "large": (Lists(LARGE, count=2), AWKWARD, _norm(2, scaled=True)),
            }
        ),
        errors.NORM,
        backends=("reference", "cpu", "triton", "cuda"),
        gradcheck=("one tensor",),
        refuses=_REFUSES,
    ),
    _spec(
        multi_gram,
        multi_gram_reference,
        _named(
            {
                "one tensor": (Lists(SINGLE), TINY, _gram),
                "small": (_TWO, TINY, _gram),
                "absent": (_SOME, TINY, _gram),
                "large": (Lists(LARGE, count=6), AWKWARD, _gram),
            }
        ),
        errors.GRAM,
        backends=("reference", "cpu", "triton", "cuda"),
        gradcheck=("one tensor",),
        refuses=_REFUSES,
    ),
    _spec(
        ratio_merge,
        ratio_merge_reference,
        _named(
            {
                "two models": (_FOUR, TINY, _ratio()),
                "settings": (_FOUR, AWKWARD, _ratio(3, floor=0.1, favor_target=False)),
                "large": (Lists(LARGE, count=6), AWKWARD, _ratio(2, normalize=None)),
            }
        ),
        errors.RATIO,
        backends=("reference", "cpu", "triton", "cuda"),
        gradcheck=("two models",),
        underivable=_UNDERIVABLE + "|does not run inside torch.compile",
    ),
    _spec(
        ties_merge,
        ties_merge_reference,
        _named(
            {
                "small": (Lists(count=3), TINY, _ties),
                "large": (Lists(LARGE, count=3, base=True), AWKWARD, _ties),
            }
        ),
        errors.TIES,
        backends=("reference", "cpu", "triton"),
        gradcheck=("small",),
        underivable=_UNDERIVABLE,
    ),
)
