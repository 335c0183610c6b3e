"""The oracle and the tolerance rule, stated once.

The oracle is the op's reference in float64 on the inputs as rounded to the dtype under test. A
result passes if

    max |result - oracle| <= 2 * max |eager - oracle| + band

where ``eager`` is the reference run in that dtype, and ``band = units * eps(dtype) * scale`` with 4
units for values, 8 for gradients, 16 for tangents and second derivatives (where terms of the size
of input times direction cancel). ``dtype`` is the result's own for values;
for derivatives it is that of the call, since even the float32 gradient of a float32 bias is made
from a bfloat16 output. ``scale`` is max |oracle|, but not less than a quarter of the largest
number the result was made from (the inputs for a value, all derivatives of the same call for a
derivative): a result that is tiny because large terms cancel (the query gradient of attention to a
single key is exactly zero) carries the rounding of those terms.

In float64 the oracle is no better than the result, and the band is 1024 units instead.

Infinities must agree in place and sign; NaN never passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.testing.spec import CallArgs, OpSpec, Outputs, Tensors

VALUE_UNITS = 4.0
GRADIENT_UNITS = 8.0
TANGENT_UNITS = 16.0
SECOND_UNITS = 16.0
FLOAT64_UNITS = 1024.0
CANCELLATION = 1.0 / 4.0

Function = Callable[[Tensors], Outputs]


@dataclass(frozen=True)
class Comparison:
    """How far one result is from the oracle, and how far it may be."""

    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.note == "" and self.error <= self.limit

    def __str__(self) -> str:
        return self.note if self.note else f"error {self.error:.3g}, allowed {self.limit:.3g}"


def compare(
    result: Tensor,
    oracle: Tensor,
    eager: Tensor | None = None,
    *,
    units: float = VALUE_UNITS,
    terms: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Judge a result by the tolerance rule.

    Args:
        result: what the op gave.
        oracle: float64 reference on the rounded inputs.
        eager: the reference in the dtype of the inputs; None leaves only the band.
        units: width of the band in eps.
        terms: magnitude of the largest number the result was made from (see the module docstring).
        dtype: dtype of the call, if it sets the precision (derivatives); None: that of the result.
    """
    if result.shape != oracle.shape:
        return Comparison(
            float("inf"), 0.0, f"shape {tuple(result.shape)}, expected {tuple(oracle.shape)}"
        )
    if result.dtype == torch.float64:
        units = max(units, FLOAT64_UNITS)
    eps = torch.finfo(result.dtype).eps
    if dtype is not None:
        eps = max(eps, torch.finfo(dtype).eps)
    band = units * eps * max(magnitude(oracle), CANCELLATION * terms)
    yardstick = 0.0 if eager is None else distance(eager, oracle)
    return Comparison(distance(result, oracle), 2.0 * yardstick + band)


def compare_all(
    results: Sequence[Tensor],
    oracles: Sequence[Tensor],
    eagers: Sequence[Tensor] | None,
    *,
    units: float,
    terms: float,
    names: Sequence[str],
    dtype: torch.dtype | None = None,
) -> list[str]:
    """What is wrong with several results; an empty list if nothing is."""
    if len(results) != len(oracles):
        return [f"{len(results)} results, expected {len(oracles)}"]
    problems = []
    for number, (name, result, oracle) in enumerate(zip(names, results, oracles, strict=True)):
        eager = None if eagers is None else eagers[number]
        verdict = compare(result, oracle, eager, units=units, terms=terms, dtype=dtype)
        if not verdict.ok:
            problems.append(f"{name}: {verdict}")
        if eager is not None and result.dtype != eager.dtype:
            problems.append(f"{name}: dtype {result.dtype}, expected {eager.dtype}")
    return problems


def distance(result: Tensor, oracle: Tensor) -> float:
    """max |result - oracle|; equal infinities count 0, unequal ones and NaN infinity."""
    if oracle.numel() == 0:
        return 0.0
    result = result.detach().to(device="cpu", dtype=torch.float64)
    oracle = oracle.detach().to(device="cpu", dtype=torch.float64)
    gap = torch.where(result == oracle, 0.0, (result - oracle).abs())
    return torch.where(gap.isnan(), torch.inf, gap).max().item()


def magnitude(*tensors: Tensor) -> float:
    """Largest finite absolute value of any of the tensors."""
    largest = 0.0
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() > 0:
            size = tensor.detach().to(torch.float64).abs()
            largest = max(largest, torch.where(size.isfinite(), size, 0.0).max().item())
    return largest


def widen(tensors: Tensors) -> Tensors:
    """The same (rounded) numbers in float64; integers and masks as they are."""
    return {
        name: tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def function(args: CallArgs, op: Callable[..., object], backend: str | None = None) -> Function:
    """A call as a function of its tensors alone."""
    return lambda tensors: args.run(op, tensors, backend)


def directions(tensors: Iterable[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Normal random tensors of the same shapes, dtypes and devices."""
    return [
        torch.randn(tuple(t.shape), generator=generator).to(device=t.device, dtype=t.dtype)
        for t in tensors
    ]


def values(fn: Function, tensors: Tensors) -> Outputs:
    """Results without autograd."""
    with torch.no_grad():
        return fn(tensors)


def leaves(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """Views of the same memory, of which the named ones require a gradient."""
    return {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}


def gradients(
    fn: Function, tensors: Tensors, names: Sequence[str], cotangents: Sequence[Tensor]
) -> Outputs:
    """Reverse mode: gradients of ``sum <cotangent, result>`` with respect to the named tensors."""
    own = leaves(tensors, names)
    results = fn(own)
    return torch.autograd.grad(
        results, [own[name] for name in names], cotangents, materialize_grads=True
    )


def second_gradients(
    fn: Function,
    tensors: Tensors,
    names: Sequence[str],
    cotangents: Sequence[Tensor],
    direction: Sequence[Tensor],
) -> Outputs:
    """Double backward: gradients of ``<direction, gradients(...)>``."""
    own = leaves(tensors, names)
    inputs = [own[name] for name in names]
    first = torch.autograd.grad(
        fn(own), inputs, cotangents, create_graph=True, materialize_grads=True
    )
    pairs = [(g, d) for g, d in zip(first, direction, strict=True) if g.requires_grad]
    if not pairs:  # the call is linear
        return tuple(torch.zeros_like(t) for t in inputs)
    return torch.autograd.grad(
        [g for g, _ in pairs], inputs, [d for _, d in pairs], materialize_grads=True
    )


def tangents(
    fn: Function, tensors: Tensors, names: Sequence[str], direction: Sequence[Tensor]
) -> tuple[Outputs, Outputs]:
    """Forward mode: results and their derivative along a direction of the named tensors."""

    def of_named(*named: Tensor) -> Outputs:
        return fn({**tensors, **dict(zip(names, named, strict=True))})

    return torch.func.jvp(of_named, tuple(tensors[n].detach() for n in names), tuple(direction))


def reference_function(spec: OpSpec, args: CallArgs) -> Function:
    """The spec's reference as a function of tensors."""
    return function(args, spec.reference)
