"""mix on GPUs, in Triton: per-sample linear combinations of tensors, and products of them.

One program takes one block of one sample: it reads every input that something needs once, writes
every output, and leaves the block's products, which are added afterwards in the order of the
blocks. There are no atomics: results do not vary. Combinations are float32, products float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1024


@triton.jit
def _load(inputs, steps, K: tl.constexpr, ONES: tl.constexpr, sample, at, mask):
    """Elements of input K as float32; number ONES is the constant 1."""
    if K == ONES:
        return tl.where(mask, 1.0, 0.0)
    else:
        pointer = inputs[K] + sample * steps[K] + at
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mix_kernel(
    inputs,
    steps,
    outputs,
    coefficients,
    numbers,
    partials,
    count,
    blocks,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``outputs``: contiguous samples of ``count``; ``partials`` (batch, blocks, pairs) float64.

    Coefficients are ``numbers`` if there are any, else float64 (batch, outputs, inputs + 1), or one
    row of them where SHARED. An input whose coefficient is 0 leaves no trace, whatever it holds.
    """
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = at < count
    for p in tl.static_range(0, len(PAIRS) // 2):
        x = _load(inputs, steps, PAIRS[2 * p], INPUTS, sample, at, mask)
        y = x
        if PAIRS[2 * p + 1] != PAIRS[2 * p]:
            y = _load(inputs, steps, PAIRS[2 * p + 1], INPUTS, sample, at, mask)
        product = tl.sum(x.to(tl.float64) * y.to(tl.float64), axis=0)
        tl.store(partials + (sample * blocks + block) * (len(PAIRS) // 2) + p, product)
    for j in tl.static_range(0, OUTPUTS):
        total = tl.zeros([BLOCK_N], tl.float32)
        for k in tl.static_range(0, INPUTS + 1):
            if numbers is not None:
                factor = numbers[j * (INPUTS + 1) + k]
            else:
                row = j if SHARED else sample * OUTPUTS + j
                factor = tl.load(coefficients + row * (INPUTS + 1) + k).to(tl.float32)
            if factor != 0.0:
                total += factor * _load(inputs, steps, k, INPUTS, sample, at, mask)
        pointer = outputs[j] + sample * count + at
        tl.store(pointer, total.to(outputs[j].dtype.element_ty), mask=mask)


# ---- host ---------------------------------------------------------------------------------------


def _result(like: torch.Tensor) -> torch.Tensor:
    """A result: in the layout of ``like`` if its batch is outermost in memory, else contiguous."""
    out = torch.empty_like(like)
    if like.shape[0] <= 1 or out.stride(0) == like.shape[1:].numel():
        return out
    return like.new_empty(like.shape)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, with samples laid out as those of ``like``."""
    axes = zip(tensor.shape[1:], tensor.stride()[1:], like.stride()[1:], strict=True)
    if all(n == 1 or own == other for n, own, other in axes):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def plan_mix(
    inputs: Sequence[torch.Tensor],
    coefficients: torch.Tensor | None,
    numbers: Sequence[float],
    outputs: Sequence[torch.Tensor],
    partials: torch.Tensor,
    pairs: Sequence[int],
) -> list[Launch]:
    """The launch of ``_mix_kernel`` over inputs laid out alike."""
    batch, blocks = inputs[0].shape[0], partials.shape[1]
    arguments: dict[str, Any] = {
        "inputs": tuple(inputs),
        "steps": tuple(t.stride(0) if batch > 1 else 0 for t in inputs),
        "outputs": tuple(outputs),
        "coefficients": coefficients,
        "numbers": None if coefficients is not None else tuple(float(n) for n in numbers),
        "partials": partials,
        "count": inputs[0].shape[1:].numel(),
        "blocks": blocks,
        "INPUTS": len(inputs),
        "OUTPUTS": len(outputs),
        "PAIRS": tuple(pairs),
        "SHARED": coefficients is not None and coefficients.shape[0] == 1,
        "BLOCK_N": BLOCK,
    }
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    return [Launch(_mix_kernel, (batch * blocks,), arguments, options)]


def mix(
    inputs: Sequence[torch.Tensor],
    coefficients: torch.Tensor | None,
    numbers: Sequence[float],
    outputs: int,
    pairs: Sequence[int],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Combinations, and products (batch, pairs), as the C++ op ``transfuse::mix``."""
    first = inputs[0]
    for tensor in inputs:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                "mix: the triton backend supports float32, float16 and bfloat16, "
                f"got {tensor.dtype}"
            )
    results = [_result(first) for _ in range(outputs)]
    count = first.shape[1:].numel()
    blocks = triton.cdiv(count, BLOCK)
    partials = first.new_zeros((first.shape[0], blocks, len(pairs) // 2), dtype=torch.float64)
    if first.numel() > 0:
        layout = results[0] if results else _result(first)
        laid = [_laid_out(tensor, layout) for tensor in inputs]
        run(plan_mix(laid, coefficients, numbers, results, partials, pairs), first.device)
    return results, partials.sum(1)
