"""Benchmarks of ``transfuse.ops.lora_linear`` and ``lora_conv2d``: an adapted layer with an expert
of each sample's own.

Both ops are compositions of library matrix products; what is measured is the way of composing them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from transfuse.ops import lora_conv2d, lora_linear
from transfuse.ops._lora_reference import lora_conv2d_reference, lora_linear_reference

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = "arithmetic of the shared weight and of the low-rank factors at the measured peak"
SCALE = 0.5
EXPERTS, RANK = 5, 16
ROUTES = (0, 3, 1, 3, 4, 0, 3, 1)  # the experts of eight samples; number 2 is not used
SHAPES = {
    "linear": {"x": (8, 197, 768), "weight": (2304, 768)},
    "conv": {"x": (8, 64, 56, 56), "weight": (64, 64, 3, 3)},
    "tiny": {"x": (8, 3, 5), "weight": (4, 5)},
}


def _arguments(t: Tensors) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
    leading = tuple(t[name] for name in ("x", "weight", "bias", "down", "up"))
    return leading, {"scale": SCALE, "expert": t["expert"]}


def _with(op: Callable[..., torch.Tensor], **more: object) -> Callable[[Tensors], torch.Tensor]:
    def call(t: Tensors) -> torch.Tensor:
        leading, options = _arguments(t)
        return op(*leading, **options, **more)

    return call


def _gathered(t: Tensors) -> torch.Tensor:
    """The factors of every sample gathered, two batched products."""
    x, expert = t["x"], t["expert"]
    low = torch.bmm(x, t["down"][expert].mT)
    return F.linear(x, t["weight"], t["bias"]) + SCALE * torch.bmm(low, t["up"][expert].mT)


def _merged(t: Tensors) -> torch.Tensor:
    """As adapters that rebuild W + B A in every forward do, sample by sample."""
    rows = []
    for x, e in zip(t["x"], ROUTES, strict=True):
        rows.append(F.linear(x, t["weight"] + SCALE * (t["up"][e] @ t["down"][e]), t["bias"]))
    return torch.stack(rows)


def _grouped(t: Tensors) -> torch.Tensor:
    """One convolution with a group of channels for every sample."""
    x, weight, expert = t["x"], t["weight"], t["expert"]
    delta = (t["up"][expert] @ t["down"][expert]).view(-1, *weight.shape)
    full = (weight + SCALE * delta).flatten(0, 1)
    y = F.conv2d(x.flatten(0, 1)[None], full, padding=1, groups=x.shape[0])
    return y.view(x.shape[0], -1, *y.shape[2:]) + t["bias"].view(-1, 1, 1)


def _merged_conv(t: Tensors) -> torch.Tensor:
    weight, rows = t["weight"], []
    for b, e in enumerate(ROUTES):
        delta = (t["up"][e] @ t["down"][e]).view_as(weight)
        full = weight + SCALE * delta
        rows.append(F.conv2d(t["x"][b : b + 1], full, t["bias"], padding=1))
    return torch.cat(rows)


def _make(name: str) -> Callable[[Setup], Workload]:
    shapes, conv = SHAPES[name], name == "conv"

    def make(setup: Setup) -> Workload:
        options = {
            "generator": setup.generator(),
            "dtype": setup.dtype,
            "device": setup.device,
        }
        out, into = shapes["weight"][:2]
        size = shapes["weight"][2] if conv else 1
        x = normal(*shapes["x"], **options)
        tensors = {
            "x": x,
            "weight": normal(*shapes["weight"], **options) * (into * size * size) ** -0.5,
            "bias": normal(out, **options),
            "down": normal(EXPERTS, RANK, into * size, **options) * (into * size) ** -0.5,
            "up": normal(EXPERTS, out * size, RANK, **options) * RANK**-0.5,
            "expert": torch.tensor(ROUTES, device=setup.device),
        }
        places = x.numel() // into
        result = (x.shape[0], out, *x.shape[2:]) if conv else (*x.shape[:-1], out)
        tensors[GRAD] = normal(*result, **options)
        shared = 2 * places * tensors["weight"].numel()
        # The delta of a convolution is formed and added, at a cost that does not grow with x.
        low = 0 if conv else 2 * places * RANK * (into + out)
        if conv:
            ours = _with(lora_conv2d, padding=1)
            reference = _with(lora_conv2d_reference, padding=1)
            expressions = {"eager": _grouped, "separate": _merged_conv}
        else:
            ours, reference = _with(lora_linear), _with(lora_linear_reference)
            expressions = {"eager": _gathered, "separate": _merged}
        factor = 1 if setup.mode == "forward" else 3
        read = sum(t.numel() for name, t in tensors.items() if name != "expert")
        return Workload(
            tensors=tensors,
            ours=ours,
            reference=reference,
            expressions=expressions,
            yardstick=None,
            differentiable=("x", "down", "up"),
            flops=factor * (shared + low),
            bytes=factor * read * x.element_size(),
            floor_note=FLOOR,
            inputs="normal, weights scaled to keep the spread",
            shape={name: list(shape) for name, shape in shapes.items()} | {"rank": RANK},
        )

    return make


CASES = (
    *(
        Case(
            name=name,
            title=title,
            make=_make(name),
            targets=(Target(dtype="float32"), Target(dtype="float32", mode="full")),
            peers=("eager", "separate", "eager-compile", "separate-compile"),
            modes=("forward", "backward", "full"),
        )
        for name, title in (
            ("linear", "linear 768 to 2304, rank 16, four of five experts over eight samples"),
            ("conv", "3 x 3 convolution of 64 channels, rank 16, four of five experts"),
        )
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make("tiny"),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
)
