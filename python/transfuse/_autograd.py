"""The one arrangement of autograd that every op uses.

A raw op differentiated only by ``register_autograd`` is silently wrong under forward mode, and one
without autograd is silently zero under ``torch.func``. So an op is described once by its rules
(:class:`Differentiable`) and gets three entrances:

- the raw op itself, when nothing needs a derivative;
- an ``autograd.Function`` with ``setup_context``, ``jvp`` and a vmap rule, in eager mode;
- the raw op with ``register_autograd``, when ``torch.compile`` traces.

The rules are written against a table of callables, so the Function's backward goes through
Functions again (double backward, forward over reverse) and the raw op's through raw ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Differentiable:
    """Rules of one op over a flat list of tensors (entries may be None) and a static description.

    Args:
        name: shown in errors and in the autograd graph.
        forward: ``(static, tensors) -> tuple of tensors``, not differentiable itself.
        vjp: ``(static, tensors, outputs, grads, needs) -> one gradient or None per tensor``;
            ``grads`` may hold None for outputs that did not matter.
        jvp: ``(static, tensors, outputs, tangents) -> one tangent per output``; ``tangents`` may
            hold None for inputs that do not move.
        vmap: ``(static, tensors, dims, size) -> (static, tensors, unfold)``: moves the mapped
            dimension into one the op has; ``unfold(outputs)`` gives it back in front.
    """

    name: str
    forward: Callable[[Any, Tensors], tuple[Tensor, ...]]
    vjp: Callable[..., Tensors] | None = None
    jvp: Callable[..., Tensors] | None = None
    vmap: Callable[..., tuple[Any, Tensors, Callable]] | None = None


def function(rule: Differentiable) -> Callable[[Any, Tensors], tuple[Tensor, ...]]:
    """``call(static, tensors) -> tuple of tensors``, differentiable as the rules say."""

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(static, *tensors):
            return tuple(rule.forward(static, tensors))

        @staticmethod
        def setup_context(ctx, inputs, output):
            static, *tensors = inputs
            ctx.static, ctx.count = static, len(tensors)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *output)
            ctx.save_for_forward(*tensors, *output)

        @staticmethod
        def backward(ctx, *grads):
            if rule.vjp is None:
                raise NotImplementedError(_unsupported(rule.name, "reverse"))
            # Nothing arrived: torch still visits the node on the way to what lies behind it.
            if all(grad is None for grad in grads):
                return (None,) * (1 + ctx.count)
            saved = ctx.saved_tensors
            tensors, outputs = saved[: ctx.count], saved[ctx.count :]
            needs = ctx.needs_input_grad[1:]
            return (None, *rule.vjp(ctx.static, tensors, outputs, grads, needs))

        @staticmethod
        def jvp(ctx, _, *tangents):
            if rule.jvp is None:
                raise NotImplementedError(_unsupported(rule.name, "forward"))
            saved = ctx.saved_tensors
            tensors, outputs = saved[: ctx.count], saved[ctx.count :]
            return tuple(rule.jvp(ctx.static, tensors, outputs, tangents))

        @staticmethod
        def vmap(info, in_dims, static, *tensors):
            if rule.vmap is None:
                raise NotImplementedError(f"{rule.name} has no vmap rule")
            static, tensors, unfold = rule.vmap(static, tensors, in_dims[1:], info.batch_size)
            outputs = unfold(_Function.apply(static, *tensors))
            return outputs, (0,) * len(outputs)

    _Function.__name__ = _Function.__qualname__ = rule.name
    return lambda static, tensors: _Function.apply(static, *tensors)


def under_transform() -> bool:
    """Whether a ``torch.func`` transform is active; under torch.compile, while it traces."""
    return torch._C._functorch.maybe_current_level() is not None


# What torch.compiler.assume_constant_result sets, without importing the compiler to set it.
under_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether forward mode or a ``torch.func`` transform is active."""
    return under_transform() or forward_ad._current_level >= 0


def needs_derivative(tensors: Tensors) -> bool:
    """Whether reverse mode, forward mode or a ``torch.func`` transform watches any of these.

    Raises:
        NotImplementedError: forward mode or a transform inside ``torch.compile``, where a custom op
            would return a zero derivative without an error.
    """
    watched = transformed()
    if watched and torch.compiler.is_compiling():
        raise NotImplementedError(
            "transfuse ops do not support torch.func transforms or forward-mode AD inside "
            "torch.compile (a compiled custom op would give a zero derivative silently); call them "
            'outside the compiled region, or pass backend="reference".'
        )
    return watched or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )


def refuse_forward_over_forward(name: str) -> None:
    """For jvp rules that use torch operations beside calls of Functions.

    Inside a jvp rule torch does not carry the tangents of an outer forward-mode level through its
    own operations, which would then be zero without an error.

    Raises:
        NotImplementedError: more than one forward-mode level is active.
    """
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is not None:
        forward = torch._C._functorch.TransformType.Jvp
        if sum(interpreter.key() == forward for interpreter in stack) > 1:
            raise NotImplementedError(_unsupported(name, "forward"))


def dense(tangent: Tensor | None, like: Tensor) -> Tensor:
    """A tangent or gradient as a real tensor: zeros where autograd passed None."""
    return torch.zeros_like(like) if tangent is None else tangent


def _unsupported(name: str, mode: str) -> str:
    return (
        f"{name}: one more {mode}-mode derivative is not implemented. transfuse differentiates its "
        "ops twice (reverse over reverse, reverse over forward, forward over reverse); use "
        'backend="reference" for higher orders and for forward over forward.'
    )
