"""The definition of row codes in eager torch, and what serves without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**21
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64-bit integer with these bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_STEP, _ONE, _TWO, _THREE = (
    _signed(v)
    for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right without the sign."""
    return (z >> by) & (_MASK >> by)


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    z = (z ^ _shifted(z, 30)) * _ONE
    z = (z ^ _shifted(z, 27)) * _TWO
    return z ^ _shifted(z, 31)


def codes_of(x: Tensor, edges: Tensor | None, wrap: bool) -> tuple[Tensor, Tensor]:
    """Codes (N, 2) of x (N, u), and the numbers of NaNs and of numbers below the first edge."""
    rows = max(1, CHUNK // max(1, x.shape[1]))
    keys = _mixed((torch.arange(x.shape[1], device=x.device) + 1) * _STEP)
    found, counts = [], x.new_zeros(2, dtype=torch.int64)
    for part in x.split(rows):
        if edges is None:
            numbers = part.to(torch.float64) + 0.0
            symbols = numbers.view(torch.int64)
            below = counts.new_zeros(())
        else:
            numbers = part.to(torch.float32)
            symbols = torch.bucketize(numbers.contiguous(), edges, right=True) - 1
            low = symbols < 0
            # Beside no number; the count of these is another.
            below = (low & ~numbers.isnan()).sum()
            symbols = torch.where(low, edges.shape[0] - 1 if wrap else 0, symbols)
        counts = counts + torch.stack((numbers.isnan().sum(), below))
        first = _mixed(symbols ^ keys)
        second = (first ^ _shifted(first, 29)) * _THREE
        found.append(_mixed(torch.stack((first.sum(1), second.sum(1)), 1)))
    if not found:
        return counts.new_zeros((0, 2)), counts
    return torch.cat(found), counts
