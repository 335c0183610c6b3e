"""The differentiable core of attention: one softmax over several sources, in its four directions.

Flat layout of a call with S sources (entries of the last three kinds may be None)::

    query, S keys, S values, S biases, S masks, S indices

``forward``, ``backward``, ``jvp`` and ``jvp_backward`` close under differentiation: the backward of
``backward`` is a jvp and a jvp_backward, and so is its forward mode; the backward of ``jvp`` is a
backward and a jvp_backward. Third derivatives raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _triton_ops
from transfuse._autograd import Differentiable, Tensors, dense, function

_KINDS = 5  # tensors per source


class Static(NamedTuple):
    """What a call holds besides tensors."""

    scales: tuple[float, ...]
    causal: tuple[int, ...]
    backend: str = "cpu"
    bias_grads: tuple[bool, ...] = ()  # which biases a backward differentiates
    windows: tuple[int, ...] = ()  # a WindowGrid's numbers: source 0 is seen within windows


class Core(NamedTuple):
    """The flat layout, taken apart."""

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    biases: list[Tensor | None]
    masks: list[Tensor | None]
    indices: list[Tensor | None]

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        return (self.query, *self.keys, *self.values, *self.biases, *self.masks, *self.indices)


def core_of(tensors: Tensors, sources: int) -> Core:
    parts = [list(tensors[1 + i * sources : 1 + (i + 1) * sources]) for i in range(_KINDS)]
    return Core(tensors[0], *parts)


def _size(sources: int) -> int:
    return 1 + _KINDS * sources


# ---- raw calls: the C++ ops and the Triton launchers behind one signature ------------------------


@dataclass(frozen=True)
class Raw:
    """The four raw kernels of a backend."""

    forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


def compact(biases: list[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """Biases that exist, and for each source the position of its own or -1: a raw op's list."""
    present = [b for b in biases if b is not None]
    positions = iter(range(len(present)))
    return present, [-1 if b is None else next(positions) for b in biases]


def _ops(ending: str) -> Raw:
    ops = torch.ops.transfuse

    def compacting(name: str, position: int) -> Callable:
        # Looked up when called: compiled graphs have no forward mode, and Triton no ops for it.
        return lambda *args: getattr(ops, name + ending)(
            *args[:position], *compact(args[position]), *args[position + 1 :]
        )

    return Raw(
        compacting("attention_forward", 3),
        compacting("attention_backward", 5),
        compacting("attention_jvp", 3),
        compacting("attention_jvp_backward", 5),
    )


def _triton_when_called(name: str) -> Callable:
    """A raw Triton kernel that is imported by its first call: a forward pass needs no Triton."""
    return lambda *args: getattr(_triton(), name)(*args)


def _triton() -> Raw:
    from transfuse.triton_kernels import attention

    return Raw(
        _expanding(attention.attention_forward, 0),
        _expanding(attention.attention_backward, 2),
        _expanding(attention.attention_jvp, 0),
        _expanding(attention.attention_jvp_backward, 2),
    )


def _expanding(launch: Callable, offset: int) -> Callable:
    """Triton launchers take biases and masks as (B, H, N, M) views; kernels read stride 0."""

    def call(*args):
        args = list(args)
        if launch.__name__.endswith("backward"):
            args[offset + 3] = [
                _own_entries(t) if wanted else t
                for t, wanted in zip(args[offset + 3], args[-1], strict=True)
            ]
        batch, heads, rows, _ = args[offset].shape
        shapes = [(batch, heads, rows, key.shape[2]) for key in args[offset + 1]]
        for position in (offset + 3, offset + 4):
            args[position] = [
                None if t is None else t.expand(shape)
                for t, shape in zip(args[position], shapes, strict=True)
            ]
        windows = args.pop(offset + 8)
        if len(windows) > 0:
            raise NotImplementedError("the Triton attention core has no windows of its own")
        if launch.__name__.startswith("attention_jvp"):
            position = offset + 13
            args[position] = [
                None if t is None else t.expand(shape)
                for t, shape in zip(args[position], shapes, strict=True)
            ]
        return launch(*args)

    return call


