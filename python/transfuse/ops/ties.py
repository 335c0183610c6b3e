"""Merging by magnitude and sign: trimmed task vectors that agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _backend, _checks
from transfuse._autograd import needs_derivative
from transfuse.ops._multitensor_call import (
    call_dtype,
    lists_of_tensors,
    one_device,
    same_blocks,
    tensor_list,
    working_dtype,
)
from transfuse.ops._multitensor_core import kernel, pack_lists

__all__ = ["ties_merge", "trim_largest"]

_backend.declare("ties_merge", ("reference", "cpu", "triton"))
_backend.declare("trim_largest", ("reference", "cpu", "triton"))


def trim_largest(
    tensors: Sequence[Tensor], density: float, *, backend: str | None = None
) -> list[Tensor]:
    r"""The entries of largest magnitude of a list of tensors, zeros elsewhere.

    .. math:: y = x \, [\, |x| \ge t \,], \qquad
              t \text{ the } \lceil d N \rceil \text{-th largest } |x| \text{ of all } N

    Args:
        tensors: any shapes, floating, one dtype and device: one vector.
        density: d, the part that is kept, above 0 and at most 1.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        Contiguous tensors of the same shapes and dtype. Entries equal to the threshold are kept.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: a derivative is asked for.

    Notes:
        The threshold is exact: radix selection on the bits of the numbers, three readings for
        float32 and no copy. NaN counts as largest, and stays. The same bits for every number of
        threads.

    Example:
        >>> import torch
        >>> from transfuse.ops import trim_largest
        >>> trim_largest([torch.tensor([1.0, -4.0]), torch.tensor([3.0, 2.0])], 0.5)
        [tensor([ 0., -4.]), tensor([3., 0.])]
    """
    found = tensor_list("tensors", tensors)
    one_device("tensors", found)
    _one_dtype("tensors", found)
    part = _density(density)
    _refuse_derivative("trim_largest", found)
    return _run("trim_largest", backend, [], [found], part, 1.0)


def ties_merge(
    deltas: Sequence[Sequence[Tensor]],
    *,
    base: Sequence[Tensor] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    backend: str | None = None,
) -> list[Tensor]:
    r"""Trim task vectors, elect a sign for every entry, and add the mean of those that have it.

    .. math:: y = b + \lambda \, \operatorname{mean} \{ \hat\delta_i : \operatorname{sign}
              \hat\delta_i = \operatorname{sign} \textstyle\sum_k \hat\delta_k \}, \qquad
              \hat\delta_i = \text{the largest } d N \text{ entries of } \delta_i

    Args:
        deltas: T lists of m tensors of the same shapes, floating, each list of one dtype.
        base: m tensors to add to.
        density: d, the part of each list that is kept, above 0 and at most 1.
        scale: lambda.
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        m contiguous tensors in the dtypes of the base, or of the first list.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: a derivative is asked for.

    Notes:
        See :func:`trim_largest` on thresholds; then one reading of everything and one writing.
        Where trimmed entries cancel to exactly 0, nothing is added (the released code takes the
        overall sign there). float32 (float64) inside, rounded once.

    Reference:
        Yadav et al. 2023, TIES-merging: resolving interference when merging models
        (arXiv:2306.01708), algorithm 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import ties_merge
        >>> one, two = [torch.tensor([1.0, -4.0, 0.1])], [torch.tensor([3.0, 2.0, 0.1])]
        >>> ties_merge([one, two], density=0.6)
        [tensor([ 2., -4.,  0.])]
    """
    lists = lists_of_tensors("deltas", deltas)
    one_device("deltas[0]", lists[0])
    for i, part in enumerate(lists):
        _one_dtype(f"deltas[{i}]", part)
    first: list[Tensor] = []
    if base is not None:
        first = tensor_list("base", base)
        same_blocks("base", first, "deltas[0]", lists[0])
    kept, factor = _density(density), _checks.number("scale", scale)
    _refuse_derivative("ties_merge", [*first, *pack_lists(lists)])
    return _run("ties_merge", backend, first, lists, kept, factor)


def trim_largest_reference(tensors: Sequence[Tensor], density: float) -> list[Tensor]:
    """The definition, as :func:`trim_largest`."""
    return trim_largest(tensors, density, backend="reference")


def ties_merge_reference(
    deltas: Sequence[Sequence[Tensor]],
    *,
    base: Sequence[Tensor] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
) -> list[Tensor]:
    """The definition, as :func:`ties_merge`."""
    return ties_merge(deltas, base=base, density=density, scale=scale, backend="reference")


def _run(
    op: str,
    backend: str | None,
    base: list[Tensor],
    lists: list[list[Tensor]],
    density: float,
    scale: float,
) -> list[Tensor]:
    known = [*base, *pack_lists(lists)]
    chosen = "composed"
    if backend != "reference":
        chosen = _backend.choose(op, backend, known[0].device, call_dtype(known))
    total = sum(t.numel() for t in lists[0])
    if total == 0:
        return [torch.zeros_like(t) for t in (base if base else lists[0])]
    # A product a rounding above a whole number is that number.
    rank = total - max(1, min(total, _ceil(density * total)))
    if chosen not in ("cpu", "triton"):
        return _composed(base, lists, rank, scale)
    thresholds = torch.stack([kernel(chosen, "select_magnitude")(part, rank) for part in lists])
    return kernel(chosen, "elect_signs")(base, pack_lists(lists), thresholds, scale)


def _ceil(x: float) -> int:
    """The next whole number, of what is not one already up to rounding."""
    whole = round(x)
    return whole if abs(x - whole) <= 1e-9 * max(1.0, abs(x)) else int(x) + 1


def _composed(
    base: list[Tensor], lists: list[list[Tensor]], rank: int, scale: float
) -> list[Tensor]:
    thresholds = []
    for part in lists:
        sizes = torch.cat([t.abs().flatten() for t in part])
        thresholds.append(sizes.kthvalue(rank + 1).values)
    results = []
    for j, first in enumerate(lists[0]):
        dtype = working_dtype(
            [part[j] for part in (*lists, base)] if base else [p[j] for p in lists]
        )
        trimmed = torch.stack(
            [
                torch.where((part[j].abs() >= least) | part[j].isnan(), part[j], 0).to(dtype)
                for part, least in zip(lists, thresholds, strict=True)
            ]
        )
        agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0) | trimmed.isnan()
        count = agrees.sum(0)
        total = torch.where(agrees, trimmed, 0).sum(0)
        mean = torch.where(count > 0, total / count.clamp_min(1), 0)
        out = scale * mean + (base[j].to(dtype) if base else 0)
        results.append(out.to((base[j] if base else first).dtype))
    return results


def _one_dtype(name: str, tensors: list[Tensor]) -> None:
    for j, entry in enumerate(tensors):
        _checks.same_dtype(f"{name}[{j}]", entry, f"{name}[0]", tensors[0])


def _density(value: object) -> float:
    found = _checks.number("density", value)
    if not 0.0 < found <= 1.0:
        raise ValueError(f"density: expected a number above 0 and at most 1, got {found}")
    return found


def _refuse_derivative(op: str, tensors: list[Tensor]) -> None:
    if needs_derivative(tensors):
        raise NotImplementedError(
            f"{op}: has no derivative; pass detached tensors, outside torch.func transforms"
        )
