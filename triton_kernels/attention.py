"""Launchers of the attention kernels: the names that ``transfuse.ops`` uses."""

from .attention_backward import attention_backward
from .attention_forward import attention_forward, attention_fused
from .attention_jvp import attention_jvp, attention_jvp_backward

__all__ = [
    "attention_backward",
    "attention_forward",
    "attention_fused",
    "attention_jvp",
    "attention_jvp_backward",
]
