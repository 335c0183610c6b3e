"""Real model classes with tiny random configurations, for integration tests."""

from __future__ import annotations

from typing import Any

import torch


def tiny_unet(**changes: object) -> Any:
    """diffusers' ``UNet2DConditionModel`` with text of width 12, in evaluation mode, seeded by 0.

    Args:
        changes: Entries of its configuration that replace those here.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import UNet2DConditionModel

    config: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval()
