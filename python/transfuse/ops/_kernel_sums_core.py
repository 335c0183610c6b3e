"""The differentiable core of kernel sums: kernels by backend, and the rules of its derivatives.

Flat tensors are the point sets (each (G, count, width)), the bandwidths (G, F) and the weights
(G, M) or None; the result is (G, P, N), float64. The first derivative by points and bandwidths has
kernels. That by the weights is the sum itself with rows and columns exchanged. Further derivatives,
and forward mode, are torch's own of the sums by matrix products, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _autograd, _backend, _triton_ops
from transfuse._autograd import (
    Differentiable,
    Tensors,
    needs_derivative,
    refuse_forward_over_forward,
)
from transfuse.ops._kernel_sums_call import Call, Plan
from transfuse.ops._kernel_sums_reference import by_rows, chunks

NAME = "kernel_sums"
WITHOUT_KERNELS = ("composed", "reference")


class Static(NamedTuple):
    """What a call has besides its tensors."""

    plan: Plan
    backend: str


class Kernels(NamedTuple):
    """The kernels of a backend, with the arguments of the C++ schemas."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[list[Tensor], Tensor]]


def kernels(backend: str) -> Kernels:
    """The kernels of a backend."""
    names = ("kernel_sums", "kernel_sums_backward")
    return Kernels(*_triton_ops.raw_ops("kernel_sums", backend, *names))


def sums(call: Call, backend: str | None) -> Tensor:
    """(P, N), float64, differentiable; the default backend also differentiates under compile."""
    chosen = _backend.choose(NAME, backend, call.points[0].device, call.points[0].dtype)
    weights = None if call.weights is None else call.weights[None]
    flat = [*(p[None] for p in call.points), call.bandwidths[None], weights]
    static = Static(call.plan, chosen)
    if torch.compiler.is_compiling():
        # Asked for its refusal of transforms.
        needs_derivative([t for t in flat if t is not None])
        if chosen in WITHOUT_KERNELS:
            return _dense(static.plan, flat)[0]
        return forward(static._replace(backend=_triton_ops.traced(chosen)), flat)[0][0]
    if needs_derivative(flat):
        return function(static, flat)[0][0]
    return forward(static, flat)[0][0]


def _split(tensors: Tensors) -> tuple[list[Tensor], Tensor, Tensor | None]:
    *points, bandwidths, weights = tensors
    return points, bandwidths, weights


def arguments(plan: Plan, tensors: Tensors) -> tuple:
    """What the C++ ops take."""
    points, bandwidths, weights = _split(tensors)
    pairs = [number for pair in plan.distances for number in pair]
    return (
        points,
        pairs,
        list(plan.kernels),
        bandwidths.contiguous(),
        list(plan.products),
        None if weights is None else weights.contiguous(),
        plan.inverse,
        plan.exclude,
    )


def _dense(plan: Plan, tensors: Tensors) -> Tensor:
    """All sums (G, P, N) by matrix products, float64, differentiable."""
    points, bandwidths, weights = _split(tensors)
    parts = [by_rows(plan, points, bandwidths, weights, r) for r in chunks(plan, points)]
    return torch.cat(parts, -1).to(torch.float64)


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """The sums by the chosen backend."""
    if static.backend in WITHOUT_KERNELS:
        return (_dense(static.plan, tensors),)
    return (kernels(static.backend).forward(*arguments(static.plan, tensors)),)


def backward(
    static: Static, tensors: Tensors, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by points and bandwidths, by the chosen backend; not differentiable."""
    points, _bandwidths, _ = _split(tensors)
    wanted = [int(need) for need in needs[: len(points)]]
    if static.backend in WITHOUT_KERNELS:
        return _pulled(static.plan, tensors, grad, [*needs[:-1], False])
    found, to_bandwidths = kernels(static.backend).backward(
        grad.contiguous(), *arguments(static.plan, tensors), wanted, bool(needs[len(points)])
    )
    by_points = [
        g.to(p.dtype) if w else None for g, p, w in zip(found, points, wanted, strict=True)
    ]
    return [*by_points, to_bandwidths if needs[len(points)] else None, None]


def _pulled(
    plan: Plan, tensors: Tensors, grad: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by the tensors that need one, some rows at a time; differentiable."""
    chosen = [i for i, need in enumerate(needs) if need and tensors[i] is not None]
    total: list[Tensor | None] = [None] * len(tensors)
    if not chosen:
        return total
    points, _, _ = _split(tensors)
    for rows in chunks(plan, points):

        def of_chosen(*given: Tensor, rows: slice = rows) -> Tensor:
            own = list(tensors)
            for i, t in zip(chosen, given, strict=True):
                own[i] = t
            return by_rows(plan, *_split(own), rows)

        value, pull = torch.func.vjp(of_chosen, *(tensors[i] for i in chosen))
        for i, g in zip(chosen, pull(grad[..., rows].to(value.dtype)), strict=True):
            known = total[i]
            total[i] = g if known is None else known + g
    return total


def exchanged(plan: Plan) -> Plan:
    """Rows for columns."""
    return plan._replace(distances=tuple((c, r) for r, c in plan.distances))


def _vjp(static: Static, tensors: Tensors, outputs: Tensors, grads: Tensors, needs) -> list:
    grad = grads[0]
    if grad is None:
        return [None] * len(tensors)
    if needs_derivative([*tensors, grad]):
        found = _pulled(static.plan, tensors, grad, needs)
        return [None if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]
    found = backward(static, tensors, grad, needs)
    if needs[-1]:
        found[-1] = to_weights(static, tensors, grad)
    return found


def to_weights(static: Static, tensors: Tensors, grad: Tensor) -> Tensor:
    """The gradient by the weights (G, M)."""
    total = None
    for number, mask in enumerate(static.plan.products):
        plan = exchanged(static.plan)._replace(products=(mask,))
        (part,) = forward(static._replace(plan=plan), [*tensors[:-1], grad[:, number]])
        total = part[:, 0] if total is None else total + part[:, 0]
    return total


def _jvp(static: Static, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> list[Tensor]:
    refuse_forward_over_forward(NAME)
    moving = [t is not None for t in tangents]
    if not any(moving):
        return [torch.zeros_like(outputs[0])]
    points, _, _ = _split(tensors)
    chosen = [i for i, m in enumerate(moving) if m]
    found = []
    for rows in chunks(static.plan, points):

        def of_chosen(*given: Tensor, rows: slice = rows) -> Tensor:
            own = list(tensors)
            for i, t in zip(chosen, given, strict=True):
                own[i] = t
            return by_rows(static.plan, *_split(own), rows)

        # J t as the gradient by v of <J^T v, t>: reverse mode alone, since forward mode may be on.
        value, pull = torch.func.vjp(of_chosen, *(tensors[i] for i in chosen))
        _, push = torch.func.vjp(pull, torch.zeros_like(value))
        found.append(push(tuple(tangents[i].to(tensors[i].dtype) for i in chosen))[0])
    return [torch.cat(found, -1).to(torch.float64)]


def _vmap(static: Static, tensors: Tensors, dims, size):
    folded: list[Tensor | None] = []
    groups = 1
    for t, dim in zip(tensors, dims, strict=True):
        if t is None:
            folded.append(None)
            continue
        t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        groups = t.shape[1]
        folded.append(t.flatten(0, 1))

    def unfold(outputs: Tensors) -> tuple[Tensor, ...]:
        return tuple(y.unflatten(0, (size, groups)) for y in outputs)

    return static, folded, unfold


function = _autograd.function(
    Differentiable(name=NAME, forward=forward, vjp=_vjp, jvp=_jvp, vmap=_vmap)
)