def _own_entries(bias: Tensor | None) -> Tensor | None:
    """A copy of a bias that was given expanded: launchers sum its gradient along a stride of 0."""
    axes = [] if bias is None else zip(bias.shape, bias.stride(), strict=True)
    if all(n == 1 or step != 0 for n, step in axes):
        return bias
    return bias.contiguous()


def raw(backend: str) -> Raw:
    """The kernels of a backend. CUDA C++ has a forward pass, whose derivatives are Triton's."""
    if backend == "triton":
        return _triton()
    if backend == "cuda":
        return Raw(_ops("").forward, *map(_triton_when_called, ("backward", "jvp", "jvp_backward")))
    return _ops("_triton" if backend == _triton_ops.COMPILED else "")


# ---- rules ---------------------------------------------------------------------------------------


def _arguments(core: Core, static: Static) -> tuple:
    return (
        core.query,
        core.keys,
        core.values,
        core.biases,
        core.masks,
        core.indices,
        list(static.scales),
        list(static.causal),
        list(static.windows),
    )


def _flat_gradients(core: Core, static: Static, result) -> tuple[Tensor, ...]:
    """(dq, dk..., dv..., flagged dbias...) in the dtypes of what they belong to."""
    grad_query, grad_keys, grad_values, grad_biases = result
    flagged = [b for b, wanted in zip(core.biases, static.bias_grads, strict=True) if wanted]
    return (
        grad_query.to(core.query.dtype),
        *grad_keys,
        *grad_values,
        *(g.to(b.dtype) for g, b in zip(grad_biases, flagged, strict=True)),
    )


def _spread(static: Static, gradients: Tensors, sources: int) -> list[Tensor | None]:
    """Gradients of a backward in the order of the core's tensors: None for masks and indices."""
    biases = iter(gradients[1 + 2 * sources :])
    return [
        *gradients[: 1 + 2 * sources],
        *(next(biases) if wanted else None for wanted in static.bias_grads),
        *([None] * (2 * sources)),
    ]


class Calls(NamedTuple):
    """What the rules call: Functions in eager mode, raw ops under torch.compile."""

    forward: Callable
    backward: Callable
    jvp: Callable
    jvp_backward: Callable


def _forward(static: Static, tensors: Tensors):
    core = core_of(tensors, len(static.scales))
    return raw(static.backend).forward(*_arguments(core, static))


def _backward(static: Static, tensors: Tensors):
    grad_out, grad_lse, *rest = tensors
    size = _size(len(static.scales))
    core, (out, lse) = core_of(rest[:size], len(static.scales)), rest[size:]
    result = raw(static.backend).backward(
        grad_out,
        None if grad_lse is None else grad_lse.contiguous(),
        *_arguments(core, static),
        out,
        lse.contiguous(),
        list(static.bias_grads),
    )
    return _flat_gradients(core, static, result)


def _jvp(static: Static, tensors: Tensors):
    sources = len(static.scales)
    size = _size(sources)
    core, (out, lse) = core_of(tensors[:size], sources), tensors[size : size + 2]
    query_t, keys_t, values_t, biases_t = _tangents(tensors[size + 2 :], sources)
    return raw(static.backend).jvp(
        *_arguments(core, static), out, lse.contiguous(), query_t, keys_t, values_t, biases_t
    )


def _jvp_backward(static: Static, tensors: Tensors):
    grad_out, grad_lse, *rest = tensors
    sources = len(static.scales)
    size = _size(sources)
    core, (out, lse, out_t, lse_t) = core_of(rest[:size], sources), rest[size : size + 4]
    query_t, keys_t, values_t, biases_t = _tangents(rest[size + 4 :], sources)
    result = raw(static.backend).jvp_backward(
        grad_out,
        None if grad_lse is None else grad_lse.contiguous(),
        *_arguments(core, static),
        out,
        lse.contiguous(),
        query_t,
        keys_t,
        values_t,
        biases_t,
        out_t,
        lse_t.contiguous(),
        list(static.bias_grads),
    )
    return _flat_gradients(core, static, result)


