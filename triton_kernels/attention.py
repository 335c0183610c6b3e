"""Launchers of the attention kernels, the names that ``transfuse.ops`` uses."""

from .attention_forward import attention_forward, attention_fused

__all__ = ["attention_forward", "attention_fused"]
