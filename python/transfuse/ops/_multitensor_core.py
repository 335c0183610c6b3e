"""The differentiable core of linear combinations of lists of tensors.

Over blocks j (tensors of a list) and lists i,

    lincomb:     out_j = base_j + sum_i c[i, j, p] delta_ij          p: partition of the element
    block_dots:  s[i, j, p] = sum over elements of p of g_j delta_ij

The gradient of either with respect to anything is again one or the other, and so are their
derivatives along directions: two kernels serve every order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse._autograd import Differentiable, Tensors, function, refuse_forward_over_forward
from transfuse.ops import _multitensor_reference as reference

# The modules of the Triton kernels.
TRITON = {
    "lincomb": "multitensor",
    "block_dots": "multitensor",
    "multi_norm": "multitensor_sums",
    "multi_gram": "multitensor_sums",
    "ratio_merge": "multitensor_merge",
    "select_magnitude": "multitensor_merge",
    "elect_signs": "multitensor_merge",
}


def kernel(backend: str, name: str) -> Callable:
    """The kernel of an op by a backend, with the arguments of the C++ op."""
    if _triton_ops.traced(backend) == _triton_ops.COMPILED:
        return getattr(torch.ops.transfuse, f"{name}_triton").default
    if backend == "triton":
        return _triton_ops.kernel(TRITON[name], name)
    return getattr(torch.ops.transfuse, name).default


class Static(NamedTuple):
    """What a call has besides its tensors.

    Tensors of ``lincomb``: coefficients (T, m, K), m of the base if it has one, T m of the lists,
    m of the ids if it has some. Of ``block_dots``: m gradients in place of coefficients and base.
    """

    lists: int
    blocks: int
    base: bool
    ids: bool
    keys: tuple[int, ...]
    partitions: int
    backend: str


class _Parts(NamedTuple):
    base: list[Tensor]
    deltas: list[list[Tensor]]
    ids: list[Tensor]


def pack_lists(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One list after the other."""
    return [t for part in lists for t in part]


def _parts(static: Static, tensors: Tensors) -> _Parts:
    """What follows the coefficients, or the gradients (as base)."""
    m = static.blocks
    at = m if static.base else 0
    rows = [list(tensors[at + i * m : at + (i + 1) * m]) for i in range(static.lists)]
    return _Parts(list(tensors[:at]), rows, list(tensors[at + static.lists * m :]))  # type: ignore[arg-type]


def lincomb_forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """m tensors, in the dtypes of the base, or of the first list."""
    coefficients, *rest = tensors
    base, deltas, ids = _parts(static, rest)
    if static.backend == "composed":
        return tuple(reference.combined(base, deltas, coefficients, ids, static.keys))
    flat = pack_lists(deltas)
    made = kernel(static.backend, "lincomb")(
        base, flat, coefficients.contiguous(), ids, list(static.keys)
    )
    return tuple(made)


def dots_forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """(T, m, K) float64."""
    grads, deltas, ids = _parts(static, tensors)
    count = static.partitions
    if static.backend == "composed":
        return (reference.block_dots(grads, deltas, ids, static.keys, count),)
    flat = pack_lists(deltas)
    return (kernel(static.backend, "block_dots")(grads, flat, ids, list(static.keys), count),)


class Calls(NamedTuple):
    """The two calls that the rules are written against: Functions, or raw ops."""

    lincomb: Callable[[Static, Tensors], tuple[Tensor, ...]]
    dots: Callable[[Static, Tensors], tuple[Tensor, ...]]


Rules = tuple[Callable, Callable]


