"""Small diffusers UNets like those that HiDiffusion knows, and runs of them."""

from __future__ import annotations

import torch

from transfuse.methods.diffusion_control.hi_diffusion import HiDiffusionOptions, RAUSchedule

try:
    import diffusers
except Exception as error:  # a broken dependency of diffusers is no ImportError
    diffusers = None
    WHY = f"diffusers is not usable: {type(error).__name__}: {error}"
else:
    WHY = ""

SD = {
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL = {
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "use_linear_projection": True,
}
CONFIGS = {"sd": SD, "sdxl": SDXL}
RUN = (900, 700, 500, 300, 100)


def inputs(size=(16, 16), batch=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, *size, generator=g), torch.randn(batch, 5, 12, generator=g)


@torch.no_grad()
def run(model, size=(16, 16), time=900, **extra):
    x, text = inputs(size)
    return model(x, time, text, **extra).sample


def always(*, strided=False, pooled=False):
    """Options of RAU-Net alone, with some devices acting in every step."""
    schedule = RAUSchedule(range(5 * strided), range(5 * pooled))
    return HiDiffusionOptions(windows=False, schedule=lambda latent, steps: schedule)
