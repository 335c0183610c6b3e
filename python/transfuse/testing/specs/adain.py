"""Spec of ``adain``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from transfuse.ops import adain
from transfuse.ops._adain_reference import adain_reference
from transfuse.testing.backends import device_of, native
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


@dataclass(frozen=True)
class Plan:
    """Shapes and options of one call. ``layout``: ``"contiguous"`` or ``"channels_last"``; ``mean``
    is added to normal numbers; a ``constant`` tensor holds one number per plane of the last two
    dimensions."""

    content: tuple[int, ...]
    style: tuple[int, ...]
    dims: tuple[int, ...] = (-2, -1)
    eps: float = 1e-4
    layout: str = "contiguous"
    mean: float = 0.5
    constant: tuple[str, ...] = ()

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""
        tensors = {}
        for name, shape in (("content", self.content), ("style", self.style)):
            tensor = torch.randn(shape, generator=generator) + self.mean
            if name in self.constant:
                tensor = tensor[..., :1, :1].expand(shape).contiguous()
            if name == "style":
                tensor = 2.0 * tensor - 1.0
            tensor = tensor.to(dtype)
            if self.layout == "channels_last":
                tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
            tensors[name] = tensor.to(device)
        return tensors

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """The call with these or similar tensors."""
        options = {} if backend is None else {"backend": backend}
        return op(tensors["content"], tensors["style"], dims=self.dims, eps=self.eps, **options)


_PLANS: dict[str, tuple[Plan, frozenset[str]]] = {
    "plain": (Plan((2, 3, 4, 3), (2, 3, 3, 2)), TINY),
    "same size": (Plan((2, 2, 3, 3), (2, 2, 3, 3)), TINY),
    "shared style": (Plan((3, 2, 2, 3), (1, 2, 3, 3)), TINY),
    "batch statistics": (Plan((2, 3, 2, 3), (3, 3, 2, 2), (0, 2, 3)), TINY),
    "channels last": (Plan((2, 9, 2, 2), (1, 9, 3, 2), layout="channels_last"), TINY),
    "channels last, batch statistics": (
        Plan((2, 9, 2, 2), (2, 9, 2, 3), (0, 2, 3), layout="channels_last"),
        TINY,
    ),
    "tokens": (Plan((2, 5, 8), (1, 4, 8), (1,)), TINY),
    "last dimension": (Plan((2, 5, 8), (2, 5, 3), (-1,)), TINY),
    "vector": (Plan((7,), (5,), (0,)), TINY),
    "dims apart": (Plan((2, 3, 2, 4), (2, 5, 2, 3), (1, 3)), TINY),
    "video": (Plan((1, 2, 2, 2, 3), (1, 2, 2, 3, 2)), TINY),
    "large eps": (Plan((2, 2, 3, 2), (2, 2, 2, 2), eps=0.7), TINY),
    "no eps": (Plan((2, 2, 3, 3), (2, 2, 3, 3), eps=0.0), TINY),
    # One element has deviation 0; a plane of one number too. Both take the style's mean.
    "one content element": (Plan((2, 3, 1, 1), (2, 3, 2, 3)), AWKWARD),
    "one style element": (Plan((2, 3, 3, 2), (1, 3, 1, 1)), AWKWARD),
    "constant content": (Plan((2, 3, 5, 5), (2, 3, 4, 4), constant=("content",)), AWKWARD),
    "constant content, no eps": (
        Plan((2, 3, 5, 5), (2, 3, 4, 4), eps=0.0, constant=("content",)),
        AWKWARD,
    ),
    "constant style": (Plan((2, 3, 5, 5), (2, 3, 4, 4), constant=("style",)), AWKWARD),
    "large mean": (Plan((1, 2, 40, 50), (1, 2, 30, 30), mean=300.0), AWKWARD),
    "no batch": (Plan((0, 3, 4, 4), (1, 3, 4, 4)), AWKWARD),
    "no pixels": (Plan((2, 3, 0, 4), (2, 3, 4, 4)), AWKWARD),
    "no channels": (Plan((2, 0, 4, 4), (2, 0, 4, 4)), AWKWARD),
    "primes": (Plan((3, 7, 31, 37), (1, 7, 13, 11)), AWKWARD),
    "long planes": (Plan((1, 2, 263, 257), (1, 2, 300, 11)), AWKWARD),
    "channels last, wide": (
        Plan((2, 67, 33, 29), (1, 67, 5, 7), layout="channels_last"),
        AWKWARD,
    ),
    "channels last, very wide": (
        Plan((1, 1300, 9, 5), (1, 1300, 3, 3), layout="channels_last"),
        AWKWARD,
    ),
    "latent": (Plan((2, 4, 64, 64), (1, 4, 64, 64)), REAL),
    "latent, batch statistics": (Plan((2, 4, 64, 64), (2, 4, 64, 64), (0, 2, 3)), REAL),
    "feature map": (Plan((1, 80, 64, 64), (1, 80, 32, 32)), REAL),
    "feature map, channels last": (
        Plan((1, 80, 64, 64), (1, 80, 64, 64), layout="channels_last"),
        REAL,
    ),
    "decoder": (Plan((2, 640, 64, 64), (2, 640, 64, 64)), BENCH),
}


def _case(name: str, plan: Plan, tags: frozenset[str]) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        return CallArgs(plan.call, plan.draw(dtype, device, generator))

    return Case(name, make, ("content", "style"), tags)


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    """Random extents and layouts around the widths of vectors, chunks and tiles."""
    sizes = (0, 1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33)
    batch, channels = choose((1, 2, 3)), choose((1, 2, 7, 8, 9, 33, 65))
    dims = choose(((-2, -1), (-2, -1), (0, 2, 3), (1,), (2,), (0, 1, 2, 3)))
    content: tuple = (batch, channels, choose(sizes), choose(sizes))
    reduced = [d % 4 for d in dims]
    style = [choose(sizes[1:]) if axis in reduced else n for axis, n in enumerate(content)]
    if 0 not in dims and choose((False, True)):
        style[0] = 1
    if 0 in style:
        content = (*content[:2], *(n if n > 0 else 5 for n in content[2:]))
        style = [n if n > 0 else 5 for n in style]
    plan = Plan(
        content,
        tuple(style),
        dims,
        eps=choose((1e-4, 0.1)),
        layout=choose(("contiguous", "channels_last")),
        mean=choose((0.0, 10.0)),
    )
    return _case(f"fuzz {plan}", plan, AWKWARD)


def _bad(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    arguments = {
        "content": torch.zeros(2, 3, 4, 5),
        "style": torch.zeros(2, 3, 6, 7),
        **changes,
    }

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        return op(given.pop("content"), given.pop("style"), **given)

    return BadCase(name, call, error, match)


_ERRORS = (
    _bad("content class", TypeError, "content: expected a tensor, got None", content=None),
    _bad("style class", TypeError, "style: expected a tensor, got 1.5", style=1.5),
    _bad(
        "content integer",
        TypeError,
        "content: expected float32.* got int64",
        content=torch.zeros(2, 3, 4, 5, dtype=torch.int64),
    ),
    _bad(
        "content sparse",
        TypeError,
        "content: expected a dense",
        content=torch.zeros(2, 3, 4, 5).to_sparse(),
    ),
    _bad(
        "style dtype",
        TypeError,
        r"style: expected dtype float32 \(that of content\), got float64",
        style=torch.zeros(2, 3, 6, 7, dtype=torch.float64),
    ),
    _bad(
        "style device",
        ValueError,
        "style: expected device cpu .* got meta",
        style=torch.zeros(2, 3, 6, 7, device="meta"),
    ),
    _bad(
        "no dimensions",
        ValueError,
        "content: expected 1 to 8 dimensions, got 0",
        content=torch.zeros(()),
    ),
    _bad(
        "style rank",
        ValueError,
        r"style: expected 4 dimensions \(those of content\), got 3",
        style=torch.zeros(3, 6, 7),
    ),
    _bad(
        "style channels",
        ValueError,
        r"style: expected 3 in dimension 1 \(which is not in dims\), got 1",
        style=torch.zeros(2, 1, 6, 7),
    ),
    _bad(
        "style batch",
        ValueError,
        "style: expected 2 or 1 in dimension 0 .* got 3",
        style=torch.zeros(3, 3, 6, 7),
    ),
    _bad(
        "style empty",
        ValueError,
        "style: expected at least one element per statistic",
        style=torch.zeros(2, 3, 0, 7),
    ),
    _bad("dims class", TypeError, "dims: expected a sequence of integers, got 2", dims=2),
    _bad("dims string", TypeError, "dims: expected a sequence of integers", dims="23"),
    _bad("dims entry", TypeError, "dims: expected integers, got 1.0", dims=(1.0,)),
    _bad("dims range", ValueError, r"dims: expected entries in \[-4, 4\), got 4", dims=(4,)),
    _bad("dims none", ValueError, "dims: expected at least one", dims=()),
    _bad("dims twice", ValueError, "dims: expected different", dims=(3, -1)),
    _bad("eps class", TypeError, "eps: expected a Python number, got '1'", eps="1"),
    _bad("eps negative", ValueError, "eps: expected a number of at least 0", eps=-1e-3),
    _bad("eps NaN", ValueError, "eps: expected a finite number", eps=float("nan")),
)


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    """The registered C++ ops, with and without gradients."""
    if not native(backend):
        return ()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    ops = torch.ops.transfuse
    content, style, dims, eps = (2, 3, 4, 5), (1, 3, 3, 2), [2, 3], 1e-3
    calls = []
    for grad in (False, True):
        x, y = normal(*content, grad=grad), normal(*style, grad=grad)
        g = normal(*content, grad=grad)
        u, v = normal(*content, grad=grad), normal(*style, grad=grad)
        kind = "with gradients" if grad else "plain"
        calls += [
            RawCall(f"forward, {kind}", ops.adain_forward, (x, y, dims, eps)),
            RawCall(f"backward, {kind}", ops.adain_backward, (g, x, y, dims, eps, True, True)),
            RawCall(f"jvp, {kind}", ops.adain_jvp, (x, y, u, v, dims, eps)),
        ]
    calls += [
        RawCall(
            "backward, one of two",
            ops.adain_backward,
            (normal(*content), normal(*content), normal(*style), dims, eps, False, True),
        ),
        RawCall(
            "jvp_backward",
            ops.adain_jvp_backward,
            (
                normal(*content),
                normal(*content),
                normal(*style),
                normal(*content),
                normal(*style),
                dims,
                eps,
                True,
                True,
            ),
        ),
    ]
    return tuple(call.on(device_of(backend)) for call in calls)


def _bytes(args: CallArgs) -> int:
    """Content and style read once, the result written once."""
    content, style = args.tensors["content"], args.tensors["style"]
    return (2 * content.numel() + style.numel()) * content.element_size()


SPECS = (
    OpSpec(
        name="adain",
        op=adain,
        reference=adain_reference,
        cases=tuple(_case(name, *entry) for name, entry in _PLANS.items()),
        dtypes=DTYPES,
        backends=("reference", "cpu", "triton", "cuda"),
        # Subtract, add, multiply-add for a statistic; subtract, multiply-add to write.
        flops=lambda args: 7 * args.tensors["content"].numel() + 4 * args.tensors["style"].numel(),
        bytes=_bytes,
        errors=_ERRORS,
        gradcheck=(
            "plain",
            "shared style",
            "batch statistics",
            "channels last",
            "dims apart",
            "large eps",
        ),
        refuses={
            "batched backward": "Batching rule not implemented",
            "compile, func.grad": "do not support torch.func transforms",
            "compile, func.jvp": "do not support torch.func transforms",
            "compile, func.vmap": "do not support torch.func transforms",
        },
        fuzz=_fuzz,
        raw_calls=_raw_calls,
    ),
)
