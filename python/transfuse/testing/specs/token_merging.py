"""Specs of ``nearest_tokens``, ``match_tokens``, ``merge_tokens``, ``unmerge_tokens`` and
``push_tokens``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from transfuse.ops import (
    MergePlan,
    match_tokens,
    merge_tokens,
    nearest_tokens,
    push_tokens,
    unmerge_tokens,
)
from transfuse.testing.backends import device_of, native
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs import _token_merging_errors as errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "cpu", "triton", "cuda")
REFUSES = {
    "jvp of jvp": "one more forward-mode derivative is not implemented",
    "batched backward": "Batching rule not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


def _normal(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def _bend(result: Tensor, curved: bool) -> Tensor:
    """The result, or its sine: most of these ops are linear, and second derivatives that are zero
    would show nothing."""
    return result.sin() if curved else result


def _options(backend: str | None) -> dict[str, str]:
    return {} if backend is None else {"backend": backend}


# ---- neighbours --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A call of ``nearest_tokens``, or of ``push_tokens`` if ``alpha`` is given.

    ``mask``: "" for none, "shared" or "own" per batch entry; the first entry of the batch may then
    choose nothing at all with "own". ``zero``: the first token and reference are zero vectors.
    """

    x: tuple[int, int, int]
    reference: tuple[int, int, int]
    mask: str = ""
    exclude_self: bool = False
    zero: bool = False
    alpha: float | None = None
    threshold: float = 0.3
    curved: bool = False

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""
        tensors = {name: _normal(getattr(self, name), dtype, generator)
                   for name in ("x", "reference")}  # fmt: skip
        if self.zero:
            tensors["x"][:, :1] = 0.0
            tensors["reference"][:, :1] = 0.0
        if self.mask:
            shape = (self.x[0] if self.mask == "own" else 1, self.reference[1])
            allowed = torch.rand(shape, generator=generator) < 0.6
            allowed[:, -1:] = True
            if self.mask == "own":
                allowed[:1] = False
            tensors["mask"] = allowed
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors; of the neighbours, the similarity."""
        options: dict[str, object] = {"mask": tensors.get("mask"), **_options(backend)}
        if self.alpha is not None:
            options |= {"alpha": self.alpha, "threshold": self.threshold}
            return _bend(op(tensors["x"], tensors["reference"], **options), self.curved)
        found = op(tensors["x"], tensors["reference"], exclude_self=self.exclude_self, **options)
        return found.similarity

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            return CallArgs(self.call, self.draw(dtype, device, generator))

        return Case(name, make, ("x", "reference"), tags)


_SEARCHES = {
    "plain": (Search((2, 5, 4), (2, 3, 4)), TINY),
    "shared reference": (Search((3, 4, 3), (1, 5, 3)), TINY),
    "mask": (Search((3, 4, 3), (3, 5, 3), mask="own"), TINY),
    "shared mask": (Search((2, 4, 3), (1, 6, 3), mask="shared"), TINY),
    "within one set": (Search((2, 5, 4), (2, 5, 4), exclude_self=True), TINY),
    "zero vectors": (Search((2, 4, 3), (2, 4, 3), zero=True), AWKWARD),
    "one token": (Search((1, 1, 7), (1, 1, 7)), AWKWARD),
    "only itself": (Search((2, 1, 5), (2, 1, 5), exclude_self=True), AWKWARD),
    "no tokens": (Search((2, 0, 3), (2, 4, 3)), AWKWARD),
    "no references": (Search((2, 3, 3), (2, 0, 3)), AWKWARD),
    "no batch": (Search((0, 3, 3), (1, 4, 3)), AWKWARD),
    "primes": (Search((3, 67, 41), (3, 101, 41)), AWKWARD),
    "deep": (Search((1, 37, 1000), (1, 131, 1000)), AWKWARD),
    "tile and one more": (Search((1, 257, 33), (1, 97, 33), mask="shared"), AWKWARD),
    "image": (Search((1, 576, 160), (1, 320, 160)), REAL),
}
_PUSHES = {
    name: (replace(entry, alpha=0.9, curved="tiny" in tags), tags)
    for name, (entry, tags) in _SEARCHES.items()
    if not entry.exclude_self
} | {
    "pull": (Search((2, 5, 4), (2, 3, 4), alpha=-0.4, threshold=-0.2), TINY),
    "everything": (Search((2, 5, 4), (1, 3, 4), alpha=0.5, threshold=-1.0, curved=True), TINY),
    "nothing": (Search((2, 5, 4), (1, 3, 4), alpha=0.5, threshold=1.0), AWKWARD),
}

_SIZES = (1, 2, 3, 7, 8, 9, 31, 32, 33, 95, 96, 97)


def _fuzz_search(choose: Callable[[Sequence[object]], object], *, push: bool) -> Case:
    """Random extents around the widths of vectors and tiles."""
    # A cosine of single numbers is a sign: its gradient is exactly 0 and made of rounding alone, so
    # there would be no size to measure an error by.
    batch, depth = choose((1, 2, 3)), choose((2, 3, 5, 8, 16, 17, 40))
    x = (batch, choose((0, *_SIZES)), depth)
    itself = not push and choose((False, False, True))
    columns = x[1] if itself else choose(_SIZES)
    search = Search(
        x,
        (x[0] if itself else choose((1, batch)), columns, depth),
        mask="" if columns == 0 else choose(("", "shared", "own")),
        exclude_self=itself,
        alpha=choose((0.9, -0.5)) if push else None,
        threshold=choose((0.65, 0.0)),
    )
    return search.case(f"fuzz {search}", AWKWARD)


def _search_flops(args: CallArgs) -> int:
    x, reference = args.tensors["x"], args.tensors["reference"]
    return 2 * x.numel() * reference.shape[1]


def _search_bytes(args: CallArgs) -> int:
    x, reference = args.tensors["x"], args.tensors["reference"]
    return (x.numel() + reference.numel()) * x.element_size()


# ---- plans -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Options of ``match_tokens``. ``destination``: every which token is one, 0 to leave it out;
    ``seed``: of the generator, None for none."""

    shape: tuple[int, int, int]
    merged: int
    size: tuple[int, int] | None = None
    stride: tuple[int, int] = (2, 2)
    destination: int = 0
    protect: tuple[int, ...] = ()
    seed: int | None = None

    def plan(self, op: Callable[..., MergePlan], metric: Tensor, backend: str | None) -> MergePlan:
        """The plan for a metric of this shape."""
        destination = generator = None
        if self.destination:
            destination = torch.arange(0, self.shape[1], self.destination, device=metric.device)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        return op(
            metric,
            self.merged,
            size=self.size,
            stride=self.stride,
            destination=destination,
            protect=self.protect,
            generator=generator,
            **_options(backend),
        )

    def match_case(self, name: str, tags: frozenset[str]) -> Case:
        """Tokens merged by the plan that the op makes of another tensor."""

        def call(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
            plan = self.plan(op, tensors["metric"], backend)
            backend = "reference" if backend is None else backend
            return _bend(merge_tokens(tensors["x"], plan, backend=backend), "tiny" in tags)

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            tensors = {key: _normal(self.shape, dtype, generator) for key in ("metric", "x")}
            return CallArgs(call, {key: tensor.to(device) for key, tensor in tensors.items()})

        return Case(name, make, ("x",), tags)

    def fixed_plan(self, device: torch.device, generator: torch.Generator) -> MergePlan:
        """A plan that does not depend on the tensors of the call."""
        metric = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        plan = self.plan(match_tokens, metric, "reference")
        return MergePlan(*(t.to(device) for t in plan))


_SPLITS = {
    "alternate": (Split((2, 7, 3), 2), TINY),
    "class token": (Split((2, 8, 4), 3, protect=(0,)), TINY),
    "two protected": (Split((2, 9, 4), 3, protect=(0, 1)), TINY),
    "grid": (Split((2, 16, 3), 9, size=(4, 4)), TINY),
    "grid, left over": (Split((2, 15, 4), 6, size=(3, 5)), TINY),
    "grid, random": (Split((1, 12, 3), 5, size=(4, 3), seed=3), TINY),
    "given": (Split((2, 7, 3), 3, destination=3, protect=(6,)), TINY),
    "nothing": (Split((2, 6, 3), 0), AWKWARD),
    "everything": (Split((2, 64, 5), 48, size=(8, 8)), AWKWARD),
    "one destination": (Split((1, 33, 4), 32, destination=33), AWKWARD),
    "one token": (Split((2, 1, 4), 0), AWKWARD),
    "no batch": (Split((0, 6, 4), 2), AWKWARD),
    "odd grid": (Split((1, 33 * 57, 8), 940, size=(33, 57), seed=1), AWKWARD),
    "cells of 3 by 2": (Split((3, 7 * 9, 10), 20, size=(7, 9), stride=(2, 3), seed=2), AWKWARD),
    "vit": (Split((2, 197, 64), 16, protect=(0,)), REAL),
    "latent": (Split((1, 1024, 80), 512, size=(32, 32), seed=5), REAL),
}


def _fuzz_split(choose: Callable[[Sequence[object]], object]) -> Split:
    batch, depth = choose((1, 2, 3)), choose((1, 3, 8, 17))
    if choose((False, True)):
        size = (choose((1, 2, 3, 5, 8)), choose((1, 2, 4, 7, 9)))
        stride = (choose((1, 2, 3)), choose((1, 2, 3)))
        tokens = size[0] * size[1]
        cells = (size[0] // stride[0]) * (size[1] // stride[1])
        merged = choose((0, 1, 2)) * (tokens - cells) // 2 if cells else 0
        return Split(
            (batch, tokens, depth), merged, size=size, stride=stride, seed=choose((None, 0, 1))
        )
    tokens = choose((1, 2, 3, 8, 16, 17, 33))
    limit = (tokens - tokens // 2 - 1) if tokens > 1 else 0
    return Split((batch, tokens, depth), choose((0, limit // 2, limit)), protect=(0,))


# ---- merging and unmerging ---------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """A call of ``merge_tokens``; ``mode=None``: of ``unmerge_tokens``."""

    split: Split
    mode: str | None = "mean"
    weighted: bool = False
    shared: bool = False  # one plan for the whole batch
    curved: bool = False

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            split = self.split
            if self.shared:
                split = replace(split, shape=(1, *split.shape[1:]))
            plan = split.fixed_plan(device, generator)
            batch, tokens, depth = self.split.shape
            if self.mode is None:
                tensors = {"y": _normal((batch, plan.row_count, depth), dtype, generator)}
            else:
                tensors = {"x": _normal((batch, tokens, depth), dtype, generator)}
            if self.weighted:
                weight = 0.5 + torch.rand((batch, tokens), generator=generator)
                tensors["weight"] = weight.to(dtype)

            def call(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
                options: dict[str, object] = {**_options(backend)}
                if self.mode is None:
                    return _bend(op(tensors["y"], plan, **options), self.curved)
                if self.weighted:
                    options["weight"] = tensors["weight"]
                result = op(tensors["x"], plan, mode=self.mode, **options)
                return _bend(result, self.curved)

            return CallArgs(call, {key: tensor.to(device) for key, tensor in tensors.items()})

        names = ("y",) if self.mode is None else ("x",)
        return Case(name, make, (*names, "weight") if self.weighted else names, tags)


def _merges() -> dict[str, tuple[Merge, frozenset[str]]]:
    cases = {}
    small = _SPLITS["grid"][0]
    for mode in ("mean", "sum", "amax", "prune"):
        cases[mode] = (Merge(small, mode), TINY)
        cases[f"{mode}, curved"] = (Merge(small, mode, curved=True), TINY)
        if mode in ("mean", "sum"):
            cases[f"{mode}, weighted"] = (Merge(small, mode, weighted=True), TINY)
            bent = Merge(small, mode, weighted=True, curved=True)
            cases[f"{mode}, weighted, curved"] = (bent, TINY)
    cases["shared plan"] = (Merge(small, shared=True, curved=True), TINY)
    cases["shared plan, amax"] = (Merge(small, "amax", shared=True), TINY)
    for name, (split, tags) in _SPLITS.items():
        if not tags & TINY:
            cases[name] = (Merge(split), tags)
            cases[f"{name}, weighted"] = (Merge(split, weighted=True), tags)
        elif name != "grid":
            cases[name] = (Merge(split, "sum"), tags)
    cases["odd grid, amax"] = (Merge(_SPLITS["odd grid"][0], "amax"), AWKWARD)
    cases["odd grid, prune"] = (Merge(_SPLITS["odd grid"][0], "prune"), AWKWARD)
    cases["unet"] = (Merge(Split((2, 4096, 320), 2048, size=(64, 64), seed=0)), BENCH)
    return cases


_UNMERGES = {name: (Merge(split, None), tags) for name, (split, tags) in _SPLITS.items()} | {
    "curved": (Merge(_SPLITS["grid"][0], None, curved=True), TINY),
    "shared plan": (Merge(_SPLITS["grid"][0], None, shared=True, curved=True), TINY),
}


def _fuzz_merge(choose: Callable[[Sequence[object]], object]) -> Case:
    mode = choose(("mean", "sum", "amax", "prune"))
    merge = Merge(
        _fuzz_split(choose),
        mode,
        weighted=mode in ("mean", "sum") and choose((False, True)),
        shared=choose((False, True)),
    )
    return merge.case(f"fuzz {merge}", AWKWARD)


def _fuzz_unmerge(choose: Callable[[Sequence[object]], object]) -> Case:
    merge = Merge(_fuzz_split(choose), None, shared=choose((False, True)))
    return merge.case(f"fuzz {merge}", AWKWARD)


def _fuzz_match(choose: Callable[[Sequence[object]], object]) -> Case:
    split = _fuzz_split(choose)
    return split.match_case(f"fuzz {split}", AWKWARD)


def _all_bytes(args: CallArgs) -> int:
    """Every tensor once, and about as much written."""
    return 2 * sum(t.numel() * t.element_size() for t in args.tensors.values())


# ---- raw ops -----------------------------------------------------------------------------------


def _plan_of(shape: tuple[int, int, int]) -> MergePlan:
    metric = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return match_tokens(metric, shape[1] // 3, backend="reference")


def _raw_search(backend: str) -> tuple[RawCall, ...]:
    if not native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)
    op = torch.ops.transfuse.nearest_tokens
    calls = []
    for grad in (False, True):
        x, reference = (
            torch.randn(shape, generator=generator).requires_grad_(grad)
            for shape in ((2, 5, 4), (2, 3, 4))
        )
        mask = torch.tensor([[True, False, True]]).expand(2, 3)
        calls += [
            RawCall(f"nearest, gradients {grad}", op, (x, reference, None, False)),
            RawCall(f"nearest with a mask, gradients {grad}", op, (x, reference, mask, False)),
        ]
    return tuple(call.on(device_of(backend)) for call in calls)


def _raw_push(backend: str) -> tuple[RawCall, ...]:
    if not native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        x, reference = (
            torch.randn(shape, generator=generator).requires_grad_(grad)
            for shape in ((2, 5, 4), (2, 3, 4))
        )
        found = nearest_tokens(x.detach(), reference.detach(), backend="reference")
        op = torch.ops.transfuse.push_tokens
        calls.append(RawCall(f"push, gradients {grad}", op, (x, reference, *found, 0.9, 0.3)))
    return tuple(call.on(device_of(backend)) for call in calls)


def _raw_match(backend: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    op = torch.ops.transfuse.match_tokens
    metric = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    return (
        RawCall("match, alternate", op, (metric, None, [0], 3)),
        RawCall("match, given", op, (metric, torch.tensor([1, 4]), [], 5)),
    )


def _raw_merge(backend: str) -> tuple[RawCall, ...]:
    if not native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)
    plan = _plan_of((2, 9, 4))
    calls = []
    for grad in (False, True):
        x = torch.randn((2, 9, 4), generator=generator).requires_grad_(grad)
        scale = torch.rand((2, 9), generator=generator).requires_grad_(grad)
        ops = torch.ops.transfuse
        calls += [
            RawCall(f"mean, gradients {grad}", ops.merge_segments, (x, None, *plan, 1)),
            RawCall(f"scaled, gradients {grad}", ops.merge_segments, (x, scale, *plan, 0)),
            RawCall(f"amax, gradients {grad}", ops.merge_amax, (x, *plan, True)),
        ]
    return tuple(call.on(device_of(backend)) for call in calls)


def _raw_unmerge(backend: str) -> tuple[RawCall, ...]:
    if not native(backend):
        return ()
    plan = _plan_of((2, 9, 4))
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        y = torch.randn((2, plan.row_count, 4), generator=generator).requires_grad_(grad)
        op = torch.ops.transfuse.merge_gather
        calls.append(RawCall(f"gather, gradients {grad}", op, (y, None, *plan, 0)))
        calls.append(RawCall(f"shares, gradients {grad}", op, (y, None, *plan, 1)))
    return tuple(call.on(device_of(backend)) for call in calls)


SPECS = (
    OpSpec(
        name="nearest_tokens",
        op=nearest_tokens,
        reference=partial(nearest_tokens, backend="reference"),
        cases=tuple(search.case(name, tags) for name, (search, tags) in _SEARCHES.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_search_flops,
        bytes=_search_bytes,
        errors=errors.NEAREST,
        gradcheck=("plain", "shared reference", "shared mask", "within one set"),
        refuses=REFUSES,
        fuzz=partial(_fuzz_search, push=False),
        raw_calls=_raw_search,
    ),
    OpSpec(
        name="match_tokens",
        op=match_tokens,
        reference=partial(match_tokens, backend="reference"),
        cases=tuple(split.match_case(name, tags) for name, (split, tags) in _SPLITS.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=lambda args: args.tensors["metric"].numel() * args.tensors["metric"].shape[1] // 2,
        bytes=_all_bytes,
        errors=errors.MATCH,
        gradcheck=("alternate", "class token"),
        refuses=REFUSES,
        fuzz=_fuzz_match,
        raw_calls=_raw_match,
    ),
    OpSpec(
        name="merge_tokens",
        op=merge_tokens,
        reference=partial(merge_tokens, backend="reference"),
        cases=tuple(merge.case(name, tags) for name, (merge, tags) in _merges().items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=lambda args: 2 * args.tensors["x"].numel(),
        bytes=_all_bytes,
        errors=errors.MERGE,
        gradcheck=(
            "mean, weighted, curved",
            "mean, curved",
            "sum, weighted, curved",
            "amax, curved",
            "prune, curved",
            "shared plan",
        ),
        refuses=REFUSES,
        fuzz=_fuzz_merge,
        raw_calls=_raw_merge,
    ),
    OpSpec(
        name="unmerge_tokens",
        op=unmerge_tokens,
        reference=partial(unmerge_tokens, backend="reference"),
        cases=tuple(merge.case(name, tags) for name, (merge, tags) in _UNMERGES.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=lambda args: 0,
        bytes=_all_bytes,
        errors=errors.UNMERGE,
        gradcheck=("curved", "shared plan"),
        refuses=REFUSES,
        fuzz=_fuzz_unmerge,
        raw_calls=_raw_unmerge,
    ),
    OpSpec(
        name="push_tokens",
        op=push_tokens,
        reference=partial(push_tokens, backend="reference"),
        cases=tuple(search.case(name, tags) for name, (search, tags) in _PUSHES.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_search_flops,
        bytes=_search_bytes,
        errors=errors.PUSH,
        gradcheck=("plain", "shared reference", "mask", "everything"),
        refuses=REFUSES,
        fuzz=partial(_fuzz_search, push=True),
        raw_calls=_raw_push,
    ),
)
