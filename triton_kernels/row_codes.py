"""Codes of rows on GPUs, in Triton (see ``csrc/include/transfuse/row_codes.h``).

One program owns some rows and goes through their numbers once. Codes are sums of 64-bit integers,
so that they have the bits of the CPU's whatever the order.
"""

from __future__ import annotations

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

TILE = 1024  # numbers that a program takes at a time
PROGRAMS = 256  # of a launch at least, if there are as many rows
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _mixed(z):
    """The finaliser of splitmix64, a bijection."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _counted(v, edges, count, STEPS: tl.constexpr):
    """How many of the ascending edges are at most v, by bisection; 0 for NaN."""
    low = tl.zeros(v.shape, tl.int32)
    high = low + count
    for _ in tl.static_range(STEPS):
        open_ = low < high
        middle = (low + high) // 2
        above = v >= tl.load(edges + middle, mask=open_, other=0.0)
        low = tl.where(open_ & above, middle + 1, low)
        high = tl.where(open_ & (above == 0), middle, high)
    return low


@triton.jit
def _codes_kernel(
    x, edges, codes, counts, rows, columns, x_n, x_u, edge_count, lowest,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Codes (N, 2) of BLOCK_N rows, and their NaNs and numbers below the first edge (programs, 2).
    STEPS of the bisection of the edges; 0 without edges: the numbers themselves, as float64."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.zeros([BLOCK_N, BLOCK_U], tl.uint64)
    second = tl.zeros([BLOCK_N, BLOCK_U], tl.uint64)
    missing = tl.zeros([BLOCK_N, BLOCK_U], tl.int64)
    below = tl.zeros([BLOCK_N, BLOCK_U], tl.int64)
    for start in range(0, columns, BLOCK_U):
        column = start + tl.arange(0, BLOCK_U)
        live = (row < rows)[:, None] & (column < columns)[None, :]
        at = x + row.to(tl.int64)[:, None] * x_n + column.to(tl.int64)[None, :] * x_u
        v = tl.load(at, mask=live, other=0.0)
        strange = v != v
        missing += (live & strange).to(tl.int64)
        if STEPS == 0:
            number = tl.where(v == 0, 0.0, v).to(tl.float64)  # -0 becomes 0
            symbol = number.to(tl.uint64, bitcast=True)
        else:
            cell = _counted(v.to(tl.float32), edges, edge_count, STEPS) - 1
            low = cell < 0
            below += (live & low & (strange == 0)).to(tl.int64)
            symbol = tl.where(low, lowest, cell).to(tl.uint64)
        key = _mixed((column + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        half = _mixed(symbol ^ key[None, :])
        other = (half ^ (half >> 29)) * 0xD6E8FEB86659FD93
        zero = tl.zeros([BLOCK_N, BLOCK_U], tl.uint64)
        first += tl.where(live, half, zero)
        second += tl.where(live, other, zero)
    to = codes + 2 * row.to(tl.int64)
    one, two = _mixed(tl.sum(first, axis=1)), _mixed(tl.sum(second, axis=1))
    tl.store(to, one.to(tl.int64, bitcast=True), mask=row < rows)
    tl.store(to + 1, two.to(tl.int64, bitcast=True), mask=row < rows)
    own = counts + 2 * tl.program_id(0).to(tl.int64)
    tl.store(own, tl.sum(tl.sum(missing, axis=1), axis=0))
    tl.store(own + 1, tl.sum(tl.sum(below, axis=1), axis=0))


def plan_codes(
    x: torch.Tensor, edges: torch.Tensor | None, wrap: bool
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """Codes (N, 2), counts of each program (programs, 2), and the launch that fills them."""
    rows, columns = x.shape
    count = 0 if edges is None else edges.shape[0]
    across = min(64, triton.next_power_of_2(max(1, columns)))
    down = min(TILE // across, triton.next_power_of_2(max(1, rows // PROGRAMS)))
    programs = triton.cdiv(rows, down)
    codes = x.new_empty((rows, 2), dtype=torch.int64)
    counts = x.new_empty((programs, 2), dtype=torch.int64)
    arguments = {
        "x": x,
        "edges": edges,
        "codes": codes,
        "counts": counts,
        "rows": rows,
        "columns": columns,
        "x_n": x.stride(0),
        "x_u": x.stride(1),
        "edge_count": count,
        "lowest": count - 1 if wrap else 0,
        "STEPS": count.bit_length(),
        "BLOCK_N": down,
        "BLOCK_U": across,
    }
    return codes, counts, Launch(_codes_kernel, (programs,), arguments, OPTIONS)


def row_codes(
    x: torch.Tensor, edges: torch.Tensor | None, wrap: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, 2), and numbers of NaNs and of numbers below the first edge, as the C++ op
    ``transfuse::row_codes``."""
    if max(x.shape) >= 2**31 - 128 or (edges is not None and edges.shape[0] >= 2**30):
        raise ValueError("row_codes: the triton backend takes fewer than 2^31 rows and columns")
    codes, counts, launch = plan_codes(x, edges, wrap)
    run([launch], x.device)
    return codes, counts.sum(0)
