"""Merging of lists of tensors on GPUs, in Triton: weighted means, and selection and election by
magnitude and sign.

As in ``multitensor``, one program owns a chunk of one tensor, found in a table. What is counted is
whole numbers, so results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton
from .multitensor import BLOCK, addresses, chunk_of, chunk_table, one_dtype

DIGIT = 8  # bits counted at a time
COUNTERS = 1024  # histograms, each of a run of chunks
OPTIONS = {"num_warps": 8, "num_stages": 2}
# Numbers as whole numbers without their sign, which order as magnitudes do; NaN above infinity.
BITS = {torch.float32: 31, torch.float16: 15, torch.bfloat16: 15}
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@triton.jit
def _ratio_kernel(
    chunks, thetas, weights, out, coefficients, floors, refused, models, blocks, settings,
    theta_like, weight_like, out_like, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted means of one chunk for all settings, and how many weights are no weights."""
    number = tl.program_id(0).to(tl.int64)
    block, begin, count = chunk_of(chunks, number)
    at = tl.arange(0, BLOCK)
    live = at < count
    element = begin + at
    bad = tl.zeros([BLOCK], tl.int32)
    for k in range(models):
        data = tl.load(weights + k * blocks + block)
        data = data.to(tl.pointer_type(weight_like.dtype.element_ty))
        f = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
        bad += tl.where((f >= 0.0) & (f < float("inf")), 0, 1)
    tl.store(refused + number, tl.sum(bad, 0))
    first = tl.load(thetas + block).to(tl.pointer_type(theta_like.dtype.element_ty))
    target = tl.load(first + element, mask=live, other=0.0).to(tl.float32)
    for s in range(settings):
        above = tl.zeros([BLOCK], tl.float32)
        below = tl.zeros([BLOCK], tl.float32)
        for k in range(models):
            c = tl.load(coefficients + s * models + k)
            if c != 0.0:
                row = k * blocks + block
                data = tl.load(weights + row).to(tl.pointer_type(weight_like.dtype.element_ty))
                f = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
                data = tl.load(thetas + row).to(tl.pointer_type(theta_like.dtype.element_ty))
                x = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
                f = c * tl.maximum(f, tl.load(floors + k))
                below += f
                above += f * x
        ratio = above / tl.where(below > 0.0, below, 1.0)
        value = tl.where(below > 0.0, ratio, target)
        to = tl.load(out + s * blocks + block).to(tl.pointer_type(out_like.dtype.element_ty))
        tl.store(to + element, value.to(out_like.dtype.element_ty), mask=live)


