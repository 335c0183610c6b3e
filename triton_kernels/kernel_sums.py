"""Kernel sums and their gradients on GPUs, in Triton: kernels of all pairs, tile by tile, of which
none is stored.

Points are packed first: less the mean of those they meet, float32, padded with zeros to whole
tiles. One program owns a tile of rows and a stretch of columns: a matrix product (of few
coordinates, squared differences) gives the distances, which all bandwidths and products share. The
gradient makes the tiles again and multiplies dL / dD by the points. Sums of programs are kept apart
and added in order, in float64: no atomics, so results do not vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._attention_plan import Launch, matrix_precision, run
from ._kernel_sums_tiles import (
    Packed,
    Pair,
    bandwidths_kernel,
    finish_kernel,
    pack_kernel,
    points_kernel,
    sums_kernel,
)
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 64  # rows, and columns, of a tile
DEPTH = 16  # coordinates that are multiplied at a time; widths are padded to whole ones
NARROW = 8  # coordinates up to which distances are sums of squared differences
WIDEST = 128  # coordinates of a gradient that one program sums; more are further programs
PROGRAMS = 1024  # about as many as a launch is cut into
MIRRORED = 2**24  # numbers in sums of mirrored tiles that are held at a time
LOG2E = 1.4426950408889634


# ---- plans ---------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Pairs of numbers of point sets, the distance of each kernel, the kernels of each product."""

    distances: tuple[tuple[int, int], ...]
    kernels: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]
    inverse: bool
    exclude: bool

    @property
    def same(self) -> tuple[bool, ...]:
        """Whether a distance is of points to themselves."""
        return tuple(row == column for row, column in self.distances)

    def constants(self) -> dict[str, Any]:
        """As compile-time arguments."""
        return {
            "SAME": self.same,
            "OF": self.kernels,
            "HAS": tuple(f in own for own in self.products for f in range(len(self.kernels))),
            "INVERSE": self.inverse,
            "EXCLUDE": self.exclude,
            "PRECISION": matrix_precision(),
            "BLOCK": BLOCK,
            "DEPTH": DEPTH,
        }

    def exchanged(self) -> Plan:
        """Rows for columns."""
        return self._replace(distances=tuple((c, r) for r, c in self.distances))


class Part(NamedTuple):
    """A plan of some of the products, with the numbers of these and of their kernels in the whole,
    the ways they count, and which distances lead to points that want a gradient."""

    plan: Plan
    products: list[int]
    kernels: list[int]
    ways: tuple[int, ...]
    target: tuple[bool, ...]


def parts_of(plan: Plan, number: int) -> list[Part]:
    """What the gradient by point set ``number`` is made of: as rows, and as columns, of which
    there is nothing left to do where both are one set in every factor."""
    own = [all(plan.same[plan.kernels[f]] for f in factors) for factors in plan.products]
    found = []
    for oriented, ways in (
        (plan, [3 if o else 1 for o in own]),
        (plan.exchanged(), [0 if o else 2 for o in own]),
    ):
        leads = [row == number for row, _ in oriented.distances]
        products = [
            p
            for p, factors in enumerate(plan.products)
            if ways[p] > 0 and any(leads[plan.kernels[f]] for f in factors)
        ]
        if products:
            found.append(_part(oriented, products, [ways[p] for p in products], leads))
    return found


def _part(plan: Plan, products: list[int], ways: list[int], leads: list[bool]) -> Part:
    kernels = sorted({f for p in products for f in plan.products[p]})
    distances = sorted({plan.kernels[f] for f in kernels})
    less = plan._replace(
        distances=tuple(plan.distances[s] for s in distances),
        kernels=tuple(distances.index(plan.kernels[f]) for f in kernels),
        products=tuple(tuple(kernels.index(f) for f in plan.products[p]) for p in products),
    )
    return Part(less, products, kernels, tuple(ways), tuple(leads[s] for s in distances))


