"""The differentiable core of token merging: kernels by backend, and the rules of their derivatives.

Merging is linear in the tokens, and so is unmerging; each is the other's transpose, so the two
carry one another's derivatives of any order. A scale per token makes them bilinear. Which token is
nearest or largest is piecewise constant, and what is left of those ops is the same two and
arithmetic of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse._autograd import (
    Differentiable,
    Tensors,
    function,
    refuse_forward_over_forward,
)
from transfuse.ops._merge_plan import segments_of
from transfuse.ops._token_merging_reference import accumulate, unit

SUM = 0
# Mean with the scale as weights, in one pass; without a derivative of its own.
AVERAGE = 3


class Static(NamedTuple):
    """What a call has besides tensors; each op uses its own part."""

    backend: str
    weighting: int = SUM
    exclude_self: bool = False
    protect: tuple[int, ...] = ()
    merged: int = 0
    alpha: float = 0.0
    threshold: float = 0.0


class Kernels(NamedTuple):
    """The raw ops of a backend, with the arguments of the C++ schemas."""

    nearest: Callable
    segments: Callable
    gather: Callable
    amax: Callable
    push: Callable


NAMES = ("nearest_tokens", "merge_segments", "merge_gather", "merge_amax", "push_tokens")


def kernels(backend: str) -> Kernels:
    """The raw ops of a backend."""
    if backend == "triton":
        return Kernels(*(_triton_ops.kernel("token_merging", name) for name in NAMES))
    ops = torch.ops.transfuse
    if backend == _triton_ops.COMPILED:
        return Kernels(*(getattr(ops, f"{name}_triton") for name in NAMES))
    return Kernels(
        ops.nearest_tokens, ops.merge_segments, ops.merge_gather, ops.merge_amax, ops.push_tokens
    )


# ---- the ops over flat tensors -----------------------------------------------------------------


def nearest(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(similarity, index) of (x, reference, mask)."""
    return tuple(kernels(static.backend).nearest(*tensors, static.exclude_self))


