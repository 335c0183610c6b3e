"""Compile every attention kernel ahead of time, without a GPU.

``python -m transfuse.triton_kernels.compile_check [--only TEXT] [--jobs N]`` plans
representative calls on meta tensors, compiles exactly the launches they would make for sm_80 and
sm_90, and prints registers, spills and shared memory of each. It exits with 1 if a kernel does not
compile, needs more shared memory than its architecture has, or (hot forward kernels) spills.

Registers and spills are read from the binary by the cuobjdump inside the Triton wheel; where that
is missing they are shown as ``-`` and not checked. Nothing here says how fast a kernel is.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ._attention_plan import Launch
from ._triton import triton
from .adain import plan_content, plan_style
from .attention_backward import Tangents, plan_gradients
from .attention_forward import plan_forward, plan_fused
from .attention_jvp import plan_jvp
from .head_curvature import plan_backward as plan_head_backward
from .head_curvature import plan_forward as plan_head_forward
from .kernel_sums import Plan as KernelPlan
from .kernel_sums import (
    packed_like,
    parts_of,
    plan_bandwidths,
    plan_finish,
    plan_pack,
    plan_points,
    plan_sums,
    stretches_of,
)
from .mix import BLOCK, plan_mix
from .multitensor import BYTES, HASHED, ONE, plan_dots, plan_lincomb
from .multitensor_merge import BITS, WORDS, plan_count, plan_elect, plan_ratio
from .multitensor_sums import plan_gram as plan_products
from .multitensor_sums import plan_norm
from .nes import plan_gradient, plan_perturb
from .patch_gram import plan_gram
from .row_codes import plan_codes
from .saliency import plan_entries, plan_map, plan_product, plan_statistics
from .simplex import plan_min_norm, plan_pareto
from .token_merging import plan_gather, plan_nearest, plan_push, plan_segments
from .window_attention import plan_forward as plan_windows

# Shared memory one block may use, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


class Case(NamedTuple):
    """One planned call; ``hot`` kernels must not spill."""

    name: str
    plan: Callable[[], list[Launch]]
    hot: bool = False


class Result(NamedTuple):
    """One compiled kernel. Registers and spill (bytes per thread) are None if unknown."""

    case: str
    kernel: str
    arch: int
    tile: str
    warps: int
    registers: int | None
    spill: int | None
    shared: int
    seconds: float
    error: str


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Call(NamedTuple):
    """Meta arguments of the core: 2 x 8 heads, 1000 queries, sources of the given lengths."""

    dtype: torch.dtype
    width: int
    lengths: tuple[int, ...] = (1000,)
    bias: str = ""
    mask: str = ""
    causal: int = 0
    wide: bool = False

    def rows(self, length: int) -> torch.Tensor:
        """(2, 8, length, width), ``wide``: with offsets inside a tile beyond 32 bits."""
        shape = (2, 8, length, self.width)
        if self.wide:
            strides = (64, 128, 2**27, 1)
            return torch.empty_strided(shape, strides, dtype=self.dtype, device="meta")
        return _meta(*shape, dtype=self.dtype)

    def pair(self, kind: str, length: int, dtype: torch.dtype) -> torch.Tensor | None:
        if not kind:
            return None
        shape = (1, 1, 1, length) if kind == "key" else (2, 1, 1000, length)
        return _meta(*shape, dtype=dtype).expand(2, 8, 1000, length)

    def arguments(self) -> tuple:
        query = self.rows(1000)
        keys = [self.rows(length) for length in self.lengths]
        count = len(keys)
        biases = [self.pair(self.bias, length, self.dtype) for length in self.lengths]
        masks = [self.pair(self.mask, length, torch.bool) for length in self.lengths]
        scales = [self.width**-0.5] * count
        return query, keys, keys, biases, masks, [None] * count, scales, [self.causal] * count

    def forward(self) -> list[Launch]:
        return plan_forward(*self.arguments())[1]

    def fused(self) -> list[Launch]:
        query, keys, *rest = self.arguments()
        rows = _meta(2, 1, 1000, dtype=torch.float32).expand(2, 8, 1000)
        index = _meta(2, dtype=torch.int64)
        count = len(keys)
        weights = [_meta(2, 8, length, dtype=torch.float32) for length in self.lengths]
        rest[-3] = [index] * count
        return plan_fused(
            query,
            query,
            rows,
            index,
            keys,
            rest[0],
            keys,
            weights,
            [index] * count,
            *rest[1:],
            list(range(count)),
            [rows] * count,
        )[1]

    def jvp(self) -> list[Launch]:
        arguments = self.arguments()
        query, keys, values, biases, *_ = arguments
        lse = _meta(2, 8, 1000, dtype=torch.float32)
        return plan_jvp(*arguments, query, lse, query, keys, values, biases)[1]

    def backward(self, second: bool = False) -> list[Launch]:
        arguments = self.arguments()
        query, keys, values, biases, *_ = arguments
        lse = _meta(2, 8, 1000, dtype=torch.float32)
        tangents = Tangents(query, keys, values, biases, query, lse) if second else None
        flags = [bool(self.bias)] * len(keys)
        return plan_gradients(query, lse, *arguments, query, lse, flags, tangents)[1]

    def jvp_backward(self) -> list[Launch]:
        return self.backward(second=True)


def _adain(direction: int, dtype: torch.dtype, layout: torch.memory_format) -> list[Launch]:
    """Forward (0), backward (1) or forward mode (2) of a feature map with a shared style."""
    content = _meta(2, 320, 33, 64, dtype=dtype).to(memory_format=layout)
    style = _meta(1, 320, 20, 20, dtype=dtype).to(memory_format=layout)
    shares = _meta(2, 640, dtype=torch.float32) if direction == 1 else None
    moved = (None, None) if direction == 0 else (content, style if direction == 2 else None)
    launches, _ = plan_content(
        direction, content, moved[0], style, moved[1], content, shares, (2, 3), 1e-4
    )
    if direction == 1:
        launches += plan_style(style, shares, style, (2, 3))[0]
    return launches


def _windows(dtype: torch.dtype, width: int, slots: int, biased: bool) -> list[Launch]:
    """Four windows of ``slots`` tokens of 2 x 8 heads."""
    tensor = _meta(2, 8, 4 * slots, width, dtype=dtype)
    bias = _meta(1, 8, 1, slots * slots, dtype=dtype) if biased else None
    codes = [_meta(slots, dtype=torch.int32) if biased else None] * 2
    table = _meta(4, slots, dtype=torch.int32)
    return plan_windows(tensor, tensor, tensor, bias, *codes, table, width**-0.5)[1]


def _merging(op: str, dtype: torch.dtype, option: int = 0) -> list[Launch]:
    """One op on 2 x 1024 tokens of 320 channels, 600 rows or references, with every option."""
    x, other = _meta(2, 1024, 320, dtype=dtype), _meta(1, 600, 320, dtype=dtype)
    near, index = (_meta(2, 1024, dtype=t) for t in (torch.float32, torch.int64))
    if op == "nearest":
        mask = _meta(1, 600, dtype=torch.bool) if option else None
        inverses = (near, _meta(1, 600, dtype=torch.float32))
        return plan_nearest(x, other, mask, bool(option), inverses, near, index)
    if op == "push":
        return [plan_push(x, other, near, index, 0.9, 0.65, x)]
    plan = (index, index, _meta(2, 601, dtype=torch.int64))
    merged, scale = _meta(2, 600, 320, dtype=dtype), near if option in (0, 3) else None
    if op == "gather":
        return [plan_gather(merged, scale, *plan, option, x)]
    winner = _meta(2, 600, 320, dtype=torch.int64) if option == 4 else None
    return [plan_segments(x, scale, *plan[1:], option, merged, winner)]


def _mix(dtype: torch.dtype, outputs: int, products: bool, own: bool) -> list[Launch]:
    """Three predictions of a latent; ``own``: coefficients of each sample."""
    inputs = [_meta(2, 4, 128, 128, dtype=dtype) for _ in range(3)]
    rows = _meta(2, outputs, 4, dtype=torch.float64) if own else None
    pairs = [0, 0, 0, 1, 1, 1, 0, 3, 1, 3] if products else []
    partials = _meta(2, triton.cdiv(4 * 128 * 128, BLOCK), len(pairs) // 2, dtype=torch.float64)
    numbers = [] if own else [0.5] * (4 * outputs)
    return plan_mix(inputs, rows, numbers, inputs[:outputs], partials, pairs)


def _nes(dtype: torch.dtype | None, masked: bool) -> list[Launch]:
    """A clip of 16 frames: 6 pairs around it, or (no dtype) the sum over 24 samples."""
    shape, seed, start = (16, 3, 112, 112), 2**63 - 1, 2**33
    mask = _meta(*shape, dtype=torch.bool) if masked else None
    if dtype is None:
        weights, out = _meta(24, dtype=torch.float64), _meta(*shape, dtype=torch.float32)
        return plan_gradient(weights, mask, out, seed, start)
    x = _meta(*shape, dtype=dtype)
    return plan_perturb(x, mask, _meta(12, *shape, dtype=dtype), seed, start, 6, 1e-3)


def _patch_gram(dtype: torch.dtype, kernel: int, stride: int) -> list[Launch]:
    """The first layer of a convolutional network on 32 images of 224 x 224."""
    features, padding = 3 * kernel * kernel, kernel // 2
    count = (224 + 2 * padding - kernel) // stride + 1
    partial = _meta(1, 49, features, features, dtype=torch.float32)
    pairs = [(number, number) for number in (kernel, stride, padding, 1, count)]
    return plan_gram(_meta(1, 32, 3, 224, 224, dtype=dtype), partial, *pairs)


def _lists(
    base: torch.dtype, delta: torch.dtype, mode: int, dots: bool, partitions: int = 10
) -> list[Launch]:
    """8 task vectors of 152 tensors."""
    partitions = 1 if mode == ONE else partitions
    addresses = {
        name: _meta(*shape, dtype=torch.int64)
        for name, shape in {
            "chunks": (42_000, 3),
            "deltas": (8 * 152,),
            "ids": (152,),
            "keys": (152,),
        }.items()
    }
    rest = _meta(152, dtype=torch.int64)
    likes = _meta(1, dtype=base), _meta(1, dtype=delta)
    if dots:
        tables = {**addresses, "grads": rest}
        partial = _meta(42_000, 8, partitions, dtype=torch.float32)
        sums = _meta(8, 152, partitions, dtype=torch.float64)
        return plan_dots(tables, _meta(153, dtype=torch.int64), partial, sums, *likes, mode=mode)
    table = _meta(8, 152, partitions, dtype=torch.float32)
    tables = {**addresses, "base": rest, "out": rest, "coefficients": table}
    return plan_lincomb(tables, *likes, lists=8, mode=mode, has_base=True)


def _sums_of_lists(dtype: torch.dtype, lists: int, order: int | None) -> list[Launch]:
    """A norm, with factors, of 152 tensors; or products of lists of them."""
    chunks, rest = _meta(42_000, 3, dtype=torch.int64), _meta(152, dtype=torch.int64)
    like = _meta(1, dtype=dtype)
    if order is not None:
        partial = _meta(42_000, dtype=torch.float64)
        return [plan_norm(chunks, rest, rest, partial, like, like, order)]
    partial = _meta(42_000, lists, lists, dtype=torch.float64)
    return [plan_products(chunks, _meta(lists, 152, dtype=torch.int64), partial, like)]


def _merge(kind: str, dtype: torch.dtype) -> list[Launch]:
    """4 models of 152 tensors: means with 50 settings, a digit of a threshold, an election."""
    chunks, like = _meta(42_000, 3, dtype=torch.int64), _meta(1, dtype=dtype)
    four, rest = _meta(4, 152, dtype=torch.int64), _meta(152, dtype=torch.int64)
    numbers = _meta(4, dtype=torch.float32)
    if kind == "count":
        counts, words = _meta(1024, 256, dtype=torch.int32), _meta(1, dtype=WORDS[dtype])
        bits = BITS[dtype]
        return [plan_count(chunks, rest, rest, counts, words, bits, a) for a in (bits, bits - 8)]
    if kind == "elect":
        tables = {"base": rest, "deltas": four, "out": rest, "thresholds": numbers}
        return [plan_elect({"chunks": chunks, **tables}, like, like, 0.7)]
    tables = {
        "chunks": chunks,
        "thetas": four,
        "weights": four,
        "out": _meta(50, 152, dtype=torch.int64),
        "coefficients": _meta(50, 4, dtype=torch.float32),
        "floors": numbers,
    }
    likes = {f"{name}_like": like for name in ("theta", "weight", "out")}
    return [plan_ratio(tables, likes, _meta(42_000, dtype=torch.int32))]


def _kernel_sums(
    dtype: torch.dtype, widths: tuple[int, ...], plan: KernelPlan, backward: int | None = None
) -> list[Launch]:
    """Sums over 1024 points, or gradients by one set of them (-1: by the bandwidths)."""
    points = [_meta(2, 1024, width, dtype=dtype) for width in widths]
    packed = [packed_like(p) for p in points]
    weights = _meta(2, 1024, dtype=torch.float32)
    factors = _meta(2, len(plan.kernels), dtype=torch.float32)
    stretches = stretches_of(16, 16)[1]
    products = len(plan.products)
    if backward is None:
        centre = _meta(2, widths[0], dtype=torch.float64)
        along = _meta(2, stretches, products, 1024, dtype=torch.float64)
        mirrored = _meta(2, 16, products, 1024, dtype=torch.float32)
        down = mirrored if all(plan.same) else None
        sums = plan_sums(plan, packed, weights, factors, along, down)
        return [plan_pack(points[0], centre, packed[0]), sums]
    grads = _meta(2, products, 1024, dtype=torch.float32)
    tables = (weights, grads, factors, factors)
    if backward < 0:
        out = _meta(2, 16, stretches, len(plan.kernels), dtype=torch.float64)
        return [plan_bandwidths(plan, packed, *tables, out)]
    own = packed[backward]
    turned = _meta(2, 2 * stretches, own.padded, own.ld, dtype=torch.float32)
    mass = _meta(2, 2 * stretches, own.padded, dtype=torch.float64)
    launches = [plan_points(p, packed, *tables, turned, mass) for p in parts_of(plan, backward)]
    out = _meta(2, 1024, widths[backward], dtype=torch.float32)
    return [*launches, plan_finish(turned, mass, own, out)]


# A sample with itself; two samples; and of x, y and yhat what a conditional divergence takes.
ONE_SAMPLE = KernelPlan(((0, 0),), (0,), ((0,),), False, False)
TWO_SAMPLES = KernelPlan(((0, 1),), (0, 0, 0), ((0,), (1,), (2,)), True, False)
CONDITIONAL = KernelPlan(
    ((0, 0), (1, 1), (2, 2), (2, 1)), (0, 1, 2, 3), ((0, 1), (0, 2), (0, 3), (0,)), False, False
)


def _saliency(dtype: torch.dtype, kind: str, code: int, last: bool = False) -> list[Launch]:
    """Maps of 8 layers of 512 channels at 28 x 28; ``code``: method, or phase 2."""
    act = _meta(8, 784, 512, dtype=dtype).mT if last else _meta(8, 512, 784, dtype=dtype)
    out, weights = (_meta(8, n, dtype=torch.float32) for n in (784, 512))
    one, three, grid = [1, 1, 1], [1, 3, 3], [1, 28, 28]
    if kind == "map":
        return plan_map(act, act, weights, out, code)
    if kind == "entries":
        return [plan_entries(act, act, out, grid, 3, code, three, [0, 1, 1])]
    found = _meta(8, 2, 784, dtype=torch.float32)
    geometry = (three, one, [0, 1, 1], one)
    return [
        plan_statistics(act, found, code),
        plan_product(found, found, out, grid, grid, geometry, code),
    ]


def _head(kind: str, samples: int, classes: int, domains: int) -> list[Launch]:
    """Forward and all gradients of a head of 2048 columns (large batches: 390), with a bias."""
    columns = 2048 if samples < 4096 else 390
    x, weight = (_meta(n, columns, dtype=torch.float32) for n in (samples, classes))
    bias, rows = (_meta(*n, dtype=torch.float32) for n in ((classes,), (samples, classes)))
    out = _meta(domains, classes, columns + 1, dtype=torch.float32)
    targets, vectors = (rows if kind == "gradient" else None, out if kind == "product" else None)
    call = (x, weight, bias, targets, vectors, [samples * e // domains for e in range(domains + 1)])
    results, launches = plan_head_forward(*call)
    return launches + plan_head_backward(out, *results[1:], *call, True, True, True)[1]


def _codes(dtype: torch.dtype, units: int, edges: int) -> list[Launch]:
    """Rows of activations, in cells or (no edges) as they are."""
    bounds = _meta(edges, dtype=torch.float32) if edges > 0 else None
    return [plan_codes(_meta(16384, units, dtype=dtype), bounds, True)[2]]


def _simplex(kind: str, count: int) -> list[Launch]:
    """10,000 problems."""
    c, a = (_meta(10_000, *n, dtype=torch.float64) for n in ((count, count), (count,)))
    return [plan_min_norm(c)[1] if kind == "min norm" else plan_pareto(c, a, False)[2]]


def cases() -> list[Case]:
    """The compact set that is compiled."""
    single, half, brain = torch.float32, torch.float16, torch.bfloat16
    return [
        Case("forward bf16 D=64", _Call(brain, 64).forward, hot=True),
        Case("forward bf16 D=128", _Call(brain, 128).forward, hot=True),
        Case("forward bf16 D=64 causal", _Call(brain, 64, causal=1).forward, hot=True),
        Case("forward bf16 D=64 mask", _Call(brain, 64, mask="full").forward),
        Case("forward bf16 D=128 bias", _Call(brain, 128, bias="full").forward),
        Case("forward fp16 D=40 3 sources", _Call(half, 40, (1024, 77, 4), bias="key").forward),
        Case("forward fp32 D=64", _Call(single, 64).forward),
        Case("forward bf16 D=256", _Call(brain, 256).forward),
        Case("forward bf16 D=64 wide", _Call(brain, 64, wide=True).forward),
        Case("fused bf16 D=64 2 groups", _Call(brain, 64, (77, 16)).fused),
        Case("backward bf16 D=64", _Call(brain, 64).backward),
        Case("backward bf16 D=128", _Call(brain, 128).backward),
        Case("backward fp16 D=40 all", _Call(half, 40, (1000,), "key", "full", 2).backward),
        Case("backward fp32 D=64", _Call(single, 64).backward),
        Case("backward bf16 D=64 wide", _Call(brain, 64, (1000,), "key", wide=True).backward),
        Case("jvp bf16 D=64", _Call(brain, 64).jvp),
        Case("jvp bf16 D=128", _Call(brain, 128).jvp),
        Case("jvp fp32 D=64", _Call(single, 64).jvp),
        Case("jvp_backward bf16 D=64", _Call(brain, 64).jvp_backward),
        Case("jvp_backward bf16 D=128", _Call(brain, 128).jvp_backward),
        Case("jvp_backward fp32 D=40 all", _Call(single, 40, (100,), "full", "key").jvp_backward),
        Case("windows bf16 D=64", lambda: _windows(brain, 64, 1024, False), hot=True),
        Case("windows bf16 D=32 bias", lambda: _windows(brain, 32, 49, True), hot=True),
        Case("windows fp32 D=40", lambda: _windows(single, 40, 1024, False)),
        Case("adain forward fp32", lambda: _adain(0, single, torch.contiguous_format), hot=True),
        Case("adain forward bf16 c. last", lambda: _adain(0, brain, torch.channels_last), hot=True),
        Case("adain backward bf16", lambda: _adain(1, brain, torch.contiguous_format)),
        Case("adain jvp fp16 c. last", lambda: _adain(2, half, torch.channels_last)),
        Case("nearest bf16", lambda: _merging("nearest", brain), hot=True),
        Case("nearest fp16 mask", lambda: _merging("nearest", half, 1)),
        Case("nearest fp32", lambda: _merging("nearest", single), hot=True),
        Case("segments sum fp32", lambda: _merging("segments", single), hot=True),
        Case("segments mean bf16", lambda: _merging("segments", brain, 1), hot=True),
        Case("segments average fp32", lambda: _merging("segments", single, 3)),
        Case("segments amax fp16", lambda: _merging("segments", half, 4)),
        Case("gather bf16", lambda: _merging("gather", brain), hot=True),
        Case("gather first fp32", lambda: _merging("gather", single, 2)),
        Case("push bf16", lambda: _merging("push", brain), hot=True),
        Case("mix fp32 step", lambda: _mix(single, 1, False, False), hot=True),
        Case("mix bf16 step per sample", lambda: _mix(brain, 1, False, True), hot=True),
        Case("mix fp16 step and original", lambda: _mix(half, 2, False, False), hot=True),
        Case("mix bf16 step and products", lambda: _mix(brain, 1, True, True), hot=True),
        Case("nes perturb bf16 masked", lambda: _nes(brain, True), hot=True),
        Case("nes gradient", lambda: _nes(None, False), hot=True),
        Case("nes gradient masked", lambda: _nes(None, True), hot=True),
        Case("patch gram fp32 7x7", lambda: _patch_gram(single, 7, 2), hot=True),
        Case("patch gram bf16 3x3", lambda: _patch_gram(brain, 3, 1), hot=True),
        Case("lincomb fp32 of fp16", lambda: _lists(single, half, ONE, False), hot=True),
        Case("lincomb bf16 ids", lambda: _lists(brain, brain, BYTES, False), hot=True),
        Case("lincomb fp32 hashed", lambda: _lists(single, single, HASHED, False), hot=True),
        Case("lincomb fp32 hashed to one", lambda: _lists(single, single, HASHED, False, 1)),
        Case("block dots fp32 hashed to one", lambda: _lists(single, single, HASHED, True, 1)),
        Case("block dots fp32 of fp16", lambda: _lists(single, half, ONE, True), hot=True),
        Case("block dots bf16 hashed", lambda: _lists(brain, brain, HASHED, True), hot=True),
        Case("saliency grad-cam fp32", lambda: _saliency(single, "map", 0), hot=True),
        Case("saliency xgrad-cam bf16 c. last", lambda: _saliency(brain, "map", 2, True), hot=True),
        Case("saliency grad-cam++ fp16", lambda: _saliency(half, "map", 1), hot=True),
        Case("saliency elementwise bf16", lambda: _saliency(brain, "map", 5), hot=True),
        Case("saliency norm fp32", lambda: _saliency(single, "product", 0), hot=True),
        Case("saliency max bf16 c. last", lambda: _saliency(brain, "product", 3, True), hot=True),
        Case("saliency depth-wise fp32", lambda: _saliency(single, "entries", 1)),
        Case("head gradient C=7", lambda: _head("gradient", 96, 7, 3), hot=True),
        Case("head diagonal C=65", lambda: _head("diagonal", 96, 65, 3), hot=True),
        Case("head product C=7", lambda: _head("product", 96, 7, 3), hot=True),
        Case("head product C=31", lambda: _head("product", 96, 31, 3), hot=True),
        Case("head product C=345", lambda: _head("product", 160, 345, 5), hot=True),
        Case("head diagonal C=1 N=50000", lambda: _head("diagonal", 50000, 1, 2), hot=True),
        Case("row codes fp32 30 edges", lambda: _codes(single, 512, 30), hot=True),
        Case("row codes bf16", lambda: _codes(brain, 10, 0), hot=True),
        Case("min norm T=3", lambda: _simplex("min norm", 3), hot=True),
        Case("pareto T=3", lambda: _simplex("pareto", 3), hot=True),
        Case("pareto T=6", lambda: _simplex("pareto", 6)),
        Case("mix fp32 products", lambda: _mix(single, 0, True, False), hot=True),
        Case("norm fp32", lambda: _sums_of_lists(single, 1, 2), hot=True),
        Case("norm fp16 largest", lambda: _sums_of_lists(half, 1, 0), hot=True),
        Case("list products fp32 of 8", lambda: _sums_of_lists(single, 8, None), hot=True),
        Case("list products bf16 of 40", lambda: _sums_of_lists(brain, 40, None), hot=True),
        Case("list products fp32 of 2", lambda: _sums_of_lists(single, 2, None), hot=True),
        Case("ratio merge fp32", lambda: _merge("ratio", single), hot=True),
        Case("threshold fp32", lambda: _merge("count", single), hot=True),
        Case("election bf16", lambda: _merge("elect", brain), hot=True),
        Case("kernel sums fp32 own", lambda: _kernel_sums(single, (64,), ONE_SAMPLE), hot=True),
        Case("kernel sums bf16 d=3", lambda: _kernel_sums(brain, (3, 3), TWO_SAMPLES), hot=True),
        Case("kernel sums conditional", lambda: _kernel_sums(single, (64, 1, 1), CONDITIONAL)),
        Case("kernel sums own grad", lambda: _kernel_sums(single, (64,), ONE_SAMPLE, 0)),
        Case("kernel sums wide grad", lambda: _kernel_sums(half, (512, 512), TWO_SAMPLES, 1)),
        Case("kernel sums cond. grad", lambda: _kernel_sums(single, (64, 1, 1), CONDITIONAL, 2)),
        Case("kernel sums grad of h", lambda: _kernel_sums(single, (64, 64), TWO_SAMPLES, -1)),
    ]


def compile_launch(launch: Launch, arch: int):
    """Compile what ``launch`` would run on ``arch``, with Triton's own specialisation of it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialization, given
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resource_usage(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers, stack bytes) per thread; these kernels have no stack but spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return None, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=False
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (None, None) if found is None else (int(found.group(1)), int(found.group(2)))


