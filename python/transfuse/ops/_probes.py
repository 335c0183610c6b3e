"""Random probe vectors made from a counter: probe i of a seed is the same alone and in any chunk.

Rademacher signs are those of ``_rademacher``; normal numbers are the noise of :func:`nes_perturb`.
Both depend on (seed, i, place) alone, not on the device, the number of threads, or the processes of
a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._rademacher import rademacher
from transfuse.ops.nes import nes_perturb

DISTRIBUTIONS = {"rademacher": 0, "normal": 1}
_TOGETHER = 2**20  # numbers


def make_probes(
    count: int,
    size: int,
    *,
    start: int,
    seed: int,
    distribution: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Probes start .. start + count - 1 as rows (count, size)."""
    probes = torch.empty((count, size), dtype=dtype, device=device)
    # Many short probes at once, long ones one by one.
    step = max(1, _TOGETHER // max(size, 1))
    for first in range(0, count, step):
        rows = probes[first : first + step]
        if distribution == "rademacher":
            _rademacher_(rows, seed, start + first)
        else:
            _normal_(rows, seed, start + first)
    return probes


def check_seed(seed: object) -> int:
    """A 64-bit integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {_checks.describe(seed)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    return seed


def _rademacher_(rows: Tensor, seed: int, start: int) -> None:
    count, size = rows.shape
    rows.copy_(rademacher(seed, start, count, size, rows.dtype, rows.device))


def _normal_(rows: Tensor, seed: int, start: int) -> None:
    count, size = rows.shape
    zeros = torch.zeros(size, dtype=rows.dtype, device=rows.device)
    rows.copy_(nes_perturb(zeros, count, sigma=1.0, seed=seed, start=start)[:count])
