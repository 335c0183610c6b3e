"""Random signs from a counter: Rademacher probes that are made where they are used.

Sign e of probe i under a seed is a bit of Philox 4x32-10 (see ``_nes_reference``) with counter
(block, i): block e // 128 has 4 words of 32 signs each, the lowest bit first; a set bit is +1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops._nes_reference import philox

_PER_BLOCK = 128


def rademacher(
    seed: int, start: int, count: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Probes ``start`` to ``start + count - 1`` of ``size`` signs each, (count, size)."""
    blocks = -(-size // _PER_BLOCK)
    number = torch.arange(blocks, device=device, dtype=torch.int64).expand(count, blocks)
    probe = torch.arange(start, start + count, device=device, dtype=torch.int64)
    words = torch.stack(philox(seed, probe[:, None].expand(count, blocks), number), dim=-1)
    # Little-endian bytes of the words, each looked up as its eight signs.
    octets = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1)
    signs = _signs_of_octets(dtype, device).index_select(0, octets.flatten())
    return signs.view(count, blocks * _PER_BLOCK)[:, :size]


def _signs_of_octets(dtype: torch.dtype, device: torch.device) -> Tensor:
    octets = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * octets - 1).to(dtype)
