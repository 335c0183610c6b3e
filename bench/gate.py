"""The correctness gate: no candidate is timed before it agrees with the float64 oracle.

The tolerance rule is the library's own, stated in :mod:`transfuse.testing.oracle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from transfuse.testing.oracle import (
    GRADIENT_UNITS,
    SECOND_UNITS,
    VALUE_UNITS,
    compare,
    distance,
    magnitude,
    widen,
)

from .cases import GRAD, Expression, Tensors, Workload

UNITS = {
    "forward": VALUE_UNITS,
    "backward": GRADIENT_UNITS,
    "full": GRADIENT_UNITS,
    "hvp": SECOND_UNITS,
}
# Eager torch itself must be within this many eps of the largest value; beyond it the yardstick is
# broken, not noisy, and twice its error would let anything through.
SANE = 64.0

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Verdict:
    """Outcome for one candidate, at the output with the largest error / tolerance."""

    passed: bool
    error: float
    tolerance: float
    reason: str = ""


def as_tuple(result: object) -> Outputs:
    """A candidate's result as a flat tuple of tensors."""
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, (tuple, list)):
        return tuple(tensor for item in result for tensor in as_tuple(item))
    raise TypeError(f"candidate returned {type(result).__name__}, expected tensors")


def bind(
    expression: Expression, tensors: Tensors, *, mode: str, differentiable: Sequence[str]
) -> Callable[[], Outputs]:
    """A call without arguments that runs ``expression`` in the given mode.

    forward and hvp return the expression's outputs; backward and full return the gradients of every
    differentiable input for the output gradient ``tensors[GRAD]``.
    """
    if mode == "hvp":
        return lambda: as_tuple(expression(tensors))
    if mode == "forward":

        def forward() -> Outputs:
            with torch.no_grad():
                return as_tuple(expression(tensors))

        return forward
    if not differentiable:
        raise ValueError(f"mode {mode!r}: the case names no differentiable inputs")
    leaves = {
        name: tensor.detach().requires_grad_(name in differentiable)
        for name, tensor in tensors.items()
    }
    inputs = [leaves[name] for name in differentiable]
    grad = leaves[GRAD]
    if mode == "full":
        return lambda: torch.autograd.grad(as_tuple(expression(leaves))[0], inputs, grad)
    output = as_tuple(expression(leaves))[0]
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def oracle(workload: Workload, *, mode: str) -> Outputs:
    """float64 reference on the rounded inputs, head by head where heads are independent."""
    return _reference(workload, widen(workload.tensors), mode)


def yardstick(workload: Workload, *, mode: str) -> Outputs:
    """Eager torch in the dtype of the inputs, whose error the tolerance rule starts from."""
    if workload.yardstick is None:
        return _reference(workload, workload.tensors, mode)
    expression = workload.expressions[workload.yardstick]
    call = bind(expression, workload.tensors, mode=mode, differentiable=workload.differentiable)
    return tuple(tensor.detach() for tensor in call())


def _reference(workload: Workload, tensors: Tensors, mode: str) -> Outputs:
    mode = "full" if mode == "backward" else mode
    slices = [tensors] if workload.heads is None else _by_head(tensors, workload.heads)
    parts = []
    for part in slices:
        call = bind(workload.reference, part, mode=mode, differentiable=workload.differentiable)
        parts.append(tuple(result.detach() for result in call()))
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(results, dim=1) for results in zip(*parts, strict=True))


def _by_head(tensors: Tensors, heads: int) -> list[Tensors]:
    return [
        {
            name: tensor.narrow(1, head, 1)
            if tensor.ndim >= 3 and tensor.shape[1] == heads
            else tensor
            for name, tensor in tensors.items()
        }
        for head in range(heads)
    ]


