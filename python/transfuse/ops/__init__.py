"""The ops: fused kernels behind thin wrappers. Every public name is listed here."""

from transfuse.ops.adain import adain
from transfuse.ops.attention import (
    KV,
    AttendResult,
    Blend,
    attend,
    attend_with_lse,
    merge_attention,
)
from transfuse.ops.window_attention import window_attention, window_partition, window_reverse

__all__ = [
    "KV",
    "AttendResult",
    "Blend",
    "adain",
    "attend",
    "attend_with_lse",
    "merge_attention",
    "window_attention",
    "window_partition",
    "window_reverse",
]