def check(name: str, position: int, arch: int) -> Result:
    """Compile launch ``position`` of the case ``name`` (plans do not travel between processes)."""
    return check_launch(next(case for case in cases() if case.name == name), position, arch)


def check_launch(case: Case, position: int, arch: int) -> Result:
    """Compile launch ``position`` of ``case`` for ``arch`` and judge it."""
    launch = case.plan()[position]
    blocks = (launch.arguments.get(name) for name in ("BLOCK_M", "BLOCK_N"))
    tile = "x".join(str(block) for block in blocks if block is not None)
    identity = (case.name, launch.kernel.__name__, arch, tile, launch.options["num_warps"])
    start = time.perf_counter()
    try:
        compiled = compile_launch(launch, arch)
    except Exception as error:  # any failure of the compiler is a finding, not a crash
        lines = (str(error).strip() or repr(error)).splitlines()
        return Result(*identity, None, None, 0, time.perf_counter() - start, lines[-1])
    registers, spill = resource_usage(compiled.asm["cubin"])
    seconds = time.perf_counter() - start
    shared = compiled.metadata.shared
    return Result(
        *identity, registers, spill, shared, seconds, verdict(arch, shared, spill, case.hot)
    )


def verdict(arch: int, shared: int, spill: int | None, hot: bool) -> str:
    """What is wrong with a compiled kernel; empty if nothing is."""
    if shared > SHARED_LIMIT[arch]:
        return f"shared memory {shared} > {SHARED_LIMIT[arch]}"
    if hot and spill is not None and spill > 0:
        return f"spills {spill} bytes"
    return ""


