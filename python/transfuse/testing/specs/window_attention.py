"""Spec of ``window_attention``. Calls are planned as data, as those of ``attend`` are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transfuse.ops import KV, _windows, window_attention
from transfuse.testing.inputs import packed
from transfuse.testing.spec import BadCase, CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs.attention import ATTENTION_REFUSES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "cpu", "triton")
TINY, AWKWARD, REAL = frozenset({"tiny"}), frozenset({"awkward"}), frozenset({"real"})


@dataclass(frozen=True)
class Extra:
    """Keys that every window sees."""

    keys: int
    batch: int | None = None
    index: tuple[int, ...] | None = None
    temperature: float = 1.0
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """Shapes and options of one call; ``bias`` is None, ``"full"`` or ``"relative"``."""

    size: tuple[int, ...]
    window: str | int | tuple[int, ...] = "half"
    shift: int | tuple[int, ...] = 0
    wrap: str = "cyclic"
    ragged: str = "exact"
    bias: str | None = None
    bias_heads: int | None = None
    bias_float32: bool = False
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    kv_batch: int | None = None
    width: int = 4
    value_width: int | None = None
    scale: float | None = None
    extra: tuple[Extra, ...] = ()
    layout: str = "contiguous"

    @property
    def grid(self) -> _windows.Grid:
        return _windows.grid(self.size, self.window, self.shift, self.wrap, self.ragged)

    def differentiable(self) -> tuple[str, ...]:
        names = ["query", "key", "value"] + (["bias"] if self.bias is not None else [])
        for number, extra in enumerate(self.extra):
            names += [f"key{number}", f"value{number}"]
            names += [f"bias{number}"] if extra.bias is not None else []
        return tuple(names)

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        grid = self.grid
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        kv_batch = self.batch if self.kv_batch is None else self.kv_batch
        value_width = self.width if self.value_width is None else self.value_width
        tensors = {
            "query": normal(self.batch, self.heads, grid.tokens, self.width),
            "key": normal(kv_batch, kv_heads, grid.tokens, self.width),
            "value": normal(kv_batch, kv_heads, grid.tokens, value_width),
        }
        if self.layout == "packed":
            names = tuple(tensors)
            tensors = dict(zip(names, packed(*tensors.values()), strict=True))
        if self.bias is not None:
            heads = self.heads if self.bias_heads is None else self.bias_heads
            rest: tuple[int, ...] = (grid.slots,) * 2
            if self.bias == "relative":
                rest = tuple(2 * w - 1 for w in grid.window)
            bias = normal(heads, *rest)
            tensors["bias"] = bias.float() if self.bias_float32 and dtype != torch.float64 else bias
        for number, extra in enumerate(self.extra):
            batch = self.batch if extra.batch is None else extra.batch
            tensors[f"key{number}"] = normal(batch, kv_heads, extra.keys, self.width)
            tensors[f"value{number}"] = normal(batch, kv_heads, extra.keys, value_width)
            if extra.index is not None:
                tensors[f"index{number}"] = torch.tensor(extra.index)
            if extra.bias is not None:
                tensors[f"bias{number}"] = normal(*extra.bias)
            if extra.mask is not None:
                tensors[f"mask{number}"] = torch.rand(extra.mask, generator=generator) < 0.6
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        extra = [
            KV(
                tensors[f"key{number}"],
                tensors[f"value{number}"],
                temperature=own.temperature,
                bias=tensors.get(f"bias{number}"),
                mask=tensors.get(f"mask{number}"),
                index=tensors.get(f"index{number}"),
            )
            for number, own in enumerate(self.extra)
        ]
        options = {} if backend is None else {"backend": backend}
        return op(
            tensors["query"],
            tensors["key"],
            tensors["value"],
            size=self.size,
            window=self.window,
            shift=self.shift,
            wrap=self.wrap,
            ragged=self.ragged,
            bias=tensors.get("bias"),
            extra=extra if len(extra) > 0 else None,
            scale=self.scale,
            **options,
        )


def window_attention_reference(*args: object, **options: object) -> Tensor:
    """The op's reference: ``window_attention(..., backend="reference")``."""
    return window_attention(*args, **options, backend="reference")


