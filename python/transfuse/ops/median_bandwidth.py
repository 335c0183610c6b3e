"""The median distance of points, the usual bandwidth of a Gaussian kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._kernel_samples import samples
from transfuse.ops._kernel_sums_call import working_dtype

__all__ = ["median_bandwidth"]

# Points of which all distances are held at once; numbers of a stretch of rows beyond.
AT_ONCE, CHUNK = 2048, 2**23


@torch.no_grad()
def median_bandwidth(
    x: Tensor,
    *,
    squared: bool = False,
    subsample: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Median of the distances between different points.

    .. math:: \mathrm{median}_{i < j} \lVert x_i - x_j \rVert

    Args:
        x: (N, d), floating, N at least 2.
        squared: the median of squared distances instead.
        subsample: so many points, drawn without replacement, instead of all.
        generator: draws them; required with ``subsample``.

    Returns:
        0-dimensional, float32 (float64 for float64), on the device of x; the mean of the two
        middle ones where their number is even. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument that does not fit; a median that is 0 or not finite,
            which is no bandwidth.

    Notes:
        Exact. Up to 2,048 points all distances are held; beyond, they are computed twice, some
        rows at a time, and counted by the bits of their float32 value: O(N) memory.

    Reference:
        Gretton et al., A Kernel Two-Sample Test, JMLR 2012, section 8.

    Example:
        >>> import torch
        >>> from transfuse.ops import median_bandwidth
        >>> median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(2.)
    """
    x = samples("x", x, least=2)
    if not isinstance(squared, bool):
        raise TypeError(f"squared: expected True or False, got {_checks.describe(squared)}")
    if subsample is not None:
        subsample = _checks.positive_int("subsample", subsample)
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                "generator: expected a torch.Generator with subsample, got "
                f"{_checks.describe(generator)}"
            )
        if subsample < 2:
            raise ValueError(f"subsample: expected at least 2 points, got {subsample}")
        drawn = torch.randperm(x.shape[0], generator=generator, device=generator.device)
        x = x[drawn[:subsample].to(x.device)]
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite numbers, got NaN or infinity")
    pairs = x.shape[0] * (x.shape[0] - 1) // 2
    found = ordered_distances(x, [(pairs - 1) // 2, pairs // 2])
    if not squared:
        found = found.sqrt()
    median = found.mean()
    if not bool(median > 0) or not bool(median.isfinite()):
        raise ValueError(
            f"x: expected points of which most differ, got a median distance of {float(median)}"
        )
    return median


def ordered_distances(x: Tensor, ranks: Sequence[int]) -> Tensor:
    """Squared distances of pairs i < j of x (N, d) at ranks from 0, smallest first."""
    x = x.detach().to(working_dtype(x.dtype))
    if x.shape[0] <= AT_ONCE:
        ordered = torch.pdist(x).square().sort().values
        return ordered[torch.tensor(ranks, device=x.device)]
    return torch.stack([_selected(x, rank) for rank in ranks])


def _selected(x: Tensor, rank: int) -> Tensor:
    """By the upper and then the lower half of the bits, whose order is that of the numbers."""
    counts = _summed(bits >> 16 for bits in _bits(x))
    upper = int(torch.searchsorted(counts.cumsum(0), rank, right=True))
    rank -= int(counts[:upper].sum())
    counts = _summed(bits[bits >> 16 == upper] & 0xFFFF for bits in _bits(x))
    lower = int(torch.searchsorted(counts.cumsum(0), rank, right=True))
    bits = torch.tensor((upper << 16) | lower, dtype=torch.int32, device=x.device)
    return bits.view(torch.float32).to(x.dtype)


def _summed(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([torch.bincount(part, minlength=2**16) for part in parts]).sum(0)


def _bits(x: Tensor) -> Iterator[Tensor]:
    step = max(1, CHUNK // x.shape[0])
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step]
        squares = torch.cdist(rows, x[start:], compute_mode="donot_use_mm_for_euclid_dist").square()
        above = torch.ones_like(squares, dtype=torch.bool).triu(1)
        yield squares[above].to(torch.float32).view(torch.int32)