def match(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(rows, order, start) of (metric, destination)."""
    return tuple(torch.ops.transfuse.match_tokens(*tensors, static.protect, static.merged))


def segments(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Merged tokens of (x, scale, rows, order, start)."""
    return (kernels(static.backend).segments(*_readable(tensors), static.weighting),)


def gather(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Unmerged tokens of (y, scale, rows, order, start)."""
    return (kernels(static.backend).gather(*_readable(tensors), static.weighting),)


def _readable(tensors: Tensors) -> Tensors:
    """The scale as kernels read it: one number after the other."""
    x, scale, *plan = tensors
    return (x, None if scale is None else scale.contiguous(), *plan)


def amax(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(largest, winner) of (x, rows, order, start)."""
    return tuple(kernels(static.backend).amax(*tensors, True))


def push(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Pushed tokens of (x, reference, similarity, index)."""
    return (kernels(static.backend).push(*tensors, static.alpha, static.threshold),)


# ---- rules -------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """What the rules call: Functions in eager mode, raw ops under torch.compile."""

    segments: Callable
    gather: Callable


def rules(table: Callable[[], Calls]) -> dict[str, tuple[Callable, Callable]]:
    """vjp and jvp rules of the differentiable ops, written against ``table()``."""

    def linear(own: str, other: str) -> tuple[Callable, Callable]:
        """Rules of one of the two linear ops, whose transpose is the other."""

        def vjp(static, tensors, outputs, grads, needs):
            x, scale, *plan = tensors
            g = grads[0]
            if static.weighting == AVERAGE:
                raise NotImplementedError("merge_segments: weighting 3 has no derivative")
            if g is None:
                return [None] * 5
            found = [None] * 5
            if needs[0]:
                (found[0],) = getattr(table(), other)(static, (g, scale, *plan))
            if scale is not None and needs[1]:
                tall, short = (x, g) if own == "segments" else (g, x)
                (spread,) = table().gather(static, (short, None, *plan))
                found[1] = (spread.to(scale.dtype) * tall.to(scale.dtype)).sum(-1)
            return found

        def jvp(static, tensors, outputs, tangents):
            x, scale, *plan = tensors
            if tangents[0] is not None and tangents[1] is not None:
                refuse_forward_over_forward(f"merge_{own}")
            parts = []
            if tangents[0] is not None:
                parts += getattr(table(), own)(static, (tangents[0], scale, *plan))
            if tangents[1] is not None:
                parts += getattr(table(), own)(static, (x, tangents[1], *plan))
            return [sum(parts[1:], parts[0]) if parts else torch.zeros_like(outputs[0])]

        return vjp, jvp

    def place(index: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """A plan that gathers by ``index``; -1 becomes 0 and is to be given the scale 0."""
        rows = torch.where(index < 0, 0, index)
        return rows, *segments_of(rows, torch.zeros_like(rows, dtype=torch.bool), count)

    def slopes(static: Static, x: Tensor, reference: Tensor, index: Tensor, plan: Tensors):
        """d similarity / d x and / d (the reference that was found)."""
        wide = accumulate(x.dtype)
        # A raw op, unlike a Function, is given a shared reference as it is.
        reference = reference.expand(index.shape[0], -1, -1)
        (found,) = table().gather(static._replace(weighting=SUM), (reference, None, *plan))
        u, scale_u = unit(x.to(wide))
        v, scale_v = unit(found.to(wide))
        s = (u * v).sum(-1, keepdim=True)
        known = (index >= 0)[..., None]
        return (
            torch.where(known, scale_u * (v - s * u), 0.0),
            torch.where(known, scale_v * (u - s * v), 0.0),
        )

    def nearest_vjp(static, tensors, outputs, grads, needs):
        x, reference, _ = tensors
        g, index = grads[0], outputs[1]
        if g is None:
            return [None] * 3
        plan = place(index, reference.shape[1])
        by_x, by_found = slopes(static, x, reference, index, plan)
        to_reference = None
        if needs[1]:
            summed = static._replace(weighting=SUM)
            (total,) = table().segments(summed, (g[..., None] * by_found, None, *plan))
            to_reference = total.to(reference.dtype)
        return [(g[..., None] * by_x).to(x.dtype) if needs[0] else None, to_reference, None]

    def nearest_jvp(static, tensors, outputs, tangents):
        refuse_forward_over_forward("nearest_tokens")
        x, reference, _ = tensors
        similarity, index = outputs
        plan = place(index, reference.shape[1])
        by_x, by_found = slopes(static, x, reference, index, plan)
        total = torch.zeros_like(similarity)
        if tangents[0] is not None:
            total = total + (by_x * tangents[0].to(by_x.dtype)).sum(-1)
        if tangents[1] is not None:
            summed = static._replace(weighting=SUM)
            (moved,) = table().gather(summed, (tangents[1], None, *plan))
            total = total + (by_found * moved.to(by_found.dtype)).sum(-1)
        return [total, None]

    def strength(static: Static, similarity: Tensor, index: Tensor) -> Tensor:
        """alpha where a token is pushed, else 0."""
        moved = (similarity > static.threshold) & (index >= 0)
        return static.alpha * moved.to(similarity.dtype)

    def push_vjp(static, tensors, outputs, grads, needs):
        x, reference, similarity, index = tensors
        g = grads[0]
        if g is None:
            return [None] * 4
        alpha = strength(static, similarity, index)
        to_x = to_reference = None
        if needs[0]:
            to_x = ((1.0 + alpha)[..., None] * g.to(alpha.dtype)).to(x.dtype)
        if needs[1]:
            plan = place(index, reference.shape[1])
            pulled = -alpha[..., None] * g.to(alpha.dtype)
            (total,) = table().segments(static, (pulled, None, *plan))
            to_reference = total.to(reference.dtype)
        return [to_x, to_reference, None, None]

    def push_jvp(static, tensors, outputs, tangents):
        refuse_forward_over_forward("push_tokens")
        x, reference, similarity, index = tensors
        alpha = strength(static, similarity, index)[..., None]
        total = torch.zeros_like(x, dtype=alpha.dtype)
        if tangents[0] is not None:
            total = total + (1.0 + alpha) * tangents[0].to(alpha.dtype)
        if tangents[1] is not None:
            plan = place(index, reference.shape[1])
            (moved,) = table().gather(static, (tangents[1], None, *plan))
            total = total - alpha * moved.to(alpha.dtype)
        return [total.to(x.dtype)]

    def amax_vjp(static, tensors, outputs, grads, needs):
        if grads[0] is None:
            return [None] * 4
        x = tensors[0]
        zeros = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        return [zeros.scatter(1, outputs[1], grads[0]), None, None, None]

    def amax_jvp(static, tensors, outputs, tangents):
        refuse_forward_over_forward("merge_amax")
        return [tangents[0].gather(1, outputs[1]), None]

    return {
        "nearest": (nearest_vjp, nearest_jvp),
        "segments": linear("segments", "gather"),
        "gather": linear("gather", "segments"),
        "amax": (amax_vjp, amax_jvp),
        "push": (push_vjp, push_jvp),
    }


def _fold(static, tensors, dims, size):
    """The mapped dimension becomes part of the batch, which is the first one of every tensor."""
    folded = [
        None
        if t is None
        else (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
        for t, dim in zip(tensors, dims, strict=True)
    ]

    def unfold(outputs):
        return tuple(t.unflatten(0, (size, -1)) for t in outputs)

    return static, folded, unfold


def _fold_match(static, tensors, dims, size):
    metric, destination = tensors
    if dims[1] is not None:
        raise NotImplementedError("match_tokens: one destination serves the whole batch of a vmap")
    static, (metric,), unfold = _fold(static, (metric,), dims[:1], size)
    return static, (metric, destination), unfold


class Functions(NamedTuple):
    """The ops as differentiable calls."""

    nearest: Callable
    match: Callable
    segments: Callable
    gather: Callable
    amax: Callable
    push: Callable


def _build() -> Functions:
    calls: dict[str, Callable] = {}
    rule = rules(lambda: Calls(calls["segments"], calls["gather"]))
    bodies = {
        "nearest": nearest,
        "segments": segments,
        "gather": gather,
        "amax": amax,
        "push": push,
    }
    for name, body in bodies.items():
        vjp, jvp = rule[name]
        calls[name] = function(
            Differentiable(name=f"merge_{name}", forward=body, vjp=vjp, jvp=jvp, vmap=_fold)
        )
    # A plan is of integers: nothing to differentiate.
    calls["match"] = function(
        Differentiable(
            name="match_tokens",
            forward=match,
            vjp=lambda static, tensors, outputs, grads, needs: [None, None],
            jvp=lambda static, tensors, outputs, tangents: [None, None, None],
            vmap=_fold_match,
        )
    )
    return Functions(**calls)


functions = _build()
