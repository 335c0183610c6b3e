"""Checks of the calls of the head curvature ops, and how samples are divided into domains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse import _checks


# No named tuples: torch 2.10's compiler does not know properties of one that it saw being made.
@dataclass(frozen=True)
class Segments:
    """Domains as stretches of the batch; ``given`` is False for a call without segments."""

    bounds: tuple[int, ...]
    given: bool

    @property
    def domains(self) -> int:
        """Number of domains E."""
        return len(self.bounds) - 1

    @property
    def lengths(self) -> list[int]:
        """Samples of each domain."""
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def even(self) -> bool:
        """Whether all domains have as many samples."""
        return len(set(self.lengths)) == 1

    def shape(self, result: Tensor) -> Tensor:
        """A result (E, ...) as the caller gets it: without E where no segments were given."""
        return result if self.given else result[0]


@dataclass(frozen=True)
class Head:
    """The checked arguments of a call, floating tensors in working precision."""

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    segments: Segments

    @property
    def classes(self) -> int:
        """Outputs C of the head; 1 is the binary head."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns D of a result: d, and one more with a bias."""
        return self.weight.shape[1] + int(self.bias is not None)


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is float64, float32 otherwise."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def head(
    features: object, weight: object, bias: object, segments: object, *more: Tensor | None
) -> Head:
    """Check what every op takes; ``more``: further floating tensors that set the precision."""
    features = _floating("features", features, ("N", "d"))
    weight = _floating("weight", weight, ("C", "d"))
    _checks.same_device("weight", weight, "features", features)
    _checks.size("weight", weight, 1, features.shape[1], "columns of features")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one row, got shape {tuple(weight.shape)}")
    if bias is not None:
        bias = _floating("bias", bias, ("C",))
        _checks.same_device("bias", bias, "features", features)
        _checks.size("bias", bias, 0, weight.shape[0], "rows of weight")
    parts = _segments(segments, features.shape[0])
    dtype = working_dtype(features, weight, bias, *more)
    wide_bias = None if bias is None else bias.to(dtype)
    return Head(features.to(dtype), weight.to(dtype), wide_bias, parts)


def targets(labels: object, features: Tensor, classes: int) -> Tensor:
    """One-hot rows (N, C) of class numbers; for a binary head (N, 1), also of floating labels.

    The numbers are read to be checked: at once on the CPU, elsewhere once per tensor (class
    numbers) or not at all (floating labels).
    """
    count = features.shape[0]
    if classes == 1 and isinstance(labels, Tensor) and labels.is_floating_point():
        return _soft_targets(labels, features)
    labels = _checks.index_map(
        "labels", labels, count, max(classes, 2), "rows of features", "features", features
    )
    if classes == 1:
        return labels[:, None].to(features.dtype)
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(features.dtype)


def _soft_targets(labels: Tensor, features: Tensor) -> Tensor:
    count = features.shape[0]
    if tuple(labels.shape) not in ((count,), (count, 1)):
        raise ValueError(
            f"labels: expected shape ({count},) or ({count}, 1) (rows of features), "
            f"got {tuple(labels.shape)}"
        )
    _checks.same_device("labels", labels, "features", features)
    if labels.requires_grad:
        raise ValueError("labels: expected a tensor without gradient, got one that requires it")
    wrapped = type(labels) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(labels)
    if labels.device.type == "cpu" and not (wrapped or torch.compiler.is_compiling()):
        outside = ~((labels >= 0) & (labels <= 1))
        if bool(outside.any()):
            raise ValueError(f"labels: expected numbers in [0, 1], got {labels[outside][0].item()}")
    return labels.reshape(count, 1).to(features.dtype)


