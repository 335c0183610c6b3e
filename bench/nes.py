"""Benchmarks of ``transfuse.ops.nes_gradient`` and ``nes_perturb``: noise that is never stored.

The alternatives draw with ``torch.randn``, so their numbers are another draw of the same noise and
are judged by their spread. What they cannot do is make the noise of a sample again by itself: where
it is needed twice they keep it, or draw all of it again in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import _nes_reference, nes_gradient, nes_perturb

from .cases import Case, Setup, Target, Tensors, Workload
from .inputs import normal

SEED, SIGMA = 5, 0.1
SHAPE = (3, 224, 224)
# As many samples at once as fit the caches of several cores with room to spare.
BATCH = 16
FLOOR = (
    "arithmetic at the measured peak: per normal number a quarter of Philox 4x32-10 (80 integer "
    "operations for four) and half of a logarithm, a root, a sine and a cosine (44 operations for "
    "two), and a multiply-add; memory is read and written once"
)
FLOPS = 80 // 4 + 44 // 2 + 2


def _gradient(t: Tensors) -> torch.Tensor:
    return _nes_reference.gradient(t["weights"].double(), t["x"], SEED, 0, None)


def _perturb(t: Tensors) -> torch.Tensor:
    return _nes_reference.perturb(t["x"], t["weights"].shape[0], SIGMA, SEED, 0, None)


def _drawn_gradient(t: Tensors) -> torch.Tensor:
    """Batches that are drawn, weighted and thrown away."""
    x, total = t["x"], torch.zeros_like(t["x"], dtype=torch.float32)
    for weights in t["weights"].split(BATCH):
        noise = torch.randn((weights.shape[0], *x.shape), dtype=torch.float32, device=x.device)
        total += torch.tensordot(weights.float(), noise, 1)
    return total


def _drawn_at_once(t: Tensors) -> torch.Tensor:
    """One expression, which a compiler may fuse so that nothing is stored."""
    x, weights = t["x"], t["weights"].float()
    noise = torch.randn((weights.shape[0], *x.shape), dtype=torch.float32, device=x.device)
    return (weights.view(-1, *([1] * x.dim())) * noise).sum(0)


def _drawn_perturb(t: Tensors) -> torch.Tensor:
    x = t["x"]
    noise = torch.randn((t["weights"].shape[0], *x.shape), dtype=torch.float32, device=x.device)
    wide, step = x.float(), SIGMA * noise
    return torch.cat([wide + step, wide - step]).to(x.dtype)


def _make(kind: str, samples: int, shape: tuple[int, ...] = SHAPE) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        options = {"generator": generator, "dtype": setup.dtype, "device": setup.device}
        tensors = {"x": normal(*shape, **options), "weights": normal(samples, **options)}
        count = tensors["x"].numel()
        own = {"seed": SEED, "backend": setup.backend}
        if kind == "gradient":
            reference, written = _gradient, 4 * count
            expressions = {"eager": _drawn_at_once, "batches": _drawn_gradient}
        else:
            reference, written = _perturb, 2 * samples * count * tensors["x"].element_size()
            expressions = {"eager": _drawn_perturb}

        def ours(t: Tensors) -> torch.Tensor:
            if kind == "gradient":
                return nes_gradient(t["weights"], t["x"], **own)
            return nes_perturb(t["x"], samples, sigma=SIGMA, **own)

        return Workload(
            tensors=tensors,
            ours=ours,
            reference=reference,
            expressions=expressions,
            draws=frozenset(expressions),
            yardstick=None,
            flops=FLOPS * samples * count,
            bytes=count * tensors["x"].element_size() + written,
            floor_note=FLOOR,
            inputs="normal",
            shape={"x": list(shape), "samples": samples},
        )

    return make


CASES = (
    *(
        Case(
            name=f"gradient-{samples}",
            title=f"weighted sum of the noise of {samples} samples of 3 x 224 x 224",
            make=_make("gradient", samples),
            targets=(Target(dtype="float32", quick=4 if samples == 16 else 0),),
            peers=("eager", "batches", "eager-compile", "batches-compile"),
            quick_peers=("batches",) if samples == 16 else (),
            memory=True,
        )
        for samples in (16, 128)
    ),
    Case(
        name="perturb-16",
        title="16 antithetic pairs of 3 x 224 x 224",
        make=_make("perturb", 16),
        targets=(Target(dtype="float32"), Target(dtype="bfloat16")),
        peers=("eager", "eager-compile"),
        memory=True,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make("gradient", 4, (3, 5, 7)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("batches",),
        quick_peers=("batches",),
        hidden=True,
    ),
)
