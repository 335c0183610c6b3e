"""Benchmarks of the sampling ops: ``transfuse.ops.cfg_step`` and ``transfuse.ops.noise_mix``.

The shapes are latents of Stable Diffusion XL at 1024 x 1024 (two images) and of models with 16
channels (eight images). The alternatives are the lines that pipelines and schedulers run, eagerly
and compiled into one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import DDIM, cfg_step, cfg_step_with_cosine, noise_mix

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = "memory: every input read once, the result written once, at the measured copy bandwidth"
RESCALE_FLOOR = (
    FLOOR + "; the two predictions are read once more, for deviations that must be known before "
    "the first result"
)
SCALE, RESCALE = 7.5, 0.7
ALPHA, ALPHA_NEXT = 0.45, 0.52
UPDATE = DDIM(alpha=ALPHA, alpha_next=ALPHA_NEXT)
SHAPES = {"sdxl": (2, 4, 128, 128), "batch": (8, 16, 128, 128)}


_PAIR = ("cond", "uncond")


def _move(x: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    original = (x - (1 - ALPHA) ** 0.5 * prediction) / ALPHA**0.5
    return ALPHA_NEXT**0.5 * original + (1 - ALPHA_NEXT) ** 0.5 * prediction


def _guide(t: Tensors) -> torch.Tensor:
    return t["uncond"] + SCALE * (t["cond"] - t["uncond"])


def _ddim(t: Tensors) -> torch.Tensor:
    return _move(t["sample"], _guide(t))


def _rescaled(t: Tensors) -> torch.Tensor:
    # As diffusers writes it.
    guided, cond = _guide(t), t["cond"]
    dims = list(range(1, cond.ndim))
    factor = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return _move(t["sample"], RESCALE * (guided * factor) + (1 - RESCALE) * guided)


def _with_cosine(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    # In float32 at least, as 16-bit sums would show nothing of a cosine near 1. Written out:
    # cosine_similarity adds in an order that loses four digits over 262144 numbers.
    c, u = (t[n].flatten(1).to(torch.promote_types(t[n].dtype, torch.float32)) for n in _PAIR)
    cosine = (c * u).sum(1) / ((c * c).sum(1).sqrt() * (u * u).sum(1).sqrt())
    return _ddim(t), cosine


def _noised(t: Tensors) -> torch.Tensor:
    view = (-1, *([1] * (t["sample"].ndim - 1)))
    return t["alpha"].view(view) * t["sample"] + t["sigma"].view(view) * t["noise"]


def _ours(kind: str, backend: str) -> Callable[[Tensors], object]:
    def call(t: Tensors) -> object:
        if kind == "noise":
            return noise_mix(
                t["sample"], t["noise"], alpha=t["alpha"], sigma=t["sigma"], backend=backend
            )
        arguments = (t["sample"], t["cond"], t["uncond"], UPDATE)
        if kind == "cosine":
            return cfg_step_with_cosine(*arguments, scale=SCALE, backend=backend)
        rescale = RESCALE if kind == "rescale" else 0.0
        return cfg_step(*arguments, scale=SCALE, rescale=rescale, backend=backend)

    return call


EXPRESSIONS = {"ddim": _ddim, "rescale": _rescaled, "cosine": _with_cosine, "noise": _noised}
# Passes of memory: reads and the write. Forward only; gradients read and write as much again.
PASSES = {"ddim": 4, "rescale": 6, "cosine": 4, "noise": 3}
FLOPS = {"ddim": 6, "rescale": 16, "cosine": 12, "noise": 4}
TITLES = {
    "ddim": "guidance and a DDIM step",
    "rescale": "guidance, rescaled, and a DDIM step",
    "cosine": "guidance, a DDIM step, and the cosine of the two predictions",
    "noise": "noise added to samples, each at its own level",
}
MODES = {"ddim": ("forward", "full"), "noise": ("forward", "full")}


def _make(kind: str, shape: tuple[int, ...]) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        names = ("sample", "noise") if kind == "noise" else ("sample", "cond", "uncond")
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in (*names, GRAD)
        }
        if kind == "noise":
            levels = torch.linspace(0.1, 0.9, shape[0])
            tensors["alpha"] = levels.sqrt().to(device=setup.device, dtype=setup.dtype)
            tensors["sigma"] = (1 - levels).sqrt().to(device=setup.device, dtype=setup.dtype)
        else:
            # Two predictions for one latent are alike.
            tensors["uncond"] = 0.9 * tensors["cond"] + 0.3 * tensors["uncond"]
        size = tensors["sample"].numel() * tensors["sample"].element_size()
        passes = PASSES[kind] * (1 if setup.mode == "forward" else 2)
        return Workload(
            tensors=tensors,
            ours=_ours(kind, setup.backend),
            reference=EXPRESSIONS[kind],
            expressions={"eager": EXPRESSIONS[kind]},
            yardstick=None,
            differentiable=names,
            flops=FLOPS[kind] * tensors["sample"].numel(),
            bytes=passes * size,
            floor_note=RESCALE_FLOOR if kind == "rescale" else FLOOR,
            inputs="normal; the unconditional prediction 0.9 x the conditional one plus noise",
            shape={"latent": list(shape), "scale": SCALE},
        )

    return make


QUICK = ("rescale", "batch")

CASES = (
    *(
        Case(
            name=f"{kind}-{size}",
            title=f"{TITLES[kind]}, {' x '.join(map(str, shape))}",
            make=_make(kind, shape),
            targets=tuple(
                Target(
                    dtype=dtype,
                    bars={"eager-compile": 1.5},
                    quick=3 if (kind, size) == QUICK and dtype == "float32" else 0,
                )
                for dtype in ("float32", "bfloat16")
            ),
            peers=("eager", "eager-compile"),
            quick_peers=("eager", "eager-compile") if (kind, size) == QUICK else (),
            modes=MODES.get(kind, ("forward",)),
        )
        for kind in EXPRESSIONS
        for size, shape in SHAPES.items()
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make("ddim", (1, 3, 5, 7)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
)
