"""Benchmarks of ``transfuse.ops.adain``: per-channel mean and standard deviation matching."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import adain

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = (
    "three passes of memory: content read once, style read once, output written once, at the "
    "measured copy bandwidth (a channel of the content stays in cache between its statistics and "
    "its rewriting); twice that for gradients"
)
EPS = 1e-4


def _eager(t: Tensors) -> torch.Tensor:
    content, style = t["content"], t["style"]
    std, mean = torch.std_mean(content, dim=(-2, -1), keepdim=True)
    style_std, style_mean = torch.std_mean(style, dim=(-2, -1), keepdim=True)
    return (content - mean) / (std + EPS) * style_std + style_mean


def _separate(t: Tensors) -> torch.Tensor:
    # As the published implementations write it: mean and std apart.
    content, style = t["content"], t["style"]
    mean, std = content.mean((-2, -1), keepdim=True), content.std((-2, -1), keepdim=True) + EPS
    style_mean, style_std = style.mean((-2, -1), keepdim=True), style.std((-2, -1), keepdim=True)
    return (content - mean) / std * style_std + style_mean


def _make(shape: tuple[int, int, int, int]) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in ("content", "style", GRAD)
        }
        tensors["style"] = tensors["style"] * 2 + 0.5
        size = tensors["content"].numel() * tensors["content"].element_size()
        return Workload(
            tensors=tensors,
            ours=lambda t: adain(
                t["content"], t["style"], dims=(-2, -1), eps=EPS, backend=setup.backend
            ),
            reference=_eager,
            expressions={"eager": _eager, "separate": _separate},
            yardstick=None,
            differentiable=("content", "style"),
            # Two multiply-adds per element for either statistics, one for the rewriting.
            flops=10 * tensors["content"].numel(),
            bytes=(3 if setup.mode == "forward" else 6) * size,
            floor_note=FLOOR,
            inputs="normal, the style shifted and scaled",
            shape={"content": list(shape), "dims": [-2, -1], "eps": EPS},
        )

    return make


CASES = (
    Case(
        name="adain-latent",
        title="adain of a 64 x 64 feature map with 640 channels",
        make=_make((2, 640, 64, 64)),
        targets=(
            Target(
                dtype="float32",
                bars={
                    "eager-compile": 2.0,
                    "separate-compile": 2.0,
                    "eager": 10.0,
                    "separate": 10.0,
                },
                quick=2,
            ),
        ),
        peers=("eager", "separate", "eager-compile", "separate-compile"),
        quick_peers=("eager", "separate", "eager-compile"),
        modes=("forward", "backward", "full"),
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make((1, 3, 5, 7)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
)
