"""Device functions, kernels and argument records of the sums over pairs (``kernel_sums``)."""

from typing import Any, NamedTuple

from ._triton import tl, triton


class Packed(NamedTuple):
    """Points as the kernels see them: (G, padded, ld), and their squared norms (G, padded).

    ``narrow``: the width where distances are squared differences, else -1.
    """

    data: Any
    norms: Any
    padded: Any
    ld: Any
    narrow: Any


class Pair(NamedTuple):
    """What a distance is between."""

    rows: Any
    columns: Any


# ---- points --------------------------------------------------------------------------------------


@triton.jit
def pack_kernel(
    x, centre, out, norms, count, width, padded, ld, x_g, x_n, x_d,
    NARROW: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of points less the centre, in float64 and then rounded, with zeros around."""
    blocks = padded // BLOCK
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    to = group * padded + row
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, ld, DEPTH):
        axis = start + tl.arange(0, DEPTH)
        live = (row < count)[:, None] & (axis < width)[None, :]
        at = x + group * x_g + row.to(tl.int64)[:, None] * x_n + axis.to(tl.int64)[None, :] * x_d
        value = tl.load(at, mask=live, other=0.0).to(tl.float64)
        middle = tl.load(centre + group * width + axis, mask=axis < width, other=0.0)
        moved = tl.where(live, value - middle[None, :], 0.0).to(tl.float32)
        tl.store(out + to[:, None] * ld + axis[None, :], moved)
        if NARROW < 0:
            square = moved.to(tl.float64)
            total += tl.sum(square * square, 1)
    tl.store(norms + to, total.to(tl.float32))


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def _squares(
    x, y, group, row, column,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Squared distances of a tile; exactly 0 between a point and itself. NaN stays NaN."""
    left, right = group * x.padded + row, group * y.padded + column
    squares = tl.zeros([BLOCK, BLOCK], tl.float32)
    if x.narrow >= 0:
        for c in tl.static_range(0, x.narrow):
            one, two = tl.load(x.data + left * x.ld + c), tl.load(y.data + right * y.ld + c)
            gap = one[:, None] - two[None, :]
            squares += gap * gap
    else:
        axis = tl.arange(0, DEPTH)
        for start in range(0, x.ld, DEPTH):
            one = tl.load(x.data + left[:, None] * x.ld + (start + axis)[None, :])
            two = tl.load(y.data + right[None, :] * y.ld + (start + axis)[:, None])
            squares = tl.dot(one, two, squares, input_precision=PRECISION)
        norms = tl.load(x.norms + left)[:, None] + tl.load(y.norms + right)[None, :]
        squares = norms - 2.0 * squares
        squares = tl.where(squares < 0.0, 0.0, squares)
    if SAME:
        squares = tl.where(row[:, None] == column[None, :], 0.0, squares)
    return squares


@triton.jit
def _all_squares(
    pairs, group, row, column,
    SAME: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Those of every distance."""
    found = ()
    for s in tl.static_range(0, len(SAME)):
        one = _squares(
            pairs[s].rows, pairs[s].columns, group, row, column, SAME[s], PRECISION, BLOCK, DEPTH
        )
        found += (one,)  # type: ignore[assignment]
    return found


@triton.jit
def _kernel(squares, scale, row, column, INVERSE: tl.constexpr, EXCLUDE: tl.constexpr):
    """A tile of a kernel; ``scale`` is log2(e) / (2 h^2), or 1 / h^2 of the inverse one."""
    if INVERSE:
        value = 1.0 / (1.0 + squares * scale)
    else:
        value = tl.math.exp2(-(squares * scale))
    if EXCLUDE:
        value = tl.where(row[:, None] == column[None, :], 0.0, value)
    return value


@triton.jit
def _times(
    value, squares, scales, row, column, P: tl.constexpr, WITHOUT: tl.constexpr,
    OF: tl.constexpr, HAS: tl.constexpr, INVERSE: tl.constexpr, EXCLUDE: tl.constexpr,
):  # fmt: skip
    """``value`` times the kernels of product P but one: the compiler makes each kernel once."""
    for f in tl.static_range(0, len(OF)):
        if (f != WITHOUT) & HAS[P * len(OF) + f]:
            scale = tl.load(scales + f)
            value = value * _kernel(squares[OF[f]], scale, row, column, INVERSE, EXCLUDE)
    return value


@triton.jit
def _slopes(
    squares, scales, slopes, grads, weights, g_padded, row, column, F: tl.constexpr,
    OF: tl.constexpr, HAS: tl.constexpr, WAYS: tl.constexpr,
    INVERSE: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of dL / dD by way of kernel F.

    ``WAYS`` of a product: 1, its gradients belong to rows and its weights to columns; 2, the other
    way round; 3, both: a pair and its mirror image.
    """
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for p in tl.static_range(0, len(WAYS)):
        if HAS[p * len(OF) + F]:
            own = grads + p * g_padded
            share = tl.zeros([BLOCK, BLOCK], tl.float32)
            if WAYS[p] != 2:
                share += tl.load(own + row)[:, None] * tl.load(weights + column)[None, :]
            if WAYS[p] >= 2:
                share += tl.load(weights + row)[:, None] * tl.load(own + column)[None, :]
            total += _times(share, squares, scales, row, column, p, F, OF, HAS, INVERSE, EXCLUDE)
    value = _kernel(squares[OF[F]], tl.load(scales + F), row, column, INVERSE, EXCLUDE)
    if INVERSE:
        value = value * value
    return total * (value * -tl.load(slopes + F))


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def sums_kernel(
    pairs, weights, scales, along, down, tiles, first, column_tiles, stretch, stretches, w_padded,
    SAME: tl.constexpr, OF: tl.constexpr, HAS: tl.constexpr, PRODUCTS: tl.constexpr,
    INVERSE: tl.constexpr, EXCLUDE: tl.constexpr, MIRROR: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Weighted sums of a tile of rows over a stretch of columns: ``along`` (G, stretches, P, N).

    MIRROR: of tiles above the diagonal alone, which serve their mirror image too, by sums down
    their columns: ``down`` (G, tiles, P, N), of rows of tiles from ``first``.
    """
    number, part = tl.program_id(0) % tiles, tl.program_id(1)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    tile = first + number
    row = tile * BLOCK + tl.arange(0, BLOCK)
    begin, end = part * stretch, tl.minimum((part + 1) * stretch, column_tiles)
    if MIRROR:
        begin = tl.maximum(begin, tile)
    scales += group * len(OF)
    weights += group * w_padded
    slot = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS, BLOCK], tl.float64)
    for block in range(begin, end):
        column = block * BLOCK + tl.arange(0, BLOCK)
        weight = tl.load(weights + column)
        squares = _all_squares(pairs, group, row, column, SAME, PRECISION, BLOCK, DEPTH)
        for p in tl.static_range(0, PRODUCTS):
            ones = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
            value = _times(ones, squares, scales, row, column, p, -1, OF, HAS, INVERSE, EXCLUDE)
            sums = tl.sum(value * weight[None, :], 1).to(tl.float64)
            total += tl.where(slot[:, None] == p, sums[None, :], 0.0)
            if MIRROR:
                own = tl.load(weights + row)
                to = down + ((group * tiles + number) * PRODUCTS + p) * w_padded + column
                # The tile on the diagonal is its own image.
                live = column >= (tile + 1) * BLOCK
                tl.store(to, tl.sum(value * own[:, None], 0), mask=live)
    rows = pairs[0].rows.padded
    to = along + ((group * stretches + part) * PRODUCTS + slot[:, None]) * rows + row[None, :]
    tl.store(to, total, mask=slot[:, None] < PRODUCTS)


@triton.jit
def points_kernel(
    pairs, weights, grads, scales, slopes, turned, mass, tiles, column_tiles, stretch, parts,
    first, ld, w_padded, g_padded,
    SAME: tl.constexpr, OF: tl.constexpr, HAS: tl.constexpr, WAYS: tl.constexpr,
    TARGET: tl.constexpr, INVERSE: tl.constexpr, EXCLUDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the gradient by the rows of some distances is made of, over a stretch of columns:
    ``turned`` (G, parts, N, ld), sums of E_ij y_j, and ``mass`` (G, parts, N), of E = dL / dD."""
    tile, chunk = tl.program_id(0) % tiles, tl.program_id(2)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    axis = chunk * WIDTH + tl.arange(0, WIDTH)
    begin = tl.program_id(1) * stretch
    end = tl.minimum(begin + stretch, column_tiles)
    scales += group * len(OF)
    slopes += group * len(OF)
    weights += group * w_padded
    grads += group * len(WAYS) * g_padded
    total = tl.zeros([BLOCK, WIDTH], tl.float32)
    masses = tl.zeros([BLOCK], tl.float64)
    for block in range(begin, end):
        column = block * BLOCK + tl.arange(0, BLOCK)
        squares = _all_squares(pairs, group, row, column, SAME, PRECISION, BLOCK, DEPTH)
        for s in tl.static_range(0, len(SAME)):
            if TARGET[s]:
                e = tl.zeros([BLOCK, BLOCK], tl.float32)
                for f in tl.static_range(0, len(OF)):
                    if OF[f] == s:
                        e += _slopes(
                            squares, scales, slopes, grads, weights, g_padded, row, column, f,
                            OF, HAS, WAYS, INVERSE, EXCLUDE, BLOCK,
                        )  # fmt: skip
                if SAME[s]:
                    e = tl.where(row[:, None] == column[None, :], 0.0, e)
                masses += tl.sum(e, 1).to(tl.float64)
                y = pairs[s].columns
                at = y.data + (group * y.padded + column)[:, None] * y.ld + axis[None, :]
                points = tl.load(at, mask=(axis < y.ld)[None, :], other=0.0)
                total = tl.dot(e, points, total, input_precision=PRECISION)
    to = (group * parts + first + tl.program_id(1)) * tiles * BLOCK + row
    if chunk == 0:
        tl.store(mass + to, masses)
    tl.store(turned + to[:, None] * ld + axis[None, :], total, mask=(axis < ld)[None, :])


@triton.jit
def bandwidths_kernel(
    pairs, weights, grads, scales, slopes, out, tiles, column_tiles, stretch, stretches,
    w_padded, g_padded,
    SAME: tl.constexpr, OF: tl.constexpr, HAS: tl.constexpr, WAYS: tl.constexpr,
    INVERSE: tl.constexpr, EXCLUDE: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of E D by way of each kernel, of a tile of rows over a stretch of columns: ``out``
    (G, tiles, stretches, F)."""
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    begin = tl.program_id(1) * stretch
    end = tl.minimum(begin + stretch, column_tiles)
    scales += group * len(OF)
    slopes += group * len(OF)
    weights += group * w_padded
    grads += group * len(WAYS) * g_padded
    slot = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], tl.float64)
    for block in range(begin, end):
        column = block * BLOCK + tl.arange(0, BLOCK)
        squares = _all_squares(pairs, group, row, column, SAME, PRECISION, BLOCK, DEPTH)
        for f in tl.static_range(0, len(OF)):
            e = _slopes(
                squares, scales, slopes, grads, weights, g_padded, row, column, f,
                OF, HAS, WAYS, INVERSE, EXCLUDE, BLOCK,
            )  # fmt: skip
            sums = tl.sum(e * squares[OF[f]], 1).to(tl.float64)
            total += tl.where(slot == f, tl.sum(sums, 0), 0.0)
    to = out + (tl.program_id(0).to(tl.int64) * stretches + tl.program_id(1)) * len(OF) + slot
    tl.store(to, total, mask=slot < len(OF))


@triton.jit
def finish_kernel(
    turned, mass, points, out, count, width, padded, ld, parts,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``out`` (G, count, width) float32: 2 (mass x - turned), of all parts in order."""
    blocks = padded // BLOCK
    group = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    axis = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    masses = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK, DEPTH], tl.float64)
    for part in range(0, parts):
        own = (group * parts + part) * padded + row
        masses += tl.load(mass + own)
        total += tl.load(turned + own[:, None] * ld + axis[None, :]).to(tl.float64)
    x = tl.load(points + (group * padded + row)[:, None] * ld + axis[None, :]).to(tl.float64)
    value = 2.0 * (masses[:, None] * x - total)
    live = (row < count)[:, None] & (axis < width)[None, :]
    to = out + (group * count + row)[:, None] * width + axis[None, :]
    tl.store(to, value.to(tl.float32), mask=live)