def work(only: str) -> Iterator[tuple[str, int, int]]:
    """(case, launch, architecture) of everything whose label contains ``only``."""
    for case in cases():
        for position in range(len(case.plan())):
            for arch in SHARED_LIMIT:
                if only in f"{case.name} sm_{arch}":
                    yield case.name, position, arch


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--only", default="", help="only cases whose 'name sm_NN' contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("compile_check: unset TRITON_INTERPRET first", file=sys.stderr)
        return 2
    tasks = list(work(given.only))
    if not tasks:
        print(f"compile_check: no case contains {given.only!r}", file=sys.stderr)
        return 2
    print(
        f"{'case':32}{'kernel':16}{'arch':6}{'tile':9}{'warps':>6}{'regs':>6}{'spill':>7}"
        f"{'shared':>9}{'s':>7}"
    )
    failures = 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        for result in pool.map(check, *zip(*tasks, strict=True)):
            registers = "-" if result.registers is None else result.registers
            spill = "-" if result.spill is None else result.spill
            failures += bool(result.error)
            print(
                f"{result.case:32}{result.kernel:16}{result.arch:<6}{result.tile:9}"
                f"{result.warps:>6}{registers:>6}{spill:>7}{result.shared:>9}"
                f"{result.seconds:>7.1f}{'  FAILED: ' + result.error if result.error else ''}",
                flush=True,
            )
    print(f"{len(tasks)} kernels, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
