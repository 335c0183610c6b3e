"""Token merging on GPUs, in Triton: neighbours, segment sums, maxima, gathers, pushes.

The search is the tile loop of a matrix product with a running (maximum, lowest index) per row; the
scores of a tile never leave the registers. Merging gives every program one row and a run of
channels, and adds that row's tokens in the order of the plan: no atomics, so results do not vary.
"""

from __future__ import annotations

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_NORM = tl.constexpr(1e-12)
PRECISION = "ieee"  # of products of float32: tf32 would call neighbours what are not
INDEX = tl.constexpr(2147483647)


@triton.jit
def _rows(pointer, tokens, live, stride_n, stride_c, start, depth, BLOCK_K: tl.constexpr):
    """A tile of tokens x channels, zero where nothing is."""
    channels = start + tl.arange(0, BLOCK_K)
    at = (
        pointer
        + tokens.to(tl.int64)[:, None] * stride_n
        + channels.to(tl.int64)[None, :] * stride_c
    )
    return tl.load(at, mask=live[:, None] & (channels < depth)[None, :], other=0.0)


@triton.jit
def _inverse_norm(square):
    """1 / |x| from the sum of squares; 0 for a vector that counts as zero."""
    norm = tl.sqrt(square)
    return tl.where(norm > SMALLEST_NORM, 1.0 / tl.where(norm > SMALLEST_NORM, norm, 1.0), 0.0)


@triton.jit
def _norm_kernel(
    x, inverse, tokens, depth, stride_b, stride_n, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Inverse norms (B, N)."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < tokens
    square = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, depth, BLOCK_N):
        tile = _rows(x + batch * stride_b, token, live, stride_n, stride_c, start, depth, BLOCK_N)
        tile = tile.to(tl.float32)
        square += tl.sum(tile * tile, axis=1)
    tl.store(inverse + batch * tokens + token, _inverse_norm(square), mask=live)