def _plans() -> dict[str, tuple[Plan, frozenset[str]]]:
    small = Plan((3, 4), window=2, shift=1, bias="full", heads=1, batch=1, width=2)
    base = Plan((6, 8))
    return {
        # Small enough for a full Jacobian by finite differences.
        "small": (small, TINY),
        "half": (base, TINY),
        "shifted": (replace(base, shift=(1, 2)), TINY),
        "negative shift": (replace(base, shift=(-1, -9)), TINY),
        "swin": (
            replace(base, window=2, shift=1, wrap="mask", bias="relative", bias_float32=True),
            TINY,
        ),
        "cut off": (replace(base, window=(4, 3), shift=(1, 2), wrap="none", bias="full"), TINY),
        "uneven": (Plan((7, 5), shift=(2, 1), bias="relative"), TINY),
        "uneven, masked": (Plan((7, 5), window=3, shift=2, wrap="mask", bias="full"), TINY),
        "padded": (Plan((7, 5), window=(4, 3), shift=(3, 2), ragged="pad", bias="full"), TINY),
        "padded, masked": (
            Plan((7, 5), window=4, shift=2, wrap="mask", ragged="pad", bias="relative"),
            TINY,
        ),
        "one axis": (Plan((13,), window=5, shift=2, bias="relative"), TINY),
        "three axes": (
            Plan((3, 4, 5), window=(2, 2, 3), shift=(1, 0, 1), wrap="mask", bias="relative"),
            TINY,
        ),
        "window of one": (Plan((3, 3), window=1), TINY),
        "window larger than the grid": (Plan((3, 4), window=(5, 9), shift=1, bias="full"), TINY),
        "one bias for all heads": (
            Plan((4, 6), window=2, heads=4, kv_heads=2, bias="full", bias_heads=1),
            TINY,
        ),
        "grouped heads": (
            Plan((4, 6), window=(2, 3), heads=6, kv_heads=2, bias="relative", value_width=3),
            TINY,
        ),
        "shared keys": (replace(base, kv_batch=1, bias="full", window=2), TINY),
        "scale": (replace(base, scale=-0.7), TINY),
        "extra keys": (
            Plan(
                (4, 4),
                window=2,
                shift=1,
                bias="full",
                extra=(
                    Extra(5, temperature=1.5, bias=(2, 1, 16, 5)),
                    Extra(3, batch=3, index=(2, 0), mask=(16, 3)),
                ),
            ),
            TINY,
        ),
        "extra keys, shared": (replace(base, extra=(Extra(1, batch=1),)), TINY),
        "no batch": (replace(base, batch=0), AWKWARD),
        "no rows": (Plan((0, 8), bias="relative", window=4), AWKWARD),
        "packed": (Plan((8, 9), window=4, heads=3, width=16, layout="packed"), AWKWARD),
        "wide": (Plan((5, 33), window=(3, 17), shift=(1, 5), width=256, value_width=70), AWKWARD),
        "long window": (
            Plan((20, 23), window=(13, 20), shift=5, wrap="mask", bias="relative", width=40),
            AWKWARD,
        ),
        "swin 56": (
            Plan(
                (56, 56), window=7, shift=3, wrap="mask", bias="relative", heads=3, batch=1,
                width=32,
            ),
            REAL,
        ),
        "hidiffusion 32": (Plan((32, 32), shift=(4, 4), heads=2, batch=1, width=40), REAL),
        "video": (
            Plan((4, 14, 15), window=(2, 7, 7), shift=(1, 3, 3), wrap="mask", bias="relative",
                 batch=1, width=32),
            REAL,
        ),
    }  # fmt: skip


def _case(name: str, plan: Plan, tags: frozenset[str]) -> Case:
    return Case(
        name,
        lambda dtype, device, generator: CallArgs(plan.call, plan.draw(dtype, device, generator)),
        plan.differentiable(),
        tags,
    )


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    axes = choose((1, 2, 2, 3))
    kv_heads = choose((1, 2))
    heads = kv_heads * choose((1, 3))
    plan = Plan(
        size=tuple(choose((0, 1, 2, 5, 7)) for _ in range(axes)),
        window=tuple(choose((1, 2, 3, 8)) for _ in range(axes)),
        shift=tuple(choose((-3, 0, 1, 2, 11)) for _ in range(axes)),
        wrap=choose(("cyclic", "mask", "none")),
        ragged=choose(("exact", "pad")),
        bias=choose((None, "full", "relative")),
        bias_heads=choose((None, 1)),
        batch=choose((1, 2)),
        heads=heads,
        kv_heads=kv_heads,
        width=choose((1, 7, 16, 33)),
        value_width=choose((None, 5)),
        extra=choose(((), (Extra(3),), (Extra(0), Extra(2, batch=1)))),
    )
    return _case(f"fuzz {plan}", plan, AWKWARD)


def _pairs(args: CallArgs) -> int:
    """Query-key pairs per head: at most window times tokens; exact for whole windows."""
    query = args.tensors["query"]
    count = 0
    for name, tensor in args.tensors.items():
        if name.startswith("key") and name != "key":
            count += query.shape[0] * query.shape[2] * tensor.shape[2]
    return count


def _flops(plan: Plan, args: CallArgs) -> int:
    query, value = args.tensors["query"], args.tensors["value"]
    table = _windows.tables(plan.grid, torch.device("cpu")).token
    own = (table < plan.grid.tokens).sum(1).square().sum().item() * query.shape[0]
    return 2 * query.shape[1] * (own + _pairs(args)) * (query.shape[3] + value.shape[3])


