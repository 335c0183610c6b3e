"""adain on GPUs, in Triton: forward, backward and forward mode.

One program takes a tile of rows x columns of planes: one plane where the reduced axes are the
fastest in memory, 16 neighbouring ones where a remaining axis is (channels_last). It goes over its
planes two to three times; they stay in the cache between. Statistics are float32 about an element
of the plane, so that a large mean costs no digits. There are no atomics: results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 1024  # rows of a plane per step
COLUMNS = 16  # neighbouring planes per program


class Planes(NamedTuple):
    """A tensor as planes: index (k0, k1) of two remaining axes, row (r0, r1) of two reduced ones.

    ``wide0`` and ``wide1`` are the extents of k1 and r1, by which a flat index is taken apart.
    """

    data: Any
    kept0: Any
    kept1: Any
    row0: Any
    row1: Any


@triton.jit
def _offset(index, extent, slow, fast):
    """Element offset of a flat index over two axes, in 64 bits."""
    return (index // extent).to(tl.int64) * slow + (index % extent).to(tl.int64) * fast


@triton.jit
def _at(planes, plane, width, rows, length):
    """Pointers to the tile rows x planes; ``width`` and ``length``: extents of the fast axes."""
    kept = _offset(plane, width, planes.kept0, planes.kept1)
    row = _offset(rows, length, planes.row0, planes.row1)
    return planes.data + row[:, None] + kept[None, :]


@triton.jit
def _tile(planes, plane, live, width, start, count, length, BLOCK_M: tl.constexpr):
    """The tile as float32, and which of it exists."""
    rows = start + tl.arange(0, BLOCK_M)
    mask = (rows < count)[:, None] & live[None, :]
    return tl.load(_at(planes, plane, width, rows, length), mask=mask, other=0.0).to(
        tl.float32
    ), mask


@triton.jit
def _pivot(planes, plane, live, width):
    """The first element of each plane."""
    kept = _offset(plane, width, planes.kept0, planes.kept1)
    return tl.load(planes.data + kept, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _mean(planes, plane, live, width, count, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean of each plane."""
    pivot = _pivot(planes, plane, live, width)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        x, mask = _tile(planes, plane, live, width, start, count, length, BLOCK_M)
        total += tl.sum(tl.where(mask, x - pivot[None, :], 0.0), axis=0)
    return pivot + total / count


