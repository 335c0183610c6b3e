"""Spec of ``patch_gram``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transfuse.ops import patch_gram
from transfuse.ops._patch_gram_call import Geometry
from transfuse.ops._patch_gram_reference import patch_gram_reference
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})

Pair = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Shape (B, C, H, W) and geometry of one call; ``mean`` is added to normal numbers."""

    shape: tuple[int, int, int, int]
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    layout: str = "contiguous"
    mean: float = 0.5

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.kernel, self.stride, self.padding, self.dilation)

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with this or a similar tensor."""
        options: dict[str, object] = {} if backend is None else {"backend": backend}
        return op(
            tensors["x"],
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            **options,
        )

    def case(self, name: str, tags: frozenset[str]) -> Case:
        """As a case."""

        def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
            x = (torch.randn(self.shape, generator=generator) + self.mean).to(dtype)
            if self.layout == "channels_last":
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
            return CallArgs(self.call, {"x": x.to(device)})

        return Case(name, make, ("x",), tags)


_PLANS: dict[str, tuple[Plan, frozenset[str]]] = {
    "3x3": (Plan((2, 2, 4, 5), (3, 3), padding=(1, 1)), TINY),
    "stride": (Plan((1, 2, 5, 6), (3, 3), (2, 2), (1, 1)), TINY),
    "stride down": (Plan((2, 1, 5, 4), (3, 2), (2, 1), (1, 0)), TINY),
    "dilation": (Plan((1, 2, 5, 5), (2, 2), (1, 1), (0, 1), (2, 3)), TINY),
    "patches apart": (Plan((2, 2, 4, 6), (2, 3), (2, 3)), TINY),
    "channels last": (Plan((1, 3, 4, 4), (2, 2), layout="channels_last"), TINY),
    "pointwise": (Plan((2, 3, 3, 3), (1, 1)), TINY),
    # Strides beyond the kernel leave pixels out, dilated strides make lattices of their own.
    "gaps": (Plan((2, 3, 9, 11), (2, 2), (3, 4)), AWKWARD),
    "stride and dilation": (Plan((2, 2, 13, 17), (3, 4), (2, 3), (2, 4), (3, 2)), AWKWARD),
    "dilation of the stride": (Plan((1, 4, 15, 15), (4, 4), (2, 2), (3, 3), (2, 2)), AWKWARD),
    "more padding than image": (Plan((2, 2, 1, 2), (3, 3), padding=(4, 3)), AWKWARD),
    "one patch": (Plan((3, 2, 7, 5), (7, 5)), AWKWARD),
    "one row": (Plan((2, 2, 3, 40), (3, 3)), AWKWARD),
    "no batch": (Plan((0, 2, 5, 5), (3, 3)), AWKWARD),
    "no channels": (Plan((2, 0, 5, 5), (3, 3)), AWKWARD),
    "four channels": (Plan((2, 4, 8, 9), (3, 3), padding=(1, 1)), AWKWARD),
    "many channels": (Plan((2, 17, 7, 9), (3, 3), padding=(1, 1)), AWKWARD),
    "large mean": (Plan((2, 3, 20, 20), (5, 5), padding=(2, 2), mean=100.0), AWKWARD),
    "primes": (Plan((3, 5, 31, 37), (5, 3), (3, 2), (2, 1)), AWKWARD),
    "wide": (Plan((1, 1, 3, 211), (3, 11), (1, 1), (1, 5)), AWKWARD),
    "cifar": (Plan((24, 3, 32, 32), (3, 3), padding=(1, 1)), REAL),
    "stem": (Plan((2, 3, 112, 112), (7, 7), (2, 2), (3, 3)), REAL),
    "imagenet stem": (Plan((16, 3, 224, 224), (7, 7), (2, 2), (3, 3)), BENCH),
    "vit": (Plan((16, 3, 224, 224), (16, 16), (16, 16)), BENCH),
}


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    """Random geometries, most of them of several phases and with borders."""
    kernel, stride, padding, dilation = (
        (choose(options), choose(options))
        for options in ((1, 2, 3, 4, 5), (1, 1, 2, 3, 5), (0, 1, 2, 4), (1, 1, 2, 3))
    )
    size = [
        max(1, d * (k - 1) + 1 - 2 * p) + choose((0, 1, 2, 7, 8, 15, 16, 17, 33))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    plan = Plan(
        (choose((1, 2, 3)), choose((1, 2, 3, 4, 5, 7)), *size),
        kernel,
        stride,
        padding,
        dilation,
        layout=choose(("contiguous", "channels_last")),
        mean=choose((0.0, 3.0)),
    )
    return plan.case(f"fuzz {plan}", AWKWARD)


def _bad(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments = {"x": torch.zeros(2, 3, 4, 5), "kernel_size": 3, **changes}

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        return op(given.pop("x"), given.pop("kernel_size"), **given)

    return BadCase(name, call, error, match)


_ERRORS = (
    _bad("class", TypeError, "x: expected a tensor, got None", x=None),
    _bad("rank", ValueError, r"x: expected 4 dimensions \(B, C, H, W\)", x=torch.zeros(3, 4, 5)),
    _bad(
        "integers",
        TypeError,
        "x: expected float32.* got int64",
        x=torch.zeros(2, 3, 4, 5, dtype=torch.int64),
    ),
    _bad("sparse", TypeError, "x: expected a dense", x=torch.zeros(2, 3, 4, 5).to_sparse()),
    _bad("kernel class", TypeError, "kernel_size: expected integers, got 'a'", kernel_size="a"),
    _bad("kernel number", TypeError, "kernel_size: expected integers, got 3.0", kernel_size=3.0),
    _bad("kernel entries", ValueError, "kernel_size: .* or two, got 3", kernel_size=(1, 1, 1)),
    _bad("kernel zero", ValueError, "kernel_size: expected integers of at least 1", kernel_size=0),
    _bad(
        "kernel large",
        ValueError,
        r"kernel that fits into 4 x 5 .* got \(3, 6\)",
        kernel_size=(3, 6),
    ),
    _bad("stride zero", ValueError, "stride: expected integers of at least 1, got 0", stride=0),
    _bad("stride bool", TypeError, "stride: expected integers, got True", stride=True),
    _bad("padding negative", ValueError, "padding: expected integers of at least 0", padding=-1),
    _bad("padding string", TypeError, "padding: expected integers, got 'same'", padding="same"),
    _bad("dilation large", ValueError, r"dilation \(2, 3\)", dilation=(2, 3)),
    _bad("backend", ValueError, "backend: expected one of", backend="opencl"),
    _bad("backend cuda", RuntimeError, "patch_gram has no cuda kernel", backend="cuda"),
)


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    generator = torch.Generator().manual_seed(0)
    calls = []
    for grad in (False, True):
        x = torch.randn((2, 2, 2, 5, 6), generator=generator).requires_grad_(grad)
        pairs = [[3, 2], [2, 1], [1, 0], [1, 2]]
        calls.append(
            RawCall(f"groups, gradients {grad}", torch.ops.transfuse.patch_gram, (x, *pairs))
        )
    return tuple(calls)


def _flops(args: CallArgs) -> int:
    """Of the product of unfolded patches, half of it by symmetry; the kernels do less."""
    result = args.run(patch_gram, {"x": args.tensors["x"][:1].double()})[0]
    batch, _, height, width = args.tensors["x"].shape
    return batch * height * width * result.shape[0] * (result.shape[0] + 1)


SPECS = (
    OpSpec(
        name="patch_gram",
        op=patch_gram,
        reference=patch_gram_reference,
        cases=tuple(plan.case(name, tags) for name, (plan, tags) in _PLANS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton"),
        flops=_flops,
        bytes=lambda args: args.tensors["x"].numel() * args.tensors["x"].element_size(),
        errors=_ERRORS,
        gradcheck=("3x3", "stride", "dilation", "patches apart"),
        refuses={
            "jvp of jvp": "one more forward-mode derivative is not implemented",
            "batched backward": "Batching rule not implemented",
            "compile, func.grad": "do not support torch.func transforms",
            "compile, func.jvp": "do not support torch.func transforms",
            "compile, func.vmap": "do not support torch.func transforms",
        },
        fuzz=_fuzz,
        raw_calls=_raw_calls,
    ),
)
