"""The differentiable core of the diffusion ops: combinations and products of tensors, per sample.

Over inputs t_0 .. t_{K-1} of one shape (B, ...) and t_K = 1 everywhere,

    out_j[b] = sum_k c[b, j, k] t_k[b]        product_p[b] = <t_first(p)[b], t_second(p)[b]>.

Outputs are linear in the inputs and in the coefficients, products bilinear in the inputs; so the
gradient of either, and its derivative along a direction, is a call of the same kind. One kernel
serves every order. The guidance, sampler and noising formulas are coefficients only, made in
float64 from numbers or from small tensors of shape (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from transfuse import _triton_ops
from transfuse._autograd import Differentiable, Tensors, function, needs_derivative

# A coefficient: the same for all samples, or float64 of shape (B,) or (1,).
Number = float | Tensor
Pairs = tuple[tuple[int, int], ...]


class Static(NamedTuple):
    """What a call has besides tensors.

    ``numbers``: coefficients (outputs x (inputs + 1)) shared by all samples, or None where they are
    the last tensor. In ``pairs`` the number ``inputs`` stands for the constant 1.
    """

    inputs: int
    outputs: int
    pairs: Pairs
    numbers: tuple[float, ...] | None
    backend: str


class Mixed(NamedTuple):
    """Combinations in the dtype of the inputs; products (B, P) in float64."""

    outputs: list[Tensor]
    products: Tensor


def mix(
    inputs: Sequence[Tensor],
    rows: Sequence[Sequence[Number | list[float]]],
    pairs: Pairs,
    backend: str,
) -> Mixed:
    """Combine and multiply checked inputs.

    Args:
        inputs: tensors of one shape (B, ...), dtype and device.
        rows: per output its coefficients, one per input and one for the constant 1. Lists of one
            number per sample are for calls that :func:`read_at_once` allows.
        pairs: products wanted, as pairs of numbers of inputs.
        backend: ``"cpu"``, ``"triton"`` or ``"cuda"``.
    """
    entries = [number for row in rows for number in row]
    if read_at_once(backend, (*inputs, *entries)):
        numbers = _numbers(entries)
        flat = [at for pair in pairs for at in pair]
        # Nothing is differentiated: past the autograd kernel, which costs as much as a small call.
        with torch._C._AutoDispatchBelowAutograd():
            return Mixed(
                *torch.ops.transfuse.mix.default(list(inputs), None, numbers, len(rows), flat)
            )
    packed, coefficients = _pack(rows, inputs[0])
    static = Static(len(inputs), len(rows), pairs, packed, _triton_ops.traced(backend))
    tensors = (*inputs, coefficients)
    if needs_derivative(tensors) and not torch.compiler.is_compiling():
        results = call(static, tensors)
    else:
        results = forward(static, tensors)
    return Mixed(list(results[: static.outputs]), results[-1])


def read_at_once(backend: str, entries: Sequence[object]) -> bool:
    """Whether small tensors are best read and computed with as Python numbers: on the CPU, where
    nothing waits, and where no derivative, transform or compiler watches."""
    if backend != "cpu" or torch.compiler.is_compiling():
        return False
    tensors = []
    for entry in entries:
        kind = type(entry)
        if kind is Tensor or kind is torch.nn.Parameter:
            tensors.append(entry)
        elif kind is not float and isinstance(entry, Tensor):
            return False  # a subclass (FakeTensor above all) has no numbers to read
    return not needs_derivative(tensors)


def _numbers(entries: Sequence[Number | list[float]]) -> list[float]:
    """All coefficients as numbers: those of all samples, or of one sample after the other."""
    if all(type(entry) is float for entry in entries):
        return list(entries)  # type: ignore[arg-type]
    flat = [entry.tolist() if isinstance(entry, Tensor) else entry for entry in entries]
    batch = max((len(entry) for entry in flat if isinstance(entry, list)), default=None)
    if batch is None:
        return flat  # type: ignore[return-value]
    columns = [
        (entry if len(entry) == batch else entry * batch)
        if isinstance(entry, list)
        else [entry] * batch
        for entry in flat
    ]
    return [number for row in zip(*columns, strict=True) for number in row]


def _pack(
    rows: Sequence[Sequence[Number]], like: Tensor
) -> tuple[tuple[float, ...] | None, Tensor | None]:
    """Coefficients as numbers if all are, else as a float64 tensor (B or 1, J, K + 1)."""
    flat = [
        torch.tensor(entry, dtype=torch.float64, device=like.device)
        if isinstance(entry, list)
        else entry
        for row in rows
        for entry in row
    ]
    if not any(isinstance(entry, Tensor) for entry in flat):
        return tuple(flat), None
    batch = max(entry.shape[0] for entry in flat if isinstance(entry, Tensor))
    columns = [
        entry.expand(batch)
        if isinstance(entry, Tensor)
        else torch.full((batch,), entry, dtype=torch.float64, device=like.device)
        for entry in flat
    ]
    return None, torch.stack(columns, dim=1).unflatten(1, (len(rows), -1))


# ---- the call over flat tensors ----------------------------------------------------------------


def kernel(backend: str) -> Callable:
    """The kernel of a backend, with the arguments of the C++ op."""
    if backend == "triton":
        return _triton_ops.kernel("mix", "mix")
    ops = torch.ops.transfuse
    return (ops.mix_triton if backend == _triton_ops.COMPILED else ops.mix).default


def forward(static: Static, tensors: Tensors) -> tuple[Tensor, ...]:
    """Outputs, then the products, of (inputs..., coefficients or None)."""
    *inputs, coefficients = tensors
    flat = [at for pair in static.pairs for at in pair]
    numbers = [] if static.numbers is None else list(static.numbers)
    if coefficients is not None:
        coefficients = coefficients.contiguous()
    outputs, products = kernel(static.backend)(inputs, coefficients, numbers, static.outputs, flat)
    return (*outputs, products)


# ---- rules -------------------------------------------------------------------------------------


def rules(table: Callable[[], Callable]) -> tuple[Callable, Callable]:
    """vjp and jvp of the call, written against the call itself."""

    def vjp(static, tensors, outputs, grads, needs):
        *inputs, coefficients = tensors
        *cotangents, products = grads
        rows = [j for j, grad in enumerate(cotangents) if grad is not None]
        live = [cotangents[j] for j in rows]
        wanted = [k for k in range(static.inputs) if needs[k]]
        found: list[Tensor | None] = [None] * (static.inputs + 1)
        if wanted and (rows or products is not None):
            made = _to_inputs(table(), static, inputs, coefficients, rows, live, products, wanted)
            for k, grad in zip(wanted, made, strict=True):
                found[k] = grad
        if coefficients is not None and needs[static.inputs] and rows:
            found[-1] = _to_coefficients(table(), static, inputs, coefficients, rows, live)
        return found

    def jvp(static, tensors, outputs, tangents):
        *inputs, coefficients = tensors
        *moves, coefficients_t = tangents
        moving = [k for k, t in enumerate(moves) if t is not None]
        count = static.inputs
        pairs = []
        for first, second in static.pairs:
            pairs.append((_moved(first, moving, count), _still(second, moving, count)))
            pairs.append((_still(first, moving, count), _moved(second, moving, count)))
        present = tuple(p for p in pairs if None not in p)
        numbers, rows = None, None
        if coefficients is None:
            numbers = []
            for row in _split(static.numbers, static.outputs, count + 1):
                numbers += [0.0] * count + [row[k] for k in moving] + [0.0]
            numbers = tuple(numbers)
        else:
            with _outer_levels(coefficients) as own:
                rest = torch.zeros_like(own) if coefficients_t is None else coefficients_t
                rows = torch.cat([rest[..., :count], own[..., moving], rest[..., count:]], dim=-1)
        results = table()(
            Static(count + len(moving), static.outputs, present, numbers, static.backend),
            (*inputs, *(moves[k] for k in moving), rows),
        )
        with _outer_levels(results[-1]) as found:
            columns = iter(found.unbind(1))
            sums = [
                sum(next(columns) for pair in pairs[at : at + 2] if None not in pair)
                for at in range(0, len(pairs), 2)
            ]
            still = found.new_zeros(found.shape[:1])
            sums = [still if isinstance(entry, int) else entry for entry in sums]
            products = torch.stack(sums, dim=1) if sums else found
        return (*results[:-1], products)

    return vjp, jvp


@contextmanager
def _outer_levels(tensor: Tensor) -> Iterator[Tensor]:
    """Inside a jvp rule torch follows no tangent through plain operations, not even those of outer
    transforms. Here it does, on the tensor without its tangent of this level."""
    with forward_ad._set_fwd_grad_enabled(True):
        yield forward_ad.unpack_dual(tensor).primal


def _still(k: int, moving: Sequence[int], count: int) -> int:
    """Number of input k among (inputs..., tangents..., 1)."""
    return count + len(moving) if k == count else k


def _moved(k: int, moving: Sequence[int], count: int) -> int | None:
    """Number of the tangent of input k; None where it has none."""
    return count + moving.index(k) if k in moving else None


def _split(flat: Sequence[float], rows: int, width: int) -> list[Sequence[float]]:
    return [flat[j * width : (j + 1) * width] for j in range(rows)]


def _to_inputs(call, static, inputs, coefficients, rows, live, products, wanted):
    """Gradients of the wanted inputs: combinations of output gradients and, for products, inputs.

    ``d/dt_k = sum_j c[j, k] g_j + sum_p (h_p t_second if first is k, + h_p t_first if second is)``
    """
    partners = [] if products is None else list(range(static.inputs))
    width = len(live) + len(partners) + 1
    sources = (*live, *(inputs[k] for k in partners))
    if products is None and coefficients is None:
        given = _split(static.numbers, static.outputs, static.inputs + 1)
        numbers = tuple(entry for k in wanted for entry in (*(given[j][k] for j in rows), 0.0))
        shape = Static(len(sources), len(wanted), (), numbers, static.backend)
        return call(shape, (*sources, None))[:-1]
    if products is None:
        part = coefficients[:, rows][..., wanted].transpose(1, 2)
        table = torch.nn.functional.pad(part, (0, 1))
    else:
        batch = inputs[0].shape[0]
        zero = products.new_zeros((batch,))
        entries = [[zero] * width for _ in wanted]
        if coefficients is None:
            given = _split(static.numbers, static.outputs, static.inputs + 1)
        for row, k in zip(entries, wanted, strict=True):
            for at, j in enumerate(rows):
                row[at] = (
                    zero + given[j][k]
                    if coefficients is None
                    else coefficients[:, j, k].expand(batch)
                )
            for p, pair in enumerate(static.pairs):
                for own, other in (pair, pair[::-1]):
                    if own == k:
                        row[len(live) + other] = row[len(live) + other] + products[:, p]
        table = torch.stack([torch.stack(row, dim=1) for row in entries], dim=1)
    shape = Static(len(sources), len(wanted), (), None, static.backend)
    return call(shape, (*sources, table))[:-1]


def _to_coefficients(call, static, inputs, coefficients, rows, live):
    """``d/dc[b, j, k] = <g_j[b], t_k[b]>``, summed over samples that share coefficients."""
    count, width = len(live), static.inputs + 1
    pairs = tuple((at, count + k) for at in range(count) for k in range(width))
    shape = Static(count + static.inputs, 0, pairs, (), static.backend)
    found = call(shape, (*live, *inputs, None))[-1].unflatten(1, (count, width))
    if coefficients.shape[0] == 1:
        found = found.sum(0, keepdim=True)
    if count == static.outputs:
        return found
    parts = iter(found.unbind(1))
    none = torch.zeros_like(found[:, 0])
    return torch.stack([next(parts) if j in rows else none for j in range(static.outputs)], dim=1)


def _vmap(static, tensors, dims, size):
    """The mapped dimension joins the batch."""
    *inputs, coefficients = tensors
    *at, coefficients_at = dims
    batch = None
    folded = []
    for tensor, dim in zip(inputs, at, strict=True):
        spread = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor
        spread = spread if dim is None else spread.movedim(dim, 0)
        batch = spread.shape[1]
        folded.append(spread.flatten(0, 1))
    if coefficients is not None:
        coefficients = (
            coefficients.unsqueeze(0).expand(size, *coefficients.shape)
            if coefficients_at is None
            else coefficients.movedim(coefficients_at, 0)
        )
        coefficients = coefficients.expand(size, batch, *coefficients.shape[2:]).flatten(0, 1)

    def unfold(outputs):
        return tuple(out.unflatten(0, (size, batch)) for out in outputs)

    return static, (*folded, coefficients), unfold


def _build() -> Callable:
    calls: list[Callable] = []
    vjp, jvp = rules(lambda: calls[0])
    calls.append(
        function(Differentiable(name="mix", forward=forward, vjp=vjp, jvp=jvp, vmap=_vmap))
    )
    return calls[0]


call = _build()
