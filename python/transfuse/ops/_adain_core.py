"""The differentiable core of adain: kernels by backend, and the rules of its derivatives.

Written F(x, s) for content x and style s. The four directions are F itself, its backward
B(g, x, s) = (dx, ds), its Jacobian-vector product J(x, s; x_t, s_t), and H, the gradient of <g, J>
with respect to x and s. As F is a function of two tensors, that closes the second order: J is the
adjoint of B in g, and H is the derivative of B along (x_t, s_t) as well as the gradient of
<B, (x_t, s_t)>. Nothing but the inputs is saved for a backward: statistics cost one reading, which
B needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse._autograd import Differentiable, Tensors, dense, function
from transfuse.ops._adain_reference import inverse, moments


class Static(NamedTuple):
    """What a call has besides tensors; ``needs``: gradients wanted of content and style."""

    dims: tuple[int, ...]
    eps: float
    backend: str
    needs: tuple[bool, bool] = (True, True)


class Kernels(NamedTuple):
    """The raw ops of a backend, with the arguments of the C++ schemas."""

    forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


def kernels(backend: str) -> Kernels:
    """The raw ops of a backend."""
    if backend == "triton":
        names = ("adain_forward", "adain_backward", "adain_jvp")
        triton = (_triton_ops.kernel("adain", name) for name in names)
        return Kernels(*triton, jvp_backward_composed)
    ops = torch.ops.transfuse
    if backend == _triton_ops.COMPILED:
        return Kernels(
            ops.adain_forward_triton,
            ops.adain_backward_triton,
            ops.adain_jvp_triton,
            jvp_backward_composed,
        )
    return Kernels(ops.adain_forward, ops.adain_backward, ops.adain_jvp, ops.adain_jvp_backward)


# ---- the four directions over flat tensors -----------------------------------------------------


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """F of (content, style)."""
    return (kernels(static.backend).forward(*tensors, static.dims, static.eps),)


def backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """B of (grad, content, style): the gradients that ``static.needs`` names."""
    pair = kernels(static.backend).backward(*tensors, static.dims, static.eps, *static.needs)
    return _wanted(static, pair)


def jvp(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """J of (content, style, content_t, style_t)."""
    return (kernels(static.backend).jvp(*tensors, static.dims, static.eps),)


def jvp_backward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """H of (grad, content, style, content_t, style_t): what ``static.needs`` names."""
    pair = kernels(static.backend).jvp_backward(*tensors, static.dims, static.eps, *static.needs)
    return _wanted(static, pair)


def _wanted(static: Static, pair: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t for t, wanted in zip(pair, static.needs, strict=True) if wanted)


# ---- rules -------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What the rules call: Functions in eager mode, raw ops under torch.compile."""

    forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