def vectors(value: object, name: str = "vectors") -> Tensor:
    """A floating tensor of 2 to 4 dimensions: what a Hessian multiplies; :func:`fit_vectors`
    compares it with the head."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    if not 2 <= value.dim() <= 4:
        raise ValueError(
            f"{name}: expected shape (C, D), (R, C, D) or (E, R, C, D), got {tuple(value.shape)}"
        )
    _checks.tensor(name, value, ("E", "R", "C", "D")[-value.dim() :])
    _checks.floating(name, value)
    return value


def fit_vectors(name: str, value: Tensor, given: Head) -> Tensor:
    """``value`` in working precision, checked against the head: (C, D) behind R, and E before."""
    _checks.same_device(name, value, "features", given.features)
    expected = (given.classes, given.width)
    if tuple(value.shape[-2:]) != expected:
        bias = "no bias" if given.bias is None else "the bias as last column"
        raise ValueError(
            f"{name}: expected (C, D) = {expected} ({bias}) in the last two dimensions, "
            f"got shape {tuple(value.shape)}"
        )
    if value.dim() == 4:
        if not given.segments.given:
            raise ValueError(
                f"{name}: expected at most 3 dimensions (R, C, D) without segments, got 4"
            )
        _checks.size(name, value, 0, given.segments.domains, "domains in segments")
    return value.to(given.features.dtype)


CUDA_CLASSES = 128


def cuda_limit(features: Tensor, weight: Tensor | None = None, *_: Tensor) -> str | None:
    """Why the CUDA kernels do not take a head of this size; None if they do."""
    if weight is not None and weight.dim() == 2 and weight.shape[0] > CUDA_CLASSES:
        return (
            f"{weight.shape[0]} classes are more than {CUDA_CLASSES}: products of that size are "
            "what torch's matrix products do best"
        )
    return None


# Beyond, products of torch's GEMM take longer than the launches that the kernels save.
TRITON_CLASSES, TRITON_PRODUCTS = 1024, 2**29


def triton_limit(features: Tensor, weight: Tensor | None = None, *_: Tensor) -> str | None:
    """Why the Triton kernels do not take a head of this size; None if they do."""
    if weight is None or weight.dim() != 2:
        return None
    classes = weight.shape[0]
    if classes > TRITON_CLASSES:
        return f"{classes} classes are more than {TRITON_CLASSES}"
    count = features.numel() * classes
    if classes > 16 and count > TRITON_PRODUCTS:
        return (
            f"products of {count} multiply-adds (N d C) are what torch's matrix products do best; "
            f"up to {TRITON_PRODUCTS} with more than 16 classes"
        )
    return None


def full_precision(like: Tensor) -> AbstractContextManager:
    """Switches autocast off where it is on: statistics are float32 at least."""
    kind = like.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _floating(name: str, value: object, axes: Sequence[str]) -> Tensor:
    tensor = _checks.tensor(name, value, axes)
    _checks.floating(name, tensor)
    return tensor


def _segments(segments: object, count: int) -> Segments:
    if count == 0:
        raise ValueError("features: expected at least one sample (row), got none")
    if segments is None:
        return Segments((0, count), False)
    return Segments(offsets(segments, count), True)


def offsets(segments: object, count: int) -> tuple[int, ...]:
    """Offsets of the domains of ``count`` samples, each domain with at least one."""
    bounds = _offsets(segments)
    if not bounds or bounds[0] != 0 or bounds[-1] != count:
        raise ValueError(
            f"segments: expected offsets from 0 to {count} (rows of features), got {_short(bounds)}"
        )
    for domain, (first, last) in enumerate(itertools.pairwise(bounds)):
        if last == first:
            raise ValueError(
                f"segments: expected at least one sample in every domain, got none in domain "
                f"{domain} (offsets {first} and {last}); leave it out of the call"
            )
        if last < first:
            raise ValueError(
                f"segments: expected ascending offsets, got {last} after {first} (domain {domain})"
            )
    return bounds


def _offsets(segments: object) -> tuple[int, ...]:
    if isinstance(segments, Tensor):
        if segments.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"segments: expected int64 or int32, got {_checks.dtype_name(segments.dtype)}"
            )
        if segments.dim() != 1:
            raise ValueError(f"segments: expected shape (E + 1,), got {tuple(segments.shape)}")
        return tuple(segments.tolist())
    if isinstance(segments, str) or not isinstance(segments, Sequence):
        raise TypeError(
            "segments: expected a sequence of integers or an int64 tensor, "
            f"got {_checks.describe(segments)}"
        )
    for entry in segments:
        if isinstance(entry, bool) or not isinstance(entry, (int, torch.SymInt)):
            raise TypeError(f"segments: expected integers, got {_checks.describe(entry)}")
    return tuple(segments)


def _short(bounds: Sequence[int]) -> str:
    return str(list(bounds)) if len(bounds) <= 8 else f"{bounds[0]}, ..., {bounds[-1]}"
