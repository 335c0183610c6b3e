"""Where windows lie on a grid of tokens: checked options, and the tables eager code works with."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

CYCLIC, SPLIT, ANCHORED = 0, 1, 2
_WRAP: dict[object, int] = {"cyclic": CYCLIC, "mask": SPLIT, "none": ANCHORED}
_RAGGED: dict[object, int] = {"exact": 0, "pad": 1}
BIAS_NONE, BIAS_FULL, BIAS_RELATIVE = 0, 1, 2
MAX_AXES = 3
_LIMIT = 2**31 - 1


class Grid(NamedTuple):
    """Windows on a grid of tokens, per axis."""

    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    wrap: int = CYCLIC
    pad: int = 0

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    @property
    def slots(self) -> int:
        """Places in one window, taken or not."""
        return math.prod(self.window)

    def numbers(self, bias: int) -> tuple[int, ...]:
        """The grid as the kernels take it."""
        return (len(self.size), *self.size, *self.window, *self.shift, self.wrap, self.pad, bias)


def grid_of(numbers: Sequence[int]) -> tuple[Grid, int]:
    """The grid, and the kind of bias, of which :meth:`Grid.numbers` are these."""
    axes, *rest = numbers
    size, window, shift = (tuple(rest[at * axes : (at + 1) * axes]) for at in range(3))
    wrap, pad, bias = rest[3 * axes :]
    return Grid(size, window, shift, wrap, pad), bias


class Tables(NamedTuple):
    """Index tables of a grid, int64.

    ``token`` (windows, slots): the token in each slot, ``tokens`` (one past the last) where a slot
    is empty. ``place`` (tokens,): window * slots + slot of each token.
    """

    token: Tensor
    place: Tensor


def grid(
    size: Sequence[int],
    window: str | int | Sequence[int],
    shift: int | Sequence[int],
    wrap: str = "cyclic",
    ragged: str = "exact",
) -> Grid:
    """Check the options of a window op.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
    """
    if not isinstance(size, (tuple, list, torch.Size)) or not 1 <= len(size) <= MAX_AXES:
        raise ValueError(
            f"size: expected 1 to {MAX_AXES} ints, such as (height, width), "
            f"got {_checks.describe(size)}"
        )
    axes = len(size)
    sizes = _ints("size", size, axes, least=0)
    if isinstance(window, str):
        if window != "half":
            raise ValueError(f'window: expected "half", an int or {axes} ints, got {window!r}')
        windows = tuple(max(1, -(-n // 2)) for n in sizes)
    else:
        windows = _ints("window", window, axes, least=1)
    shifts = _ints("shift", shift, axes, least=None)
    return Grid(
        sizes,
        windows,
        shifts,
        _checks.choice("wrap", wrap, _WRAP),
        _checks.choice("ragged", ragged, _RAGGED),
    )


def _ints(name: str, value: object, axes: int, *, least: int | None) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else value
    if not isinstance(values, (tuple, list, torch.Size)) or len(values) != axes:
        raise ValueError(
            f"{name}: expected an int or {axes} ints (one per axis of size), "
            f"got {_checks.describe(value)}"
        )
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"{name}: expected ints, got {_checks.describe(value)}")
        if (least is not None and entry < least) or abs(entry) > _LIMIT:
            bound = "" if least is None else f" >= {least}"
            raise ValueError(f"{name}: expected ints{bound} below 2**31, got {value!r}")
    return tuple(values)


def check_tokens(name: str, tokens: int, own: Grid) -> None:
    """Refuse a number of tokens that is not the grid's."""
    if tokens != own.tokens:
        raise ValueError(
            f"size: expected a product of {tokens} (the tokens of {name}), "
            f"got {own.size} = {own.tokens}"
        )


