"""Host side of the attention kernels: block sizes, argument records, launches.

A launcher first *plans* (allocates results, builds ``Launch`` records) and then runs the plan.
Ahead-of-time compilation (``compile_check``) plans on meta tensors and compiles the same launches,
so that what is checked is what would run.

Block sizes come from ``TABLE``. The environment variable ``TRANSFUSE_TRITON_CONFIG`` overrides
entries, for tuning on a machine without editing the package::

    TRANSFUSE_TRITON_CONFIG="forward:64:half=128,64,4,3;dkey:128=64,32,8,1"

that is ``direction:bucket[:half|single]=block_m,block_n,warps,stages``, separated by ``;``. The
bucket is the larger head dimension rounded up to a power of two (16 .. 256); without the precision
the entry holds for both. ``TRANSFUSE_TRITON_PRECISION`` (``ieee``, ``tf32x3`` or ``tf32``; default
``ieee``) sets how float32 inputs are multiplied.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ._attention_tiles import Blend, Operand, Pairs, Source
from ._triton import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAUSAL = (0, 1, 2)
# Sources are unrolled in the kernel; more than this many are handled by several launches.
MAX_SOURCES = 8
MAX_HEAD_DIM = 256
BUCKETS = (16, 32, 64, 128, 256)


class Config(NamedTuple):
    """Tile of queries x keys, warps per program, software pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Chosen with compile_check: every kernel it compiles stays below 99 KB of shared memory (the limit
# of consumer GPUs) and the bfloat16 forward kernels do not spill. Not tuned by timing.
TABLE: Mapping[str, Mapping[str, Mapping[int, Config]]] = {
    "forward": {
        "half": {
            16: Config(128, 64, 4, 3),
            32: Config(128, 64, 4, 3),
            64: Config(128, 64, 4, 3),
            128: Config(128, 32, 8, 3),
            256: Config(64, 32, 4, 2),
        },
        "single": {
            16: Config(64, 32, 4, 2),
            32: Config(64, 32, 4, 2),
            64: Config(32, 32, 4, 2),
            128: Config(32, 32, 4, 2),
            256: Config(32, 16, 4, 1),
        },
    },
    "dquery": {
        "half": {
            16: Config(64, 64, 4, 2),
            32: Config(64, 64, 4, 2),
            64: Config(64, 64, 4, 2),
            128: Config(64, 32, 4, 2),
            256: Config(32, 32, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 2),
            32: Config(32, 32, 4, 2),
            64: Config(32, 32, 4, 2),
            128: Config(32, 16, 4, 1),
            256: Config(16, 16, 4, 1),
        },
    },
    "dkey": {
        "half": {
            16: Config(64, 64, 4, 2),
            32: Config(64, 64, 4, 2),
            64: Config(64, 64, 4, 2),
            128: Config(32, 64, 4, 2),
            256: Config(32, 32, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 2),
            32: Config(32, 32, 4, 2),
            64: Config(32, 32, 4, 2),
            128: Config(16, 32, 4, 1),
            256: Config(16, 16, 4, 1),
        },
    },
    "dbias": {
        "half": {
            16: Config(64, 64, 4, 1),
            32: Config(64, 64, 4, 1),
            64: Config(64, 64, 4, 1),
            128: Config(64, 32, 4, 1),
            256: Config(32, 32, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 32, 4, 1),
            128: Config(32, 16, 4, 1),
            256: Config(16, 16, 4, 1),
        },
    },
    "jvp": {
        "half": {
            16: Config(64, 64, 4, 2),
            32: Config(64, 64, 4, 2),
            64: Config(64, 32, 4, 2),
            128: Config(64, 32, 8, 1),
            256: Config(32, 16, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 16, 4, 1),
            128: Config(16, 16, 4, 1),
            256: Config(16, 16, 4, 1),
        },
    },
    "jvp_dquery": {
        "half": {
            16: Config(64, 32, 4, 1),
            32: Config(64, 32, 4, 1),
            64: Config(64, 32, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(16, 16, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 16, 4, 1),
            128: Config(16, 16, 4, 1),
            256: Config(16, 16, 8, 1),
        },
    },
    "jvp_dkey": {
        "half": {
            16: Config(32, 64, 4, 1),
            32: Config(32, 64, 4, 1),
            64: Config(32, 64, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(16, 16, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(16, 32, 8, 1),
            128: Config(16, 16, 4, 1),
            256: Config(16, 16, 8, 1),
        },
    },
    "jvp_dbias": {
        "half": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 32, 4, 1),
            128: Config(32, 32, 4, 1),
            256: Config(16, 16, 4, 1),
        },
        "single": {
            16: Config(32, 32, 4, 1),
            32: Config(32, 32, 4, 1),
            64: Config(32, 16, 4, 1),
            128: Config(16, 16, 4, 1),
            256: Config(16, 16, 8, 1),
        },
    },
}


class Launch(NamedTuple):
    """One kernel launch, not yet made. ``options`` are Triton's own (warps, stages, ...)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Make the launches in order, on ``device`` (Triton itself uses the current device)."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for launch in launches:
            if min(launch.grid) > 0:
                launch.kernel[launch.grid](**launch.arguments, **launch.options)


@functools.lru_cache(maxsize=8)
def _overrides(text: str) -> dict[tuple[str, int, str], Config]:
    parsed = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        try:
            name, _, numbers = entry.partition("=")
            direction, bucket, *precision = (part.strip() for part in name.split(":"))
            config = Config(*(int(number) for number in numbers.split(",")))
            known = direction in TABLE and int(bucket) in BUCKETS and len(precision) <= 1
            precisions = precision if precision else ["half", "single"]
            sizes = (config.block_m, config.block_n, config.warps)
            known = known and set(precisions) <= {"half", "single"} and config.stages >= 1
            known = known and min(sizes[:2]) >= 16 and max(sizes[:2]) <= 256
            known = known and all(n > 0 and n & (n - 1) == 0 for n in sizes)
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"TRANSFUSE_TRITON_CONFIG: cannot use {entry!r}; expected "
                "direction:bucket[:half|single]=block_m,block_n,warps,stages with direction one "
                f"of {', '.join(TABLE)}, bucket one of {BUCKETS}, block sizes powers of two from "
                "16 to 256"
            )
        for each in precisions:
            parsed[direction, int(bucket), each] = config
    return parsed


def choose(
    direction: str,
    dtype: torch.dtype,
    width: int,
    rows: int,
    keys: int,
    crowded: bool = False,
) -> Config:
    """Table entry for head dimension ``width``, its tile shrunk to the problem.

    ``crowded`` halves the table's tile, for calls that need more registers than a plain one: a bias
    or mask that differs from query to query (its tile and addresses are as large as the logits), a
    blend, or the running sum of several groups.
    """
    bucket = padded(width)
    precision = "single" if dtype == torch.float32 else "half"
    config = TABLE[direction][precision][bucket]
    text = os.environ.get("TRANSFUSE_TRITON_CONFIG")
    override = None
    if text is not None:
        override = _overrides(text).get((direction, bucket, precision))
    if override is not None:
        config = override
    elif crowded:
        config = config._replace(block_m=max(16, config.block_m // 2))
    block_m = min(config.block_m, padded(rows))
    block_n = min(config.block_n, padded(keys))
    warps = config.warps
    if (block_m, block_n) != config[:2]:
        # More than one warp per 16 x 16 patch of the tile would only repeat work.
        warps = min(warps, max(1, block_m * block_n // 256))
    return Config(block_m, block_n, warps, config.stages)


def differs_per_row(*groups: Sequence[torch.Tensor | None]) -> bool:
    """Whether a bias or mask is not the same for every query."""
    return any(t is not None and _stride(t, 2) != 0 for tensors in groups for t in tensors)


def padded(size: int) -> int:
    """Power of two >= size and >= 16, the smallest matrix operand."""
    return max(16, triton.next_power_of_2(size))


def matrix_precision() -> str:
    """How float32 matrix products are computed; half precisions ignore it."""
    name = os.environ.get("TRANSFUSE_TRITON_PRECISION", "ieee")
    if name not in ("ieee", "tf32x3", "tf32"):
        raise ValueError(f"TRANSFUSE_TRITON_PRECISION: expected ieee, tf32x3 or tf32, got {name!r}")
    return name


def options(config: Config) -> dict[str, Any]:
    """Triton options; fusion is set here so that no environment variable changes results."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def _stride(tensor: torch.Tensor, axis: int) -> int:
    # The stride of an axis of size 1 is arbitrary in torch; 0 also broadcasts a batch of one.
    return 0 if tensor.shape[axis] == 1 else tensor.stride(axis)


def _unit(*strides: int) -> int:
    """Largest power of two up to 16 that divides all strides."""
    return math.gcd(16, *strides)


def operand(tensor: torch.Tensor) -> Operand:
    """Record of a (B, H, N, D) or (B, H, N) tensor."""
    column = _stride(tensor, 3) if tensor.dim() == 4 else 0
    strides = [_stride(tensor, axis) for axis in range(3)]
    unit = _unit(*strides)
    return Operand(tensor, *(stride // unit for stride in strides), column, tl.constexpr(unit))


def pairs(tensor: torch.Tensor) -> Pairs:
    """Record of a (B, H, N, M) bias or mask; masks are read as bytes."""
    data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    strides = [_stride(data, axis) for axis in range(3)]
    unit = _unit(*strides)
    per_row = strides[2] != 0
    return Pairs(
        data,
        *(stride // unit for stride in strides),
        _stride(data, 3),
        tl.constexpr(unit),
        tl.constexpr(per_row),
    )


def source_record(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    index: torch.Tensor | None,
    scale: float,
    causal: int,
    heads: int,
    block_n: int,
    ends: bool = True,
    blend: Blend | None = None,
    gate: torch.Tensor | float = 1.0,
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None,
) -> Source:
    """What the kernels need to know about one source."""
    key_tangent, value_tangent, bias_tangent = (None,) * 3 if tangents is None else tangents
    length = key.shape[2]
    return Source(
        key=operand(key),
        value=operand(value),
        bias=maybe(pairs, bias),
        mask=maybe(pairs, mask),
        index=maybe(torch.Tensor.contiguous, index),
        blend=blend,
        key_tangent=maybe(operand, key_tangent),
        value_tangent=maybe(operand, value_tangent),
        bias_tangent=maybe(pairs, bias_tangent),
        gate=operand(gate) if isinstance(gate, torch.Tensor) else None,
        gate_constant=1.0 if isinstance(gate, torch.Tensor) else float(gate),
        length=length,
        repeat=heads // key.shape[1],
        scale=float(scale),
        shared=tl.constexpr(index is None and key.shape[0] == 1),
        causal=tl.constexpr(causal),
        fold=tl.constexpr(bias is None and scale > 0.0),
        even=tl.constexpr(causal == 0 and length % block_n == 0),
        ends=tl.constexpr(ends),
    )


def blend_record(
    other: torch.Tensor, weight: float | torch.Tensor, index: torch.Tensor | None
) -> Blend:
    """Record of a blend with ``other``; index maps batch entries to those of ``other``."""
    tensor = isinstance(weight, torch.Tensor)
    return Blend(
        other=operand(other),
        index=maybe(torch.Tensor.contiguous, index),
        weight=operand(weight) if tensor else None,
        constant=0.0 if tensor else float(weight),
    )


def maybe(function: Callable[[torch.Tensor], Any], tensor: torch.Tensor | None) -> Any:
    """``function(tensor)``, or None for None."""
    return None if tensor is None else function(tensor)


def is_wide(*records: Any) -> bool:
    """Whether an offset inside one tile (at most 256 x 256) may exceed 32 bits."""
    for record in records:
        if isinstance(record, Operand | Pairs):
            if 256 * (record.row * record.unit.value + record.column) >= 2**31:
                return True
        elif isinstance(record, tuple) and is_wide(*record):
            return True
    return False


def check_dtypes(*groups: tuple[str, Sequence[torch.Tensor | None]]) -> None:
    """All matrix operands of one call have one supported dtype.

    Raises:
        TypeError: naming the argument, expected and got.
    """
    expected = None
    for name, tensors in groups:
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{name}: the triton backend supports float32, float16 and bfloat16, "
                    f"got {tensor.dtype}"
                )
            expected = tensor.dtype if expected is None else expected
            if tensor.dtype != expected:
                raise TypeError(f"{name}: expected {expected} like query, got {tensor.dtype}")


def check_pairs(name: str, tensors: Sequence[torch.Tensor | None], boolean: bool) -> None:
    """Masks are bool, biases any supported float.

    Raises:
        TypeError: naming the argument, expected and got.
    """
    expected = "bool" if boolean else "float32, float16 or bfloat16"
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in ((torch.bool,) if boolean else DTYPES):
            raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")


def check_head_dims(*widths: int) -> None:
    """Raises ValueError unless every head dimension is in 1 .. 256."""
    for width in widths:
        if not 1 <= width <= MAX_HEAD_DIM:
            raise ValueError(f"head dimension: expected 1 to {MAX_HEAD_DIM}, got {width}")
