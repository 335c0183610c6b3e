"""What a benchmark case is: plain data on the call, its alternatives and the bar it must meet."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from transfuse import _backend

Tensors = dict[str, torch.Tensor]
Expression = Callable[[Tensors], object]

# Modules of this package that define CASES. A new op adds its module name here.
OP_MODULES = (
    "attention",
    "window_attention",
    "token_merging",
    "adain",
    "diffusion",
    "patch_gram",
    "row_codes",
    "head_curvature",
    "kernel_sums",
    "simplex",
    "saliency",
    "nes",
    "lora",
    "multitensor",
)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# forward: no gradients.  backward: gradients alone, of a graph built before the clock starts.
# full: forward and backward together.  hvp: the expression takes its second derivatives itself.
MODES = ("forward", "backward", "full", "hvp")


# Key of the output gradient among a workload's tensors, where a mode needs one.
GRAD = "grad_out"


class Unavailable(Exception):
    """A case, peer or measurement that cannot run here. The message becomes its row."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One (dtype, mode) of a case, with the figures it must reach.

    ``bar`` is best peer time / transfuse time, ``memory_bar`` smallest peer peak / transfuse peak.
    ``bars`` holds further time bars against single peers, by peer name. ``quick`` is its place in
    the order of --quick, 0 to be left out of it.
    """

    dtype: str
    mode: str = "forward"
    bar: float | None = None
    memory_bar: float | None = None
    bars: dict[str, float] = field(default_factory=dict)
    quick: int = 0


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a case is built for. ``kernels`` names the backend; None is the device's first."""

    dtype: torch.dtype
    mode: str
    device: torch.device
    seed: int = 0
    kernels: str | None = None

    @property
    def backend(self) -> str:
        """The backend ours is forced to: a forced one never falls back, so a missing or mismatched
        binary is a failed row and not the timing of an eager composition under our name."""
        if self.kernels is not None:
            return self.kernels
        return "triton" if self.device.type == "cuda" else "cpu"

    def need(self, *ops: str) -> None:
        """Raise Unavailable where one of these ops has no such backend."""
        for op in ops:
            if self.backend not in _backend.declared()[op].backends:
                raise Unavailable(f"{op} has no {self.backend} kernel")

    def generator(self) -> torch.Generator:
        # Always a CPU generator: the same seed must give the same inputs on every device.
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One built case: inputs, transfuse's call, what users would write, and the work it stands for.

    ``expressions`` are the alternatives by kind ("sdpa", "explicit", ...); ``peers`` of this
    package say how each is run (eagerly, compiled, by another package). Every expression maps the
    tensors to the same output as ``ours``. ``variants`` are further ways to write it with
    transfuse, left out of quick runs.
    ``reference`` must also accept float64 tensors. ``yardstick`` names the expression whose error
    counts as eager torch's; None is the reference itself, the rule wherever that takes no minutes.
    ``heads`` set means heads are independent (axis 1 of every tensor whose axis 1 has that size),
    so that the oracle may go head by head and never hold a whole float64 attention map.
    ``needs_bytes`` (by kind of expression) keeps a peer that would not fit from being started,
    ``skips`` (by peer) one that is known to be hopeless: why. ``estimates`` (by kind) names
    expressions that estimate the result by random numbers or sum it in a precision too low for its
    length, and how far they may be from it, as a part of the largest value; ``draws`` those whose
    result is itself random numbers of their own, which are judged by their spread.
    """

    tensors: Tensors
    ours: Expression
    reference: Expression
    expressions: dict[str, Expression]
    yardstick: str | None
    flops: int
    bytes: int
    floor_note: str
    inputs: str
    shape: dict[str, object]
    variants: dict[str, Expression] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    heads: int | None = None
    needs_bytes: dict[str, int] = field(default_factory=dict)
    skips: dict[str, str] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    draws: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A named benchmark case of one op.

    ``peers`` and ``quick_peers`` are names of ``transfuse.bench.peers``; the quick ones leave out
    what takes long to compile. ``hidden`` cases run only when named, and all do on a type of
    device that is not one of ``devices``.
    """

    name: str
    title: str
    make: Callable[[Setup], Workload]
    targets: tuple[Target, ...]
    peers: tuple[str, ...]
    quick_peers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("forward",)
    hidden: bool = False
    memory: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def load_cases(ops: tuple[str, ...] = OP_MODULES) -> dict[str, tuple[Case, ...]]:
    """The cases of the given ops, by op."""
    return {op: importlib.import_module(f".{op}", __package__).CASES for op in ops}


def select_targets(
    case: Case, *, dtypes: tuple[str, ...], mode: str | None, quick: bool
) -> tuple[Target, ...]:
    """The targets of a case that a command line asks for.

    Without ``dtypes`` and ``mode``, the case's own (only the quick ones when ``quick``). With them,
    every asked combination the case can run; one without a bar of its own is run without a bar.
    """
    if not dtypes and mode is None:
        return tuple(target for target in case.targets if target.quick > 0 or not quick)
    if mode is not None and mode not in case.modes:
        return ()
    own = {(target.dtype, target.mode): target for target in case.targets}
    wanted_modes = (
        (mode,) if mode is not None else tuple(dict.fromkeys(t.mode for t in case.targets))
    )
    wanted_dtypes = dtypes if dtypes else tuple(dict.fromkeys(t.dtype for t in case.targets))
    return tuple(
        own.get((dtype, wanted), Target(dtype=dtype, mode=wanted))
        for wanted in wanted_modes
        for dtype in wanted_dtypes
    )