def rules(table: Callable[[], Calls]) -> dict[str, tuple[Callable | None, Callable | None]]:
    """vjp and jvp rules of the four directions, written against ``table()``."""

    def gradients(
        static: Static, call: str, tensors: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """What ``call`` gives for the inputs that need it, None for the others."""
        flags = (bool(needs[0]), bool(needs[1]))
        if not any(flags):
            return [None, None]
        found = iter(getattr(table(), call)(static._replace(needs=flags), tensors))
        return [next(found) if flag else None for flag in flags]

    def spread(static: Static, given: Tensors, like: Tensors) -> list[Tensor]:
        """One dense tensor per input from those of the wanted ones."""
        found = iter(given)
        return [
            dense(next(found) if wanted else None, tensor)
            for wanted, tensor in zip(static.needs, like, strict=True)
        ]

    def forward_vjp(static, tensors, outputs, grads, needs):
        if grads[0] is None:
            return [None, None]
        return gradients(static, "backward", (grads[0], *tensors), needs)

    def forward_jvp(static, tensors, outputs, tangents):
        moved = [dense(t, like) for t, like in zip(tangents, tensors, strict=True)]
        return table().jvp(static, (*tensors, *moved))

    def backward_vjp(static, tensors, outputs, cotangents, needs):
        _, content, style = tensors
        moved = spread(static, cotangents, (content, style))
        at_grad = table().jvp(static, (content, style, *moved))[0] if needs[0] else None
        return [at_grad, *gradients(static, "jvp_backward", (*tensors, *moved), needs[1:])]

    def backward_jvp(static, tensors, outputs, tangents):
        grad, content, style = tensors
        parts = []
        if tangents[0] is not None:
            parts.append(table().backward(static, (tangents[0], content, style)))
        if tangents[1] is not None or tangents[2] is not None or not parts:
            moved = (dense(tangents[1], content), dense(tangents[2], style))
            parts.append(table().jvp_backward(static, (grad, content, style, *moved)))
        return [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]

    def jvp_vjp(static, tensors, outputs, grads, needs):
        if grads[0] is None:
            return [None] * 4
        content, style, *moved = tensors
        return [
            *gradients(static, "jvp_backward", (grads[0], content, style, *moved), needs[:2]),
            # A tangent enters linearly: its gradient is the ordinary backward.
            *gradients(static, "backward", (grads[0], content, style), needs[2:]),
        ]

    def jvp_jvp(static, tensors, outputs, tangents):
        content, style, content_t, style_t = tensors
        total = None
        if tangents[2] is not None or tangents[3] is not None:
            moved = (dense(tangents[2], content), dense(tangents[3], style))
            (total,) = table().jvp(static, (content, style, *moved))
        if tangents[0] is not None or tangents[1] is not None:
            moved = (dense(tangents[0], content), dense(tangents[1], style))
            bent = second_tangent(
                content, style, content_t, style_t, *moved, static.dims, static.eps
            )
            total = bent if total is None else total + bent
        return [torch.zeros_like(content) if total is None else total]

    return {
        "forward": (forward_vjp, forward_jvp),
        "backward": (backward_vjp, backward_jvp),
        "jvp": (jvp_vjp, jvp_jvp),
        "jvp_backward": (None, None),
    }


def _vmap(static, tensors, dims, size):
    """The mapped dimension becomes a further one that remains, in front of all tensors."""
    moved = [
        t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    ]
    return static._replace(dims=tuple(d + 1 for d in static.dims)), moved, lambda outputs: outputs


def _build() -> Calls:
    calls: dict[str, Callable] = {}
    rule = rules(lambda: Calls(**calls))
    bodies = {
        "forward": forward,
        "backward": backward,
        "jvp": jvp,
        "jvp_backward": jvp_backward,
    }
    for name, body in bodies.items():
        vjp, jvp_rule = rule[name]
        calls[name] = function(
            Differentiable(name=f"adain_{name}", forward=body, vjp=vjp, jvp=jvp_rule, vmap=_vmap)
        )
    return Calls(**calls)


functions = _build()


# ---- second order in eager torch ----------------------------------------------------------------


class _Point(NamedTuple):
    """Statistics of one input and of a tangent at it, in accumulation precision."""

    centred: Tensor
    std: Tensor
    slope: Tensor  # d std / d x_i = slope * centred_i
    tangent: Tensor  # centred
    std_t: Tensor


def _point(x: Tensor, x_t: Tensor, axes: Sequence[int]) -> _Point:
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    _, centred, std = moments(x.to(accumulate), axes)
    tangent = x_t.to(accumulate)
    tangent = tangent - tangent.mean(dim=tuple(axes), keepdim=True)
    slope = _slope(x, std, axes)
    return _Point(centred, std, slope, tangent, slope * _sum(centred * tangent, axes))


def _slope(x: Tensor, std: Tensor, axes: Sequence[int]) -> Tensor:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return inverse((count - 1) * std) if count > 1 else torch.zeros_like(std)


def _sum(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.sum(dim=tuple(axes), keepdim=True)


def jvp_backward_composed(
    grad: Tensor,
    content: Tensor,
    style: Tensor,
    content_t: Tensor,
    style_t: Tensor,
    dims: Sequence[int],
    eps: float,
    content_grad: bool,
    style_grad: bool,
) -> tuple[Tensor, Tensor]:
    """H in eager torch, for backends without a kernel of it (see ``adain.h`` for the algebra)."""
    if content.numel() == 0:
        return torch.zeros_like(content), torch.zeros_like(style)
    x, y = _point(content, content_t, dims), _point(style, style_t, dims)
    scale = inverse(x.std + eps)
    gain = y.std * scale
    g = grad.to(x.std.dtype)
    g = g - g.mean(dim=tuple(dims), keepdim=True)
    along, across = _sum(g * x.centred, dims), _sum(g * x.tangent, dims)
    by_std_t = -along * gain * scale
    by_std = scale * (along * scale * (2.0 * gain * x.std_t - y.std_t) - gain * across)
    to_content = (
        (y.std_t - gain * x.std_t) * scale * g
        + by_std_t * x.slope * x.tangent
        + (by_std - by_std_t * x.std_t * inverse(x.std)) * x.slope * x.centred
    )
    shared = [
        axis
        for axis in range(content.dim())
        if axis not in dims and style.shape[axis] != content.shape[axis]
    ]
    to_std_t, to_std = along * scale, scale * (across - along * x.std_t * scale)
    if shared:
        to_std_t, to_std = _sum(to_std_t, shared), _sum(to_std, shared)
    to_style = (
        to_std_t * y.slope * y.tangent
        + (to_std - to_std_t * y.std_t * inverse(y.std)) * y.slope * y.centred
    )
    return to_content.to(content.dtype), to_style.to(style.dtype)


def second_tangent(
    content: Tensor,
    style: Tensor,
    content_t: Tensor,
    style_t: Tensor,
    content_u: Tensor,
    style_u: Tensor,
    dims: Sequence[int],
    eps: float,
) -> Tensor:
    """Derivative of J(x, s; x_t, s_t) along (x_u, s_u) in x and s, in eager torch."""
    if content.numel() == 0:
        return torch.zeros_like(content)
    x, y = _point(content, content_t, dims), _point(style, style_t, dims)
    p, q = _point(content, content_u, dims), _point(style, style_u, dims)
    scale = inverse(x.std + eps)
    gain = y.std * scale
    gain_t = (y.std_t - gain * x.std_t) * scale
    gain_u = (q.std_t - gain * p.std_t) * scale
    std_tu = x.slope * _sum(p.tangent * x.tangent, dims) - x.std_t * p.std_t * inverse(x.std)
    style_std_tu = y.slope * _sum(q.tangent * y.tangent, dims) - y.std_t * q.std_t * inverse(y.std)
    gain_tu = (style_std_tu - gain_u * x.std_t - gain * std_tu - gain_t * p.std_t) * scale
    result = gain_u * x.tangent + gain_tu * x.centred + gain_t * p.tangent
    return result.to(content.dtype)
