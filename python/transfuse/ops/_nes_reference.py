"""Counter-based noise in eager torch: the definition of the noise of the NES ops, their oracle and
their fallback.

Number e of sample i under a seed comes from Philox 4x32-10 (Salmon et al. 2011) with counter
(block, i) and key seed. Group q = e // 64 has the blocks 16 q .. 16 q + 15; word c of its block j
belongs to number 64 q + 16 c + j. Two words make two normal numbers (Box and Muller). Integers are
exact everywhere; the rest is float64 here, rounded to the working precision at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_GROUP = 64


def philox(seed: int, sample: int | Tensor, blocks: Tensor) -> list[Tensor]:
    """The four words, as int64, of each block of a sample (or of a sample for each block)."""
    # A number may have 64 bits, which no tensor holds before its halves are taken.
    zeros = torch.zeros_like(blocks)
    c = [blocks & _LOW, blocks >> 32 & _LOW, zeros + (sample & _LOW), zeros + (sample >> 32 & _LOW)]
    low, high = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        # The product of two 32-bit numbers wraps around in int64; its bits are the right ones.
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32 & _LOW) ^ c[1] ^ low,
            second & _LOW,
            (first >> 32 & _LOW) ^ c[3] ^ high,
            first & _LOW,
        ]
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return c


def noise(seed: int, sample: int, count: int, device: torch.device) -> Tensor:
    """The first ``count`` normal numbers of a sample, float64."""
    groups = -(-count // _GROUP)
    words = philox(seed, sample, torch.arange(16 * groups, device=device, dtype=torch.int64))
    parts = []
    for first, second in (words[:2], words[2:]):
        radius = (-2.0 * ((first.double() + 0.5) * 2.0**-32).log()).sqrt()
        angle = (2.0 * math.pi * 2.0**-32) * second.double()
        parts += [radius * angle.cos(), radius * angle.sin()]
    # (4, groups, 16) -> (groups, 4, 16)
    return torch.stack(parts).view(4, groups, 16).transpose(0, 1).reshape(-1)[:count]


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def sample_noise(seed: int, sample: int, like: Tensor, mask: Tensor | None) -> Tensor:
    """The noise of one sample in the shape of a tensor, in its working precision."""
    found = noise(seed, sample, like.numel(), like.device).view(like.shape)
    if mask is not None:
        found = found * mask
    return found.to(working_dtype(like))


def perturb(
    x: Tensor, count: int, sigma: float, seed: int, start: int, mask: Tensor | None
) -> Tensor:
    """``x + sigma noise_i`` for every i, then ``x - sigma noise_i``."""
    wide = x.to(working_dtype(x))
    steps = [sigma * sample_noise(seed, start + i, x, mask) for i in range(count)]
    moved = [wide + s for s in steps] + [wide - s for s in steps]
    if not moved:
        return x.new_empty((0, *x.shape))
    return torch.stack(moved).to(x.dtype)


def gradient(weights: Tensor, like: Tensor, seed: int, start: int, mask: Tensor | None) -> Tensor:
    """``sum_i weights_i noise_i``, one sample after the other."""
    total = torch.zeros(like.shape, dtype=working_dtype(like), device=like.device)
    for i, weight in enumerate(weights.unbind()):
        total += weight * sample_noise(seed, start + i, like, mask)
    return total
