"""Recorded inputs of model calls, so that a call can be made again later."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor

from transfuse.methods.diffusion_control._feature_store import tensor_bytes


class ModelCall(NamedTuple):
    """Arguments of one call."""

    args: tuple
    kwargs: dict


class RecordedCalls:
    """Model inputs by (role, time label).

    Tensors are copied, because samplers may reuse them; an argument that is the same unmodified
    tensor as in an earlier call (the prompt embedding, usually) is copied once.
    """

    def __init__(self) -> None:
        self._calls: dict[tuple[str, int], ModelCall] = {}
        # id -> (source, its version, copy); the weak reference guards against a reused id
        self._copies: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def put(self, role: str, label: int, args: tuple, kwargs: dict) -> None:
        """Record a call, replacing an earlier one of the same role and label."""
        self._copies = {at: kept for at, kept in self._copies.items() if kept[0]() is not None}
        self._calls[role, label] = ModelCall(self._copy(args), self._copy(kwargs))

    def _copy(self, value):
        if isinstance(value, Tensor):
            known = self._copies.get(id(value))
            if known is not None and known[0]() is value and known[1] == value._version:
                return known[2]
            copy = value.detach().clone()
            self._copies[id(value)] = (weakref.ref(value), value._version, copy)
            return copy
        if isinstance(value, dict):
            return {name: self._copy(item) for name, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._copy(item) for item in value)
        return value

    def get(self, role: str, label: int) -> ModelCall | None:
        """The recorded call, or None."""
        return self._calls.get((role, label))

    def labels(self, role: str) -> tuple[int, ...]:
        """Time labels recorded for a role, ascending."""
        return tuple(sorted(label for kind, label in self._calls if kind == role))

    def clear(self, role: str | None = None) -> None:
        """Forget the calls of one role, or of both."""
        self._calls = {at: call for at, call in self._calls.items() if role not in (None, at[0])}

    def nbytes(self) -> int:
        """Bytes of the recorded tensors, each counted once."""
        distinct: dict[int, Tensor] = {}
        for call in self._calls.values():
            _collect(call, distinct)
        return tensor_bytes(distinct.values())


def _collect(value, found: dict[int, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        _collect(tuple(value.values()), found)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