def _axis(size: int, window: int, shift: int, wrap: int, pad: int) -> tuple[list[int], list[int]]:
    """Window and slot of every token of one axis."""
    period = -(-size // window) * window if pad else size
    windows, slots = [], []
    for token in range(size):
        if wrap == ANCHORED:
            position, part = token + -shift % window, 0
        else:
            turned = shift % period
            position = (token - turned) % period
            part = int(wrap == SPLIT and token < turned)
        windows.append(2 * (position // window) + part)
        slots.append(position % window)
    # Windows are counted in order, those without a token left out.
    number = {w: i for i, w in enumerate(sorted(set(windows)))}
    return [number[w] for w in windows], slots


@functools.lru_cache(maxsize=64)
def _tables(own: Grid) -> Tables:
    count, places, slots = 1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for size, window, shift in zip(own.size, own.window, own.shift, strict=True):
        windows, at = _axis(size, window, shift, own.wrap, own.pad)
        number = max(windows, default=-1) + 1
        count *= number
        places = (places[:, None] * number + torch.tensor(windows, dtype=torch.int64)).flatten()
        slots = (slots[:, None] * window + torch.tensor(at, dtype=torch.int64)).flatten()
    place = places * own.slots + slots
    token = torch.full((count * own.slots,), own.tokens, dtype=torch.int64)
    token[place] = torch.arange(own.tokens)
    return Tables(token.view(count, own.slots), place)


@functools.lru_cache(maxsize=64)
def _tables_on(own: Grid, device: torch.device) -> Tables:
    made = _tables(own)
    return Tables(made.token.to(device), made.place.to(device))


def tables(own: Grid, device: torch.device) -> Tables:
    """The index tables of a grid on a device; made once per grid."""
    if torch.compiler.is_compiling():
        # Constants of the graph: a cached tensor from outside could not be traced.
        made = _tables.__wrapped__(own)
        return Tables(made.token.to(device), made.place.to(device))
    return _tables_on(own, device)


@functools.lru_cache(maxsize=64)
def _relative_index(window: tuple[int, ...], device: torch.device) -> Tensor:
    axes = torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")
    index = torch.zeros((), dtype=torch.int64)
    for coordinate, side in zip(axes, window, strict=True):
        flat = coordinate.flatten()
        index = index * (2 * side - 1) + (flat[:, None] - flat[None, :] + side - 1)
    return index.to(device)


def relative_index(window: tuple[int, ...], device: torch.device) -> Tensor:
    """(slots, slots): the entry of a flattened relative table for a query slot and a key slot."""
    if torch.compiler.is_compiling():
        return _relative_index.__wrapped__(window, device)
    return _relative_index(window, device)


def slot_codes(own: Grid, kind: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(slots,) int32 each: a bias of ``kind`` has entry query code + key code for two slots."""
    if kind == BIAS_NONE:
        return None, None
    slot = torch.arange(own.slots, dtype=torch.int64)
    if kind == BIAS_FULL:
        codes = slot * own.slots, slot
    else:
        code, centre, rest = torch.zeros_like(slot), 0, own.slots
        for side in own.window:
            rest //= side
            code = code * (2 * side - 1) + slot // rest % side
            centre = centre * (2 * side - 1) + side - 1
        codes = code + centre, -code
    query, key = (c.to(device=device, dtype=torch.int32) for c in codes)
    return query, key


@functools.lru_cache(maxsize=64)
def kernel_tables(
    own: Grid, kind: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """What the Triton kernel reads, int32: :func:`slot_codes` and the token in each slot; made once
    per grid."""
    return *slot_codes(own, kind, device), tables(own, device).token.int()


def partition(x: Tensor, own: Grid, dim: int) -> Tensor:
    """Tokens along ``dim`` to (windows, slots), zero in empty slots."""
    index = tables(own, x.device).token
    if own.tokens < index.numel():
        pad = list(x.shape)
        pad[dim] = 1
        x = torch.cat([x, x.new_zeros(pad)], dim=dim)
    return x.index_select(dim, index.flatten()).unflatten(dim, index.shape)


def reverse(windows: Tensor, own: Grid, dim: int) -> Tensor:
    """(windows, slots) at ``dim`` and ``dim + 1`` back to tokens."""
    return windows.flatten(dim, dim + 1).index_select(dim, tables(own, windows.device).place)
