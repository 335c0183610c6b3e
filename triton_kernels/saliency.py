"""Gradient-weighted and NormGrad maps on GPUs, in Triton.

One program owns a block of locations of one sample and goes through the channels, or, where weights
of channels are pooled first, a block of channels and goes through the locations. Sums are float32,
kept apart for each place of a tile until the end. No atomics, so results do not vary.
"""

from __future__ import annotations

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Codes of transfuse.ops._saliency_call.
GRADCAM, PLUS, XGRADCAM, LAYERCAM, HIRESCAM, ELEMENTWISE = range(6)
SCALING, BIAS, CONV, DEPTHWISE = range(4)
NORM, FILTER_NORM, SUM, MAX = range(4)
PLUS_EPS, POOLED_EPS = 1e-6, 1e-7


@triton.jit
def _tile(x, channel, location, live, x_c, x_l):
    """A tile of channels x locations as float32, 0 where nothing is."""
    at = x + channel.to(tl.int64)[:, None] * x_c + location.to(tl.int64)[None, :] * x_l
    return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _pool_kernel(
    act, grad, weights, channels, locations, a_b, a_c, a_l, g_b, g_c, g_l,
    METHOD: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``weights`` (B, C): of Grad-CAM, Grad-CAM++ or XGrad-CAM."""
    sample = tl.program_id(0).to(tl.int64)
    act += sample * a_b
    grad += sample * g_b
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < channels
    first = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    second = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for start in range(0, locations, BLOCK_L):
        location = start + tl.arange(0, BLOCK_L)
        live = there[:, None] & (location < locations)[None, :]
        if METHOD != 1:
            g = _tile(grad, channel, location, live, g_c, g_l)
            if METHOD == 0:
                first += g
            else:
                a = _tile(act, channel, location, live, a_c, a_l)
                first += a * g
                second += a
        else:
            second += _tile(act, channel, location, live, a_c, a_l)
    total = tl.sum(second, axis=1)
    if METHOD == 1:
        for start in range(0, locations, BLOCK_L):
            location = start + tl.arange(0, BLOCK_L)
            live = there[:, None] & (location < locations)[None, :]
            g = _tile(grad, channel, location, live, g_c, g_l)
            square = g * g
            below = square * (2.0 + total[:, None] * g)
            below = below + tl.where(below < 0, -EPS, EPS)
            first += tl.where(g < 0, 0.0, g) * (square / below)
    weight = tl.sum(first, axis=1)
    if METHOD == 0:
        weight = weight / locations
    if METHOD == 2:
        weight = weight / (total + tl.where(total < 0, -EPS, EPS))
    tl.store(weights + sample * channels + channel, weight, mask=there)


@triton.jit
def _map_kernel(
    act, grad, weights, out, channels, locations, a_b, a_c, a_l, g_b, g_c, g_l,
    METHOD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``out`` (B, L); ``weights`` (B, C) of methods that pool them."""
    sample = tl.program_id(0).to(tl.int64)
    act += sample * a_b
    grad += sample * g_b
    location = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = location < locations
    total = tl.zeros([BLOCK_C, BLOCK_L], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        live = (channel < channels)[:, None] & inside[None, :]
        a = _tile(act, channel, location, live, a_c, a_l)
        if METHOD < 3:
            at = weights + sample * channels + channel
            total += tl.load(at, mask=channel < channels, other=0.0)[:, None] * a
        else:
            g = _tile(grad, channel, location, live, g_c, g_l)
            if METHOD == 3:
                g = tl.where(g < 0, 0.0, g)
            x = a * g
            if METHOD == 5:
                x = tl.where(x < 0, 0.0, x)
            total += x
    tl.store(out + sample * locations + location, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _statistics_kernel(
    x, out, channels, locations, x_b, x_c, x_l,
    PHASE2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """``out`` (B, K, L): sum of squares; of squares of either sign; sum; largest and smallest."""
    sample = tl.program_id(0).to(tl.int64)
    x += sample * x_b
    location = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = location < locations
    first = tl.full([BLOCK_C, BLOCK_L], -float("inf") if PHASE2 == 3 else 0.0, tl.float32)
    second = tl.full([BLOCK_C, BLOCK_L], float("inf") if PHASE2 == 3 else 0.0, tl.float32)
    strange = tl.zeros([BLOCK_C, BLOCK_L], tl.int32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        live = (channel < channels)[:, None] & inside[None, :]
        value = _tile(x, channel, location, live, x_c, x_l)
        if PHASE2 == 0:
            first += value * value
        elif PHASE2 == 1:
            positive = tl.where(value < 0, 0.0, value)
            negative = tl.where(value > 0, 0.0, value)
            first += positive * positive
            second += negative * negative
        elif PHASE2 == 2:
            first += value
        else:
            strange += (value != value).to(tl.int32)
            first = tl.maximum(first, tl.where(live, value, -float("inf")))
            second = tl.minimum(second, tl.where(live, value, float("inf")))
    kinds: tl.constexpr = 2 if PHASE2 % 2 == 1 else 1
    out += sample * kinds * locations + location
    if PHASE2 == 3:
        bad = tl.sum(strange, axis=0) > 0
        tl.store(out, tl.where(bad, float("nan"), tl.max(first, axis=0)), mask=inside)
        tl.store(out + locations, tl.where(bad, float("nan"), tl.min(second, axis=0)), mask=inside)
    else:
        tl.store(out, tl.sum(first, axis=0), mask=inside)
        if PHASE2 == 1:
            tl.store(out + locations, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _neighbour(
    location, tap, rows, columns, depth, out_rows, out_columns,
    KH: tl.constexpr, KW: tl.constexpr, SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """What entry ``tap`` of the kernel sees from output locations: input locations, and whether
    they are inside."""
    z = location // (out_rows * out_columns) * SD - PD + tap // (KH * KW) * DD
    y = location // out_columns % out_rows * SH - PH + tap // KW % KH * DH
    x = location % out_columns * SW - PW + tap % KW * DW
    inside = (z >= 0) & (z < depth) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return (z * rows + y) * columns + x, inside


@triton.jit
def _product_kernel(
    of_act, of_grad, out, depth, rows, columns, locations, out_rows, out_columns,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DD: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    PHASE2: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Statistics of a neighbourhood times those of a gradient: the map, (B, locations)."""
    sample = tl.program_id(0).to(tl.int64)
    size = depth * rows * columns
    kinds: tl.constexpr = 2 if PHASE2 % 2 == 1 else 1
    of_act += sample * kinds * size
    of_grad += sample * kinds * locations
    location = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = location < locations
    first = tl.full([BLOCK_L], -float("inf") if PHASE2 == 3 else 0.0, tl.float32)
    second = tl.full([BLOCK_L], float("inf") if PHASE2 == 3 else 0.0, tl.float32)
    strange = tl.zeros([BLOCK_L], tl.int32)
    for tap in range(KD * KH * KW):
        at, there = _neighbour(
            location, tap, rows, columns, depth, out_rows, out_columns,
            KH, KW, SD, SH, SW, PD, PH, PW, DD, DH, DW,
        )  # fmt: skip
        mask = inside & there
        one = tl.load(of_act + at, mask=mask, other=0.0)
        if PHASE2 == 3:
            # Zeros around the activations take part.
            strange += (one != one).to(tl.int32)
            two = tl.load(of_act + size + at, mask=mask, other=0.0)
            first = tl.maximum(first, one)
            second = tl.minimum(second, two)
        else:
            first += one
            if PHASE2 == 1:
                second += tl.load(of_act + size + at, mask=mask, other=0.0)
    g = tl.load(of_grad + location, mask=inside, other=0.0)
    if PHASE2 == 0:
        value = tl.sqrt(first) * tl.sqrt(g)
    elif PHASE2 == 2:
        value = first * g
    else:
        h = tl.load(of_grad + locations + location, mask=inside, other=0.0)
        if PHASE2 == 1:
            p = tl.sqrt(first) * tl.sqrt(g)
            m = tl.sqrt(second) * tl.sqrt(h)
            value = tl.sqrt(p * p + m * m)
        else:
            top = tl.maximum(tl.maximum(first * g, first * h), tl.maximum(second * g, second * h))
            value = tl.where((strange > 0) | (g != g), float("nan"), top)
    tl.store(out + sample * locations + location, value, mask=inside)


@triton.jit
def _entries_kernel(
    act, grad, out, channels, depth, rows, columns, locations, a_b, a_c, a_l, g_b, g_c, g_l,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ACT: tl.constexpr, PHASE2: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Phase 2 over channels and the neighbourhood of each; of the gradient alone unless ACT."""
    sample = tl.program_id(0).to(tl.int64)
    act += sample * a_b
    grad += sample * g_b
    location = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = location < locations
    total = tl.full([BLOCK_C, BLOCK_L], -float("inf") if PHASE2 == 3 else 0.0, tl.float32)
    strange = tl.zeros([BLOCK_C, BLOCK_L], tl.int32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        live = (channel < channels)[:, None] & inside[None, :]
        g = _tile(grad, channel, location, live, g_c, g_l)
        for tap in range(KD * KH * KW):
            value = g
            if ACT:
                at, there = _neighbour(
                    location, tap, rows, columns, depth, rows, columns,
                    KH, KW, 1, 1, 1, PD, PH, PW, 1, 1, 1,
                )  # fmt: skip
                value = g * _tile(act, channel, at, live & there[None, :], a_c, a_l)
            if PHASE2 == 3:
                strange += (value != value).to(tl.int32)
                total = tl.maximum(total, tl.where(live, value, -float("inf")))
            elif PHASE2 == 2:
                total += value
            else:
                if PHASE2 == 1:
                    value = tl.where(value < 0, 0.0, value)
                total += value * value
    if PHASE2 == 3:
        bad = tl.sum(strange, axis=0) > 0
        result = tl.where(bad, float("nan"), tl.max(total, axis=0))
    else:
        result = tl.sum(total, axis=0)
        if PHASE2 < 2:
            result = tl.sqrt(result)
    tl.store(out + sample * locations + location, result, mask=inside)


# ---- launches ------------------------------------------------------------------------------------


def _blocks(x: torch.Tensor) -> dict[str, int]:
    """Tiles that are long along the axis that is contiguous."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return {"BLOCK_C": 64, "BLOCK_L": 16} if last else {"BLOCK_C": 16, "BLOCK_L": 64}


def _strides(letter: str, x: torch.Tensor) -> dict[str, int]:
    return dict(zip((f"{letter}_b", f"{letter}_c", f"{letter}_l"), x.stride(), strict=True))


OPTIONS = {"num_warps": 4, "num_stages": 2}


def plan_map(
    act: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, method: int
) -> list[Launch]:
    """The launches that fill ``out`` (B, L), and ``weights`` (B, C) where the method pools them."""
    batch, channels, locations = act.shape
    shared = {
        "act": act,
        "grad": grad,
        "weights": weights,
        "channels": channels,
        "locations": locations,
        **_strides("a", act),
        **_strides("g", grad),
        "METHOD": method,
    }
    blocks = _blocks(act)
    launches = []
    if method in (GRADCAM, PLUS, XGRADCAM):
        eps = PLUS_EPS if method == PLUS else POOLED_EPS
        grid = (batch, triton.cdiv(channels, blocks["BLOCK_C"]), 1)
        launches.append(Launch(_pool_kernel, grid, {**shared, "EPS": eps, **blocks}, OPTIONS))
    grid = (batch, triton.cdiv(locations, blocks["BLOCK_L"]), 1)
    launches.append(Launch(_map_kernel, grid, {**shared, "out": out, **blocks}, OPTIONS))
    return launches


def plan_statistics(x: torch.Tensor, out: torch.Tensor, phase2: int) -> Launch:
    """The launch that fills ``out`` (B, K, L)."""
    batch, channels, locations = x.shape
    blocks = _blocks(x)
    arguments = {
        "x": x,
        "out": out,
        "channels": channels,
        "locations": locations,
        **_strides("x", x),
        "PHASE2": phase2,
        **blocks,
    }
    grid = (batch, triton.cdiv(locations, blocks["BLOCK_L"]), 1)
    return Launch(_statistics_kernel, grid, arguments, OPTIONS)


def _axes(letter: str, numbers: list[int]) -> dict[str, int]:
    return dict(zip((f"{letter}D", f"{letter}H", f"{letter}W"), numbers, strict=True))


def plan_product(
    of_act: torch.Tensor,
    of_grad: torch.Tensor,
    out: torch.Tensor,
    grid: list[int],
    out_grid: list[int],
    geometry: tuple[list[int], ...],
    phase2: int,
) -> Launch:
    """The launch that makes a map of statistics of both tensors."""
    batch, locations = out.shape
    block = 128
    arguments = {
        "of_act": of_act,
        "of_grad": of_grad,
        "out": out,
        **dict(zip(("depth", "rows", "columns"), grid, strict=True)),
        "locations": locations,
        "out_rows": out_grid[1],
        "out_columns": out_grid[2],
    }
    for letter, numbers in zip("KSPD", geometry, strict=True):
        arguments |= _axes(letter, numbers)
    arguments |= {"PHASE2": phase2, "BLOCK_L": block}
    return Launch(_product_kernel, (batch, triton.cdiv(locations, block), 1), arguments, OPTIONS)


def plan_entries(
    act: torch.Tensor,
    grad: torch.Tensor,
    out: torch.Tensor,
    grid: list[int],
    phase1: int,
    phase2: int,
    kernel: list[int],
    padding: list[int],
) -> Launch:
    """The launch of the phases ``scaling``, ``bias`` and depth-wise."""
    batch, channels, locations = grad.shape
    blocks = _blocks(grad)
    arguments = {
        "act": act,
        "grad": grad,
        "out": out,
        "channels": channels,
        **dict(zip(("depth", "rows", "columns"), grid, strict=True)),
        "locations": locations,
        **_strides("a", act),
        **_strides("g", grad),
        **_axes("K", kernel),
        **_axes("P", padding),
        "ACT": phase1 != BIAS,
        "PHASE2": phase2,
        **blocks,
    }
    launch_grid = (batch, triton.cdiv(locations, blocks["BLOCK_L"]), 1)
    return Launch(_entries_kernel, launch_grid, arguments, OPTIONS)


def _check(name: str, act: torch.Tensor) -> None:
    if act.dtype not in DTYPES:
        raise TypeError(
            f"{name}: the triton backend supports float32, float16 and bfloat16, got {act.dtype}"
        )
    if max(act.shape[1:]) >= 2**31 or act.shape[0] >= 2**31:
        raise ValueError(f"{name}: the triton backend takes fewer than 2^31 of each axis")


def grad_weighted_map(act: torch.Tensor, grad: torch.Tensor, method: int) -> torch.Tensor:
    """The map (B, L), as the C++ op ``transfuse::grad_weighted_map``."""
    _check("grad_weighted_map", act)
    batch, channels, locations = act.shape
    out = act.new_empty((batch, locations), dtype=torch.float32)
    weights = act.new_empty((batch, channels), dtype=torch.float32)
    if out.numel() > 0:
        run(plan_map(act, grad, weights, out, method), act.device)
    return out


def normgrad_map(
    act: torch.Tensor,
    grad: torch.Tensor,
    grid: list[int],
    phase1: int,
    phase2: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """The map (B, L'), as the C++ op ``transfuse::normgrad_map``."""
    _check("normgrad_map", act)
    batch, _, locations = grad.shape
    out = grad.new_empty((batch, locations), dtype=torch.float32)
    if out.numel() == 0:
        return out
    if phase1 != CONV:
        launch = plan_entries(act, grad, out, grid, phase1, phase2, kernel, padding)
        run([launch], act.device)
        return out
    kinds = 2 if phase2 in (FILTER_NORM, MAX) else 1
    out_grid = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(grid, kernel, stride, padding, dilation, strict=True)
    ]
    found = [x.new_empty((batch, kinds, x.shape[2]), dtype=torch.float32) for x in (act, grad)]
    launches = [plan_statistics(x, own, phase2) for x, own in zip((act, grad), found, strict=True)]
    geometry = (kernel, stride, padding, dilation)
    launches.append(plan_product(*found, out, grid, out_grid, geometry, phase2))
    run(launches, act.device)
    return out