@triton.jit
def _nearest_kernel(
    x, reference, x_inverse, reference_inverse, allowed, similarity, index,
    tokens, references, depth,
    x_b, x_n, x_c, reference_b, reference_n, reference_c, inverse_b, allowed_b, allowed_n,
    EXCLUDE_SELF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Running maximum of the cosines of one tile of tokens with all references."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < tokens
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    found = tl.full([BLOCK_M], INDEX, tl.int32)
    first = tl.full([BLOCK_M], INDEX, tl.int32)
    for begin in range(0, references, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        there = column < references
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            a = _rows(x + batch * x_b, token, live, x_n, x_c, start, depth, BLOCK_K)
            b = _rows(
                reference + batch * reference_b, column, there, reference_n, reference_c, start,
                depth, BLOCK_K,
            )  # fmt: skip
            score = tl.dot(a, tl.trans(b), score, input_precision=PRECISION)
        scale = tl.load(reference_inverse + batch * inverse_b + column, mask=there, other=0.0)
        score = score * scale[None, :]
        may = there[None, :] & live[:, None]
        if allowed is not None:
            at = allowed + batch * allowed_b + column.to(tl.int64) * allowed_n
            may = may & (tl.load(at, mask=there, other=0) != 0)[None, :]
        if EXCLUDE_SELF:
            may = may & (token[:, None] != column[None, :])
        numbers = tl.where(may, column[None, :], INDEX)
        first = tl.minimum(first, tl.min(numbers, axis=1))
        # A NaN equals nothing, not even itself, and loses.
        score = tl.where(may & (score == score), score, -float("inf"))
        high = tl.max(score, axis=1)
        lowest = tl.min(tl.where(score == high[:, None], numbers, INDEX), axis=1)
        better = high > best
        found = tl.where(better, lowest, found)
        best = tl.where(better, high, best)
    scale = tl.load(x_inverse + batch * tokens + token, mask=live, other=0.0)
    none = best == -float("inf")
    best = tl.where(none, tl.where(first == INDEX, best, float("nan")), best * scale)
    found = tl.where(none, tl.where(first == INDEX, -1, first), found)
    at = batch * tokens + token
    tl.store(similarity + at, best, mask=live)
    tl.store(index + at, found.to(tl.int64), mask=live)


@triton.jit
def _segments_kernel(
    x, scale, order, start, out, winner,
    tokens, rows, depth, x_b, x_n, x_c, scale_b, order_b, start_b,
    WEIGHTING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row of the result: sum (0), mean (1), first (2), average with
    the scale as weights (3) or largest (4) of its tokens."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = channel < depth
    begin = tl.load(start + batch * start_b + row)
    end = tl.load(start + batch * start_b + row + 1)
    if WEIGHTING == 2:
        end = tl.minimum(end, begin + 1)
    total = tl.zeros([BLOCK_N], tl.float32)
    holder = tl.zeros([BLOCK_N], tl.int64)
    weight = 0.0
    for k in range(begin, end):
        token = tl.load(order + batch * order_b + k)
        # An entry that is no token is left out: nothing outside may be read.
        inside = (token >= 0) & (token < tokens)
        at = x + batch * x_b + token * x_n + channel.to(tl.int64) * x_c
        value = tl.load(at, mask=live & inside, other=0.0).to(tl.float32)
        if scale is not None:
            factor = tl.load(scale + batch * scale_b + token, mask=inside, other=0.0)
            value = value * factor
            weight += factor
        if WEIGHTING == 4:
            nan, had = value != value, total != total
            same = (value == total) | (nan & had)
            wins = (value > total) | (nan & (had == 0)) | (same & (token < holder)) | (k == begin)
            total = tl.where(wins, value, total)
            holder = tl.where(wins, token, holder)
        else:
            total += value
    if WEIGHTING == 1:
        total = total / tl.maximum(end - begin, 1).to(tl.float32)
    if WEIGHTING == 3:
        total = tl.where(weight == 0.0, 0.0, total / tl.where(weight == 0.0, 1.0, weight))
    at = (batch * rows + row) * depth + channel
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)
    if winner is not None:
        tl.store(winner + at, holder, mask=live)


@triton.jit
def _gather_kernel(
    y, scale, rows, order, start, out,
    tokens, count, depth, y_b, y_n, y_c, scale_b, rows_b, order_b, start_b,
    WEIGHTING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of tokens x channels of the result: the row of each token."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = token < tokens
    row = tl.load(rows + batch * rows_b + token, mask=live, other=0)
    inside = live & (row >= 0) & (row < count)
    mask = inside[:, None] & (channel < depth)[None, :]
    if WEIGHTING == 2:
        begin = tl.load(start + batch * start_b + row, mask=inside, other=0)
        first = tl.load(
            order + batch * order_b + begin,
            mask=inside & (begin >= 0) & (begin < tokens),
            other=-1,
        )
        mask = mask & (first == token)[:, None]
    at = y + batch * y_b + row[:, None] * y_n + channel.to(tl.int64)[None, :] * y_c
    value = tl.load(at, mask=mask, other=0.0)
    if WEIGHTING == 1:
        begin = tl.load(start + batch * start_b + row, mask=inside, other=0)
        end = tl.load(start + batch * start_b + row + 1, mask=inside, other=1)
        value = value.to(tl.float32) / tl.maximum(end - begin, 1).to(tl.float32)[:, None]
    if scale is not None:
        factor = tl.load(scale + batch * scale_b + token, mask=live, other=0.0)
        value = value.to(tl.float32) * factor[:, None]
    at = out + (batch * tokens + token.to(tl.int64))[:, None] * depth + channel[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=live[:, None] & (channel < depth)[None, :])


@triton.jit
def _push_kernel(
    x, reference, similarity, index, out,
    tokens, references, depth, x_b, x_n, x_c, reference_b, reference_n, reference_c,
    alpha, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, or x + alpha (x - nearest) where it is near enough."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = token < tokens
    near = tl.load(similarity + batch * tokens + token, mask=live, other=-float("inf"))
    number = tl.load(index + batch * tokens + token, mask=live, other=-1)
    moves = (near > threshold) & (number >= 0) & (number < references)
    mask = live[:, None] & (channel < depth)[None, :]
    wide = channel.to(tl.int64)[None, :]
    at = x + batch * x_b + token.to(tl.int64)[:, None] * x_n + wide * x_c
    value = tl.load(at, mask=mask, other=0.0)
    at = reference + batch * reference_b + number[:, None] * reference_n + wide * reference_c
    other = tl.load(at, mask=mask & moves[:, None], other=0.0).to(tl.float32)
    single = value.to(tl.float32)
    pushed = (single + alpha * (single - other)).to(value.dtype)
    at = out + (batch * tokens + token.to(tl.int64))[:, None] * depth + channel[None, :]
    tl.store(at, tl.where(moves[:, None], pushed, value), mask=mask)


# ---- launchers ---------------------------------------------------------------------------------


def _check(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            "token merging: the triton backend supports float32, float16 and bfloat16, "
            f"got {x.dtype}"
        )


def _channels(depth: int, most: int = 128) -> int:
    return max(16, min(most, triton.next_power_of_2(max(1, depth))))


def _strides(name: str, x: torch.Tensor, batch: int) -> dict[str, int]:
    """Strides of (B or 1, N, C); a batch of one serves all."""
    own = x.stride()
    return {
        f"{name}_b": 0 if x.shape[0] == 1 and batch != 1 else own[0],
        f"{name}_n": own[1],
        f"{name}_c": own[2],
    }


def _plan_stride(t: torch.Tensor | None, batch: int) -> int:
    return 0 if t is None or (t.shape[0] == 1 and batch != 1) else t.stride(0)


_POINTWISE = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def plan_norm(x: torch.Tensor, inverse: torch.Tensor) -> Launch:
    """The launch that computes inverse norms (B, N)."""
    batch, tokens, depth = x.shape
    arguments = {
        "x": x,
        "inverse": inverse,
        "tokens": tokens,
        "depth": depth,
        "stride_b": x.stride(0),
        "stride_n": x.stride(1),
        "stride_c": x.stride(2),
        "BLOCK_M": 32,
        "BLOCK_N": _channels(depth),
    }
    return Launch(_norm_kernel, (triton.cdiv(tokens, 32), batch), arguments, _POINTWISE)


def plan_nearest(
    x: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None,
    exclude_self: bool,
    inverses: tuple[torch.Tensor, torch.Tensor],
    similarity: torch.Tensor,
    index: torch.Tensor,
) -> list[Launch]:
    """Norms of both sets, then the search."""
    batch, tokens, depth = x.shape
    single = x.dtype == torch.float32
    rows = 64 if single else 128
    columns = 64 if single else 128
    arguments = {
        "x": x,
        "reference": reference,
        "x_inverse": inverses[0],
        "reference_inverse": inverses[1],
        "allowed": None if mask is None else mask.view(torch.uint8),
        "similarity": similarity,
        "index": index,
        "tokens": tokens,
        "references": reference.shape[1],
        "depth": depth,
        **_strides("x", x, batch),
        **_strides("reference", reference, batch),
        "inverse_b": 0 if reference.shape[0] == 1 else reference.shape[1],
        "allowed_b": _plan_stride(mask, batch),
        "allowed_n": 0 if mask is None else mask.stride(1),
        "EXCLUDE_SELF": exclude_self,
        "PRECISION": PRECISION,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "BLOCK_K": _channels(depth, 32 if single else 64),
    }
    grid = (triton.cdiv(tokens, rows), batch)
    options = {"num_warps": 4 if single else 8, "num_stages": 3, "enable_fp_fusion": True}
    return [
        plan_norm(x, inverses[0]),
        plan_norm(reference, inverses[1]),
        Launch(_nearest_kernel, grid, arguments, options),
    ]


def plan_segments(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    order: torch.Tensor,
    start: torch.Tensor,
    weighting: int,
    out: torch.Tensor,
    winner: torch.Tensor | None,
) -> Launch:
    """The launch that merges; ``weighting`` 4 is the maximum."""
    batch, tokens, depth = x.shape
    block = _channels(depth, 512)
    arguments = {
        "x": x,
        "scale": scale,
        "order": order,
        "start": start,
        "out": out,
        "winner": winner,
        "tokens": tokens,
        "rows": out.shape[1],
        "depth": depth,
        **_strides("x", x, batch),
        "scale_b": _plan_stride(scale, batch),
        "order_b": _plan_stride(order, batch),
        "start_b": _plan_stride(start, batch),
        "WEIGHTING": weighting,
        "BLOCK_M": 1,
        "BLOCK_N": block,
    }
    grid = (out.shape[1], triton.cdiv(depth, block), batch)
    return Launch(_segments_kernel, grid, arguments, {**_POINTWISE, "num_warps": 2})


def plan_gather(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    weighting: int,
    out: torch.Tensor,
) -> Launch:
    """The launch that unmerges."""
    batch, count, depth = y.shape
    tokens, block = rows.shape[1], _channels(depth)
    arguments = {
        "y": y,
        "scale": scale,
        "rows": rows,
        "order": order,
        "start": start,
        "out": out,
        "tokens": tokens,
        "count": count,
        "depth": depth,
        **_strides("y", y, batch),
        "scale_b": _plan_stride(scale, batch),
        "rows_b": _plan_stride(rows, batch),
        "order_b": _plan_stride(order, batch),
        "start_b": _plan_stride(start, batch),
        "WEIGHTING": weighting,
        "BLOCK_M": 16,
        "BLOCK_N": block,
    }
    grid = (triton.cdiv(tokens, 16), triton.cdiv(depth, block), batch)
    return Launch(_gather_kernel, grid, arguments, _POINTWISE)


def plan_push(
    x: torch.Tensor,
    reference: torch.Tensor,
    similarity: torch.Tensor,
    index: torch.Tensor,
    alpha: float,
    threshold: float,
    out: torch.Tensor,
) -> Launch:
    """The launch that pushes."""
    batch, tokens, depth = x.shape
    block = _channels(depth)
    arguments = {
        "x": x,
        "reference": reference,
        "similarity": similarity,
        "index": index,
        "out": out,
        "tokens": tokens,
        "references": reference.shape[1],
        "depth": depth,
        **_strides("x", x, batch),
        **_strides("reference", reference, batch),
        "alpha": float(alpha),
        "threshold": float(threshold),
        "BLOCK_M": 16,
        "BLOCK_N": block,
    }
    grid = (triton.cdiv(tokens, 16), triton.cdiv(depth, block), batch)
    return Launch(_push_kernel, grid, arguments, _POINTWISE)


def nearest_tokens(
    x: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of each token with a reference, and the lowest reference that has it."""
    _check(x)
    batch, tokens = x.shape[:2]
    similarity = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    index = torch.empty((batch, tokens), dtype=torch.int64, device=x.device)
    inverses = (
        torch.empty_like(similarity),
        torch.empty(reference.shape[:2], dtype=torch.float32, device=x.device),
    )
    run(plan_nearest(x, reference, mask, exclude_self, inverses, similarity, index), x.device)
    return similarity, index


def merge_segments(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    weighting: int,
) -> torch.Tensor:
    """Sum (0), mean (1), first token (2) or weighted average (3) of each row of a plan."""
    _check(x)
    out = x.new_empty((x.shape[0], start.shape[1] - 1, x.shape[2]))
    run([plan_segments(x, scale, order, start, weighting, out, None)], x.device)
    return out


def merge_amax(
    x: torch.Tensor, rows: torch.Tensor, order: torch.Tensor, start: torch.Tensor, winners: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest number of each row and channel, and the lowest token that has it."""
    _check(x)
    out = x.new_empty((x.shape[0], start.shape[1] - 1, x.shape[2]))
    winner = x.new_empty(out.shape if winners else (0,), dtype=torch.int64)
    run([plan_segments(x, None, order, start, 4, out, winner if winners else None)], x.device)
    return out, winner


def merge_gather(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor,
    order: torch.Tensor,
    start: torch.Tensor,
    weighting: int,
) -> torch.Tensor:
    """The row of each token of a plan."""
    _check(y)
    out = y.new_empty((y.shape[0], rows.shape[1], y.shape[2]))
    run([plan_gather(y, scale, rows, order, start, weighting, out)], y.device)
    return out


def push_tokens(
    x: torch.Tensor,
    reference: torch.Tensor,
    similarity: torch.Tensor,
    index: torch.Tensor,
    alpha: float,
    threshold: float,
) -> torch.Tensor:
    """``x + alpha (x - reference[index])`` where the similarity exceeds the threshold."""
    _check(x)
    out = x.new_empty(x.shape)
    similarity, index = similarity.contiguous(), index.contiguous()
    run([plan_push(x, reference, similarity, index, alpha, threshold, out)], x.device)
    return out