def _products(
    calls: Calls,
    static: Static,
    coefficients: Tensor,
    grads: Tensors,
    parts: _Parts,
    wanted: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """``coefficients[i, j] * grads[j]`` for pairs (i, j), in the dtypes of the lists."""
    if not wanted:
        return []
    likes = [parts.deltas[i][j] for i, j in wanted]
    given = []
    for (_, j), like in zip(wanted, likes, strict=True):
        grad = grads[j]
        # The first list sets the precision of the result.
        wide = torch.promote_types(grad.dtype, like.dtype)  # type: ignore[union-attr]
        given.append(grad.to(wide))  # type: ignore[union-attr]
    table = torch.stack([coefficients[i, j] for i, j in wanted])[None]
    keys = tuple(static.keys[j] for _, j in wanted) if static.keys else ()
    ids = [parts.ids[j] for _, j in wanted] if static.ids else []
    shape = static._replace(lists=1, blocks=len(wanted), base=False, keys=keys)
    found = calls.lincomb(shape, (table, *given, *ids))
    return [t.to(like.dtype) for t, like in zip(found, likes, strict=True)]


def _like_first(deltas: list[list[Tensor]], likes: Sequence[Tensor]) -> list[Tensor]:
    """The lists end to end, the first in at least the precision of the results."""
    first = [
        d.to(torch.promote_types(d.dtype, like.dtype))
        for d, like in zip(deltas[0], likes, strict=True)
    ]
    return pack_lists([first, *deltas[1:]])


def _filled(tangents: Tensors, likes: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(like) if t is None else t for t, like in zip(tangents, likes, strict=True)
    ]


def _some(tensors: Tensors) -> bool:
    return any(t is not None for t in tensors)


def lincomb_rules(calls: Callable[[], Calls]) -> Rules:
    """vjp and jvp of ``lincomb``."""

    def vjp(static, tensors, outputs, grads, needs):
        coefficients, *rest = tensors
        parts = _parts(static, rest)
        m, t = static.blocks, static.lists
        live = [j for j in range(m) if grads[j] is not None]
        found: list[Tensor | None] = [None] * len(tensors)
        if needs[0] and live:
            found[0] = _to_coefficients(calls(), static, coefficients, grads, parts, live)
        at = 1
        if static.base:
            for j in live:
                if needs[at + j]:
                    found[at + j] = grads[j]
            at += m
        wanted = [(i, j) for i in range(t) for j in live if needs[at + i * m + j]]
        made = _products(calls(), static, coefficients, grads, parts, wanted)
        for (i, j), grad in zip(wanted, made, strict=True):
            found[at + i * m + j] = grad
        return found

    def jvp(static, tensors, outputs, tangents):
        refuse_forward_over_forward("lincomb")
        coefficients, *rest = tensors
        moved, *moves = tangents
        parts, moving = _parts(static, rest), _parts(static, moves)
        lists, rows = [], []
        if moved is not None:
            lists += parts.deltas
            rows.append(moved)
        if any(_some(part) for part in moving.deltas):
            lists += [_filled(p, q) for p, q in zip(moving.deltas, parts.deltas, strict=True)]
            rows.append(coefficients)
        if not lists:
            return _filled(moving.base if static.base else [None] * static.blocks, outputs)
        base = _filled(moving.base, parts.base) if static.base else []
        table = rows[0] if len(rows) == 1 else torch.cat(rows)
        shape = static._replace(lists=len(lists))
        return calls().lincomb(shape, (table, *base, *pack_lists(lists), *parts.ids))

    return vjp, jvp


def _to_coefficients(calls, static, coefficients, grads, parts, live):
    """Gradient (T, m, K) of the coefficients; 0 for blocks whose result did not matter."""
    keys = tuple(static.keys[j] for j in live) if static.keys else ()
    ids = [parts.ids[j] for j in live] if static.ids else []
    deltas = [part[j] for part in parts.deltas for j in live]
    shape = static._replace(blocks=len(live), base=True, keys=keys)
    (sums,) = calls.dots(shape, (*(grads[j] for j in live), *deltas, *ids))
    if len(live) < static.blocks:
        at = torch.tensor(live, device=sums.device)
        sums = sums.new_zeros(coefficients.shape).index_copy(1, at, sums)
    return sums.to(coefficients.dtype)


def dots_rules(calls: Callable[[], Calls]) -> Rules:
    """vjp and jvp of ``block_dots``."""

    def vjp(static, tensors, outputs, grads, needs):
        (cotangent,) = grads
        found: list[Tensor | None] = [None] * len(tensors)
        if cotangent is None:
            return found
        parts = _parts(static, tensors)
        m, t = static.blocks, static.lists
        if any(needs[:m]):
            flat = _like_first(parts.deltas, parts.base)
            shape = static._replace(base=False)
            made = calls().lincomb(shape, (cotangent, *flat, *parts.ids))
            for j in range(m):
                found[j] = made[j].to(parts.base[j].dtype) if needs[j] else None
        wanted = [(i, j) for i in range(t) for j in range(m) if needs[(i + 1) * m + j]]
        products = _products(calls(), static, cotangent, parts.base, parts, wanted)
        for (i, j), grad in zip(wanted, products, strict=True):
            found[(i + 1) * m + j] = grad
        return found

    def jvp(static, tensors, outputs, tangents):
        refuse_forward_over_forward("block_dots")
        parts, moving = _parts(static, tensors), _parts(static, tangents)
        total = torch.zeros_like(outputs[0])
        if _some(moving.base):
            base = _filled(moving.base, parts.base)
            flat = (*base, *pack_lists(parts.deltas), *parts.ids)
            total = total + calls().dots(static, flat)[0]
        if any(_some(part) for part in moving.deltas):
            lists = [_filled(p, q) for p, q in zip(moving.deltas, parts.deltas, strict=True)]
            flat = (*parts.base, *pack_lists(lists), *parts.ids)
            total = total + calls().dots(static, flat)[0]
        return [total]

    return vjp, jvp


# ---- vmap: every lane has blocks of its own ------------------------------------------------------


def _lanes(tensors: Tensors, dims, size: int) -> list[Tensor]:
    """Blocks of all lanes, lane after lane; what is not mapped is shared, not copied."""
    rows = [
        [t] * size if dim is None else list(t.unbind(dim))
        for t, dim in zip(tensors, dims, strict=True)
    ]
    return [row[s] for s in range(size) for row in rows]


def _spread(static: Static, tensors: Tensors, dims, size: int) -> list[Tensor]:
    m = static.blocks
    groups = len(tensors) // m
    return [
        t
        for g in range(groups)
        for t in _lanes(tensors[g * m : (g + 1) * m], dims[g * m : (g + 1) * m], size)
    ]


def _lincomb_vmap(static: Static, tensors: Tensors, dims, size):
    coefficients, dim = tensors[0], dims[0]
    table = (
        coefficients.unsqueeze(1).expand(-1, size, -1, -1)
        if dim is None
        else coefficients.movedim(dim, 1)
    )
    blocks = static.blocks
    shape = static._replace(blocks=size * blocks, keys=static.keys * size)

    def unfold(outputs):
        return tuple(torch.stack(outputs[j::blocks]) for j in range(blocks))

    return shape, [table.flatten(1, 2), *_spread(static, tensors[1:], dims[1:], size)], unfold


def _dots_vmap(static: Static, tensors: Tensors, dims, size):
    blocks = static.blocks
    shape = static._replace(blocks=size * blocks, keys=static.keys * size)

    def unfold(outputs):
        return (outputs[0].unflatten(1, (size, blocks)).movedim(1, 0),)

    return shape, _spread(static, tensors, dims, size), unfold


def _build() -> Calls:
    made: list[Calls] = []
    lincomb_vjp, lincomb_jvp = lincomb_rules(lambda: made[0])
    dots_vjp, dots_jvp = dots_rules(lambda: made[0])
    made.append(
        Calls(
            function(
                Differentiable(
                    name="lincomb",
                    forward=lincomb_forward,
                    vjp=lincomb_vjp,
                    jvp=lincomb_jvp,
                    vmap=_lincomb_vmap,
                )
            ),
            function(
                Differentiable(
                    name="block_dots",
                    forward=dots_forward,
                    vjp=dots_vjp,
                    jvp=dots_jvp,
                    vmap=_dots_vmap,
                )
            ),
        )
    )
    return made[0]


CALLS = _build()
RAW = Calls(lincomb_forward, dots_forward)
