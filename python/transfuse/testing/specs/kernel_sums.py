"""Specs of ``kernel_sums`` and ``kernel_product_sums``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transfuse.ops import kernel_product_sums, kernel_sums
from transfuse.ops._kernel_sums_reference import (
    kernel_product_sums_reference,
    kernel_sums_reference,
)
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs import _kernel_sums_errors as errors

# float16, which only loads differently, is left to the random cases.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})

_REFUSES = {
    "jvp of jvp": "one more forward-mode derivative is not implemented",
    "batched backward": "Batching rule not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}


@dataclass(frozen=True)
class Plan:
    """Sizes and options of one call of ``kernel_sums``; ``columns`` None: x with itself."""

    rows: int
    width: int
    columns: int | None = None
    bandwidths: tuple[float, ...] | float = 1.0
    moving: bool = False  # the bandwidths are tensors that want a gradient
    weighted: bool = False
    kernel: str = "rbf"
    exclude: bool = False
    mean: float = 0.5

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        options: dict[str, object] = {} if backend is None else {"backend": backend}
        bandwidth = tensors["log_h"].exp() if self.moving else self.bandwidths
        return op(
            tensors["x"],
            tensors.get("y"),
            bandwidth,
            weights=tensors.get("weights"),
            kernel=self.kernel,
            exclude_diagonal=self.exclude,
            **options,
        )

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""
        names = ["x"]
        names += [] if self.columns is None else ["y"]
        names += ["log_h"] if self.moving else []
        names += ["weights"] if self.weighted else []

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            columns = self.rows if self.columns is None else self.columns
            made = {
                "x": torch.randn(self.rows, self.width, generator=generator) + self.mean,
                "y": torch.randn(columns, self.width, generator=generator) + self.mean,
                "log_h": torch.tensor(self.bandwidths).log(),
                "weights": torch.randn(columns, generator=generator),
            }
            return CallArgs(self.call, {n: made[n].to(dtype=dtype, device=device) for n in names})

        return Case(name, make, tuple(names), tags)


_PLANS: dict[str, tuple[Plan, frozenset[str]]] = {
    "everything": (Plan(4, 3, 5, (0.7, 1.9), moving=True, weighted=True), TINY),
    "itself weighted": (Plan(4, 2, None, (0.8, 2.0), moving=True, weighted=True), TINY),
    "imq no diagonal": (
        Plan(5, 2, None, 1.1, moving=True, weighted=True, kernel="imq", exclude=True),
        TINY,
    ),
    "one point": (Plan(1, 3, bandwidths=2.0), AWKWARD),
    "no columns": (Plan(3, 2, 0), AWKWARD),
    "no rows": (Plan(0, 2, 3), AWKWARD),
    "no width": (Plan(3, 0, 2), AWKWARD),
    "far from zero": (Plan(9, 4, 7, 1.5, mean=100.0), AWKWARD),
    "tiles": (Plan(97, 11, 49, (1.0, 3.0), weighted=True), AWKWARD),
    "blocks": (Plan(211, 3, None, 1.2, moving=True, exclude=True), AWKWARD),
    "long blocks": (Plan(101, 9, 301, 3.0, moving=True), AWKWARD),
    "batch": (Plan(128, 64, bandwidths=8.0), REAL),
    "mmd": (Plan(8192, 64, bandwidths=8.0), BENCH),
}


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    """Random sizes around those of tiles and blocks."""
    sizes = (1, 2, 7, 47, 49, 96, 97, 145, 193)
    rows, columns = choose(sizes), choose((None, *sizes))
    plan = Plan(
        rows,
        choose((1, 3, 16, 17)),
        columns,
        choose(((1.0,), (0.6, 4.0))),
        moving=choose((True, False)),
        weighted=choose((True, False)),
        kernel=choose(("rbf", "imq")),
        exclude=columns in (None, rows) and choose((True, False)),
    )
    return plan.case(f"fuzz {plan}", AWKWARD)


# name -> rows, widths of x and t (or y), which products, options
def _products_case(
    name: str,
    tags: frozenset[str],
    rows: int,
    products: Sequence[Sequence[int]] | None,
    conditional: bool,
    **options: object,
) -> Case:
    def call(op: Callable[..., object], t: Tensors, backend: str | None) -> object:
        given: dict[str, object] = {} if backend is None else {"backend": backend}
        h = t["log_h"].exp()
        factors = [(t["x"], None, h[0]), (t["y"], None, h[1])]
        if conditional:
            factors += [(t["t"], None, h[2]), (t["t"], t["y"], 1.3)]
        else:
            factors += [(t["t"], None, h[2]), (t["t"], None, 1.9)]
        return op(factors, products, **options, **given)

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        sizes = {"x": (rows, 3), "y": (rows, 1), "t": (rows, 1 if conditional else 2)}
        made = {n: torch.randn(*size, generator=generator) for n, size in sizes.items()}
        made["log_h"] = torch.tensor([0.3, 0.1, -0.2])
        return CallArgs(call, {n: t.to(dtype=dtype, device=device) for n, t in made.items()})

    return Case(name, make, ("x", "y", "t", "log_h"), tags)


_CONDITIONAL = ((0,), (0, 1), (0, 2), (0, 3))

_PRODUCT_CASES = (
    _products_case("conditional", TINY, 4, _CONDITIONAL, True),
    _products_case("information", TINY, 4, ((0,), (2,), (0, 2), (0, 1, 3)), False),
    _products_case("all", TINY, 5, None, False, kernel="imq", exclude_diagonal=True),
    _products_case("conditional blocks", AWKWARD, 197, _CONDITIONAL, True),
)


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        points = [torch.randn(2, n, 3, generator=generator).requires_grad_(grad) for n in (4, 5)]
        h = torch.ones(2, 2, dtype=torch.float64).requires_grad_(grad)
        weights = torch.ones(2, 5, dtype=torch.float64).requires_grad_(grad)
        plan = ([0, 1], [0, 0], h, [1, 3], weights, False, False)
        calls.append(
            RawCall(f"groups, gradients {grad}", torch.ops.transfuse.kernel_sums, (points, *plan))
        )
    sums = torch.ones(2, 2, 4, dtype=torch.float64)
    still = [p.detach() for p in points]
    plan = ([0, 1], [0, 0], h.detach(), [1, 3], None, True, False, [1, 0], True)
    op = torch.ops.transfuse.kernel_sums_backward
    calls.append(RawCall("backward", op, (sums, still, *plan)))
    return tuple(calls)


def _flops(args: CallArgs) -> int:
    x, y = args.tensors["x"], args.tensors.get("y")
    if y is None:
        return x.shape[0] ** 2 * (x.shape[1] + 10)
    return 2 * x.shape[0] * y.shape[0] * (x.shape[1] + 10)


def _bytes(args: CallArgs) -> int:
    return sum(t.numel() * t.element_size() for t in args.tensors.values())


SPECS = (
    OpSpec(
        name="kernel_sums",
        op=kernel_sums,
        reference=kernel_sums_reference,
        cases=tuple(plan.case(name, tags) for name, (plan, tags) in _PLANS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton"),
        flops=_flops,
        bytes=_bytes,
        errors=errors.SUMS,
        gradcheck=("everything", "itself weighted", "imq no diagonal"),
        refuses=_REFUSES,
        fuzz=_fuzz,
        raw_calls=_raw_calls,
        varying=frozenset({"tangent", "second gradient"}),
    ),
    OpSpec(
        name="kernel_product_sums",
        op=kernel_product_sums,
        reference=kernel_product_sums_reference,
        cases=_PRODUCT_CASES,
        dtypes=(torch.float32, torch.float64),
        backends=("reference", "cpu", "triton"),
        flops=_flops,
        bytes=_bytes,
        errors=errors.PRODUCTS,
        gradcheck=("conditional",),
        refuses=_REFUSES,
        varying=frozenset({"tangent", "second gradient"}),
        declared_as="kernel_sums",
    ),
)
