"""Benchmarks of ``grad_weighted_map`` and ``normgrad_map``: maps of a layer's activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops import grad_weighted_map, normgrad_map

from .cases import Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = "activations and gradients read once, at the measured copy bandwidth"


def _single(x: Tensor) -> Tensor:
    """Sums of half-precision numbers need single precision."""
    return x if x.dtype == torch.float64 else x.float()


def _workload(
    setup: Setup,
    shape: tuple[int, ...],
    layout: str,
    ours: Callable[[Tensors], Tensor],
    expressions: dict[str, Callable[[Tensors], Tensor]],
    **more: object,
) -> Workload:
    generator = setup.generator()
    act, grad = (
        normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
        for _ in range(2)
    )
    return Workload(
        # As after a ReLU.
        tensors={"act": act.relu(), "grad": grad},
        ours=ours,
        reference=expressions["eager"],
        expressions=expressions,
        yardstick=None,
        flops=4 * act.numel(),
        bytes=2 * act.numel() * act.element_size(),
        floor_note=FLOOR,
        inputs="normal, activations after a ReLU",
        shape={"act": list(shape), "layout": layout},
        **more,
    )


def _numpy_grad_cam(t: Tensors) -> Tensor:
    # As pytorch-grad-cam computes it: NumPy on the host, a weighted copy of the activations.
    act, grad = (t[name].float().cpu().numpy() for name in ("act", "grad"))
    weights = grad.mean(axis=(2, 3))
    weighted = weights[:, :, None, None] * act
    return torch.from_numpy(weighted.sum(axis=1)).to(t["act"].device)


def _grad_cam(shape: tuple[int, ...]) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        def eager(t: Tensors) -> Tensor:
            # Without the weighted copy: a small matrix product per image.
            weights = _single(t["grad"]).mean((2, 3))
            return torch.einsum("bc,bchw->bhw", weights, _single(t["act"]))

        def separate(t: Tensors) -> Tensor:
            weights = _single(t["grad"]).mean((2, 3), keepdim=True)
            return (weights * _single(t["act"])).sum(1)

        return _workload(
            setup,
            shape,
            "nchw",
            lambda t: grad_weighted_map(t["act"], t["grad"], backend=setup.backend),
            {"eager": eager, "separate": separate, "official": _numpy_grad_cam},
        )

    return make


def _tokens(shape: tuple[int, ...]) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        def eager(t: Tensors) -> Tensor:
            weights = _single(t["grad"]).mean(1)
            return (_single(t["act"]) @ weights[..., None])[..., 0]

        def separate(t: Tensors) -> Tensor:
            return (_single(t["grad"]).mean(1, keepdim=True) * _single(t["act"])).sum(2)

        return _workload(
            setup,
            shape,
            "tokens",
            lambda t: grad_weighted_map(
                t["act"], t["grad"], layout="tokens", backend=setup.backend
            ),
            {"eager": eager, "separate": separate},
        )

    return make


def _outer_norm(t: Tensors) -> Tensor:
    # As the released grid of NormGrad computes it, image by image: the outer product of each
    # location, and its norm. Its entries side by side: torch's norm across planes loses digits.
    act, grad = (_single(t[name]).flatten(2).mT for name in ("act", "grad"))
    maps = [
        (g[:, None] * a[:, :, None]).flatten(1).norm(dim=1) for a, g in zip(act, grad, strict=True)
    ]
    return torch.stack(maps).unflatten(1, t["act"].shape[2:])


def _norm_grad(shape: tuple[int, ...], phase1: str) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        def eager(t: Tensors) -> Tensor:
            act, grad = _single(t["act"]), _single(t["grad"])
            if phase1 == "conv1x1":
                return act.norm(dim=1) * grad.norm(dim=1)
            near = torch.nn.functional.avg_pool2d(
                act.square().sum(1, keepdim=True), 3, 1, 1, divisor_override=1
            )
            return near[:, 0].sqrt() * grad.norm(dim=1)

        def separate(t: Tensors) -> Tensor:
            # torch's norm across planes is slow.
            squares = [_single(t[name]).square().sum(1) for name in ("act", "grad")]
            return squares[0].sqrt() * squares[1].sqrt()

        channels, locations = shape[1], shape[2] * shape[3]
        expressions = {"eager": eager}
        if phase1 == "conv1x1":
            expressions |= {"separate": separate, "official": _outer_norm}
        return _workload(
            setup,
            shape,
            "nchw",
            lambda t: normgrad_map(t["act"], t["grad"], phase1=phase1, backend=setup.backend),
            expressions,
            needs_bytes={"official": 10 * channels**2 * locations},
            # torch's norm of as many squares as an outer product has, one after the other.
            estimates={"official": 1e-3},
        )

    return make


CASES = (
    Case(
        name="grad-cam-64",
        title="Grad-CAM of 64 layers of 512 channels at 28 x 28",
        make=_grad_cam((64, 512, 28, 28)),
        targets=(
            Target(dtype="float32", bars={"official": 2.0}, quick=6),
            Target(dtype="bfloat16", bars={"official": 2.0}),
        ),
        peers=("official", "eager", "separate", "eager-compile", "separate-compile"),
        quick_peers=("eager", "official"),
        memory=True,
    ),
    Case(
        name="grad-cam-7x7",
        title="Grad-CAM of 64 layers of 2048 channels at 7 x 7 (the last of ResNet50)",
        make=_grad_cam((64, 2048, 7, 7)),
        targets=(Target(dtype="float32", bars={"official": 2.0}),),
        peers=("official", "eager", "separate", "separate-compile"),
    ),
    Case(
        name="grad-cam-tokens",
        title="Grad-CAM of 32 x 197 tokens of width 768 (ViT-B/16)",
        make=_tokens((32, 197, 768)),
        targets=(Target(dtype="float32"),),
        peers=("eager", "separate", "separate-compile"),
    ),
    Case(
        name="norm-grad-8",
        title="NormGrad (conv1x1, norm) of 8 layers of 512 channels at 28 x 28",
        make=_norm_grad((8, 512, 28, 28), "conv1x1"),
        targets=(Target(dtype="float32", bars={"official": 50.0}),),
        peers=("official", "eager", "separate", "eager-compile", "separate-compile"),
        memory=True,
    ),
    Case(
        name="norm-grad-3x3",
        title="NormGrad (conv3x3, norm) of 32 layers of 256 channels at 56 x 56",
        make=_norm_grad((32, 256, 56, 56), "conv3x3"),
        targets=(Target(dtype="float32"),),
        peers=("eager", "eager-compile"),
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_grad_cam((2, 3, 5, 7)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        hidden=True,
    ),
)