@triton.jit
def _moments(
    first,
    second,
    plane,
    live,
    width,
    count,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Means of ``first`` and ``second``, each as a number and the rest that its rounding left, and
    sums of the centred products first * first and first * second."""
    first_mean = _mean(first, plane, live, width, count, length, BLOCK_M, BLOCK_N)
    second_mean = first_mean
    if second is not None:
        second_mean = _mean(second, plane, live, width, count, length, BLOCK_M, BLOCK_N)
    square = tl.zeros([BLOCK_N], tl.float32)
    product = tl.zeros([BLOCK_N], tl.float32)
    first_rest = tl.zeros([BLOCK_N], tl.float32)
    second_rest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_M):
        x, mask = _tile(first, plane, live, width, start, count, length, BLOCK_M)
        x = tl.where(mask, x - first_mean[None, :], 0.0)
        first_rest += tl.sum(x, axis=0)
        square += tl.sum(x * x, axis=0)
        if second is not None:
            y, _ = _tile(second, plane, live, width, start, count, length, BLOCK_M)
            y = tl.where(mask, y - second_mean[None, :], 0.0)
            second_rest += tl.sum(y, axis=0)
            product += tl.sum(x * y, axis=0)
    product -= first_rest * second_rest / count
    square -= first_rest * first_rest / count
    # Rounding may leave less than nothing; NaN stays.
    square = tl.where(square < 0.0, 0.0, square)
    return first_mean, first_rest / count, second_mean, second_rest / count, square, product


@triton.jit
def _inverse(x):
    """1 / x, and 0 for 0."""
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def _std(square, count):
    """Unbiased deviation and its slope: d std / d x_i = slope (x_i - mean). 0 for one element."""
    free = tl.maximum(count - 1, 1)
    std = tl.where(count > 1, tl.sqrt_rn(square / free), 0.0)
    return std, tl.where(count > 1, _inverse(free * std), 0.0)


@triton.jit
def _write(
    out,
    first,
    second,
    first_mean,
    second_mean,
    first_factor,
    second_factor,
    offset,
    plane,
    live,
    width,
    count,
    length,
    BLOCK_M: tl.constexpr,
):
    """out = first_factor (first - mean) + second_factor (second - mean) + offset."""
    for start in range(0, count, BLOCK_M):
        x, mask = _tile(first, plane, live, width, start, count, length, BLOCK_M)
        y = (x - first_mean[None, :]) * first_factor[None, :] + offset[None, :]
        if second is not None:
            t, _ = _tile(second, plane, live, width, start, count, length, BLOCK_M)
            y += (t - second_mean[None, :]) * second_factor[None, :]
        rows = start + tl.arange(0, BLOCK_M)
        tl.store(_at(out, plane, width, rows, length), y.to(out.data.dtype.element_ty), mask=mask)


@triton.jit
def _content_kernel(
    content,
    companion,
    style,
    style_companion,
    out,
    shares,
    planes,
    width,
    count,
    length,
    style_count,
    style_length,
    eps,
    DIRECTION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Forward (0), backward towards the content (1), or Jacobian-vector product (2).

    ``companion`` is the gradient or the content's tangent, ``style_companion`` the style's tangent.
    ``shares``: (2, planes) of what a content plane adds to the gradient of its style plane.
    """
    plane = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = plane < planes
    style_mean, style_rest, other_mean, other_rest, style_square, style_product = _moments(
        style, style_companion, plane, live, width, style_count, style_length, BLOCK_M, BLOCK_N
    )
    style_std, style_slope = _std(style_square, style_count)
    mean, rest, companion_mean, companion_rest, square, product = _moments(
        content, companion, plane, live, width, count, length, BLOCK_M, BLOCK_N
    )
    std, slope = _std(square, count)
    scale = _inverse(std + eps)
    gain = style_std * scale
    if DIRECTION == 0:
        factor, offset = gain, style_mean + (style_rest - gain * rest)
    elif DIRECTION == 1:
        factor = -gain * scale * product * slope
        offset = -(factor * rest + gain * companion_rest)
        if shares is not None:
            tl.store(shares + plane, count * (companion_mean + companion_rest), mask=live)
            tl.store(shares + planes + plane, product * scale, mask=live)
    else:
        factor = (style_product * style_slope - gain * product * slope) * scale
        offset = other_mean + (other_rest - (factor * rest + gain * companion_rest))
    if out is not None:
        _write(
            out,
            content,
            companion,
            mean,
            companion_mean,
            factor,
            gain,
            offset,
            plane,
            live,
            width,
            count,
            length,
            BLOCK_M,
        )


@triton.jit
def _style_kernel(
    style,
    shares,
    out,
    planes,
    width,
    count,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the style from the summed shares of its content planes."""
    plane = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = plane < planes
    mean, rest, _, _, square, _ = _moments(
        style, None, plane, live, width, count, length, BLOCK_M, BLOCK_N
    )
    _, slope = _std(square, count)
    factor = tl.load(shares + planes + plane, mask=live, other=0.0) * slope
    offset = tl.load(shares + plane, mask=live, other=0.0) / count - factor * rest
    _write(
        out,
        style,
        None,
        mean,
        mean,
        factor,
        factor,
        offset,
        plane,
        live,
        width,
        count,
        length,
        BLOCK_M,
    )


# ---- host ---------------------------------------------------------------------------------------


class _Geometry(NamedTuple):
    """Tensors of one shape as planes."""

    records: list[Planes | None]
    planes: int
    width: int
    count: int  # type: ignore[assignment]  # a field, not tuple.count
    length: int
    rows: int
    columns: int


def _merge(
    shape: Sequence[int], strides: Sequence[Sequence[int]], axes: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """Axes as (size, stride per tensor), neighbours merged where every tensor allows it."""
    merged: list[tuple[int, list[int]]] = []
    for axis in axes:
        size, steps = shape[axis], [s[axis] for s in strides]
        if size == 1:
            continue
        if merged and all(a == size * b for a, b in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged


def _geometry(tensors: Sequence[torch.Tensor | None], dims: Sequence[int]) -> _Geometry:
    """Describe tensors of one shape; None where more than two axes of a kind remain."""
    present = [t for t in tensors if t is not None]
    shape = present[0].shape
    strides = [[0 if n == 1 else t.stride(axis) for axis, n in enumerate(shape)] for t in present]
    kept = _merge(shape, strides, [a for a in range(len(shape)) if a not in dims])
    order = sorted(dims, key=lambda a: -strides[0][a])
    reduced = _merge(shape, strides, order)
    if len(kept) > 2 or len(reduced) > 2:
        raise _TooManyAxes
    while len(kept) < 2:
        kept.insert(0, (1, [0] * len(present)))
    while len(reduced) < 2:
        reduced.insert(0, (1, [0] * len(present)))
    records: list[Planes | None] = []
    number = 0
    for tensor in tensors:
        if tensor is None:
            records.append(None)
            continue
        records.append(
            Planes(
                tensor,
                kept[0][1][number],
                kept[1][1][number],
                reduced[0][1][number],
                reduced[1][1][number],
            )
        )
        number += 1
    count = reduced[0][0] * reduced[1][0]
    side = kept[1][0] >= 8 and kept[1][1][0] == 1 and reduced[1][1][0] != 1
    columns = COLUMNS if side else 1
    rows = min(triton.next_power_of_2(count), ROWS // columns)
    return _Geometry(
        records, kept[0][0] * kept[1][0], kept[1][0], count, reduced[1][0], rows, columns
    )


class _TooManyAxes(Exception):
    pass


def _spread(style: torch.Tensor, content: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The style with the content's extents in the remaining dimensions."""
    shape = [style.shape[a] if a in dims else n for a, n in enumerate(content.shape)]
    return style.expand(shape)


def _plain(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """A copy whose remaining and reduced dimensions each merge into one."""
    kept = [a for a in range(tensor.dim()) if a not in dims]
    order = [*kept, *dims]
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                "adain: the triton backend supports float32, float16 and bfloat16, "
                f"got {tensor.dtype}"
            )


def plan_content(
    direction: int,
    content: torch.Tensor,
    companion: torch.Tensor | None,
    style: torch.Tensor,
    style_companion: torch.Tensor | None,
    out: torch.Tensor | None,
    shares: torch.Tensor | None,
    dims: Sequence[int],
    eps: float,
) -> tuple[list[Launch], torch.Tensor | None]:
    """The launch of ``_content_kernel``, and the tensor it writes (``out``, or a plain copy)."""
    style = _spread(style, content, dims)
    if style_companion is not None:
        style_companion = _spread(style_companion, content, dims)
    try:
        mine, theirs = _pair(content, companion, out, style, style_companion, dims)
    except _TooManyAxes:
        content, style = _plain(content, dims), _plain(style, dims)
        companion, out, style_companion = (
            None if t is None else _plain(t, dims) for t in (companion, out, style_companion)
        )
        mine, theirs = _pair(content, companion, out, style, style_companion, dims)
    arguments = {
        "content": mine.records[0],
        "companion": mine.records[1],
        "style": theirs.records[0],
        "style_companion": theirs.records[1],
        "out": mine.records[2],
        "shares": shares,
        "planes": mine.planes,
        "width": mine.width,
        "count": mine.count,
        "length": mine.length,
        "style_count": theirs.count,
        "style_length": theirs.length,
        "eps": float(eps),
        "DIRECTION": direction,
        "BLOCK_M": mine.rows,
        "BLOCK_N": mine.columns,
    }
    return [_launch(_content_kernel, mine, arguments)], out


def _pair(content, companion, out, style, style_companion, dims) -> tuple[_Geometry, _Geometry]:
    """Geometries of content and style that number their planes alike."""
    mine = _geometry([content, companion, out], dims)
    theirs = _geometry([style, style_companion], dims)
    if theirs.width != mine.width and theirs.planes == mine.planes:
        if theirs.planes == theirs.width:  # the style's merge further: take them apart
            theirs = _split(theirs, mine.width)
        elif mine.planes == mine.width:
            mine = _split(mine, theirs.width)
        else:
            raise _TooManyAxes
    return mine, theirs


def _split(geometry: _Geometry, width: int) -> _Geometry:
    """One merged axis of planes as two, the fast one of extent ``width``."""
    records = [None if r is None else r._replace(kept0=r.kept1 * width) for r in geometry.records]
    return geometry._replace(records=records, width=width)


def _launch(kernel: Any, geometry: _Geometry, arguments: dict[str, Any]) -> Launch:
    tile = geometry.rows * geometry.columns
    options = {
        "num_warps": max(1, min(8, tile // 128)),
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
    return Launch(kernel, (triton.cdiv(geometry.planes, geometry.columns),), arguments, options)


def plan_style(
    style: torch.Tensor, shares: torch.Tensor, out: torch.Tensor, dims: Sequence[int]
) -> tuple[list[Launch], torch.Tensor]:
    """The launch of ``_style_kernel``; ``shares`` (2, planes of the style)."""
    try:
        mine = _geometry([style, out], dims)
    except _TooManyAxes:
        style, out = _plain(style, dims), _plain(out, dims)
        mine = _geometry([style, out], dims)
    arguments = {
        "style": mine.records[0],
        "shares": shares,
        "out": mine.records[1],
        "planes": mine.planes,
        "width": mine.width,
        "count": mine.count,
        "length": mine.length,
        "BLOCK_M": mine.rows,
        "BLOCK_N": mine.columns,
    }
    return [_launch(_style_kernel, mine, arguments)], out


def _content_pass(
    direction, content, companion, style, style_companion, wanted, shares, dims, eps
) -> torch.Tensor | None:
    out = torch.empty_like(content) if wanted else None
    launches, written = plan_content(
        direction, content, companion, style, style_companion, out, shares, dims, eps
    )
    run(launches, content.device)
    return out if written is out else out.copy_(written)


def adain_forward(
    content: torch.Tensor, style: torch.Tensor, dims: Sequence[int], eps: float
) -> torch.Tensor:
    """``std_s (content - mean_c) / (std_c + eps) + mean_s`` over ``dims`` (axes from 0)."""
    _check(content, style)
    if content.numel() == 0:
        return torch.empty_like(content)
    return _content_pass(0, content, None, style, None, True, None, dims, eps)


def adain_jvp(
    content: torch.Tensor,
    style: torch.Tensor,
    content_t: torch.Tensor,
    style_t: torch.Tensor,
    dims: Sequence[int],
    eps: float,
) -> torch.Tensor:
    """Derivative of :func:`adain_forward` along the tangents."""
    _check(content, style, content_t, style_t)
    if content.numel() == 0:
        return torch.empty_like(content)
    return _content_pass(2, content, content_t, style, style_t, True, None, dims, eps)


def adain_backward(
    grad: torch.Tensor,
    content: torch.Tensor,
    style: torch.Tensor,
    dims: Sequence[int],
    eps: float,
    content_grad: bool,
    style_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of content and style; an empty tensor for one that is not wanted."""
    _check(grad, content, style)
    none = content.new_empty((0,))
    if content.numel() == 0:
        return (
            torch.empty_like(content) if content_grad else none,
            torch.zeros_like(style) if style_grad else none,
        )
    kept = [1 if a in dims else n for a, n in enumerate(content.shape)]
    shares = None
    if style_grad:
        planes = torch.Size(kept).numel()
        shares = torch.empty((2, planes), dtype=torch.float32, device=content.device)
    to_content = _content_pass(1, content, grad, style, None, content_grad, shares, dims, eps)
    if not style_grad:
        return to_content, none
    repeated = [
        a + 1 for a, n in enumerate(kept) if a not in dims and style.shape[a] == 1 and n != 1
    ]
    if repeated:
        # A dense tensor summed over axes: torch's own sum is deterministic.
        shares = shares.view(2, *kept).sum(repeated, keepdim=True).reshape(2, -1)
    to_style = torch.empty_like(style)
    launches, written = plan_style(style, shares, to_style, dims)
    run(launches, style.device)
    if written is not to_style:
        to_style.copy_(written)
    return none if to_content is None else to_content, to_style
