"""Ops on lists of tensors in eager torch: their definitions, and what serves without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.ops._multitensor_call import (
    Partition,
    combination,
    lists_of_tensors,
    one_device,
    same_blocks,
    tensor_list,
    working_dtype,
)

_LOW = 2**32 - 1


def lincomb_reference(
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    base: Sequence[Tensor] | None = None,
    partition: Partition = None,
) -> list[Tensor]:
    """``base_j + sum_i coefficients[i, j] deltas[i][j]``, as ``transfuse.ops.lincomb``."""
    call = combination(deltas, coefficients, base, partition)
    return combined(call.base, call.deltas, call.coefficients, call.ids, call.keys)


def combined(
    base: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    ids: Sequence[Tensor],
    keys: Sequence[int],
) -> list[Tensor]:
    """The same for checked arguments: coefficients (T, m, K), ids or keys per block or neither."""
    results = []
    for j, first in enumerate(deltas[0]):
        parts = [part[j] for part in deltas]
        dtype = working_dtype([*parts, *base[j : j + 1]])
        factors = spread(coefficients[:, j].to(dtype), first, ids, keys, j)
        total = base[j].to(dtype) if base else torch.zeros_like(first, dtype=dtype)
        for factor, part in zip(factors, parts, strict=True):
            total = total + factor * part.to(dtype)
        results.append(total.to((base[j] if base else first).dtype))
    return results


def spread(
    factors: Tensor, like: Tensor, ids: Sequence[Tensor], keys: Sequence[int], j: int
) -> list[Tensor]:
    """Coefficients (T, K) of block j as T tensors that broadcast to its shape."""
    if not ids and not keys:
        return list(factors[:, 0])
    count = factors.shape[1]
    at = partition_of(like, ids, keys, count, j)
    # One more for ids beyond the last: no coefficient.
    return [torch.cat([row, row.new_zeros(1)])[at] for row in factors]


def partition_of(
    like: Tensor, ids: Sequence[Tensor], keys: Sequence[int], count: int, j: int
) -> Tensor:
    """Number of the partition of every element of block j, int64; ``count`` where it has none."""
    if ids:
        return ids[j].to(torch.int64).clamp_max(count)
    return hashed_ids(like.numel(), keys[j], count, like.device).reshape(like.shape)


def hashed_ids(elements: int, key: int, count: int, device: torch.device) -> Tensor:
    """The partition of each element under a key: a hash of its number in the tensor."""
    i = torch.arange(elements, device=device)
    high = _mixed((i >> 32) + _mixed_number(key >> 32 & _LOW) & _LOW)
    inner = _mixed((key & _LOW) ^ high)
    bits = _mixed((i & _LOW) ^ inner)
    return ((bits >> 16) * count) >> 16


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32 bits, held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def _mixed_number(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def block_dots(
    grads: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor]],
    ids: Sequence[Tensor],
    keys: Sequence[int],
    count: int,
) -> Tensor:
    """(T, m, K) float64: sums of ``grads[j] * deltas[i][j]`` over the elements of a partition."""
    rows = []
    for part in deltas:
        row = []
        for j, (grad, delta) in enumerate(zip(grads, part, strict=True)):
            dtype = working_dtype([grad, delta])
            product = (grad.to(dtype) * delta.to(dtype)).to(torch.float64)
            if not ids and not keys:
                row.append(product.sum().reshape(1))
                continue
            at = partition_of(grad, ids, keys, count, j).flatten()
            sums = product.new_zeros(count + 1).index_add(0, at, product.flatten())
            row.append(sums[:count])
        rows.append(torch.stack(row))
    return torch.stack(rows)


# ---- norms and products --------------------------------------------------------------------------


def multi_norm_reference(
    tensors: Sequence[Tensor], *, ord: float = 2, scale: Sequence[Tensor] | None = None
) -> Tensor:
    """The norm of all tensors as one vector, as ``transfuse.ops.multi_norm``."""
    return normed(*norm_arguments(tensors, ord, scale))


def norm_arguments(
    tensors: object, ord: object, scale: object
) -> tuple[list[Tensor], int, list[Tensor]]:
    """Checked: the tensors, the order (0: largest), and the factors."""
    found = tensor_list("tensors", tensors)
    one_device("tensors", found)
    orders = {1: 1, 2: 2, float("inf"): 0}
    if isinstance(ord, bool) or not isinstance(ord, (int, float)) or ord not in orders:
        raise ValueError(f"ord: expected 1, 2 or inf, got {ord!r}")
    factors: list[Tensor] = []
    if scale is not None:
        factors = tensor_list("scale", scale)
        same_blocks("scale", factors, "tensors", found)
    return found, orders[ord], factors


def normed(tensors: Sequence[Tensor], order: int, scale: Sequence[Tensor]) -> Tensor:
    """The same for checked arguments."""
    dtype = working_dtype([*tensors, *scale])
    ord = float("inf") if order == 0 else order
    found = []
    for j, tensor in enumerate(tensors):
        x = tensor.to(dtype)
        x = x * scale[j].to(dtype) if scale else x
        # Of no numbers torch has no largest.
        x = x.new_zeros(1) + x.sum() if x.numel() == 0 else x
        found.append(torch.linalg.vector_norm(x, ord))
    return torch.linalg.vector_norm(torch.stack(found), ord)


def multi_dot_reference(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists, as ``transfuse.ops.multi_dot``."""
    left, right = dot_arguments(xs, ys)
    return dotted(left, right)


def dot_arguments(xs: object, ys: object) -> tuple[list[Tensor], list[Tensor]]:
    """Checked."""
    left, right = tensor_list("xs", xs), tensor_list("ys", ys)
    one_device("xs", left)
    same_blocks("ys", right, "xs", left)
    return left, right


def dotted(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The same for checked arguments."""
    dtype = working_dtype([*xs, *ys])
    sums = [(x.to(dtype) * y.to(dtype)).sum() for x, y in zip(xs, ys, strict=True)]
    return torch.stack(sums).sum()


def multi_gram_reference(lists: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of lists, as ``transfuse.ops.multi_gram``."""
    return grammed(gram_arguments(lists))


def gram_arguments(lists: object) -> list[list[Tensor | None]]:
    """Checked: lists of the same shapes, None where a tensor is absent, at least one that is."""
    found = lists_of_tensors("lists", lists, absent=True)
    shapes: dict[int, tuple[str, Tensor]] = {}
    for i, part in enumerate(found):
        for j, entry in enumerate(part):
            if entry is None:
                continue
            name, other = shapes.setdefault(j, (f"lists[{i}]", entry))
            same_blocks(f"lists[{i}]", [None] * j + [entry], name, [None] * j + [other])
    if not shapes:
        raise ValueError("lists: expected at least one tensor, got only None")
    known = [entry for part in found for entry in part if entry is not None]
    one_device("lists", known)
    return found


def grammed(lists: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The same for checked arguments."""
    known = [entry for part in lists for entry in part if entry is not None]
    dtype = working_dtype(known)
    total = torch.zeros((len(lists), len(lists)), dtype=dtype, device=known[0].device)
    for parts in zip(*lists, strict=True):
        like = next((p for p in parts if p is not None), None)
        if like is None:
            continue
        rows = torch.stack(
            [
                (torch.zeros_like(like, dtype=dtype) if p is None else p.to(dtype)).reshape(-1)
                for p in parts
            ]
        )
        total = total + rows @ rows.mT
    return total
