"""Specs of ``nes_perturb`` and ``nes_gradient``, whose noise is made from a counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfuse.ops import nes_gradient, nes_perturb
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
# Logarithm, root, sine, cosine and two products make two normal numbers; the integer operations of
# the generator are no floating-point operations.
NOISE_FLOPS = 4


@dataclass(frozen=True)
class Plan:
    """One call of either op for a tensor of ``shape`` and ``samples`` samples."""

    shape: tuple[int, ...]
    samples: int = 3
    seed: int = 5
    start: int = 0
    mask: tuple[int, ...] | None = None

    def perturb(self, name: str, tags: frozenset[str]) -> Case:
        """As a case of ``nes_perturb``."""

        def draw(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
            return torch.randn(self.shape, generator=generator).to(dtype)

        def call(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
            return op(tensors["x"], self.samples, sigma=0.5, **self._options(tensors, backend))

        return Case(name, partial(self._make, "x", draw, call), ("x",), tags)

    def gradient(self, name: str, tags: frozenset[str]) -> Case:
        """As a case of ``nes_gradient``, for a tensor of the dtype of the weights."""

        def draw(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
            return torch.randn(self.samples, generator=generator).to(dtype)

        def call(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
            weights = tensors["weights"]
            like = weights.new_zeros(self.shape)
            return op(weights, like, **self._options(tensors, backend))

        return Case(name, partial(self._make, "weights", draw, call), ("weights",), tags)

    def _make(
        self,
        name: str,
        draw: Callable[..., Tensor],
        call: Callable[..., Any],
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> CallArgs:
        tensors = {name: draw(dtype, generator)}
        if self.mask is not None:
            tensors["mask"] = torch.rand(self.mask, generator=generator) > 0.4
        return CallArgs(call, {key: tensor.to(device) for key, tensor in tensors.items()})

    def _options(self, tensors: Tensors, backend: str | None) -> dict[str, object]:
        options: dict[str, object] = {"seed": self.seed, "start": self.start}
        options["mask"] = tensors.get("mask")
        return options if backend is None else {**options, "backend": backend}


_PLANS = {
    "plain": (Plan((3, 5)), TINY),
    "masked": (Plan((4, 33), mask=(33,)), TINY),
    "large seed and start": (Plan((70,), seed=2**63 + 9, start=2**40 + 3), TINY),
    "number": (Plan((), samples=2), AWKWARD),
    "no samples": (Plan((7,), samples=0), AWKWARD),
    "no elements": (Plan((0, 3)), AWKWARD),
    "one group": (Plan((64,)), AWKWARD),
    "past a group": (Plan((65,), samples=1), AWKWARD),
    "several blocks": (Plan((5, 4099), mask=(5, 4099)), AWKWARD),
    "image": (Plan((3, 64, 64), samples=8, mask=(1, 64, 64)), REAL),
}


def _fuzz(choose: Callable[[Sequence[object]], object], kind: str) -> Case:
    shape: Any = choose(((), (1,), (63,), (64,), (2, 65), (3, 1, 129), (0,), (2049,)))
    plan = Plan(
        shape,
        samples=choose((0, 1, 2, 5)),
        seed=choose((0, -1, 2**32, 2**64 - 1)),
        start=choose((0, 1, 2**32 - 1)),
        mask=choose((None, shape, (1,) * len(shape))),
    )
    return getattr(plan, kind)(f"fuzz {plan}", AWKWARD)


@dataclass(frozen=True)
class _Refused:
    """A call with one argument that must be refused."""

    kind: str
    changes: dict[str, object] = field(default_factory=dict)

    def __call__(self, op: Callable[..., object]) -> object:
        first = {"x": torch.zeros(3), "count": 2, "sigma": 0.1}
        if self.kind == "gradient":
            first = {"weights": torch.zeros(2), "like": torch.zeros(3)}
        arguments = {**first, "seed": 0, **self.changes}
        leading = [arguments.pop(name) for name in tuple(first)[:2]]
        return op(*leading, **arguments)


def _bad(
    kind: str, rows: Sequence[tuple[dict[str, object], type[Exception], str]]
) -> tuple[BadCase, ...]:
    return tuple(
        BadCase(f"{next(iter(changes))} {i}", _Refused(kind, changes), error, match)
        for i, (changes, error, match) in enumerate(rows)
    )


_SHARED_ERRORS = (
    ({"seed": 1.5}, TypeError, "seed: expected an integer"),
    ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
    ({"start": -1}, ValueError, "start: expected an integer of at least 0"),
    ({"mask": torch.ones(3)}, TypeError, "mask: expected a bool tensor"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask: expected a shape"),
    ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "mask: expected device"),
)
_BACKEND_ERROR = ({"backend": "fast"}, ValueError, "backend: expected one of")
_ERRORS = {
    "perturb": _bad(
        "perturb",
        (
            ({"x": None}, TypeError, "x: expected a tensor"),
            ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x: expected float32"),
            ({"count": -1}, ValueError, "count: expected an integer of at least 0"),
            ({"count": 1.0}, TypeError, "count: expected an integer"),
            ({"sigma": 0.0}, ValueError, "sigma: expected a number greater than 0"),
            *_SHARED_ERRORS,
            _BACKEND_ERROR,
        ),
    ),
    "gradient": _bad(
        "gradient",
        (
            ({"weights": 1.0}, TypeError, "weights: expected a tensor"),
            ({"weights": torch.ones(2, 2)}, ValueError, "weights: expected 1 dimensions"),
            ({"weights": torch.ones(2, dtype=torch.int64)}, TypeError, "weights: expected float32"),
            ({"like": None}, TypeError, "like: expected a tensor"),
            *_SHARED_ERRORS,
            _BACKEND_ERROR,
        ),
    ),
}


def _raw_calls(backend: str, kind: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3, dtype=torch.float64)
    if kind == "perturb":
        op = torch.ops.transfuse.nes_perturb
        return tuple(
            RawCall(f"mask {mask is not None}", op, (x, mask, 3, 0, 2, 0.1))
            for mask in (None, x > 0)
        )
    op = torch.ops.transfuse.nes_gradient
    return tuple(
        RawCall(f"mask {mask is not None}", op, (weights, x, mask, 3, 1)) for mask in (None, x > 0)
    )


def _perturb_work(x: Tensor, count: int, **_: object) -> tuple[int, int]:
    """Numbers of noise that a call needs, and bytes that it must read and write."""
    return count * x.numel(), (1 + 2 * count) * x.numel() * x.element_size()


def _gradient_work(weights: Tensor, like: Tensor, **_: object) -> tuple[int, int]:
    wide = 8 if like.dtype == torch.float64 else 4
    return weights.numel() * like.numel(), like.numel() * wide


def _spec(
    op: Callable[..., object], kind: str, work: Callable[..., tuple[int, int]], adds: int
) -> OpSpec:
    """``adds``: operations per number of noise beside making it."""
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=partial(op, backend="reference"),
        cases=tuple(getattr(plan, kind)(name, tags) for name, (plan, tags) in _PLANS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton"),
        flops=lambda args: (NOISE_FLOPS + adds) * args.call(work, args.tensors, None)[0],
        bytes=lambda args: args.call(work, args.tensors, None)[1],
        errors=_ERRORS[kind],
        gradcheck=("plain",),
        underivable="has no derivative|do not support torch.func transforms",
        fuzz=partial(_fuzz, kind=kind),
        raw_calls=partial(_raw_calls, kind=kind),
        noise=lambda seed: getattr(Plan((9, 7), seed=seed), kind)(f"seed {seed}", TINY),
    )


SPECS = (
    _spec(nes_perturb, "perturb", _perturb_work, 3),
    _spec(nes_gradient, "gradient", _gradient_work, 2),
)
