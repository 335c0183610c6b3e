"""Specs of the sampling ops: ``cfg_step`` and its siblings, ``noise_mix`` and its sibling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from transfuse.ops import (
    DDIM,
    DDPM,
    Euler,
    Predict,
    cfg_step,
    cfg_step_with_cosine,
    cfg_step_with_original,
    noise_mix,
    noise_mix_with_velocity,
)
from transfuse.ops._cfg_reference import (
    cfg_step_reference,
    cfg_step_with_cosine_reference,
    cfg_step_with_original_reference,
)
from transfuse.ops._noise_mix_reference import (
    noise_mix_reference,
    noise_mix_with_velocity_reference,
)
from transfuse.testing.backends import device_of, native
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs._diffusion_errors import (
    CFG_ERRORS,
    COSINE_ERRORS,
    NOISE_ERRORS,
    ORIGINAL_ERRORS,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "cpu", "triton", "cuda")
REFUSES = {
    "batched backward": "Batching rule not implemented",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


@dataclass(frozen=True)
class Plan:
    """One call of cfg_step. Names in ``per_sample`` (``"scale"``, fields of the update) become
    tensors of one number per sample, and inputs of the call. Levels are sigmoids of theirs."""

    shape: tuple[int, ...]
    update: Any
    scale: float = 3.0
    options: dict = field(default_factory=dict)
    per_sample: tuple[str, ...] = ()
    noisy: bool = False
    guided: bool = True
    mean: float = 0.0
    layout: str = "contiguous"

    @property
    def names(self) -> tuple[str, ...]:
        """Inputs of the call."""
        optional = (("uncond", self.guided), ("noise", self.noisy))
        return (
            *(
                ()
                if isinstance(self.update, Predict) and self.update.alpha is None
                else ("sample",)
            ),
            "cond",
            *(name for name, there in optional if there),
            *self.per_sample,
        )

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""
        tensors: Tensors = {}
        shared = torch.randn(self.shape, generator=generator)
        for name in self.names:
            if name in self.per_sample:
                start = self.scale if name == "scale" else 1.0
                spread = torch.linspace(0.9, 1.1, self.shape[0])
                tensors[name] = (start * spread).to(device=device, dtype=dtype)
                continue
            tensor = torch.randn(self.shape, generator=generator)
            if name in ("cond", "uncond"):
                # Two predictions for one latent are alike.
                tensor = 0.8 * shared + 0.6 * tensor + self.mean
            tensor = tensor.to(dtype)
            if self.layout == "channels_last":
                tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
            tensors[name] = tensor.to(device)
        return tensors

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        options = {} if backend is None else {"backend": backend}
        levels = {n: _level(n, tensors[n]) for n in self.per_sample if n != "scale"}
        return op(
            tensors.get("sample"),
            tensors["cond"],
            tensors.get("uncond"),
            replace(self.update, **levels),
            scale=tensors.get("scale", self.scale),
            noise=tensors.get("noise"),
            **self.options,
            **options,
        )


# Noise levels are made of any number, because tests move and negate what they are given.
_LEVELS = {"alpha": (0.2, 0.3), "alpha_next": (0.6, 0.3), "sigma": (1.5, 1.0), "sigma_next": (0, 1)}


def _level(name: str, x: torch.Tensor) -> torch.Tensor:
    low, span = _LEVELS[name]
    return low + span * torch.sigmoid(x)


_DDIM = DDIM(alpha=0.5, alpha_next=0.7)
_NOISY = DDIM(alpha=0.5, alpha_next=0.7, eta=0.6)
_DDPM = DDPM(alpha=0.4, alpha_next=0.5)
_EULER = Euler(sigma=2.0, sigma_next=1.25)
_SMALL = (2, 3, 2, 4)
_V = {"prediction": "v_prediction"}

_PLANS: dict[str, tuple[Plan, frozenset[str]]] = {
    "ddim": (Plan(_SMALL, _DDIM), TINY),
    "everything": (
        Plan(_SMALL, _NOISY, options={"rescale": 0.7}, per_sample=("scale",), noisy=True),
        TINY,
    ),
    "levels per sample": (
        Plan(
            _SMALL,
            _NOISY,
            options={**_V, "rescale": 0.4},
            per_sample=("alpha", "alpha_next"),
            noisy=True,
        ),
        TINY,
    ),
    "rescaled": (Plan(_SMALL, _DDIM, options={"rescale": 1.0}), TINY),
    "ddpm": (Plan((3, 5), _DDPM, noisy=True), TINY),
    "ddpm, large, v": (
        Plan((2, 7), DDPM(alpha=0.4, alpha_next=0.5, variance="large"), noisy=True, options=_V),
        TINY,
    ),
    "ddpm, per sample": (
        Plan(
            (2, 7),
            _DDPM,
            noisy=True,
            per_sample=("alpha_next",),
            scale=0.5,
            options={"rescale": 1.0},
        ),
        TINY,
    ),
    "euler": (Plan(_SMALL, _EULER), TINY),
    "euler, v, per sample": (
        Plan(
            _SMALL,
            _EULER,
            options={**_V, "rescale": 0.7},
            per_sample=("sigma", "sigma_next", "scale"),
        ),
        TINY,
    ),
    "sample prediction": (Plan(_SMALL, _DDIM, options={"prediction": "sample"}), TINY),
    "negative scale": (Plan((2, 3), _DDIM, scale=-1.5), TINY),
    "channels last": (Plan((2, 5, 3, 2), _DDIM, layout="channels_last"), TINY),
    "last step": (Plan(_SMALL, DDPM(alpha=0.9, alpha_next=1.0), noisy=True), AWKWARD),
    "inversion": (Plan(_SMALL, DDIM(alpha=0.7, alpha_next=0.5)), AWKWARD),
    "one element": (Plan((3, 1), _DDIM, options={"rescale": 0.5}), AWKWARD),
    "no rest": (Plan((3,), _DDIM), AWKWARD),
    "shifted": (Plan((2, 4, 33, 31), _DDIM, options={"rescale": 0.7}, mean=10.0), AWKWARD),
    "no batch": (Plan((0, 4, 8, 8), _DDIM), AWKWARD),
    "no batch, rescaled": (Plan((0, 4, 8, 8), _DDIM, options={"rescale": 0.7}), AWKWARD),
    "no pixels": (Plan((2, 4, 0, 8), _DDIM, options={"rescale": 0.7}), AWKWARD),
    "primes": (Plan((3, 5, 67, 41), _NOISY, noisy=True), AWKWARD),
    "long": (Plan((2, 40961), _NOISY, noisy=True, options={"rescale": 0.3}), AWKWARD),
    "many samples": (Plan((300, 129), _NOISY, noisy=True, per_sample=("scale",)), AWKWARD),
    "latent": (Plan((2, 4, 64, 64), _DDIM, scale=7.5), REAL),
    "latent, rescaled": (Plan((2, 4, 64, 64), _EULER, scale=7.5, options={"rescale": 0.7}), REAL),
    "sdxl": (Plan((2, 4, 128, 128), _DDIM, scale=7.5), BENCH),
}
_PREDICT = {
    "predict": (Plan(_SMALL, Predict()), TINY),
    "unguided": (Plan(_SMALL, _DDIM, scale=1.0, guided=False), TINY),
}


def _case(name: str, plan: Plan, tags: frozenset[str]) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        return CallArgs(plan.call, plan.draw(dtype, device, generator))

    # First the tensor in which the rescaled op is not linear. Noise drops out of a last step.
    quiet = getattr(plan.update, "alpha_next", 0.0) == 1.0
    names = (n for n in plan.names if not (n == "noise" and quiet))
    return Case(name, make, tuple(sorted(names, key=lambda n: n != "cond")), tags)


def _cases(plans: dict[str, tuple[Plan, frozenset[str]]], **options: object) -> tuple[Case, ...]:
    return tuple(
        _case(name, replace(plan, options={**plan.options, **options}), tags)
        for name, (plan, tags) in plans.items()
    )


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    """Random extents around the widths of vectors, chunks and segments, and random updates."""
    update = choose((_DDIM, _NOISY, _DDPM, _EULER))
    rest: Any = choose(((), (1,), (7,), (3, 5), (1023,), (1025,), (4, 65, 63), (2, 0)))
    plan = Plan(
        (choose((0, 1, 2, 3, 17)), *rest),
        update,
        scale=choose((0.0, 1.0, 7.5)),
        options={
            "rescale": choose((0.0, 0.7)),
            "prediction": choose(("epsilon", "v_prediction", "sample")),
        },
        per_sample=choose(((), ("scale",))),
        noisy=update in (_NOISY, _DDPM),
    )
    return _case(f"fuzz {plan}", plan, AWKWARD)


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    """The registered C++ op, with shared and own coefficients, with and without gradients."""
    if not native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        x, y = (torch.randn(2, 3, 5, generator=generator).requires_grad_(grad) for _ in range(2))
        own = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).requires_grad_(grad)
        op, kind = torch.ops.transfuse.mix, "with gradients" if grad else "plain"
        calls += [
            RawCall(f"numbers, {kind}", op, ([x, y], None, [1.0, 2.0, 0.5], 1, [])),
            RawCall(f"coefficients, {kind}", op, ([x, y], own, [], 2, [])),
            RawCall(f"both, {kind}", op, ([x, y], own[:1].detach(), [], 2, [0, 1, 1, 1, 0, 2])),
            RawCall(f"products, {kind}", op, ([x, y], None, [], 0, [0, 1])),
        ]
    return tuple(call.on(device_of(backend)) for call in calls)


def _inputs(args: CallArgs) -> list[torch.Tensor]:
    big = max(t.dim() for t in args.tensors.values())
    return [t for t in args.tensors.values() if t.dim() == big]


def _bytes(args: CallArgs) -> int:
    """Every input read once, the result written once."""
    inputs = _inputs(args)
    return (len(inputs) + 1) * inputs[0].numel() * inputs[0].element_size()


def _flops(args: CallArgs) -> int:
    """A multiply-add per input."""
    return 2 * sum(t.numel() for t in _inputs(args))


def _cfg_spec(
    op: Callable[..., object],
    reference: Callable[..., object],
    cases: tuple[Case, ...],
    errors: tuple[BadCase, ...],
    **more: object,
) -> OpSpec:
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=cases,
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_flops,
        bytes=_bytes,
        errors=errors,
        refuses=REFUSES,
        declared_as="cfg_step",
        **more,
    )


# ---- noise_mix -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisePlan:
    """One call of noise_mix; ``levels`` are tensors (B,) if ``own``, numbers else."""

    shape: tuple[int, ...]
    levels: tuple[float, float] = (0.6, 0.8)
    own: bool = False

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""
        names = ("sample", "noise")
        tensors = {n: torch.randn(self.shape, generator=generator).to(dtype) for n in names}
        if self.own:
            for name, level in zip(("alpha", "sigma"), self.levels, strict=True):
                tensors[name] = (level * torch.linspace(0.5, 1.0, self.shape[0])).to(dtype)
        return {name: t.to(device) for name, t in tensors.items()}

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        options = {} if backend is None else {"backend": backend}
        alpha, sigma = (
            tensors.get(n, level) for n, level in zip(("alpha", "sigma"), self.levels, strict=True)
        )
        return op(tensors["sample"], tensors["noise"], alpha=alpha, sigma=sigma, **options)

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """The case of this call."""

        def make(dtype: torch.dtype, device: torch.device, g: torch.Generator) -> CallArgs:
            return CallArgs(self.call, self.draw(dtype, device, g))

        return Case(
            name, make, ("sample", "noise", *(("alpha", "sigma") if self.own else ())), tags
        )


def _noise_fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    rest: Any = choose(((), (1,), (7,), (3, 5), (1023,), (1025,), (4, 65, 63), (2, 0)))
    plan = NoisePlan((choose((0, 1, 2, 3, 17)), *rest), own=choose((False, True)))
    return plan.case(f"fuzz {plan}", AWKWARD)


_NOISE_CASES = (
    NoisePlan((2, 3, 2, 4)).case("numbers", TINY),
    NoisePlan((3, 5), own=True).case("per sample", TINY),
    NoisePlan((4,), own=True).case("no rest", AWKWARD),
    NoisePlan((0, 3, 4), own=True).case("no batch", AWKWARD),
    NoisePlan((2, 0, 4), own=True).case("no pixels", AWKWARD),
    NoisePlan((3, 5, 67, 41), own=True).case("primes", AWKWARD),
    NoisePlan((2, 40961)).case("long", AWKWARD),
    NoisePlan((2, 4, 64, 64), own=True).case("latent", REAL),
)


def _noise_spec(op, reference, **more: object) -> OpSpec:
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=_NOISE_CASES,
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_flops,
        bytes=_bytes,
        errors=NOISE_ERRORS,
        gradcheck=("per sample",),
        refuses=REFUSES,
        vanishing=frozenset({"func.hessian"}),
        declared_as="noise_mix",
        **more,
    )


_WITH_SAMPLE = {n: p for n, p in _PLANS.items() if "sample" in p[0].names}

SPECS = (
    _cfg_spec(
        cfg_step,
        cfg_step_reference,
        _cases({**_PLANS, **_PREDICT}),
        CFG_ERRORS,
        gradcheck=("everything", "levels per sample", "ddpm, per sample", "euler, v, per sample"),
        fuzz=_fuzz,
        raw_calls=_raw_calls,
    ),
    _cfg_spec(
        cfg_step_with_original,
        cfg_step_with_original_reference,
        _cases(_WITH_SAMPLE),
        ORIGINAL_ERRORS,
        gradcheck=("everything", "euler, v, per sample"),
    ),
    _cfg_spec(
        cfg_step_with_cosine,
        cfg_step_with_cosine_reference,
        (
            *_cases(_PLANS),
            *(
                replace(case, name=f"{case.name}, original")
                for case in _cases(
                    {n: _PLANS[n] for n in ("ddim", "everything", "levels per sample", "long")},
                    space="original",
                )
            ),
        ),
        COSINE_ERRORS,
        gradcheck=("everything", "everything, original", "levels per sample, original"),
    ),
    _noise_spec(noise_mix, noise_mix_reference, fuzz=_noise_fuzz),
    _noise_spec(noise_mix_with_velocity, noise_mix_with_velocity_reference),
)