def _tangents(flat: Tensors, sources: int):
    """query_t, keys_t, values_t, biases_t."""
    return (
        flat[0],
        list(flat[1 : 1 + sources]),
        list(flat[1 + sources : 1 + 2 * sources]),
        list(flat[1 + 2 * sources : 1 + 3 * sources]),
    )


def _dense_tangents(core: Core, flat: Tensors) -> list[Tensor | None]:
    """Tangents of query, keys and values made dense; those of biases may stay None."""
    sources = len(core.keys)
    moving = (core.query, *core.keys, *core.values)
    out: list[Tensor | None] = [dense(t, like) for t, like in zip(flat, moving, strict=False)]
    out.extend(flat[len(moving) : len(moving) + sources])
    return out


def _flags(core: Core, needs) -> tuple[bool, ...]:
    start = 1 + 2 * len(core.keys)
    return tuple(
        b is not None and bool(need)
        for b, need in zip(core.biases, needs[start : start + len(core.keys)], strict=True)
    )


def rules(calls: Calls | Callable[[], Calls]) -> dict:
    """vjp and jvp rules of the four ops, written against ``calls``."""

    def table() -> Calls:
        return calls() if callable(calls) else calls

    def forward_vjp(static, tensors, outputs, grads, needs):
        core = core_of(tensors, len(static.scales))
        static = static._replace(bias_grads=_flags(core, needs))
        out, lse = outputs
        grads_flat = table().backward(static, (dense(grads[0], out), grads[1], *tensors, out, lse))
        return _spread(static, grads_flat, len(core.keys))

    def forward_jvp(static, tensors, outputs, tangents):
        core = core_of(tensors, len(static.scales))
        return table().jvp(static, (*tensors, *outputs, *_dense_tangents(core, tangents)))

    def split(static, tensors):
        """grad_out, grad_lse, core, out, lse of a backward's inputs."""
        size = _size(len(static.scales))
        core = core_of(tensors[2 : 2 + size], len(static.scales))
        return tensors[0], tensors[1], core, *tensors[2 + size : 4 + size]

    def backward_vjp(static, tensors, outputs, cotangents, needs):
        grad_out, grad_lse, core, out, lse = split(static, tensors)
        sources = len(core.keys)
        biases = iter(cotangents[1 + 2 * sources :])
        moved = [
            *cotangents[: 1 + 2 * sources],
            *(next(biases) if wanted else None for wanted in static.bias_grads),
        ]
        moved = _dense_tangents(core, moved)
        out_t, lse_t = table().jvp(static, (*core.flat, out, lse, *moved))
        flags = static._replace(bias_grads=_flags(core, needs[2:]))
        flat = table().jvp_backward(
            flags, (grad_out, grad_lse, *core.flat, out, lse, out_t, lse_t, *moved)
        )
        grad_lse_t = None if grad_lse is None else lse_t
        return [out_t, grad_lse_t, *_spread(flags, flat, sources), None, None]

    def backward_jvp(static, tensors, outputs, tangents):
        grad_out, grad_lse, core, out, lse = split(static, tensors)
        size = _size(len(core.keys))
        moved = _dense_tangents(core, tangents[2 : 2 + 1 + 3 * len(core.keys)])
        out_t, lse_t = tangents[2 + size : 4 + size]
        if out_t is None or lse_t is None:
            out_t, lse_t = table().jvp(static, (*core.flat, out, lse, *moved))
        curved = table().jvp_backward(
            static, (grad_out, grad_lse, *core.flat, out, lse, out_t, lse_t, *moved)
        )
        if tangents[0] is None and tangents[1] is None:
            return curved
        straight = table().backward(
            static, (dense(tangents[0], grad_out), tangents[1], *core.flat, out, lse)
        )
        return [a + b for a, b in zip(curved, straight, strict=True)]

    def jvp_vjp(static, tensors, outputs, grads, needs):
        sources = len(static.scales)
        size = _size(sources)
        core, (out, lse) = core_of(tensors[:size], sources), tensors[size : size + 2]
        moved = list(tensors[size + 2 :])
        out_t, lse_t = outputs
        grad = dense(grads[0], out_t)
        point = static._replace(bias_grads=_flags(core, needs))
        at_point = table().jvp_backward(
            point, (grad, grads[1], *core.flat, out, lse, out_t, lse_t, *moved)
        )
        moving = tuple(
            t is not None and bool(need)
            for t, need in zip(
                moved[1 + 2 * sources :], needs[size + 2 + 1 + 2 * sources :], strict=True
            )
        )
        # A tangent enters linearly: its gradient is the ordinary backward at the same point.
        along = static._replace(
            bias_grads=tuple(m and b is not None for m, b in zip(moving, core.biases, strict=True))
        )
        at_tangent = table().backward(along, (grad, grads[1], *core.flat, out, lse))
        return [
            *_spread(point, at_point, sources),
            None,
            None,
            *_spread(along, at_tangent, sources)[: 1 + 3 * sources],
        ]

    return {
        "forward": (forward_vjp, forward_jvp),
        "backward": (backward_vjp, backward_jvp),
        "jvp": (jvp_vjp, None),
        "jvp_backward": (None, None),
    }