def _bytes(args: CallArgs) -> int:
    query, value = args.tensors["query"], args.tensors["value"]
    out = query.shape[:3].numel() * value.shape[3] * query.element_size()
    return out + sum(t.numel() * t.element_size() for t in args.tensors.values())


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    if backend != "cpu":
        return ()
    ops = torch.ops.transfuse
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, key, value, grad, tangent = (normal(2, 2, 12, 4) for _ in range(5))
    bias = normal(1, 2, 1, 16)
    grid = _windows.grid((3, 4), 2, 1)
    core = (query, [key], [value], [bias], [0], [None], [None], [0.5], [0])
    windows = list(grid.numbers(_windows.BIAS_FULL))
    out, lse = ops.attention_forward(*core, windows)
    return (
        RawCall("forward", ops.attention_forward.default, (*core, windows)),
        RawCall(
            "backward",
            ops.attention_backward.default,
            (grad, None, *core, windows, out, lse, [True]),
        ),
        RawCall(
            "jvp",
            ops.attention_jvp.default,
            (*core, windows, out, lse, tangent, [tangent], [tangent], [None]),
        ),
    )


def _bad(name: str, match: str, error: type[Exception] = ValueError, **options: object) -> BadCase:
    def call(op: Callable[..., object]) -> object:
        query = torch.randn(1, 2, 12, 4)
        given = {"query": query, "key": query, "value": query, "size": (3, 4), **options}
        return op(given.pop("query"), given.pop("key"), given.pop("value"), **given)

    return BadCase(name, call, error, match)


_QUERY = torch.zeros(1, 2, 12, 4)
ERRORS = (
    _bad("size and tokens", r"size: expected a product of 12 .* got \(3, 5\) = 15", size=(3, 5)),
    _bad("size of four axes", r"size: expected 1 to 3 ints", size=(1, 3, 2, 2)),
    _bad("size of floats", r"size: expected ints", TypeError, size=(3.0, 4)),
    _bad("negative size", r"size: expected ints >= 0", size=(-3, -4)),
    _bad("window 0", r"window: expected ints >= 1", window=0),
    _bad("window of three", r"window: expected an int or 2 ints", window=(2, 2, 2)),
    _bad("window by another name", r'window: expected "half"', window="third"),
    _bad("window true", r"window: expected", TypeError, window=True),
    _bad("shift of floats", r"shift: expected", ValueError, shift=0.5),
    _bad("wrap", r"wrap: expected one of", wrap="torus"),
    _bad("ragged", r"ragged: expected one of", ragged="resize"),
    _bad("key of other tokens", r"size: expected a product of 11 \(the tokens of key\)",
         key=torch.zeros(1, 2, 11, 4), value=torch.zeros(1, 2, 11, 4)),
    _bad("key of three axes", r"key: expected", key=torch.zeros(2, 12, 4)),
    _bad("value of another dtype", r"value: expected dtype", TypeError, value=_QUERY.double()),
    _bad("value of other heads", r"value: expected 2 .*heads", value=torch.zeros(1, 1, 12, 4)),
    _bad("bias of another shape", r"bias: expected shape \(2 or 1, 4, 4\)",
         bias=torch.zeros(2, 4, 5)),
    _bad("bias of other heads", r"bias: expected shape", bias=torch.zeros(3, 4, 4)),
    _bad("bias of ints", r"bias: expected", TypeError, bias=torch.zeros(2, 4, 4).long()),
    _bad("scale", r"scale: expected a finite number", scale=math.nan),
    _bad("extra", r"extra: expected a KV", TypeError, extra=torch.zeros(1)),
    _bad("extra of another width", r"extra\[0\]\.key: expected 4",
         extra=KV(torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))),
    _bad("causal extra", r"extra\[0\]\.causal: expected None",
         extra=KV(_QUERY, _QUERY, causal="upper_left")),
    _bad("gated extra", r"extra\[0\]\.gate: expected the gate of key",
         extra=KV(_QUERY, _QUERY, gate=0.5)),
    _bad("grouped extra", r"expected one group",
         extra=KV(_QUERY, _QUERY, group=1)),
    _bad("backend", r"backend: expected one of", backend="gpu"),
)  # fmt: skip

_PLANS = _plans()

SPECS = (
    OpSpec(
        name="window_attention",
        op=window_attention,
        reference=window_attention_reference,
        cases=tuple(_case(name, *entry) for name, entry in _PLANS.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=lambda args: _flops(args.call.__self__, args),
        bytes=_bytes,
        errors=ERRORS,
        gradcheck=("small", "swin", "uneven", "one bias for all heads", "extra keys"),
        refuses=ATTENTION_REFUSES,
        fuzz=_fuzz,
        raw_calls=_raw_calls,
    ),
)