class Gate:
    """Holds the oracle and eager torch's result for one workload, and judges candidates by them.

    Outputs are judged one by one, except those of a Hessian-vector product: they are pieces of one
    vector and share one tolerance.

    Raises:
        RuntimeError: eager torch is itself too far from the oracle to measure anything by.
    """

    def __init__(self, truth: Outputs, eager: Outputs, *, mode: str, inputs: Tensors) -> None:
        self._shapes = [tuple(tensor.shape) for tensor in truth]
        self._dtypes = [tensor.dtype for tensor in eager]
        self._mode = mode
        self._truth = self._judged(truth)
        self._eager = self._judged(eager)
        # The largest number a result was made from, as the tolerance rule defines it.
        self._terms = magnitude(*inputs.values()) if mode == "forward" else magnitude(*self._truth)
        for index, (ours, right) in enumerate(zip(self._eager, self._truth, strict=True)):
            error = distance(ours, right)
            unit = torch.finfo(ours.dtype).eps * max(magnitude(right), self._terms / 8)
            # Written so that NaN fails.
            if not error <= SANE * unit and ours.dtype != torch.float64:
                raise RuntimeError(
                    f"eager torch is off by {error:.3g} at output {index}, more than {SANE:g} "
                    f"units of {unit:.3g}: nothing can be judged by it"
                )

    def judge(self, outputs: Outputs, *, slack: float = 0.0) -> Verdict:
        """Compare one candidate's outputs with the oracle.

        ``slack``, as a part of the largest value of an output, is for estimates.
        """
        outputs = tuple(tensor.detach() for tensor in outputs)
        misfit = self._misfit(outputs)
        if misfit is not None:
            return misfit
        worst = Verdict(True, 0.0, math.inf)
        for index, output in enumerate(self._judged(outputs)):
            verdict = compare(
                output,
                self._truth[index],
                self._eager[index],
                units=UNITS[self._mode],
                terms=self._terms,
            )
            if slack > 0.0 and verdict.note == "":
                limit = max(verdict.limit, slack * magnitude(self._truth[index]))
                verdict = replace(verdict, limit=limit)
            if not verdict.ok:
                return Verdict(
                    False, verdict.error, verdict.limit, f"wrong: output {index}, {verdict}"
                )
            # error / limit without dividing by a limit of zero.
            if verdict.error * worst.tolerance > worst.error * verdict.limit or index == 0:
                worst = Verdict(True, verdict.error, verdict.limit)
        return worst

    def judge_draw(self, outputs: Outputs) -> Verdict:
        """Compare the mean and the spread of another draw of the same random numbers with the
        oracle's, within six standard errors of two independent draws."""
        outputs = tuple(tensor.detach() for tensor in outputs)
        misfit = self._misfit(outputs)
        if misfit is not None:
            return misfit
        worst = Verdict(True, 0.0, math.inf)
        for index, (output, truth) in enumerate(zip(outputs, self._truth, strict=True)):
            spread = truth.std(correction=0)
            limit = 6.0 * (2.0 / truth.numel()) ** 0.5
            wide = output.to(torch.float64)
            errors = (wide.mean() - truth.mean()) / spread, wide.std(correction=0) / spread - 1.0
            error = max(abs(e.item()) for e in errors)
            if not error <= limit:
                reason = f"wrong: output {index}, not a draw of the same numbers"
                return Verdict(False, error, limit, f"{reason} ({error:.3g}, allowed {limit:.3g})")
            if error * worst.tolerance > worst.error * limit or index == 0:
                worst = Verdict(True, error, limit)
        return worst

    def _misfit(self, outputs: Outputs) -> Verdict | None:
        """What is wrong with the number, shapes or dtypes of outputs; None if nothing."""
        if len(outputs) != len(self._shapes):
            return _refuse(f"returned {len(outputs)} outputs, expected {len(self._shapes)}")
        for index, output in enumerate(outputs):
            if tuple(output.shape) != self._shapes[index]:
                got, expected = tuple(output.shape), self._shapes[index]
                return _refuse(f"output {index} has shape {got}, expected {expected}")
            if output.dtype != self._dtypes[index]:
                return _refuse(
                    f"output {index} has dtype {output.dtype}, expected {self._dtypes[index]}"
                )
        return None

    def _judged(self, outputs: Outputs) -> Outputs:
        if self._mode != "hvp":
            return outputs
        return (torch.cat([tensor.reshape(-1) for tensor in outputs]),)


def _refuse(reason: str) -> Verdict:
    return Verdict(False, math.inf, 0.0, f"wrong: {reason}")