# ---- vmap: the mapped dimension is folded into the batch -----------------------------------------


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int | None) -> Tensor | None:
    """(V, B, ...) -> (V * B, ...), repeating what is unmapped; ``batch`` widens a batch of 1."""
    if tensor is None:
        return None
    tensor = (
        tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    )
    if batch is not None and tensor.shape[1] != batch:
        tensor = tensor.expand(size, batch, *tensor.shape[2:])
    return tensor.reshape(size * tensor.shape[1], *tensor.shape[2:])


def _batch_of(tensor: Tensor, dim: int | None) -> int:
    return tensor.shape[0] if dim is None else tensor.movedim(dim, 0).shape[1]


def _fold_core(core: Core, dims: Core, size: int) -> tuple[Core, list[int]]:
    """The core with every tensor folded, and the source batches before folding."""
    batch = _batch_of(core.query, dims.query)
    source_batches = [_batch_of(k, d) for k, d in zip(core.keys, dims.keys, strict=True)]
    offsets = torch.arange(size, device=core.query.device).repeat_interleave(batch)
    indices: list[Tensor | None] = []
    for index, dim, own in zip(core.indices, dims.indices, source_batches, strict=True):
        if index is not None:
            indices.append(_fold(index, dim, size, None) + own * offsets)
        else:
            indices.append(offsets if own == 1 and batch != 1 else None)
    return (
        Core(
            _fold(core.query, dims.query, size, None),
            [_fold(t, d, size, None) for t, d in zip(core.keys, dims.keys, strict=True)],
            [_fold(t, d, size, None) for t, d in zip(core.values, dims.values, strict=True)],
            [_fold(t, d, size, batch) for t, d in zip(core.biases, dims.biases, strict=True)],
            [_fold(t, d, size, batch) for t, d in zip(core.masks, dims.masks, strict=True)],
            indices,
        ),
        source_batches,
    )


def _unfold(tensor: Tensor, size: int) -> Tensor:
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _unfold_gradients(static: Static, flat, size: int, bias_batches: list[int]):
    """Gradients back to (V, ...); a bias whose batch was widened from 1 is summed over it."""
    sources = len(static.scales)
    out = [_unfold(t, size) for t in flat[: 1 + 2 * sources]]
    own = [b for b, wanted in zip(bias_batches, static.bias_grads, strict=True) if wanted]
    for grad, batch in zip(flat[1 + 2 * sources :], own, strict=True):
        grad = _unfold(grad, size)
        out.append(grad.sum(1, keepdim=True) if batch == 1 and grad.shape[1] != 1 else grad)
    return tuple(out)