def stretches_of(tiles: int, column_tiles: int) -> tuple[int, int]:
    """(tiles of columns of a stretch, stretches), by sizes alone."""
    wanted = min(column_tiles, max(1, PROGRAMS // tiles))
    stretch = triton.cdiv(column_tiles, wanted)
    return stretch, triton.cdiv(column_tiles, stretch)


def _pairs(plan: Plan, packed: Sequence[Packed]) -> tuple[Pair, ...]:
    return tuple(Pair(packed[row], packed[column]) for row, column in plan.distances)


def _options(plan: Plan) -> dict[str, int]:
    return {"num_warps": 4 if len(plan.distances) == 1 else 8, "num_stages": 2}


def packed_like(x: torch.Tensor) -> Packed:
    """Room for packed points (G, count, width)."""
    groups, count, width = x.shape
    padded, ld = (triton.cdiv(max(1, n), unit) * unit for n, unit in ((count, BLOCK), (width, 16)))
    data = x.new_empty((groups, padded, ld), dtype=torch.float32)
    norms = x.new_empty((groups, padded), dtype=torch.float32)
    return Packed(data, norms, padded, ld, tl.constexpr(width if width <= NARROW else -1))


def plan_pack(x: torch.Tensor, centre: torch.Tensor, packed: Packed) -> Launch:
    """The launch that fills ``packed``."""
    arguments = {
        "x": x,
        "centre": centre,
        "out": packed.data,
        "norms": packed.norms,
        "count": x.shape[1],
        "width": x.shape[2],
        "padded": packed.padded,
        "ld": packed.ld,
        **dict(zip(("x_g", "x_n", "x_d"), x.stride(), strict=True)),
        "NARROW": packed.narrow.value,
        "BLOCK": BLOCK,
        "DEPTH": DEPTH,
    }
    grid = (x.shape[0] * (packed.padded // BLOCK),)
    return Launch(pack_kernel, grid, arguments, {"num_warps": 4})


def plan_sums(
    plan: Plan,
    packed: Sequence[Packed],
    weights: torch.Tensor,
    scales: torch.Tensor,
    along: torch.Tensor,
    down: torch.Tensor | None,
    first: int = 0,
) -> Launch:
    """The launch that fills ``along`` (G, stretches, P, N), of all rows or, with ``down``
    (G, tiles, P, N), of its tiles of rows from ``first``."""
    row, column = plan.distances[0]
    tiles = packed[row].padded // BLOCK if down is None else down.shape[1]
    column_tiles = packed[column].padded // BLOCK
    stretches = along.shape[1]
    stretch = triton.cdiv(column_tiles, stretches)
    arguments = {
        "pairs": _pairs(plan, packed),
        "weights": weights,
        "scales": scales,
        "along": along,
        "down": down,
        "tiles": tiles,
        "first": first,
        "column_tiles": column_tiles,
        "stretch": stretch,
        "stretches": stretches,
        "w_padded": weights.shape[1],
        **plan.constants(),
        "PRODUCTS": len(plan.products),
        "MIRROR": down is not None,
        "SLOTS": triton.next_power_of_2(len(plan.products)),
    }
    return Launch(sums_kernel, (tiles * along.shape[0], stretches), arguments, _options(plan))


def _pass(
    plan: Plan,
    packed: Sequence[Packed],
    weights: torch.Tensor,
    grads: torch.Tensor,
    scales: torch.Tensor,
    slopes: torch.Tensor,
    ways: Sequence[int],
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and the arguments that both kernels of gradients have."""
    row, column = plan.distances[0]
    tiles, column_tiles = (packed[p].padded // BLOCK for p in (row, column))
    stretch, stretches = stretches_of(tiles, column_tiles)
    return (tiles * scales.shape[0], stretches), {
        "pairs": _pairs(plan, packed),
        "weights": weights,
        "grads": grads,
        "scales": scales,
        "slopes": slopes,
        "tiles": tiles,
        "column_tiles": column_tiles,
        "stretch": stretch,
        "w_padded": weights.shape[1],
        "g_padded": grads.shape[2],
        "WAYS": tuple(ways),
        **plan.constants(),
    }


def plan_points(
    part: Part,
    packed: Sequence[Packed],
    weights: torch.Tensor,
    grads: torch.Tensor,
    scales: torch.Tensor,
    slopes: torch.Tensor,
    turned: torch.Tensor,
    mass: torch.Tensor,
    first: int = 0,
) -> Launch:
    """The launch that fills some parts, from ``first``, of ``turned`` (G, parts, N, ld) and of
    ``mass`` (G, parts, N)."""
    grid, arguments = _pass(part.plan, packed, weights, grads, scales, slopes, part.ways)
    ld = turned.shape[3]
    width = min(WIDEST, triton.next_power_of_2(ld))
    arguments |= {
        "turned": turned,
        "mass": mass,
        "parts": turned.shape[1],
        "first": first,
        "ld": ld,
        "TARGET": part.target,
        "WIDTH": width,
    }
    options = _options(part.plan) if width <= 64 else {"num_warps": 8, "num_stages": 2}
    return Launch(points_kernel, (*grid, triton.cdiv(ld, width)), arguments, options)


def plan_bandwidths(
    plan: Plan,
    packed: Sequence[Packed],
    weights: torch.Tensor,
    grads: torch.Tensor,
    scales: torch.Tensor,
    slopes: torch.Tensor,
    out: torch.Tensor,
) -> Launch:
    """The launch that fills ``out`` (G, tiles, stretches, F)."""
    ways = [1] * len(plan.products)
    grid, arguments = _pass(plan, packed, weights, grads, scales, slopes, ways)
    arguments |= {
        "out": out,
        "stretches": out.shape[2],
        "SLOTS": triton.next_power_of_2(len(plan.kernels)),
    }
    return Launch(bandwidths_kernel, grid, arguments, _options(plan))


def plan_finish(
    turned: torch.Tensor, mass: torch.Tensor, packed: Packed, out: torch.Tensor
) -> Launch:
    """The launch that makes a gradient ``out`` (G, count, width) of its parts."""
    groups, parts, padded, ld = turned.shape
    arguments = {
        "turned": turned,
        "mass": mass,
        "points": packed.data,
        "out": out,
        "count": out.shape[1],
        "width": out.shape[2],
        "padded": padded,
        "ld": ld,
        "parts": parts,
        "BLOCK": BLOCK,
        "DEPTH": DEPTH,
    }
    grid = (groups * (padded // BLOCK), ld // DEPTH)
    return Launch(finish_kernel, grid, arguments, {"num_warps": 4})


# ---- calls ---------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """A call of which something is to be computed: packed points, padded weights (G, M), factors of
    squared distances in kernels and in their derivatives, both (G, F)."""

    plan: Plan
    packed: list[Packed]
    weights: torch.Tensor
    scales: torch.Tensor
    slopes: torch.Tensor


def _plan(
    pairs: Sequence[int],
    kernels: Sequence[int],
    products: Sequence[int],
    inverse: bool,
    exclude: bool,
) -> Plan:
    masks = tuple(tuple(f for f in range(len(kernels)) if mask >> f & 1) for mask in products)
    distances = tuple(zip(pairs[::2], pairs[1::2], strict=True))
    return Plan(distances, tuple(kernels), masks, inverse, exclude)


def _centres(points: Sequence[torch.Tensor], plan: Plan) -> list[torch.Tensor]:
    """For each set of points the mean (G, width), float64, of all that it meets."""
    together = list(range(len(points)))
    for row, column in plan.distances:
        old, new = together[column], together[row]
        together = [new if own == old else own for own in together]
    means = {}
    for number in set(together):
        members = [p for p, own in zip(points, together, strict=True) if own == number]
        total = torch.stack([p.sum(1, dtype=torch.float64) for p in members]).sum(0)
        means[number] = total / max(1, sum(p.shape[1] for p in members))
    return [means[number] for number in together]


def _ready(
    points: Sequence[torch.Tensor],
    plan: Plan,
    bandwidths: torch.Tensor,
    weights: torch.Tensor | None,
) -> _Ready:
    if max(p.shape[1] for p in points) >= 2**31 - BLOCK:
        raise ValueError("kernel_sums: the triton backend takes fewer than 2^31 points")
    packed = [packed_like(p) for p in points]
    centres = _centres(points, plan)
    launches = [plan_pack(*one) for one in zip(points, centres, packed, strict=True)]
    run(launches, points[0].device)
    column = plan.distances[0][1]
    ones = points[0].new_ones((), dtype=torch.float32).expand(points[0].shape[0], 1)
    given = ones.expand(-1, points[column].shape[1]) if weights is None else weights
    # Bounds keep an exponent of zero times it, or of infinity times it, a number.
    slopes = (1.0 if plan.inverse else 0.5) / bandwidths / bandwidths
    slopes = torch.where(bandwidths == 0, torch.nan, slopes.clamp(1e-37, 1e37))
    scales = slopes if plan.inverse else (slopes * LOG2E).clamp_max(1e37)
    return _Ready(
        plan,
        packed,
        _padded(given, packed[column].padded),
        scales.to(torch.float32).contiguous(),
        slopes.to(torch.float32).contiguous(),
    )


def _padded(values: torch.Tensor, size: int) -> torch.Tensor:
    """float32, with zeros up to a size of the last axis."""
    found = values.new_zeros((*values.shape[:-1], size), dtype=torch.float32)
    found[..., : values.shape[-1]] = values
    return found


def _read(points: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As the kernels read them: from memory, where the sign of a negated view is not."""
    for p in points:
        if p.dtype not in DTYPES:
            raise TypeError(
                "kernel_sums: the triton backend supports float32, float16 and bfloat16, "
                f"got {p.dtype}"
            )
    return [p.resolve_neg() for p in points]


def kernel_sums(
    points: Sequence[torch.Tensor],
    pairs: Sequence[int],
    kernels: Sequence[int],
    bandwidths: torch.Tensor,
    products: Sequence[int],
    weights: torch.Tensor | None,
    inverse: bool,
    exclude: bool,
) -> torch.Tensor:
    """(G, P, N) float64, as the C++ op ``transfuse::kernel_sums``."""
    points = _read(points)
    plan = _plan(pairs, kernels, products, inverse, exclude)
    row, column = plan.distances[0]
    groups, rows = points[row].shape[:2]
    shape = (groups, len(products), rows)
    sums = bandwidths.new_zeros(shape, dtype=torch.float64)
    if sums.numel() == 0 or points[column].shape[1] == 0:
        return sums
    call = _ready(points, plan, bandwidths, weights)
    padded = call.packed[row].padded
    tiles = padded // BLOCK
    mirrored = sums.new_zeros((groups, len(products), padded))
    band = min(tiles, max(1, MIRRORED // mirrored.numel())) if all(plan.same) else tiles
    _, stretches = stretches_of(band, call.packed[column].padded // BLOCK)
    along = sums.new_empty((groups, stretches, len(products), padded))
    common = (plan, call.packed, call.weights, call.scales, along)
    if not all(plan.same):
        run([plan_sums(*common, None)], sums.device)
        return along.sum(1)[..., :rows].contiguous()
    for first in range(0, tiles, band):
        held = (groups, min(band, tiles - first), len(products), padded)
        down = sums.new_zeros(held, dtype=torch.float32)
        run([plan_sums(*common, down, first)], sums.device)
        mirrored += down.sum(1, dtype=torch.float64)
    return (along.sum(1) + mirrored)[..., :rows].contiguous()


def kernel_sums_backward(
    grad: torch.Tensor,
    points: Sequence[torch.Tensor],
    pairs: Sequence[int],
    kernels: Sequence[int],
    bandwidths: torch.Tensor,
    products: Sequence[int],
    weights: torch.Tensor | None,
    inverse: bool,
    exclude: bool,
    wanted: Sequence[int],
    bandwidths_wanted: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients by the points that are wanted, float32, and by the bandwidths, float64; empty
    where they are not. As the C++ op ``transfuse::kernel_sums_backward``."""
    points = _read(points)
    plan = _plan(pairs, kernels, products, inverse, exclude)
    found = [
        p.new_zeros((p.shape[0] if want else 0, *p.shape[1:]), dtype=torch.float32)
        for p, want in zip(points, wanted, strict=True)
    ]
    shape = (bandwidths.shape[0] if bandwidths_wanted else 0, len(kernels))
    of_bandwidths = bandwidths.new_zeros(shape)
    row, column = plan.distances[0]
    if points[row].shape[0] * points[row].shape[1] * points[column].shape[1] == 0:
        return found, of_bandwidths
    call = _ready(points, plan, bandwidths, weights)
    grads = _padded(grad, call.packed[row].padded)
    for number, out in enumerate(found):
        if out.numel() > 0:
            _to_points(call, grads, number, out)
    if bandwidths_wanted:
        tiles = call.packed[row].padded // BLOCK
        _, stretches = stretches_of(tiles, call.packed[column].padded // BLOCK)
        sums = grad.new_empty((grad.shape[0], tiles, stretches, len(kernels)))
        tables = (call.weights, grads, call.scales, call.slopes)
        run([plan_bandwidths(plan, call.packed, *tables, sums)], grad.device)
        of_bandwidths = -2.0 * sums.sum((1, 2)) / bandwidths
    return found, of_bandwidths


def _entries(t: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """``t[:, numbers]``, which would copy the list to the device and wait for that."""
    return torch.stack([t[:, n] for n in numbers], 1)


def _to_points(call: _Ready, grads: torch.Tensor, number: int, out: torch.Tensor) -> None:
    """Fill the gradient by one set of points."""
    packed = call.packed[number]
    parts = parts_of(call.plan, number)
    if not parts:
        return
    counts = []
    for part in parts:
        column = part.plan.distances[0][1]
        tiles, column_tiles = packed.padded // BLOCK, call.packed[column].padded // BLOCK
        counts.append(stretches_of(tiles, column_tiles)[1])
    turned = packed.data.new_empty((grads.shape[0], sum(counts), packed.padded, packed.ld))
    mass = turned.new_empty(turned.shape[:3], dtype=torch.float64)
    launches, first = [], 0
    for part, count in zip(parts, counts, strict=True):
        some = (_entries(t, part.kernels) for t in (call.scales, call.slopes))
        tables = (call.weights, _entries(grads, part.products), *some)
        launches.append(plan_points(part, call.packed, *tables, turned, mass, first))
        first += count
    launches.append(plan_finish(turned, mass, packed, out))
    run(launches, out.device)
