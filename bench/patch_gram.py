"""Benchmarks of ``transfuse.ops.patch_gram``: second moments of the patches of first layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from transfuse.ops import patch_gram

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = (
    "each correlation of two channels at one distance once, over all positions, at the measured "
    "peak: what is left of the product of unfolded patches when equal sums are computed once"
)


def _correlations(kernel: int, stride: int) -> int:
    """Distances of the patch and phases of the stride, both ways together, half by symmetry."""
    across = sum(
        1
        for phase in range(stride)
        for apart in range(1 - kernel, kernel)
        if any(0 <= j + apart < kernel for j in range(phase, kernel, stride))
    )
    return (across * across + 1) // 2


def _make(
    shape: tuple[int, int, int, int], kernel: int, stride: int, padding: int
) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        x = normal(*shape, generator=setup.generator(), dtype=setup.dtype, device=setup.device)

        def patches(x: torch.Tensor) -> torch.Tensor:
            # Sums of half-precision squares need single precision.
            x = x if x.dtype == torch.float64 else x.float()
            return F.unfold(x, kernel, padding=padding, stride=stride)

        def eager(t: Tensors) -> torch.Tensor:
            # One matrix product of all patches, side by side.
            p = patches(t["x"]).transpose(0, 1).flatten(1)
            return p @ p.mT

        def separate(t: Tensors) -> torch.Tensor:
            # A product for each image, and their sum: no copy of the patches, more matrices.
            p = patches(t["x"])
            return (p @ p.mT).sum(0)

        batch, channels, height, width = shape
        count = (height + 2 * padding - kernel) // stride + 1
        positions = ((height + 2 * padding) // stride) * ((width + 2 * padding) // stride)
        n = channels * kernel * kernel
        grad = normal(n, n, generator=setup.generator(), dtype=torch.float32, device=setup.device)
        return Workload(
            tensors={"x": x, GRAD: grad},
            ours=lambda t: patch_gram(
                t["x"], kernel, stride=stride, padding=padding, backend=setup.backend
            ),
            reference=eager,
            expressions={"eager": eager, "separate": separate},
            yardstick=None,
            differentiable=("x",),
            flops=2 * batch * positions * channels**2 * _correlations(kernel, stride),
            bytes=x.numel() * x.element_size() + 4 * n * n,
            floor_note=FLOOR,
            inputs="normal; up to 16 MiB of packed images stay with the thread after the first "
            "call and are not in the peak memory of later ones",
            shape={
                "x": list(shape),
                "kernel": kernel,
                "stride": stride,
                "padding": padding,
                "n": n,
                "patches": batch * count * count,
            },
        )

    return make


_PEERS = ("eager", "separate", "eager-compile", "separate-compile")


def _case(name: str, title: str, make: Callable[[Setup], Workload], quick: int) -> Case:
    return Case(
        name=name,
        title=title,
        make=make,
        targets=(
            Target(dtype="float32", bar=2.0, quick=quick),
            Target(dtype="bfloat16", bar=2.0),
        ),
        peers=_PEERS,
        quick_peers=("eager", "separate") if quick > 0 else (),
        memory=True,
    )


CASES = (
    _case(
        "cifar-128",
        "3 x 3 patches of 128 images of 32 x 32 (ResNet for CIFAR)",
        _make((128, 3, 32, 32), 3, 1, 1),
        5,
    ),
    _case(
        "stem-16",
        "7 x 7 patches of stride 2 of 16 images of 224 x 224 (ResNet stem)",
        _make((16, 3, 224, 224), 7, 2, 3),
        0,
    ),
    _case(
        "stem-64",
        "7 x 7 patches of stride 2 of 64 images of 224 x 224 (ResNet stem)",
        _make((64, 3, 224, 224), 7, 2, 3),
        0,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make((2, 2, 6, 7), 3, 1, 1),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
)