@triton.jit
def _count_kernel(
    chunks, tensors, found, counts, total, per_program, like,
    ABOVE: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``counts`` (programs, BINS) of a digit of the magnitudes whose higher digits are ``found``,
    over a run of chunks."""
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, total)
    prefix = tl.load(found).to(tl.int32)
    at = tl.arange(0, BLOCK)
    digits = tl.zeros([BINS], tl.int32)
    for number in range(first, last):
        block, begin, count = chunk_of(chunks, number)
        data = tl.load(tensors + block).to(tl.pointer_type(like.dtype.element_ty))
        word = tl.load(data + begin + at, mask=at < count, other=0).to(tl.int32)
        word = word & ((1 << BITS) - 1)
        own = at < count
        if ABOVE < BITS:
            own = own & ((word >> ABOVE) == prefix)
        digits += tl.histogram((word >> SHIFT) & (BINS - 1), BINS, mask=own)
    to = counts + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS)
    tl.store(to, digits)


@triton.jit
def _elect_kernel(
    chunks, base, deltas, out, thresholds, scale, lists, blocks, delta_like, out_like,
    HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of a result: the mean of what is not below its list's threshold and has the sign of
    their sum. NaN shows."""
    block, begin, count = chunk_of(chunks, tl.program_id(0).to(tl.int64))
    at = tl.arange(0, BLOCK)
    live = at < count
    element = begin + at
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(lists):
        data = tl.load(deltas + k * blocks + block)
        data = data.to(tl.pointer_type(delta_like.dtype.element_ty))
        x = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
        total += tl.where(tl.abs(x) < tl.load(thresholds + k), 0.0, x)
    sign = tl.where(total > 0.0, 1.0, tl.where(total < 0.0, -1.0, total))
    total = tl.zeros([BLOCK], tl.float32)
    agreeing = tl.zeros([BLOCK], tl.float32)
    for k in range(lists):
        data = tl.load(deltas + k * blocks + block)
        data = data.to(tl.pointer_type(delta_like.dtype.element_ty))
        x = tl.load(data + element, mask=live, other=0.0).to(tl.float32)
        least = tl.load(thresholds + k)
        # Nothing but NaN beside a threshold of NaN.
        agrees = (x * sign > 0.0) & (tl.abs(x) >= least)
        total += tl.where(agrees, x, 0.0)
        agreeing += tl.where(agrees, 1.0, 0.0)
    mean = tl.where(agreeing > 0.0, total / tl.where(agreeing > 0.0, agreeing, 1.0), sign * 0.0)
    value = scale * mean
    if HAS_BASE:
        data = tl.load(base + block).to(tl.pointer_type(out_like.dtype.element_ty))
        value += tl.load(data + element, mask=live, other=0.0).to(tl.float32)
    to = tl.load(out + block).to(tl.pointer_type(out_like.dtype.element_ty))
    tl.store(to + element, value.to(out_like.dtype.element_ty), mask=live)


# ---- launches ------------------------------------------------------------------------------------


def plan_ratio(
    tables: dict[str, torch.Tensor], likes: dict[str, torch.Tensor], refused: torch.Tensor
) -> Launch:
    """The launch for blocks whose results are of one dtype.

    Args:
        tables: ``chunks`` (n, 3), addresses ``thetas`` (M, m), ``weights`` (M, m) and ``out``
            (S, m), and float32 ``coefficients`` (S, M) and ``floors`` (M).
        likes: ``theta_like``, ``weight_like`` and ``out_like``, any tensors of their dtypes.
        refused: (n,) int32.
    """
    models, blocks = tables["thetas"].shape
    arguments = {
        **tables,
        **likes,
        "refused": refused,
        "models": models,
        "blocks": blocks,
        "settings": tables["coefficients"].shape[0],
        "BLOCK": BLOCK,
    }
    return Launch(_ratio_kernel, (tables["chunks"].shape[0],), arguments, OPTIONS)


def plan_count(
    chunks: torch.Tensor,
    tensors: torch.Tensor,
    found: torch.Tensor,
    counts: torch.Tensor,
    like: torch.Tensor,
    bits: int,
    above: int,
) -> Launch:
    """The launch that fills ``counts`` (programs, bins) int32 of the digit below bit ``above``, of
    ``bits``, of whole numbers like ``like``, whose higher digits are ``found`` (1,)."""
    total, digit = chunks.shape[0], min(DIGIT, above)
    arguments = {
        "chunks": chunks,
        "tensors": tensors,
        "found": found,
        "counts": counts,
        "total": total,
        "per_program": triton.cdiv(total, counts.shape[0]),
        "like": like,
        "ABOVE": above,
        "SHIFT": above - digit,
        "BITS": bits,
        "BINS": 1 << digit,
        "BLOCK": BLOCK,
    }
    return Launch(_count_kernel, (counts.shape[0],), arguments, OPTIONS)


def plan_elect(
    tables: dict[str, torch.Tensor | None],
    delta_like: torch.Tensor,
    out_like: torch.Tensor,
    scale: float,
) -> Launch:
    """The launch for blocks whose results are of one dtype.

    Args:
        tables: ``chunks`` (n, 3), addresses ``base`` (m) or None, ``deltas`` (T, m) and ``out``
            (m), and ``thresholds`` (T,) float32.
        delta_like, out_like: any tensors of the dtypes of lists and results.
    """
    lists, blocks = tables["deltas"].shape
    arguments = {
        **tables,
        "scale": scale,
        "lists": lists,
        "blocks": blocks,
        "delta_like": delta_like,
        "out_like": out_like,
        "HAS_BASE": tables["base"] is not None,
        "BLOCK": BLOCK,
    }
    return Launch(_elect_kernel, (tables["chunks"].shape[0],), arguments, OPTIONS)


def _by_dtype(
    likes: Sequence[torch.Tensor], device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A tensor of each dtype, and the chunks of those that have it."""
    table, _ = chunk_table([t.numel() for t in likes])
    found = []
    for dtype in dict.fromkeys(t.dtype for t in likes):
        own = torch.tensor([t.dtype == dtype for t in likes])
        chunks = table[own[table[:, 0]]].contiguous().to(device)
        if chunks.shape[0] > 0:
            found.append((next(t for t in likes if t.dtype == dtype), chunks))
    return found


def ratio_merge(
    thetas: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    floors: Sequence[float],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """S m results, and the number of weights that are negative or not finite, as the C++ op
    ``transfuse::ratio_merge``."""
    settings, models = coefficients.shape
    targets = thetas[: len(thetas) // models]
    device = targets[0].device
    results = [
        torch.empty(t.shape, dtype=t.dtype, device=device) for _ in range(settings) for t in targets
    ]
    one_dtype(targets)
    own, factors = one_dtype(thetas), one_dtype(weights)
    shared = {
        "thetas": addresses(own, device).reshape(models, -1),
        "weights": addresses(factors, device).reshape(models, -1),
        "out": addresses(results, device).reshape(settings, -1),
        "coefficients": coefficients.to(device=device, dtype=torch.float32).contiguous(),
        "floors": torch.tensor(list(floors), dtype=torch.float32).to(device),
    }
    bad = torch.zeros((), dtype=torch.int64, device=device)
    for like, chunks in _by_dtype(targets, device):
        refused = torch.empty(chunks.shape[0], dtype=torch.int32, device=device)
        likes = {"theta_like": own[0], "weight_like": factors[0], "out_like": like}
        run([plan_ratio({"chunks": chunks, **shared}, likes, refused)], device)
        bad += refused.sum()
    return results, bad


def select_magnitude(tensors: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The magnitude at a rank from 0, smallest first, of all elements; 0-dimensional, float64. As
    the C++ op ``transfuse::select_magnitude``, but nothing is read from the device."""
    device, dtype = tensors[0].device, tensors[0].dtype
    own = one_dtype(tensors)
    words = [t.view(WORDS[dtype]) for t in own]
    table, _ = chunk_table([t.numel() for t in own])
    chunks, at = table.to(device), addresses(own, device)
    programs = min(COUNTERS, chunks.shape[0])
    found = torch.zeros(1, dtype=torch.int64, device=device)
    left = torch.full((1,), rank, dtype=torch.int64, device=device)
    above = BITS[dtype]
    while above > 0:
        digit = min(DIGIT, above)
        counts = torch.empty((programs, 1 << digit), dtype=torch.int32, device=device)
        run([plan_count(chunks, at, found, counts, words[0], BITS[dtype], above)], device)
        sums = counts.sum(0).cumsum(0)
        value = torch.searchsorted(sums, left, right=True)
        before = torch.where(value > 0, sums[(value - 1).clamp_min(0)], 0)
        left, found = left - before, (found << digit) | value
        above -= digit
    return found.to(WORDS[dtype]).view(dtype)[0].to(torch.float64)


def elect_signs(
    base: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    thresholds: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """As the C++ op ``transfuse::elect_signs``."""
    lists = thresholds.shape[0]
    likes = base if base else deltas[: len(deltas) // lists]
    device = likes[0].device
    results = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in likes]
    one_dtype(likes)
    moved, first = one_dtype(deltas), [t.contiguous() for t in base]
    shared = {
        "base": addresses(first, device) if first else None,
        "deltas": addresses(moved, device).reshape(lists, -1),
        "out": addresses(results, device),
        "thresholds": thresholds.to(torch.float32).contiguous(),
    }
    launches = [
        plan_elect({"chunks": chunks, **shared}, moved[0], like, scale)
        for like, chunks in _by_dtype(likes, device)
    ]
    run(launches, device)
    return results
