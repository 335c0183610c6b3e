"""One denoising step of a UNet with the layout of SD1.5, with and without each patch.

``python -m transfuse.bench.unet_step [--width 160] [--side 64] [--repeats 5] [--json OUT]``

The weights are random, so that the times are real and the pictures are not. Heads have 40 channels,
as those of SD1.5's finest level; ``--width 320`` is its full width. The two halves of
classifier-free guidance are one batch of 2. Patches are put on and taken off between timings; the
model is checked to be what it was at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import machine
from .report import table

HEAD_WIDTH = 40
WIDTH_UNIT = 160  # whole heads, and whole groups of 32 for group norm


def build_unet(width: int, side: int) -> torch.nn.Module:
    """diffusers' UNet with SD1.5's blocks at a finest width of ``width`` channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    widths = (width, 2 * width, 4 * width, 4 * width)
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        # diffusers' name for the number of heads, for historical reasons.
        attention_head_dim=tuple(w // HEAD_WIDTH for w in widths),
        cross_attention_dim=768,
    ).eval()


def patches() -> dict[str, Callable[[torch.nn.Module], object]]:
    """Name -> put it on a UNet; returns what has ``remove()``."""
    from transfuse.integrations.diffusers import AttendProcessor, TokenMerging, patch
    from transfuse.methods.diffusion_control.hi_diffusion import HiDiffusionOptions

    return {
        "AttendProcessor": lambda unet: patch(unet, AttendProcessor()),
        "TokenMerging, ratio 0.5": lambda unet: patch(unet, TokenMerging(ratio=0.5)),
        "hi_diffusion, windows": lambda unet: patch(unet, HiDiffusionOptions(raunet=False)),
    }


@torch.no_grad()
def measure(width: int, side: int, repeats: int) -> dict[str, object]:
    """Medians of every variant in turns, as plain data."""
    unet = build_unet(width, side)
    generator = torch.Generator().manual_seed(1)
    inputs = (
        torch.randn(2, 4, side, side, generator=generator),
        torch.tensor(500),
        torch.randn(2, 77, 768, generator=generator),
    )
    before = unet(*inputs).sample
    variants: dict[str, Callable[[torch.nn.Module], object] | None] = {"none": None, **patches()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, put in variants.items():
            handle = None if put is None else put(unet)
            start = time.perf_counter()
            unet(*inputs)
            elapsed = time.perf_counter() - start
            if handle is not None:
                handle.remove()
            if turn > 0:  # the first turn warms up
                seconds[name].append(elapsed)
    if not torch.equal(unet(*inputs).sample, before):
        raise RuntimeError("a patch left the model changed")
    plain = statistics.median(seconds["none"])
    return {
        "shape": {"latent": [2, 4, side, side], "width": width, "head_width": HEAD_WIDTH},
        "repeats": repeats,
        "results": {
            name: {
                "p50": statistics.median(times),
                "fastest": min(times),
                "speed_up": plain / statistics.median(times),
            }
            for name, times in seconds.items()
        },
        "environment": machine.environment(torch.device("cpu")),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench.unet_step",
        description="Time one denoising step of an SD1.5-like UNet with and without each patch.",
    )
    parser.add_argument("--width", type=int, default=160, help="channels of the finest level")
    parser.add_argument("--side", type=int, default=64, help="of the latent")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    given = parser.parse_args(arguments)
    if given.width % WIDTH_UNIT != 0 or given.width <= 0 or given.side % 8 != 0 or given.side <= 0:
        parser.error(f"--width must be a multiple of {WIDTH_UNIT}, --side of 8")
    if given.repeats < 1:
        parser.error("--repeats must be at least 1")
    try:
        record = measure(given.width, given.side, given.repeats)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        [name, f"{1e3 * r['p50']:.0f}", f"{1e3 * r['fastest']:.0f}", f"{r['speed_up']:.2f} x"]
        for name, r in record["results"].items()
    ]
    print(table("one step", ("patch", "p50 ms", "fastest", "speed-up"), rows))
    if given.json is not None:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
