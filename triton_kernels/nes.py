"""Counter-based noise on GPUs, in Triton: the NES ops (see ``csrc/include/transfuse/nes.h``).

The words are those of the other backends, bit for bit; normal numbers agree up to rounding. One
program takes one block of numbers, and for the gradient goes over all samples: no atomics.
"""

from __future__ import annotations

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024  # numbers per program; 64 per group of 16 counters


@triton.jit
def _normals(low, high):
    """Two normal numbers from two words."""
    unit = 2.3283064365386963e-10  # 2^-32
    # Near u = 1, ln u = log1p(-v) for the complement v, which has all its digits.
    u = (low.to(tl.float32) + 0.5) * unit
    v = ((low ^ 0xFFFFFFFF).to(tl.uint32).to(tl.float32) + 0.5) * unit
    small = -v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    log = tl.where(v < 0.0078125, small, tl.log(u))
    radius = tl.sqrt_rn(-2.0 * log)
    # The angle in quarters and a signed rest, by integers, so that cos and sin see small numbers.
    quarter = (high + 0x20000000).to(tl.uint32) >> 30
    rest = (high - (quarter << 30)).to(tl.uint32).to(tl.int32, bitcast=True)
    angle = rest.to(tl.float32) * 1.4629180792671596e-09  # pi / 2 * 2^-30
    # Polynomials on |angle| <= pi / 4: the library's functions keep a stack for large angles.
    z = angle * angle
    sine = -0.16666655242443085 + z * (0.008332177996635437 + z * -0.00019517297914717346)
    sine = angle + angle * z * sine
    cosine = 0.04166664555668831 + z * (-0.001388736767694354 + z * 2.443845005473122e-05)
    cosine = 1.0 + z * (-0.5 + z * cosine)
    swap = (quarter & 1) != 0
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def _words(seed, sample, block):
    """The four words of each 64-bit block number of a sample."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    s0 = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    s1 = zero + (sample >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, s0, s1)


@triton.jit
def _places(start, BLOCK_N: tl.constexpr):
    """Block numbers of a stretch, and the number in x that word 0 of each makes."""
    j = tl.arange(0, BLOCK_N // 4)
    block = start // 4 + j
    return block, block // 16 * 64 + block % 16


@triton.jit
def _perturb_kernel(
    x, mask, out, count, parts, samples, first_sample, seed, sigma, BLOCK_N: tl.constexpr
):
    """``out`` (2 samples, count): x + sigma noise, then x - sigma noise."""
    sample = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts).to(tl.int64) * BLOCK_N
    block, place = _places(start, BLOCK_N)
    r0, r1, r2, r3 = _words(seed, tl.cast(first_sample, tl.int64) + sample, block)
    n0, n1 = _normals(r0, r1)
    n2, n3 = _normals(r2, r3)
    for c in tl.static_range(0, 4):
        noise = n0 if c == 0 else (n1 if c == 1 else (n2 if c == 2 else n3))
        at = place + 16 * c
        live = at < count
        if mask is not None:
            noise = tl.where(tl.load(mask + at, mask=live, other=0) != 0, noise, 0.0)
        value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        row = out + sample * count + at
        tl.store(row, (value + sigma * noise).to(out.dtype.element_ty), mask=live)
        row += samples * count
        tl.store(row, (value - sigma * noise).to(out.dtype.element_ty), mask=live)


@triton.jit
def _gradient_kernel(weights, mask, out, count, samples, first_sample, seed, BLOCK_N: tl.constexpr):
    """``out`` (count): sum over samples of weight times noise."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    block, place = _places(start, BLOCK_N)
    t0 = tl.zeros([BLOCK_N // 4], tl.float32)
    t1 = tl.zeros([BLOCK_N // 4], tl.float32)
    t2 = tl.zeros([BLOCK_N // 4], tl.float32)
    t3 = tl.zeros([BLOCK_N // 4], tl.float32)
    for s in range(0, samples):
        weight = tl.load(weights + s).to(tl.float32)
        r0, r1, r2, r3 = _words(seed, tl.cast(first_sample, tl.int64) + s, block)
        n0, n1 = _normals(r0, r1)
        n2, n3 = _normals(r2, r3)
        t0 += weight * n0
        t1 += weight * n1
        t2 += weight * n2
        t3 += weight * n3
    for c in tl.static_range(0, 4):
        total = t0 if c == 0 else (t1 if c == 1 else (t2 if c == 2 else t3))
        at = place + 16 * c
        live = at < count
        if mask is not None:
            total = tl.where(tl.load(mask + at, mask=live, other=0) != 0, total, 0.0)
        tl.store(out + at, total, mask=live)


# ---- host ---------------------------------------------------------------------------------------

_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def plan_perturb(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    seed: int,
    start: int,
    samples: int,
    sigma: float,
) -> list[Launch]:
    """The launch of ``_perturb_kernel`` on contiguous tensors."""
    parts = triton.cdiv(x.numel(), BLOCK)
    arguments = {
        "x": x,
        "mask": _bytes(mask),
        "out": out,
        "count": x.numel(),
        "parts": parts,
        "samples": samples,
        "first_sample": start,
        "seed": seed,
        "sigma": float(sigma),
        "BLOCK_N": BLOCK,
    }
    return [Launch(_perturb_kernel, (parts * samples,), arguments, _OPTIONS)]


def plan_gradient(
    weights: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor, seed: int, start: int
) -> list[Launch]:
    """The launch of ``_gradient_kernel`` on contiguous tensors."""
    arguments = {
        "weights": weights,
        "mask": _bytes(mask),
        "out": out,
        "count": out.numel(),
        "samples": weights.shape[0],
        "first_sample": start,
        "seed": seed,
        "BLOCK_N": BLOCK,
    }
    return [Launch(_gradient_kernel, (triton.cdiv(out.numel(), BLOCK),), arguments, _OPTIONS)]


def _check(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            f"nes: the triton backend supports float32, float16 and bfloat16, got {x.dtype}"
        )


def nes_perturb(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    seed: int,
    start: int,
    samples: int,
    sigma: float,
) -> torch.Tensor:
    """Antithetic perturbations, as the C++ op ``transfuse::nes_perturb``."""
    _check(x)
    out = x.new_empty((2 * samples, *x.shape))
    if out.numel() > 0:
        run(plan_perturb(x, mask, out, seed, start, samples, sigma), x.device)
    return out


def nes_gradient(
    weights: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, seed: int, start: int
) -> torch.Tensor:
    """Weighted sum of noise, as the C++ op ``transfuse::nes_gradient``."""
    _check(x)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() > 0:
        run(plan_gradient(weights, mask, out, seed, start), x.device)
    return out
