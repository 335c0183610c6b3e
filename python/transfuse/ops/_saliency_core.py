"""The differentiable core of the saliency maps: kernels by backend, and rules of derivatives.

Values come from a kernel, derivatives of every order from the definition: a rule differentiates
``static.defined`` by torch, which follows it through further derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _autograd, _triton_ops
from transfuse._autograd import (
    Differentiable,
    Tensors,
    dense,
    needs_derivative,
    refuse_forward_over_forward,
)
from transfuse.ops._saliency_call import PHASES1, Plan
from transfuse.ops._saliency_reference import normgrad, weighted_map


def _kernel(backend: str, name: str) -> Callable:
    """The kernel of an op by a backend, with the arguments of the C++ op."""
    if _triton_ops.traced(backend) == _triton_ops.COMPILED:
        return getattr(torch.ops.transfuse, f"{name}_triton")
    if backend == "triton":
        return _triton_ops.kernel("saliency", name)
    return getattr(torch.ops.transfuse, name)


class Weighted(NamedTuple):
    """A gradient-weighted map: code of the method, and backend."""

    method: int
    backend: str

    @property
    def uses_act(self) -> bool:
        return True

    def defined(self, act: Tensor, grad: Tensor) -> Tensor:
        return weighted_map(act, grad, self.method)

    def kernel(self, act: Tensor, grad: Tensor) -> Tensor:
        return _kernel(self.backend, "grad_weighted_map")(act, grad, self.method)


class Normed(NamedTuple):
    """A NormGrad map: its plan, and backend."""

    plan: Plan
    backend: str

    @property
    def uses_act(self) -> bool:
        return self.plan.phase1 != PHASES1["bias"]

    def defined(self, act: Tensor, grad: Tensor) -> Tensor:
        return normgrad(act, grad, self.plan)

    def kernel(self, act: Tensor, grad: Tensor) -> Tensor:
        arguments = (self.plan.grid, self.plan.phase1, self.plan.phase2, *self.plan.geometry)
        return _kernel(self.backend, "normgrad_map")(act, grad, *arguments)


Static = Weighted | Normed


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(B, C, L) and (B, C', L') -> (B, L')."""
    act, grad = tensors
    if static.backend == "composed":
        return (static.defined(act, grad),)
    return (static.kernel(act, grad),)


def gradients(
    static: Static, act: Tensor, grad: Tensor, cotangent: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients with respect to act and grad of <cotangent, map>; None where it does not depend."""
    if not static.uses_act:
        _, pull = torch.func.vjp(lambda g: static.defined(act, g), grad)
        return None, pull(cotangent)[0]
    _, pull = torch.func.vjp(static.defined, act, grad)
    return pull(cotangent)


def _vjp(static: Static, tensors: Tensors, outputs: Tensors, grads: Tensors, needs) -> list:
    if grads[0] is None:
        return [None, None]
    return list(gradients(static, *tensors, grads[0]))


def _jvp(static: Static, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> list[Tensor]:
    refuse_forward_over_forward("saliency maps")
    moved = [dense(t, like) for t, like in zip(tangents, tensors, strict=True)]
    # Twice in reverse mode, which is linear in its cotangent: forward mode is off within a rule.
    _, pull = torch.func.vjp(
        lambda c: torch.func.vjp(static.defined, *tensors)[1](c), torch.zeros_like(outputs[0])
    )
    return [pull(tuple(moved))[0]]


def _vmap(static: Static, tensors: Tensors, dims, size):
    """The mapped dimension joins the batch."""
    folded = []
    for x, dim in zip(tensors, dims, strict=True):
        spread = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        batch = spread.shape[1]
        folded.append(spread.flatten(0, 1))

    def unfold(outputs: Tensors) -> tuple[Tensor, ...]:
        return tuple(y.unflatten(0, (size, batch)) for y in outputs)

    return static, folded, unfold


function = _autograd.function(
    Differentiable(name="saliency_map", forward=forward, vjp=_vjp, jvp=_jvp, vmap=_vmap)
)


def call(static: Static, act: Tensor, grad: Tensor) -> Tensor:
    """The map (B, L') of checked arguments, by the entrance that fits."""
    watched = needs_derivative((act, grad))
    if watched and not torch.compiler.is_compiling():
        return function(static, (act, grad))[0]
    return forward(static, (act, grad))[0]
