"""Checks of calls on lists of tensors, and what such a call is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

Partition = Sequence[Tensor] | int | None

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # of the keys of the blocks: 2^64 / golden ratio
MOST_PARTITIONS = 65536
_DTYPES = frozenset(_checks.FLOATING)
_TYPES = frozenset((Tensor, torch.nn.Parameter))


class Combination(NamedTuple):
    """A checked call: coefficients (T, m, K) in float64, and how elements find their partition."""

    base: list[Tensor]
    deltas: list[list[Tensor]]
    coefficients: Tensor
    ids: list[Tensor]
    keys: tuple[int, ...]


def tensor_list(name: str, value: object, *, absent: bool = False) -> list:
    """A list (or tuple) of at least one dense floating tensor; None among them where allowed."""
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {_checks.describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one tensor, got none")
    found = list(value)
    if not _all_usual(found):
        for j, entry in enumerate(found):
            if entry is not None or not absent:
                _checks.floating(f"{name}[{j}]", _checks.dense(f"{name}[{j}]", entry))
    return found


def _all_usual(entries: list) -> bool:
    """Whether a glance shows that all are what they should be: lists have hundreds of entries."""
    return (
        not torch.compiler.is_compiling()
        and _TYPES.issuperset(map(type, entries))
        and _DTYPES.issuperset([t.dtype for t in entries])
        and all([t.layout is torch.strided for t in entries])
    )


def _outlines(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.device]]:
    return [(t.shape, t.device) for t in tensors]


def lists_of_tensors(name: str, value: object, *, absent: bool = False) -> list[list]:
    """At least one list of tensors, of the same shapes and on one device."""
    if isinstance(value, (Tensor, str)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of lists, got {_checks.describe(value)}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one list, got none")
    found = [tensor_list(f"{name}[{i}]", part, absent=absent) for i, part in enumerate(value)]
    if not torch.compiler.is_compiling() and not any(t is None for part in found for t in part):
        first = _outlines(found[0])
        if all([_outlines(part) == first for part in found[1:]]):
            return found
    for i, part in enumerate(found[1:], 1):
        same_blocks(f"{name}[{i}]", part, f"{name}[0]", found[0])
    return found


def same_blocks(name: str, value: Sequence, of: str, like: Sequence) -> None:
    """As many tensors as in another list, of its shapes and on its device."""
    if len(value) != len(like):
        raise ValueError(f"{name}: expected {len(like)} tensors (as {of}), got {len(value)}")
    for j, (entry, other) in enumerate(zip(value, like, strict=True)):
        if entry is None or other is None:
            continue
        if entry.shape != other.shape:
            raise ValueError(
                f"{name}[{j}]: expected shape {tuple(other.shape)} (that of {of}[{j}]), "
                f"got {tuple(entry.shape)}"
            )
        if entry.device != other.device:
            _checks.same_device(f"{name}[{j}]", entry, f"{of}[{j}]", other)


def one_device(name: str, tensors: Sequence[Tensor]) -> None:
    """All tensors of a list on one device."""
    for j, entry in enumerate(tensors):
        if entry.device != tensors[0].device:
            _checks.same_device(f"{name}[{j}]", entry, f"{name}[0]", tensors[0])


def combination(
    deltas: object, coefficients: object, base: object, partition: Partition
) -> Combination:
    """Check the arguments of ``lincomb``."""
    lists = lists_of_tensors("deltas", deltas)
    one_device("deltas[0]", lists[0])
    blocks = len(lists[0])
    first: list[Tensor] = []
    if base is not None:
        first = tensor_list("base", base)
        same_blocks("base", first, "deltas[0]", lists[0])
    table = _coefficients(coefficients, len(lists), blocks, lists[0][0])
    parted = partition is not None
    if parted != (table.dim() == 3):
        expected = "(T, m, K) with a partition" if parted else "(T,) or (T, m) without a partition"
        raise ValueError(f"coefficients: expected {expected}, got shape {tuple(table.shape)}")
    while table.dim() < 3:
        table = table.unsqueeze(-1)
    table = table.to(torch.float64).expand(len(lists), blocks, table.shape[2])
    ids, keys = _partition(partition, lists[0])
    return Combination(first, lists, table, ids, keys)


def _coefficients(value: object, lists: int, blocks: int, like: Tensor) -> Tensor:
    table = _checks.dense("coefficients", value)
    _checks.floating("coefficients", table)
    _checks.same_device("coefficients", table, "deltas", like)
    shape = tuple(table.shape)
    wanted = (lists, blocks)[: min(len(shape), 2)]
    if not 1 <= len(shape) <= 3 or shape[:2] != wanted:
        raise ValueError(
            f"coefficients: expected shape ({lists},), ({lists}, {blocks}) or "
            f"({lists}, {blocks}, K), got {shape}"
        )
    if len(shape) == 3 and not 1 <= shape[2] <= MOST_PARTITIONS:
        raise ValueError(
            f"coefficients: expected 1 to {MOST_PARTITIONS} partitions, got shape {shape}"
        )
    return table


def _partition(partition: Partition, like: list[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    if partition is None:
        return [], ()
    if isinstance(partition, int) and not isinstance(partition, bool):
        return [], block_keys(partition, len(like))
    if isinstance(partition, (Tensor, str)) or not isinstance(partition, Sequence):
        raise TypeError(
            "partition: expected a list of uint8 or uint16 tensors, an integer (the seed of a "
            f"hash) or None, got {_checks.describe(partition)}"
        )
    ids = list(partition)
    for j, entry in enumerate(ids):
        if not isinstance(entry, Tensor) or entry.dtype not in (torch.uint8, torch.uint16):
            raise TypeError(
                f"partition[{j}]: expected a uint8 or uint16 tensor, got {_checks.describe(entry)}"
            )
        _checks.same_dtype(f"partition[{j}]", entry, "partition[0]", ids[0])
    same_blocks("partition", ids, "deltas[0]", like)
    return ids, ()


def block_keys(seed: int, blocks: int) -> tuple[int, ...]:
    """The key of each block's hash: signed 64-bit integers."""
    keys = ((seed + j * _STEP) & _MASK for j in range(blocks))
    return tuple(key - 2**64 if key >= 2**63 else key for key in keys)


def working_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where any tensor is."""
    wide = torch.float64 in [t.dtype for t in tensors]
    return torch.float64 if wide else torch.float32


def call_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that decides on a backend: float64 where any tensor is, else the first one's."""
    return torch.float64 if working_dtype(tensors) == torch.float64 else tensors[0].dtype