def _bias_batches(core: Core, dims: Core) -> list[int]:
    return [
        0 if b is None else _batch_of(b, d) for b, d in zip(core.biases, dims.biases, strict=True)
    ]


def _forward_vmap(static, tensors, dims, size):
    sources = len(static.scales)
    folded, _ = _fold_core(core_of(tensors, sources), core_of(dims, sources), size)
    return static, folded.flat, lambda outputs: tuple(_unfold(t, size) for t in outputs)


def _rows(tensors, dims, size):
    return [_fold(t, d, size, None) for t, d in zip(tensors, dims, strict=True)]


def _fold_tangents(core: Core, dims: Core, tensors, tangent_dims, size):
    """Tangents are shaped like what they belong to."""
    sources = len(core.keys)
    batch = _batch_of(core.query, dims.query)
    moving = 1 + 2 * sources
    folded = _rows(tensors[:moving], tangent_dims[:moving], size)
    for t, d in zip(tensors[moving:], tangent_dims[moving:], strict=True):
        folded.append(_fold(t, d, size, batch))
    return folded


def _backward_vmap(static, tensors, dims, size):
    sources = len(static.scales)
    end = 2 + _size(sources)
    core, core_dims = core_of(tensors[2:end], sources), core_of(dims[2:end], sources)
    folded, _ = _fold_core(core, core_dims, size)
    flat = (
        *_rows(tensors[:2], dims[:2], size),
        *folded.flat,
        *_rows(tensors[end:], dims[end:], size),
    )
    batches = _bias_batches(core, core_dims)
    return static, flat, lambda out: _unfold_gradients(static, out, size, batches)


def _jvp_vmap(static, tensors, dims, size):
    sources = len(static.scales)
    end = _size(sources)
    core, core_dims = core_of(tensors[:end], sources), core_of(dims[:end], sources)
    folded, _ = _fold_core(core, core_dims, size)
    flat = (
        *folded.flat,
        *_rows(tensors[end : end + 2], dims[end : end + 2], size),
        *_fold_tangents(core, core_dims, tensors[end + 2 :], dims[end + 2 :], size),
    )
    return static, flat, lambda outputs: tuple(_unfold(t, size) for t in outputs)


def _jvp_backward_vmap(static, tensors, dims, size):
    sources = len(static.scales)
    end = 2 + _size(sources)
    core, core_dims = core_of(tensors[2:end], sources), core_of(dims[2:end], sources)
    folded, _ = _fold_core(core, core_dims, size)
    flat = (
        *_rows(tensors[:2], dims[:2], size),
        *folded.flat,
        *_rows(tensors[end : end + 4], dims[end : end + 4], size),
        *_fold_tangents(core, core_dims, tensors[end + 4 :], dims[end + 4 :], size),
    )
    batches = _bias_batches(core, core_dims)
    return static, flat, lambda out: _unfold_gradients(static, out, size, batches)


# ---- the Functions -------------------------------------------------------------------------------


def _build() -> Calls:
    table: dict[str, Callable] = {}
    rule = rules(lambda: Calls(**table))
    bodies = {
        "forward": (_forward, _forward_vmap),
        "backward": (_backward, _backward_vmap),
        "jvp": (_jvp, _jvp_vmap),
        "jvp_backward": (_jvp_backward, _jvp_backward_vmap),
    }
    for name, (body, vmap) in bodies.items():
        vjp, jvp = rule[name]
        table[name] = function(
            Differentiable(name=f"attention_{name}", forward=body, vjp=vjp, jvp=jvp, vmap=vmap)
        )
    return Calls(**table)


functions = _build()
