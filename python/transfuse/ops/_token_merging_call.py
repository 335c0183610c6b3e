"""Checks of calls of the token merging ops."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._merge_plan import MergePlan, Roles, rows_of, tokens_of

AXES = ("B", "N", "C")
MODES: dict[object, int] = {"mean": 1, "sum": 0, "amax": 3, "prune": 2}


def check_nearest(
    x: object, reference: object, mask: object, exclude_self: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, reference, and the mask as (B or 1, M)."""
    x = _checks.tensor("x", x, AXES)
    _checks.floating("x", x)
    reference = _checks.tensor("reference", reference, ("B", "M", "C"))
    _checks.same_dtype("reference", reference, "x", x)
    _checks.same_device("reference", reference, "x", x)
    batch = x.shape[0]
    if reference.shape[0] != batch and reference.shape[0] != 1:
        raise ValueError(
            f"reference: expected batch {batch} (that of x) or 1, got {reference.shape[0]} "
            f"(shape {tuple(reference.shape)})"
        )
    _checks.size("reference", reference, 2, x.shape[2], "the channels of x")
    if not isinstance(exclude_self, bool):
        raise TypeError(f"exclude_self: expected a bool, got {_checks.describe(exclude_self)}")
    if exclude_self:
        _checks.size("reference", reference, 1, x.shape[1], "the tokens of x, for exclude_self")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {_checks.describe(mask)}")
        _checks.same_device("mask", mask, "x", x)
        mask = _checks.broadcast("mask", mask, (batch, reference.shape[1]), ("B", "M"))
        if mask.shape[1] != reference.shape[1]:
            raise ValueError(
                f"mask: expected {reference.shape[1]} entries (one per reference token), got 1"
            )
    return x, reference, mask


def check_push(alpha: object, threshold: object) -> tuple[float, float]:
    """Both as numbers."""
    alpha = _checks.number("alpha", alpha)
    threshold = _checks.number("threshold", threshold)
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a cosine in [-1, 1], got {threshold}")
    return alpha, threshold


def check_merge(
    x: object, plan: object, mode: object, weight: object
) -> tuple[Tensor, MergePlan, int, Tensor | None]:
    """x, the plan, the code of the mode, and the weight as (B, N)."""
    x = _checks.tensor("x", x, AXES)
    _checks.floating("x", x)
    plan = _check_plan(x, plan)
    _checks.size("x", x, 1, tokens_of(plan), "the tokens of the plan")
    code = _checks.choice("mode", mode, MODES)
    if weight is not None:
        if code not in (0, 1):
            raise ValueError(f"weight: expected None with mode {mode!r}, got a weight")
        weight = _checks.tensor("weight", weight, ("B", "N"))
        _checks.auxiliary("weight", weight, "x", x)
        fits = weight.shape[0] == x.shape[0] or weight.shape[0] == 1
        if not fits or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"weight: expected shape ({x.shape[0]} or 1, {x.shape[1]}), "
                f"got {tuple(weight.shape)}"
            )
    return x, plan, code, weight


def check_unmerge(y: object, plan: object) -> tuple[Tensor, MergePlan]:
    """Both."""
    y = _checks.tensor("y", y, ("B", "R", "C"))
    _checks.floating("y", y)
    plan = _check_plan(y, plan, "y")
    _checks.size("y", y, 1, rows_of(plan), "the rows of the plan")
    return y, plan


def _check_plan(x: Tensor, plan: object, name: str = "x") -> MergePlan:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan: expected a MergePlan, got {_checks.describe(plan)}")
    tokens = plan.rows.shape[-1] if isinstance(plan.rows, Tensor) and plan.rows.dim() == 2 else None
    for part, field in zip(plan, MergePlan._fields, strict=True):
        fits = isinstance(part, Tensor) and part.dim() == 2 and part.dtype == torch.int64
        if fits and field == "order":
            fits = part.shape[1] == tokens
        if fits and field == "start":
            fits = part.shape[1] > 0
        if not fits or part.shape[0] != plan.rows.shape[0]:
            raise ValueError(
                f"plan: expected an int64 matrix {field} as match_tokens makes it, "
                f"got {_checks.describe(part)}"
            )
    batch = plan.rows.shape[0]
    if batch != x.shape[0] and batch != 1:
        raise ValueError(f"plan: expected batch {x.shape[0]} (that of {name}) or 1, got {batch}")
    _checks.same_device("plan", plan.rows, name, x)
    return plan


