"""Specs of the curvature of linear heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transfuse.ops import (
    head_gradient,
    head_hessian_diagonal,
    head_hessian_distance,
    head_hessian_product,
    head_hessian_trace,
    head_hgp,
    head_hutchinson_diagonal,
)
from transfuse.testing import backends
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors

# Half inputs are taken to float32. float64 is what derivatives are checked in by differences.
DTYPES = (torch.float32, torch.bfloat16)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})

Op = Callable[..., object]


@dataclass(frozen=True)
class Plan:
    """Shapes of one call. ``lengths``: samples of each domain, or of the only one without segments.
    ``scale`` multiplies the weight: large ones saturate the softmax."""

    lengths: tuple[int, ...]
    columns: int
    classes: int
    bias: bool = True
    segments: bool = True
    scale: float = 1.0
    offset: float = 0.0

    @property
    def bounds(self) -> list[int] | None:
        """The argument ``segments``."""
        if not self.segments:
            return None
        return [sum(self.lengths[:e]) for e in range(len(self.lengths) + 1)]

    def draw(
        self, kind: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> Tensors:
        """The tensors of the call of an op."""
        samples, d, c = sum(self.lengths), self.columns, self.classes

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        tensors = {
            "features": (normal(samples, d) + self.offset).to(dtype),
            "weight": (self.scale / max(d, 1) ** 0.5 * normal(c, d)).to(dtype),
        }
        if self.bias:
            tensors["bias"] = (0.3 * normal(c)).to(dtype)
        if kind in ("gradient", "hgp"):
            tensors["labels"] = torch.randint(0, max(c, 2), (samples,), generator=generator)
        if kind == "product":
            tensors["vectors"] = normal(2, c, d + self.bias).to(dtype)
        return {name: t.to(device) for name, t in tensors.items()}


def _arguments(kind: str, tensors: Tensors) -> list[object]:
    """Positional arguments of an op."""
    last = {"gradient": ["labels"], "hgp": ["labels"], "product": ["vectors"]}.get(kind, [])
    given = [tensors["features"], tensors["weight"], tensors.get("bias")]
    return [*given, *(tensors[name] for name in last), *([5] if kind == "hutchinson" else [])]


_PLANS: dict[str, tuple[Plan, frozenset[str]]] = {
    "domains": (Plan((3, 1, 2), 3, 3), TINY),
    "even domains": (Plan((2, 2), 3, 2), TINY),
    "one domain": (Plan((4,), 3, 3, segments=False), TINY),
    "no bias": (Plan((2, 3), 4, 3, bias=False), TINY),
    "binary": (Plan((3, 2), 3, 1), TINY),
    "binary, no bias": (Plan((4,), 4, 1, bias=False, segments=False), TINY),
    # A last vector of columns, the column of ones in a block of its own, tiles of classes + 1.
    "primes": (Plan((7, 13, 1), 97, 11), AWKWARD),
    "a block and a column": (Plan((5, 33), 192, 9), AWKWARD),
    "no columns": (Plan((2, 3), 0, 3), AWKWARD),
    "one sample": (Plan((1,), 1, 2, segments=False), AWKWARD),
    "many small domains": (Plan((2, 1, 3, 1, 2) * 2, 17, 5), AWKWARD),
    "saturated": (Plan((9, 8), 12, 5, scale=3.0), AWKWARD),
    "shifted features": (Plan((6, 70), 31, 3, offset=1.0), AWKWARD),
    "pacs": (Plan((32, 32, 32), 512, 7), REAL),
    "officehome": (Plan((32, 32, 32), 2048, 65), BENCH),
}


def _case(kind: str, name: str, plan: Plan, tags: frozenset[str]) -> Case:
    def call(op: Op, tensors: Tensors, backend: str | None) -> object:
        options = {} if backend is None else {"backend": backend}
        return op(*_arguments(kind, tensors), segments=plan.bounds, **options)

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        return CallArgs(call, plan.draw(kind, dtype, device, generator))

    names = ("features", "weight", *(("bias",) if plan.bias else ()))
    return Case(name, make, (*names, *(("vectors",) if kind == "product" else ())), tags)


# Ops that are composed of others have no widths of vectors and tiles to be tried at.
_COMPOSED = ("domains", "even domains", "one domain", "binary, no bias", "no columns", "primes")


def _cases(kind: str, widths: bool) -> tuple[Case, ...]:
    return tuple(
        _case(kind, name, *entry)
        for name, entry in _PLANS.items()
        if (widths or name in _COMPOSED) and (entry[0].segments or kind != "distance")
    )


def _fuzz(kind: str) -> Callable[[Callable[[Sequence[object]], object]], Case]:
    """Random extents around the widths of vectors, tiles and blocks."""

    def fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
        sizes = (1, 2, 3, 5, 8, 31, 33, 65)
        lengths = tuple(choose(sizes) for _ in range(choose((1, 2, 3))))
        plan = Plan(
            lengths,
            choose((0, 1, 7, 8, 9, 24, 31, 95, 96, 97)),
            choose((1, 2, 3, 4, 5, 8, 9, 17)),
            bias=choose((True, False)),
            scale=choose((1.0, 3.0)),
        )
        return _case(kind, f"fuzz {plan}", plan, AWKWARD)

    return fuzz


# ---- refusals -----------------------------------------------------------------------------------


def _bad(kind: str, name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    plan = Plan((4, 2), 3, 2)
    drawn = plan.draw(kind, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    segments = changes.pop("segments", plan.bounds)
    tensors = {**drawn, **changes}

    def call(op: Op) -> object:
        return op(*_arguments(kind, tensors), segments=segments)

    return BadCase(name, call, error, match)


def _errors(kind: str) -> tuple[BadCase, ...]:
    def bad(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
        return _bad(kind, name, error, match, **changes)

    ints = torch.zeros(6, 3, dtype=torch.int64)
    found = [
        bad("features class", TypeError, "features: expected a tensor, got None", features=None),
        bad("features rank", ValueError, "features: expected 2 dim", features=torch.zeros(6)),
        bad("features integer", TypeError, "features: expected float32", features=ints),
        bad(
            "features empty",
            ValueError,
            "features: expected at least one sample",
            features=torch.zeros(0, 3),
        ),
        bad("weight class", TypeError, "weight: expected a tensor, got 2.0", weight=2.0),
        bad(
            "weight width",
            ValueError,
            r"weight: expected 3 in dimension 1 \(columns of features\), got 4",
            weight=torch.zeros(2, 4),
        ),
        bad("weight empty", ValueError, "weight: expected at least", weight=torch.zeros(0, 3)),
        bad(
            "weight device",
            ValueError,
            "weight: expected device cpu",
            weight=torch.zeros(2, 3, device="meta"),
        ),
        bad("bias length", ValueError, "bias: expected 2 in dimension 0", bias=torch.zeros(3)),
        bad("bias class", TypeError, "bias: expected a tensor, got 0.0", bias=0.0),
        bad("segments class", TypeError, "segments: expected a sequence", segments=3),
        bad("segments entry", TypeError, "segments: expected integers, got 2.5", segments=[0, 2.5]),
        bad(
            "segments dtype",
            TypeError,
            "segments: expected int64 or int32, got float32",
            segments=torch.tensor([0.0, 6.0]),
        ),
        bad("segments end", ValueError, r"offsets from 0 to 6 .* got \[0, 5\]", segments=[0, 5]),
        bad("segments start", ValueError, "offsets from 0 to 6", segments=[1, 6]),
        bad("segments none", ValueError, "offsets from 0 to 6", segments=[]),
        bad(
            "segments empty domain",
            ValueError,
            "at least one sample in every domain, got none in domain 1",
            segments=[0, 4, 4, 6],
        ),
        bad(
            "segments order", ValueError, "ascending offsets, got 2 after 4", segments=[0, 4, 2, 6]
        ),
    ]
    if kind in ("gradient", "hgp"):
        wrong = torch.tensor([0, 1, 2, 0, 1, 0])
        found += [
            bad("labels class", TypeError, "labels: expected an integer", labels=None),
            bad("labels floating", TypeError, "labels: expected int64", labels=torch.zeros(6)),
            bad("labels length", ValueError, r"labels: expected shape \(6,\)", labels=wrong[:5]),
            bad("labels range", ValueError, r"labels: .* in \[0, 2\), got 2", labels=wrong),
            bad("labels negative", ValueError, r"labels: .* got -1", labels=-wrong.clamp(max=1)),
            bad(
                "binary labels range",
                ValueError,
                r"labels: .* in \[0, 2\), got 2",
                weight=torch.zeros(1, 3),
                bias=torch.zeros(1),
                labels=wrong,
            ),
            bad(
                "binary labels above 1",
                ValueError,
                r"labels: expected numbers in \[0, 1\], got 2.0",
                weight=torch.zeros(1, 3),
                bias=torch.zeros(1),
                labels=wrong.float(),
            ),
        ]
    if kind == "product":
        found += [
            bad("vectors class", TypeError, "vectors: expected a tensor", vectors=1),
            bad(
                "vectors rank",
                ValueError,
                r"vectors: expected shape \(C, D\), \(R, C, D\) or",
                vectors=torch.zeros(3),
            ),
            bad(
                "vectors without the bias",
                ValueError,
                r"expected \(C, D\) = \(2, 4\) \(the bias as last column\)",
                vectors=torch.zeros(2, 3),
            ),
            bad(
                "vectors domains",
                ValueError,
                "vectors: expected 2 in dimension 0 .domains",
                vectors=torch.zeros(3, 1, 2, 4),
            ),
        ]
    return tuple(found)


# ---- specs --------------------------------------------------------------------------------------


def _size(args: CallArgs) -> tuple[int, int, int]:
    return (*args.tensors["features"].shape, args.tensors["weight"].shape[0])


def _flops(products: int) -> Callable[[CallArgs], int]:
    def flops(args: CallArgs) -> int:
        n, d, c = _size(args)
        return products * 2 * n * d * c

    return flops


def _bytes(args: CallArgs) -> int:
    """Features and weight read once."""
    return sum(t.numel() * t.element_size() for t in args.tensors.values())


def _raw_calls(kind: str) -> Callable[[str], tuple[RawCall, ...]]:
    """The registered C++ ops, with and without gradients."""

    def calls(backend: str) -> tuple[RawCall, ...]:
        if not backends.native(backend):
            return ()
        ops, found = torch.ops.transfuse, []
        for grad in (False, True):
            plan = Plan((3, 2), 4, 3)
            generator = torch.Generator().manual_seed(0)
            tensors = plan.draw(kind, torch.float32, torch.device("cpu"), generator)
            targets = torch.full((5, 3), 0.25) if kind == "gradient" else None
            product, v, u = kind == "product", None, torch.empty(0, 3)
            if product:
                v = torch.randn(2, 3, 5, generator=generator).requires_grad_(grad)
                u = torch.randn(5, 3, generator=generator)
            x, w, b = (tensors[n].requires_grad_(grad) for n in ("features", "weight", "bias"))
            label = "with gradients" if grad else "plain"
            both = (x, w, b, targets, v, [0, 3, 5])
            found.append(RawCall(f"forward, {label}", ops.head_forward, both))
            if not product:
                alone = (x, w, None, targets, None, [0, 5])
                found.append(RawCall(f"no bias, {label}", ops.head_forward, alone))
            if not grad:
                p = torch.rand(5, 3, generator=generator)
                cotangent = torch.randn(2, 3, 5, generator=generator)
                whole = (cotangent, p, 1 - p, u, *both)
                found += [
                    RawCall("backward", ops.head_backward, (*whole, True, True, True)),
                    RawCall("backward, head", ops.head_backward, (*whole, False, True, False)),
                ]
        return tuple(found)

    return calls


_KERNEL_REFUSES = {"batched backward": "Batching rule not implemented|no vmap rule"}


def _reference(op: Op) -> Op:
    """The op with its reference, which takes no ``backend``."""

    def reference(*arguments: object, **options: object) -> object:
        return op(*arguments, backend="reference", **options)

    return reference


def _spec(
    op: Op, kind: str, products: int, *, kernel: bool = False, widths: bool = False
) -> OpSpec:
    """``kernel``: it has kernels; ``widths``: one of its own, tried at all its widths."""
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=_reference(op),
        cases=_cases(kind, widths),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton", "cuda") if kernel else ("reference",),
        flops=_flops(products),
        bytes=_bytes,
        errors=_errors(kind),
        gradcheck=("domains", "no bias", "binary") if widths else ("domains",),
        refuses=_KERNEL_REFUSES if kernel else {},
        fuzz=_fuzz(kind) if widths else None,
        raw_calls=_raw_calls(kind) if kernel else None,
        varying=frozenset({"tangent", "second gradient"}) if kernel else frozenset(),
    )


SPECS = (
    _spec(head_gradient, "gradient", 2, kernel=True),
    _spec(head_hessian_diagonal, "diagonal", 2, kernel=True, widths=True),
    _spec(head_hessian_trace, "trace", 1),
    _spec(head_hessian_product, "product", 5, kernel=True, widths=True),
    # On the CPU the kernels of the gradient and of the product, one after the other.
    _spec(head_hgp, "hgp", 5),
    _spec(head_hessian_distance, "distance", 2),
    _spec(head_hutchinson_diagonal, "hutchinson", 21),
)
