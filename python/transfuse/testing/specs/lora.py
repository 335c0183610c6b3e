"""Specs of the low-rank adapted layers, ``lora_linear`` and ``lora_conv2d``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from transfuse.ops import lora_conv2d, lora_linear
from transfuse.ops._lora_reference import lora_conv2d_reference, lora_linear_reference
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
# Which experts are used decides what is computed, so their numbers must be readable.
_UNREADABLE = "vmap: It looks like you're calling|data-dependent|dynamic|does not support|aten::"


@dataclass(frozen=True)
class Plan:
    """One call. ``x`` ends in the inputs of a linear layer, or is (B, I, H, W); ``experts``: the
    numbers of the samples' experts (a tensor), or one number."""

    x: tuple[int, ...]
    out: int
    rank: int
    count: int = 3
    experts: tuple[int, ...] | int | None = 1
    size: int = 0  # of the kernel; 0: a linear layer
    bias: str | None = "shared"
    own_scale: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the floating tensors of the call."""
        size = max(self.size, 1)
        into = self.x[1] if self.size else self.x[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "x": self.x,
            "weight": (self.out, into, *([size] * 2 if self.size else ())),
            "down": (self.count, self.rank, into * size),
            "up": (self.count, self.out * size, self.rank),
        }
        if self.bias is not None:
            shapes["bias"] = (self.out,) if self.bias == "shared" else (self.count, self.out)
        if self.own_scale:
            shapes["scale"] = (self.count,)
        return shapes

    def make(
        self, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> CallArgs:
        """The call; weights have the spread that keeps results near 1."""
        tensors: Tensors = {}
        for name, shape in self.shapes().items():
            width = {"weight": prod(shape[1:]), "down": shape[-1], "up": self.rank}.get(name, 1)
            spread = max(width, 1) ** -0.5
            tensor = torch.randn(shape, generator=generator) * spread
            tensors[name] = tensor.to(device=device, dtype=dtype)
        if isinstance(self.experts, tuple):
            tensors["expert"] = torch.tensor(self.experts, dtype=torch.int64, device=device)
        return CallArgs(self.call, tensors)

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        expert = tensors.get("expert", None if isinstance(self.experts, tuple) else self.experts)
        return op(
            tensors["x"],
            tensors["weight"],
            tensors.get("bias"),
            tensors["down"],
            tensors["up"],
            scale=tensors.get("scale", 0.5),
            expert=expert,
            **self.options,
        )

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""
        return Case(name, self.make, tuple(self.shapes()), tags)


_LINEAR = {
    "one expert": (Plan((3, 2, 5), 4, 2), TINY),
    "routed": (
        Plan((4, 3), 5, 2, experts=(2, 0, 2, 1), bias="own", own_scale=True),
        TINY,
    ),
    "only expert, no bias": (Plan((2, 5), 3, 1, count=1, experts=None, bias=None), TINY),
    "rank above both widths": (Plan((2, 3), 2, 5, experts=(1, 1)), TINY),
    "routed rows": (
        Plan((4, 3, 5), 4, 2, experts=(2, 0, 2, 1), bias="own", own_scale=True),
        TINY,
    ),
    "no batch": (Plan((0, 4, 6), 3, 2, experts=()), AWKWARD),
    "no tokens": (Plan((2, 0, 6), 3, 2, experts=(1, 0)), AWKWARD),
    "rank 0": (Plan((2, 4), 3, 0, experts=(1, 0)), AWKWARD),
    "vit": (Plan((4, 197, 192), 192, 8, count=5, experts=(4, 0, 0, 2)), REAL),
}
_CONV = {
    "one expert": (Plan((2, 2, 4, 3), 3, 2, size=3, options={"padding": 1}), TINY),
    "routed": (
        Plan(
            (3, 2, 5, 4),
            2,
            2,
            experts=(2, 0, 2),
            size=3,
            bias="own",
            own_scale=True,
            options={"stride": (2, 1), "padding": (1, 0)},
        ),
        TINY,
    ),
    "1 by 1, no bias": (Plan((2, 3, 2, 2), 2, 1, count=1, experts=None, size=1, bias=None), TINY),
    "dilated": (
        Plan((2, 2, 7, 6), 3, 2, experts=(1, 0), size=2, options={"dilation": 2}),
        AWKWARD,
    ),
    "same": (Plan((1, 2, 5, 5), 2, 2, size=3, options={"padding": "same"}), AWKWARD),
    "no batch": (Plan((0, 2, 5, 5), 3, 2, experts=(), size=3), AWKWARD),
    "resnet": (
        Plan((4, 32, 28, 28), 32, 4, count=5, experts=(4, 0, 0, 2), size=3, options={"padding": 1}),
        REAL,
    ),
}


def _fuzz(choose: Callable[[Sequence[object]], object], conv: bool) -> Case:
    batch: Any = choose((1, 2, 5))
    count: Any = choose((1, 2, 4))
    inner: Any = choose(((3, 4, 5), (1, 6, 3))) if conv else choose(((4,), (2, 7), (3, 1, 5)))
    experts = tuple(choose(range(count)) for _ in range(batch))
    plan = Plan(
        (batch, *inner),
        choose((1, 3, 8)),
        choose((1, 2, 6)),
        count=count,
        experts=choose((experts, 0)),
        size=choose((1, 2, 3)) if conv else 0,
        bias=choose((None, "shared", "own")),
        own_scale=choose((False, True)),
        options={"padding": choose((0, 1, 2))} if conv else {},
    )
    return plan.case(f"fuzz {plan}", AWKWARD)


def _flops(args: CallArgs) -> int:
    """Of the shared product alone, which nothing avoids."""
    t = args.tensors
    # Places that the weight is applied to; an upper bound for convolutions that shrink.
    places = t["x"].numel() // max(t["weight"].shape[1], 1)
    return 2 * places * t["weight"].numel()


def _bytes(args: CallArgs) -> int:
    """Input, weights and low-rank factors read once, the result written once."""
    t = args.tensors
    read = sum(tensor.numel() for tensor in t.values() if tensor.is_floating_point())
    written = t["x"].numel() // max(t["weight"].shape[1], 1) * t["weight"].shape[0]
    return (read + written) * t["x"].element_size()


def _bad(size: int) -> tuple[BadCase, ...]:
    kernel = (size, size) if size else ()
    wide = max(size, 1)
    good: dict[str, object] = {
        "x": torch.zeros(2, 4, 5, 5) if size else torch.zeros(2, 4),
        "weight": torch.zeros(3, 4, *kernel),
        "bias": None,
        "down": torch.zeros(2, 1, 4 * wide),
        "up": torch.zeros(2, 3 * wide, 1),
        "expert": 0,
    }

    def case(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
        arguments = {**good, **changes}

        def call(op: Callable[..., object]) -> object:
            given = dict(arguments)
            leading = [given.pop(n) for n in ("x", "weight", "bias", "down", "up")]
            return op(*leading, **given)

        return BadCase(name, call, error, match)

    x = good["x"]
    rows = [
        case("x class", TypeError, "x: expected a tensor", x=None),
        case("x integer", TypeError, "x: expected float32", x=x.long()),
        case("weight class", TypeError, "weight: expected a tensor", weight=1.0),
        case("weight dtype", TypeError, "weight: expected dtype", weight=good["weight"].double()),
        case(
            "weight device", ValueError, "weight: expected device", weight=good["weight"].to("meta")
        ),
        case("weight rank", ValueError, "weight: expected . dimensions", weight=torch.zeros(3)),
        case("bias class", TypeError, "bias: expected a tensor or None", bias=1.0),
        case("bias shape", ValueError, "bias: expected", bias=torch.zeros(4)),
        case("down rank", ValueError, "down: expected 3 dimensions", down=torch.zeros(1, 4)),
        case("down shape", ValueError, "down: expected shape", down=torch.zeros(2, 1, 5)),
        case("up shape", ValueError, "up: expected shape", up=torch.zeros(2, 3 * wide, 2)),
        case("scale class", TypeError, "scale: expected a Python number", scale="1"),
        case("scale shape", ValueError, "scale: expected shape", scale=torch.ones(3)),
        case("expert number", ValueError, r"expert: expected a number in \[0, 2\)", expert=2),
        case("expert missing", ValueError, "expert: expected a number or int64", expert=None),
        case("expert class", ValueError, r"expert: expected a number in \[0, 2\)", expert="a"),
        case("expert dtype", TypeError, "expert: expected int64", expert=torch.zeros(2)),
        case("expert entry", ValueError, "expert: expected entries", expert=torch.tensor([0, 2])),
        case("expert shape", ValueError, r"expert: expected shape", expert=torch.tensor([0])),
    ]
    if size:
        rows += [
            case("x dims", ValueError, "x: expected 4 dimensions", x=torch.zeros(4, 5, 5)),
            case("x channels", ValueError, "x: expected 4 channels", x=torch.zeros(2, 2, 5, 5)),
            case("kernel", ValueError, "square kernel", weight=torch.zeros(3, 4, 3, 2)),
        ]
    else:
        rows += [
            case("x rank", ValueError, r"x: expected shape \(B", x=torch.zeros(4)),
            case("x width", ValueError, "x: expected 4", x=torch.zeros(2, 5)),
        ]
    return tuple(rows)


def _spec(op, reference, plans, size: int) -> OpSpec:
    return OpSpec(
        name=op.__name__,
        op=op,
        reference=reference,
        cases=tuple(plan.case(name, tags) for name, (plan, tags) in plans.items()),
        dtypes=DTYPES,
        backends=("reference",),
        flops=_flops,
        bytes=_bytes,
        errors=_bad(size),
        gradcheck=("one expert", "routed"),
        vanishing=frozenset({"func.hessian"}),  # linear in every tensor
        refuses={name: _UNREADABLE for name in ("vmap, one tensor", "vmap, all tensors")},
        fuzz=lambda choose: _fuzz(choose, size > 0),
    )


SPECS = (
    _spec(lora_linear, lora_linear_reference, _LINEAR, 0),
    _spec(lora_conv2d, lora_conv2d_reference, _CONV, 3),
)