def check_match(
    metric: object,
    merged: object,
    size: object,
    stride: object,
    destination: object,
    protect: object,
    generator: object,
) -> tuple[Tensor, Roles, int]:
    """The metric, the roles of its tokens, and how many of them are merged."""
    metric = _checks.tensor("metric", metric, AXES)
    _checks.floating("metric", metric)
    if isinstance(merged, bool) or not isinstance(merged, (int, torch.SymInt)):
        raise TypeError(f"merged: expected a number of tokens, got {_checks.describe(merged)}")
    tokens = metric.shape[1]
    fixed = _protected(protect, tokens)
    if size is None:
        if generator is not None:
            raise ValueError("generator: expected None without size, got a generator")
        roles = _alternate(tokens, fixed) if destination is None else None
    elif destination is not None:
        raise ValueError("destination: expected None with size, got a destination")
    else:
        roles = _grid(metric, size, stride, fixed, generator)
    if roles is None:
        roles = _explicit(metric, destination, fixed)
    return metric, roles, _clamp(merged, roles.limit, tokens)


def _clamp(merged: int | torch.SymInt, limit: int, tokens: int) -> int:
    count = int(min(max(merged, 0), limit))
    if count != merged and not torch.compiler.is_compiling():
        warnings.warn(
            f"merged: {merged} of {tokens} tokens asked for, between 0 and {limit} can be merged "
            f"(sources that are not protected); {count} are",
            stacklevel=4,
        )
    return count


def _protected(protect: object, tokens: int) -> tuple[int, ...]:
    if protect is None:
        return ()
    if isinstance(protect, (str, Tensor)) or not isinstance(protect, Sequence):
        raise TypeError(
            f"protect: expected a sequence of token numbers, got {_checks.describe(protect)}"
        )
    for entry in protect:
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"protect: expected token numbers, got {_checks.describe(entry)}")
        if not 0 <= entry < tokens:
            raise ValueError(f"protect: expected entries in [0, {tokens}), got {entry}")
    return tuple(sorted(set(protect)))


def _limit(sources: int, destinations: int, fixed_sources: int, fixed_destinations: int) -> int:
    return max(0, sources - fixed_sources) if destinations > fixed_destinations else 0


def _alternate(tokens: int, fixed: tuple[int, ...]) -> Roles:
    odd = sum(token % 2 for token in fixed)
    count = tokens // 2
    return Roles(None, fixed, _limit(tokens - count, count, len(fixed) - odd, odd))


def _explicit(metric: Tensor, destination: object, fixed: tuple[int, ...]) -> Roles:
    tokens = metric.shape[1]
    count = destination.shape[0] if isinstance(destination, Tensor) and destination.dim() else 0
    destination = _checks.index_map(
        "destination", destination, count, tokens, "one per destination", "metric", metric
    )
    if not torch.compiler.is_compiling() and destination.device.type != "meta":
        different = torch.unique(destination.detach()).shape[0]
        if different != count:
            raise ValueError(
                f"destination: expected different tokens, got {count - different} more than once"
            )
    # Which of them are protected is not read: as if all protected ones were of either kind.
    return Roles(destination, fixed, _limit(tokens - count, count, len(fixed), len(fixed)))


def _pair(name: str, value: object) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
        raise TypeError(f"{name}: expected two integers (height, width), got {value!r}")
    if min(pair) < 1:
        raise ValueError(f"{name}: expected numbers of at least 1, got {pair}")
    return pair


def _grid(
    metric: Tensor, size: object, stride: object, fixed: tuple[int, ...], generator: object
) -> Roles:
    height, width = _pair("size", size)
    stride = _pair("stride", stride)
    tokens = metric.shape[1]
    if height * width != tokens:
        raise ValueError(
            f"size: expected height * width = {tokens} (the tokens of metric), "
            f"got {height} * {width} = {height * width}"
        )
    count = (height // stride[0]) * (width // stride[1])
    if generator is None:
        destination = first_of_cells(height, width, stride, metric.device)
        places = [divmod(token, width) for token in fixed]
        ended = (height // stride[0] * stride[0], width // stride[1] * stride[1])
        hit = sum(
            y % stride[0] == 0 and x % stride[1] == 0 and y < ended[0] and x < ended[1]
            for y, x in places
        )
        return Roles(destination, fixed, _limit(tokens - count, count, len(fixed) - hit, hit))
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {_checks.describe(generator)}")
    destination = random_of_cells(height, width, stride, generator).to(metric.device)
    return Roles(destination, fixed, _limit(tokens - count, count, len(fixed), len(fixed)))


def first_of_cells(
    height: int, width: int, stride: tuple[int, int], device: torch.device
) -> Tensor:
    """The upper left token of every whole cell, ascending."""
    rows = torch.arange(height // stride[0], device=device) * (stride[0] * width)
    columns = torch.arange(width // stride[1], device=device) * stride[1]
    return (rows[:, None] + columns).flatten()


def random_of_cells(
    height: int, width: int, stride: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """One token of every whole cell, drawn by the generator alone."""
    device = generator.device
    shape = (height // stride[0], width // stride[1])
    drawn = torch.randint(stride[0] * stride[1], shape, generator=generator, device=device)
    offset = drawn // stride[1] * width + drawn % stride[1]
    return first_of_cells(height, width, stride, device) + offset.flatten()
