"""Which tensors of several state dicts go together, and what is done with the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

States = Sequence[Mapping[str, Tensor]]
Names = Collection[str] | Callable[[str], bool]

# Numbers of all models together that are merged in one call of a kernel.
GROUP = 2**26
# Running statistics are no parameters: no importance is known for them, and the target's alone
# belong to other weights.
STATISTICS = ("running_mean", "running_var")
_SHOWN = 8


class Plan(NamedTuple):
    """Names to merge, those that are averaged without weights, and those kept from the target."""

    merged: list[str]
    averaged: list[str]
    kept: list[str]


def check_states(name: str, states: object) -> list[Mapping[str, Tensor]]:
    """At least one mapping of names to tensors."""
    if isinstance(states, Mapping) or not isinstance(states, Sequence):
        raise TypeError(f"{name}: expected a list of state dicts, got {_checks.describe(states)}")
    if len(states) == 0:
        raise ValueError(f"{name}: expected at least one state dict, got none")
    for i, state in enumerate(states):
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{name}[{i}]: expected a mapping of names to tensors, "
                f"got {_checks.describe(state)}"
            )
    return list(states)


def peek(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Shape and dtype of a tensor: of a file without reading it, where the mapping can say."""
    meta = getattr(state, "meta", None)
    return state[name] if meta is None else meta(name)


def chosen(names: Names) -> Callable[[str], bool]:
    """Whether a name is among the given ones."""
    if callable(names):
        return names
    if isinstance(names, str):
        raise TypeError(f"keep: expected a collection of names or a function, got {names!r}")
    return set(names).__contains__


def plan(states: States, keep: Names, weighted: Callable[[str], bool]) -> Plan:
    """Sort the target's tensors, and refuse what does not fit.

    Args:
        states: the target's first.
        keep: names that are taken from the target as they are; other models need not have them.
        weighted: whether a name is to be merged.

    Raises:
        ValueError: names that are missing in one model or not known to the target, other shapes,
            tensors that cannot be averaged; the message lists them.
    """
    target, stays = states[0], chosen(keep)
    found = Plan([], [], [])
    problems: list[str] = []
    for name in target:
        tensor = peek(target, name)
        if stays(name):
            found.kept.append(name)
            continue
        trouble = quantised(tensor)
        if trouble is not None:
            problems.append(f"{name} {trouble}")
        elif not tensor.is_floating_point():
            found.kept.append(name)
        elif weighted(name):
            found.merged.append(name)
        elif name.endswith(STATISTICS):
            found.averaged.append(name)
        else:
            found.kept.append(name)
    for i, state in enumerate(states[1:], 1):
        unknown = [n for n in state if n not in target and not stays(n)]
        problems += [f"{n} is in states[{i}] and not in states[0]" for n in unknown]
        for name in target:
            if stays(name):
                continue
            if name not in state:
                problems.append(f"{name} is missing in states[{i}]")
                continue
            problems += _unlike(name, peek(state, name), peek(target, name), i)
    refuse(problems)
    return found


def _unlike(name: str, tensor: Tensor, target: Tensor, i: int) -> list[str]:
    trouble = quantised(tensor)
    if trouble is not None:
        return [f"{name} in states[{i}] {trouble}"]
    if tensor.shape != target.shape:
        return [
            f"{name} in states[{i}] has shape {tuple(tensor.shape)}, in states[0] "
            f"{tuple(target.shape)}"
        ]
    if tensor.is_floating_point() != target.is_floating_point():
        return [
            f"{name} in states[{i}] is {_checks.dtype_name(tensor.dtype)}, in states[0] "
            f"{_checks.dtype_name(target.dtype)}"
        ]
    return []


def quantised(tensor: Tensor) -> str | None:
    """Why numbers of a tensor are codes and not values; None if they are values."""
    if tensor.is_quantized or tensor.layout is not torch.strided:
        return "is quantised or not dense; dequantise it first, or keep it"
    if tensor.is_floating_point() and tensor.dtype not in _checks.FLOATING:
        return f"is {_checks.dtype_name(tensor.dtype)}; convert it to a larger type first"
    if tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() >= 2:
        return (
            f"is a matrix of {_checks.dtype_name(tensor.dtype)}, so quantised; dequantise it "
            "first, or keep it"
        )
    return None


def refuse(problems: Sequence[str]) -> None:
    """One error for all differences.

    Raises:
        ValueError: there are any.
    """
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            "state dicts: expected the same names, shapes and kinds of tensors, got "
            f"{len(problems)} differences: " + "; ".join(problems[:_SHOWN]) + more
        )


def groups(names: Iterable[str], states: States) -> Iterator[list[str]]:
    """Names in order, as many at a time as a kernel is given at once."""
    held: list[str] = []
    numbers = 0
    for name in names:
        size = peek(states[0], name).numel() * len(states)
        if held and numbers + size > GROUP:
            yield held
            held, numbers = [], 0
        held.append(name)
        numbers += size
    if held:
        yield held


class Tied:
    """Results by the memory of the target's tensor: tied weights are merged once."""

    def __init__(self) -> None:
        self._known: dict[tuple, str] = {}

    def original(self, name: str, tensor: Tensor) -> str:
        """The first name with this memory."""
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"
        if tensor.numel() == 0 or not plain:
            return name
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        return self._known.setdefault(key, name)
