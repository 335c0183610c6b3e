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
from transfuse.ops.token_merging import (
    MergePlan,
    Nearest,
    compose_plans,
    match_tokens,
    merge_tokens,
    nearest_tokens,
    push_tokens,
    unmerge_tokens,
)
from transfuse.ops.window_attention import window_attention, window_partition, window_reverse

__all__ = [
    "KV",
    "AttendResult",
    "Blend",
    "MergePlan",
    "Nearest",
    "adain",
    "attend",
    "attend_with_lse",
    "compose_plans",
    "match_tokens",
    "merge_attention",
    "merge_tokens",
    "nearest_tokens",
    "push_tokens",
    "unmerge_tokens",
    "window_attention",
    "window_partition",
    "window_reverse",
]
