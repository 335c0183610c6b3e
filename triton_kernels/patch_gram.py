"""Second moments of image patches on GPUs, in Triton: a product with itself of patches that are
gathered tile by tile and never stored.

One program owns a tile of the matrix, above the diagonal, and a stretch of the patches; its sums
are added to those of other stretches in order, in float64. No atomics, so results do not vary.
"""

from __future__ import annotations

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISION = "ieee"  # of products of float32: an inverse follows
PATCHES, STRETCH = 32, 8192  # patches per step of a program, and about as many per program
PARTIAL = 2**26  # numbers in all partial matrices


@triton.jit
def _tile(
    x, patch, live, feature, there, per_image, columns, height, width,
    x_b, x_c, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """A tile of patches x features, zero where nothing is."""
    image, place = patch // per_image, patch % per_image
    channel, inside = feature // (KH * KW), feature % (KH * KW)
    row = (place // columns * SH - PH)[:, None] + (inside // KW * DH)[None, :]
    column = (place % columns * SW - PW)[:, None] + (inside % KW * DW)[None, :]
    mask = live[:, None] & there[None, :] & (row >= 0) & (row < height)
    mask = mask & (column >= 0) & (column < width)
    at = x + image.to(tl.int64)[:, None] * x_b + channel.to(tl.int64)[None, :] * x_c
    at = at + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _gram_kernel(
    x, partial, features, patches, per_image, columns, height, width, stretch, stretches,
    x_g, x_b, x_c, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of one partial matrix (group, stretch, n, n)."""
    if tl.program_id(0) > tl.program_id(1):
        return
    part = tl.program_id(2).to(tl.int64)
    x += part // stretches * x_g
    first = (part % stretches).to(tl.int32) * stretch
    last = tl.minimum(first + stretch, patches)
    left = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    right = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_P):
        patch = start + tl.arange(0, BLOCK_P)
        live = patch < last
        a = _tile(
            x, patch, live, left, left < features, per_image, columns, height, width,
            x_b, x_c, x_h, x_w, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        b = _tile(
            x, patch, live, right, right < features, per_image, columns, height, width,
            x_b, x_c, x_h, x_w, KH, KW, SH, SW, PH, PW, DH, DW,
        )  # fmt: skip
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    at = partial + part * features * features
    at = at + left.to(tl.int64)[:, None] * features + right.to(tl.int64)[None, :]
    tl.store(at, total, mask=(left < features)[:, None] & (right < features)[None, :])


def stretches_of(patches: int, features: int, groups: int) -> int:
    """How many stretches the patches of each group are cut into, by sizes alone."""
    fits = max(1, PARTIAL // max(1, groups * features * features))
    return max(1, min(triton.cdiv(patches, STRETCH), fits))


def plan_gram(
    x: torch.Tensor,
    partial: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    outputs: tuple[int, int],
) -> list[Launch]:
    """The launch that fills ``partial`` (G, stretches, n, n), above the diagonal of tiles.

    Args:
        x: (G, B, C, H, W), any strides.
        outputs: numbers of patches down and across.
    """
    groups, batch, _, height, width = x.shape
    stretches, features = partial.shape[1:3]
    per_image = outputs[0] * outputs[1]
    patches = batch * per_image
    stretch = triton.cdiv(triton.cdiv(patches, stretches), PATCHES) * PATCHES
    block = 32 if features <= 32 else 64
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    arguments = {
        "x": x,
        "partial": partial,
        "features": features,
        "patches": patches,
        "per_image": per_image,
        "columns": outputs[1],
        "height": height,
        "width": width,
        "stretch": stretch,
        "stretches": stretches,
        **dict(zip(("x_g", "x_b", "x_c", "x_h", "x_w"), x.stride(), strict=True)),
        **dict(zip(names, (*kernel, *stride, *padding, *dilation), strict=True)),
        "PRECISION": PRECISION,
        "BLOCK_N": block,
        "BLOCK_P": PATCHES,
    }
    tiles = triton.cdiv(features, block)
    options = {"num_warps": 4, "num_stages": 2}
    return [Launch(_gram_kernel, (tiles, tiles, groups * stretches), arguments, options)]


def patch_gram(
    x: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Second moments (G, n, n) of patches, as the C++ op ``transfuse::patch_gram``."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"patch_gram: the triton backend supports float32, float16 and bfloat16, got {x.dtype}"
        )
    groups, batch, channels, height, width = x.shape
    features = channels * kernel[0] * kernel[1]
    if x.numel() == 0:
        return x.new_zeros((groups, features, features), dtype=torch.float32)
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    )
    patches = batch * rows * columns
    if patches >= 2**31:
        raise ValueError(
            f"patch_gram: the triton backend takes fewer than 2^31 patches, got {patches}"
        )
    stretches = stretches_of(patches, features, groups)
    shape = (groups, stretches, features, features)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    run(plan_gram(x, partial, kernel, stride, padding, dilation, (rows, columns)), x.device)
    # What lies below the diagonal of tiles was not written, and is not read.
    upper = torch.triu(partial).sum(1, dtype=torch.float64)
    return (upper + torch.triu(upper, 1).mT).to(torch.float32)
