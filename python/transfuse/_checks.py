"""Argument checks shared by every op: one clear error before any kernel runs.

Each function takes the name the user sees (``"sources[1].mask"``), what it expects and what it got,
and raises ``TypeError`` for a wrong kind of object (class, dtype) and ``ValueError`` for a wrong
value, shape or device. They run on every call, so they look at metadata only; the one check that
reads values (:func:`index_map`) says when it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Largest and smallest entry of the index tensors already read on devices where reading one waits
# for # the queue: tensor -> (version, smallest, largest).
_INDEX_RANGES = WeakIdKeyDictionary()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """What an error message says about an argument it refuses."""
    if isinstance(value, Tensor):
        return f"a {dtype_name(value.dtype)} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (bool, int, float, str)) or value is None:
        return repr(value)
    return f"an object of type {type(value).__name__}"


def dense(name: str, value: object) -> Tensor:
    """A dense tensor of any shape."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    return value


def tensor(name: str, value: object, axes: Sequence[str]) -> Tensor:
    """A dense tensor with one dimension per entry of ``axes`` (``("B", "H", "N", "D")``)."""
    value = dense(name, value)
    if value.dim() != len(axes):
        raise ValueError(
            f"{name}: expected {len(axes)} dimensions ({', '.join(axes)}), "
            f"got {value.dim()} (shape {tuple(value.shape)})"
        )
    return value


def floating(name: str, value: Tensor) -> None:
    """float32, bfloat16, float16 or float64."""
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {dtype_name(value.dtype)}"
        )


def same_device(name: str, value: Tensor, of: str, reference: Tensor) -> None:
    """The device of another argument."""
    if value.device != reference.device:
        raise ValueError(
            f"{name}: expected device {reference.device} (that of {of}), got {value.device}"
        )


def same_dtype(name: str, value: Tensor, of: str, reference: Tensor) -> None:
    """The dtype of another argument."""
    if value.dtype != reference.dtype:
        raise TypeError(
            f"{name}: expected dtype {dtype_name(reference.dtype)} (that of {of}), "
            f"got {dtype_name(value.dtype)}"
        )


def size(name: str, value: Tensor, dim: int, expected: int, meaning: str) -> None:
    """One dimension of exactly ``expected`` entries."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"{name}: expected {expected} in dimension {dim} ({meaning}), "
            f"got {value.shape[dim]} (shape {tuple(value.shape)})"
        )


def number(name: str, value: object, *, positive: bool = False) -> float:
    """A finite Python number, greater than zero if ``positive``."""
    # A plain float is the usual case, and a call of a small op has several.
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (float, int, torch.SymFloat, torch.SymInt))
    ):
        raise TypeError(f"{name}: expected a Python number, got {describe(value)}")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, got {result}")
    if positive and result <= 0.0:
        raise ValueError(f"{name}: expected a number greater than 0, got {result}")
    return result


def positive_int(name: str, value: object) -> int:
    """A Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")
    return value


def choice(name: str, value: object, table: Mapping[Any, int]) -> int:
    """The code of one of a few named options."""
    # A list is not hashable, so membership alone would raise an unhelpful error.
    if (value is None or isinstance(value, str)) and value in table:
        return table[value]
    options = ", ".join(repr(option) for option in table)
    raise ValueError(f"{name}: expected one of {options}, got {describe(value)}")


def broadcast(name: str, value: Tensor, shape: tuple[int, ...], axes: Sequence[str]) -> Tensor:
    """``value`` with the rank of ``shape``, each dimension full or 1, checked to broadcast to it.

    Dimensions of 1 stay 1: kernels read them with stride 0, and a gradient has the same small
    shape, where that of an expanded view would have to be formed in full before autograd sums it.
    """
    given = value.shape
    surplus = len(shape) - len(given)
    fits = surplus >= 0
    if fits:
        for got, expected in zip(given, shape[surplus:], strict=True):
            if got != expected and got != 1:
                fits = False
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to ({', '.join(axes)}) = {shape}, "
            f"got {tuple(given)}"
        )
    return value[(None,) * surplus] if surplus > 0 else value


def coefficient(
    name: str,
    value: object,
    shape: tuple[int, ...],
    axes: Sequence[str],
    of: str,
    reference: Tensor,
) -> float | Tensor:
    """A finite number, or a floating tensor that broadcasts to ``shape``; rank aligned."""
    if not isinstance(value, Tensor):
        return number(name, value)
    auxiliary(name, value, of, reference)
    return broadcast(name, value, shape, axes)


def auxiliary(name: str, value: Tensor, of: str, reference: Tensor) -> None:
    """A dense tensor in the dtype of ``reference`` or in float32, on its device."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
    if value.dtype != reference.dtype and value.dtype != torch.float32:
        raise TypeError(
            f"{name}: expected dtype {dtype_name(reference.dtype)} (that of {of}) or float32, "
            f"got {dtype_name(value.dtype)}"
        )
    same_device(name, value, of, reference)


def index_map(
    name: str, value: object, length: int, bound: int, meaning: str, of: str, reference: Tensor
) -> Tensor:
    """An integer tensor of shape ``(length,)`` with entries in ``[0, bound)``.

    Returned as int64 and contiguous, as kernels read it.

    Values are read on every call on the CPU. On other devices, where reading waits for the queue,
    they are read once for each index tensor and again after it was modified in place. They are not
    read while a graph is being traced or captured, under ``torch.func`` transforms of the index
    itself, or for tensors without data; the kernels keep their own guard for these.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an integer tensor or None, got {describe(value)}")
    if value.dtype != torch.int64 and value.dtype != torch.int32:
        raise TypeError(f"{name}: expected int64 or int32, got {dtype_name(value.dtype)}")
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(
            f"{name}: expected shape ({length},) ({meaning}), got {tuple(value.shape)}"
        )
    same_device(name, value, of, reference)
    if not torch.compiler.is_compiling():
        extent = _index_range(value)
        if extent is not None and (extent[0] < 0 or extent[1] >= bound):
            got = extent[0] if extent[0] < 0 else extent[1]
            raise ValueError(f"{name}: expected entries in [0, {bound}), got {got}")
    # Both do nothing, and return the tensor itself, in the usual case.
    return value.to(torch.int64).contiguous()


def _index_range(index: Tensor) -> tuple[int, int] | None:
    """Smallest and largest entry; None where nothing is there or nothing can be read."""
    if (
        index.shape[0] == 0
        # A subclass (FakeTensor above all) or a functorch wrapper has no values of its own.
        or type(index) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(index)
    ):
        return None
    if index.device.type == "cpu":
        return _read_range(index)
    if index.device.type == "meta" or (
        index.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        return None
    if index.is_inference():  # has no version counter
        return _read_range(index)
    known = _INDEX_RANGES.get(index)
    if known is None or known[0] != index._version:
        known = (index._version, *_read_range(index))
        _INDEX_RANGES[index] = known
    return known[1], known[2]


def _read_range(index: Tensor) -> tuple[int, int]:
    entries = index.detach().tolist()
    return min(entries), max(entries)
