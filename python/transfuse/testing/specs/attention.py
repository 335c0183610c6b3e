"""Specs of ``attend``, ``attend_with_lse`` and ``merge_attention``.

Calls are planned as data (:class:`Plan`, :class:`Source`): shapes and features, from which tensors
are drawn and the call is built. One plan serves ``attend`` and, where it has a single softmax,
``attend_with_lse``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transfuse.ops import (
    KV,
    Blend,
    attend,
    attend_with_lse,
    merge_attention,
)
from transfuse.ops._attention_core import compact
from transfuse.ops._attention_reference import (
    attend_reference,
    attend_with_lse_reference,
    merge_attention_reference,
)
from transfuse.ops._sources import normalise
from transfuse.testing.inputs import packed
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs._attention_errors import ATTEND_ERRORS, LSE_ERRORS, MERGE_ERRORS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "cpu", "triton")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """A blend: weight a number or the shape of a tensor; batch and index of the other tensor."""

    weight: float | Shape
    batch: int | None = None
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One source of a plan. Tensors are named by the shape they are drawn with."""

    keys: int
    batch: int | None = None
    heads: int | None = None
    group: int = 0
    gate: float | Shape = 1.0
    temperature: float = 1.0
    bias: Shape | None = None
    bias_forbids: bool = False
    bias_float32: bool = False
    mask: Shape | None = None
    mask_kind: str = "random"
    causal: str | None = None
    index: tuple[int, ...] | None = None
    index_dtype: torch.dtype = torch.int64
    blend: Mix | None = None


@dataclass(frozen=True)
class Plan:
    """Shapes and features of one call. ``layout`` is ``"contiguous"``, ``"packed"`` (query, key,
    value of the first source in one buffer) or ``"heads_last"``."""

    batch: int
    heads: int
    queries: int
    width: int
    sources: tuple[Source, ...]
    value_width: int | None = None
    blend: Mix | None = None
    scale: float | None = None
    layout: str = "contiguous"

    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors a gradient must reach, in the order they are drawn."""
        names = ["query", *_mix_names("query_", self.blend)]
        for number, source in enumerate(self.sources):
            names += [f"key{number}", f"value{number}"]
            names += [f"bias{number}"] if source.bias is not None else []
            names += _mix_names(f"key{number}_", source.blend)
            if isinstance(source.gate, tuple) and f"gate{source.group}" not in names:
                names.append(f"gate{source.group}")
        return tuple(names)

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(dtype)

        value_width = self.width if self.value_width is None else self.value_width
        tensors = {"query": normal(self.batch, self.heads, self.queries, self.width)}
        _draw_mix(tensors, "query_", self.blend, tensors["query"].shape, normal, uniform)
        for number, source in enumerate(self.sources):
            batch = self.batch if source.batch is None else source.batch
            heads = self.heads if source.heads is None else source.heads
            tensors[f"key{number}"] = normal(batch, heads, source.keys, self.width)
            tensors[f"value{number}"] = normal(batch, heads, source.keys, value_width)
            if source.bias is not None:
                bias = torch.randn(source.bias, generator=generator)
                if source.bias_forbids:
                    forbidden = torch.rand(source.bias, generator=generator) < 0.3
                    bias = bias.masked_fill(forbidden, -torch.inf)
                bias = bias.to(dtype)
                single = source.bias_float32 and dtype != torch.float64
                tensors[f"bias{number}"] = bias.float() if single else bias
            if source.mask is not None:
                tensors[f"mask{number}"] = _draw_mask(source.mask, source.mask_kind, generator)
            if source.index is not None:
                tensors[f"index{number}"] = torch.tensor(source.index, dtype=source.index_dtype)
            shape = (batch, heads, source.keys, self.width)
            _draw_mix(tensors, f"key{number}_", source.blend, shape, normal, uniform)
            if isinstance(source.gate, tuple) and f"gate{source.group}" not in tensors:
                tensors[f"gate{source.group}"] = uniform(*source.gate) + 0.5
        if self.layout == "packed":
            names = ("query", "key0", "value0")
            tensors.update(zip(names, packed(*(tensors[n] for n in names)), strict=True))
        elif self.layout == "heads_last":
            for name, tensor in tensors.items():
                if tensor.dim() == 4:
                    tensors[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """Build the sources from the tensors and call ``op``."""
        sources = []
        for number, source in enumerate(self.sources):
            gate = tensors.get(f"gate{source.group}", source.gate)
            sources.append(
                KV(
                    tensors[f"key{number}"],
                    tensors[f"value{number}"],
                    group=source.group,
                    gate=gate,
                    temperature=source.temperature,
                    bias=tensors.get(f"bias{number}"),
                    mask=tensors.get(f"mask{number}"),
                    causal=source.causal,
                    index=tensors.get(f"index{number}"),
                    blend=_build_mix(tensors, f"key{number}_", source.blend),
                )
            )
        blend = _build_mix(tensors, "query_", self.blend)
        options = {} if backend is None else {"backend": backend}
        return op(
            tensors["query"],
            sources[0] if len(sources) == 1 else sources,
            blend=blend,
            scale=self.scale,
            **options,
        )


def _mix_names(prefix: str, mix: Mix | None) -> list[str]:
    if mix is None:
        return []
    # A weight of exactly 0 or 1 leaves one partner out, and its gradient is zero by definition.
    return [f"{prefix}other"] + ([f"{prefix}weight"] if isinstance(mix.weight, tuple) else [])


def _draw_mix(
    tensors: Tensors,
    prefix: str,
    mix: Mix | None,
    shape: Sequence[int],
    normal: Callable[..., Tensor],
    uniform: Callable[..., Tensor],
) -> None:
    if mix is None:
        return
    batch = shape[0] if mix.batch is None else mix.batch
    tensors[f"{prefix}other"] = normal(batch, *shape[1:])
    if isinstance(mix.weight, tuple):
        tensors[f"{prefix}weight"] = uniform(*mix.weight)
    if mix.index is not None:
        tensors[f"{prefix}index"] = torch.tensor(mix.index)


def _build_mix(tensors: Tensors, prefix: str, mix: Mix | None) -> Blend | None:
    if mix is None:
        return None
    weight = tensors.get(f"{prefix}weight", mix.weight)
    return Blend(tensors[f"{prefix}other"], weight, tensors.get(f"{prefix}index"))


def _draw_mask(shape: Shape, kind: str, generator: torch.Generator) -> Tensor:
    """``"random"``; ``"rows"``: some rows wholly forbidden; ``"none"``: everything forbidden;
    ``"blocks"``: allowed and forbidden squares of 32, so that whole tiles can be left out."""
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "blocks":
        rows, columns = (-(-n // 32) for n in shape[-2:])
        blocks = torch.rand((*shape[:-2], rows, columns), generator=generator) < 0.5
        mask = blocks.repeat_interleave(32, -2).repeat_interleave(32, -1)
        return mask[..., : shape[-2], : shape[-1]].contiguous()
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind == "rows":
        mask[..., ::3, :] = False
    return mask


# -- cases --------------------------------------------------------------------------------------

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


def _plans() -> dict[str, tuple[Plan, frozenset[str]]]:
    own = Source(11)
    base = Plan(2, 4, 9, 8, (own,))

    def with_source(**changes: object) -> Plan:
        return replace(base, sources=(replace(own, **changes),))

    b, h, n, m = 2, 4, 9, 11
    plans = {
        # Small enough for a full Jacobian by finite differences.
        "small": (
            Plan(1, 2, 3, 2, (Source(4, bias=(4,)), Source(2, temperature=1.5))),
            TINY,
        ),
        "plain": (base, TINY),
        "self": (Plan(2, 2, 7, 5, (Source(7),)), TINY),
        "value width": (replace(base, value_width=3), TINY),
        "scale": (replace(base, scale=-0.7), TINY),
        "temperature": (with_source(temperature=1.5), TINY),
        "two sources": (
            Plan(2, 2, 5, 4, (Source(6), Source(3, temperature=2.0, bias=(3,)))),
            TINY,
        ),
        "three sources, ragged": (
            replace(base, sources=(Source(17), Source(1), Source(5, temperature=0.5))),
            TINY,
        ),
        "source of no keys": (replace(base, sources=(Source(0), Source(6))), AWKWARD),
        "groups": (
            Plan(2, 2, 5, 4, (Source(6), Source(3, group=1, gate=0.3)), value_width=6),
            TINY,
        ),
        "groups, interleaved": (
            replace(
                base,
                sources=(
                    Source(7, group=1, gate=-0.5),
                    Source(5),
                    Source(3, group=1, gate=-0.5, temperature=2.0),
                ),
            ),
            TINY,
        ),
        "gate 0": (replace(base, sources=(Source(7), Source(3, group=1, gate=0.0))), TINY),
        "gate of batch": (with_source(gate=(b, 1, 1)), TINY),
        "gate of head": (with_source(gate=(h, 1)), TINY),
        "gate of query": (
            replace(base, sources=(Source(5), Source(6, group=1, gate=(b, 1, n)))),
            TINY,
        ),
        "gate of all": (with_source(gate=(b, h, n)), TINY),
        # Beside a second source: alone, softmax would not feel these two.
        "bias scalar": (replace(base, sources=(replace(own, bias=()), Source(4))), TINY),
        "bias of key": (with_source(bias=(m,)), TINY),
        "bias of batch and key": (with_source(bias=(b, 1, 1, m)), TINY),
        "bias of head": (with_source(bias=(h, n, m)), TINY),
        "bias of query and key": (with_source(bias=(n, m)), TINY),
        "bias of query": (
            replace(
                base,
                sources=(replace(own, bias=(b, 1, n, 1), bias_float32=True), Source(4)),
            ),
            TINY,
        ),
        "bias of all": (with_source(bias=(b, h, n, m)), TINY),
        "bias forbids": (with_source(bias=(b, h, n, m), bias_forbids=True), AWKWARD),
        "mask of key": (with_source(mask=(b, 1, 1, m)), TINY),
        "mask of query and key": (with_source(mask=(n, m)), TINY),
        "mask of all": (with_source(mask=(b, h, n, m)), TINY),
        "masked rows": (with_source(mask=(b, 1, n, m), mask_kind="rows"), TINY),
        "masked rows of one source": (
            replace(
                base,
                sources=(Source(m, mask=(n, m), mask_kind="rows"), Source(4)),
            ),
            TINY,
        ),
        "all masked": (with_source(mask=(m,), mask_kind="none"), AWKWARD),
        "one group all masked": (
            replace(base, sources=(Source(5), Source(6, group=1, mask=(6,), mask_kind="none"))),
            TINY,
        ),
        "mask in blocks": (
            Plan(1, 2, 150, 16, (Source(170, mask=(150, 170), mask_kind="blocks"),)),
            AWKWARD,
        ),
        "causal upper": (with_source(causal="upper_left"), TINY),
        "causal lower": (with_source(causal="lower_right"), TINY),
        "causal, more queries": (
            Plan(1, 2, 12, 6, (Source(5, causal="lower_right"),)),
            TINY,
        ),
        "causal, long": (Plan(1, 2, 133, 16, (Source(150, causal="lower_right"),)), AWKWARD),
        "causal, mask and bias": (
            with_source(causal="upper_left", mask=(b, 1, n, m), bias=(h, 1, m)),
            TINY,
        ),
        "shared source": (with_source(batch=1), TINY),
        "index": (
            Plan(3, 2, 5, 4, (Source(6, batch=2, index=(1, 1, 0)),)),
            TINY,
        ),
        "index, int32": (
            with_source(batch=5, index=(4, 2), index_dtype=torch.int32, mask=(n, m)),
            TINY,
        ),
        "query blend": (replace(base, blend=Mix(0.25)), TINY),
        "query blend of batch": (
            replace(base, blend=Mix((b, 1, 1), batch=1)),
            TINY,
        ),
        "query blend of query": (
            Plan(2, 2, 5, 4, (Source(6),), blend=Mix((2, 1, 5), batch=3, index=(2, 0))),
            TINY,
        ),
        "key blend": (with_source(blend=Mix(0.75)), TINY),
        "key blend of key": (
            with_source(batch=3, index=(2, 0), blend=Mix((m,), batch=2, index=(0, 1, 1))),
            TINY,
        ),
        "grouped heads": (Plan(2, 6, 5, 4, (Source(7, heads=2),)), TINY),
        "one key head": (Plan(2, 4, 6, 5, (Source(7, heads=1, bias=(4, 1, 7)),)), TINY),
        "everything": (
            Plan(
                3,
                4,
                10,
                9,
                (
                    Source(
                        13,
                        batch=2,
                        heads=2,
                        temperature=1.5,
                        bias=(3, 1, 1, 13),
                        mask=(10, 13),
                        index=(1, 0, 1),
                        blend=Mix((2, 1, 13), batch=1),
                    ),
                    Source(7, batch=1, heads=2, causal="upper_left"),
                    Source(6, group=1, gate=(3, 1, 10), heads=2, mask=(3, 1, 1, 6)),
                    Source(5, heads=2, group=2, gate=-0.4, bias=(5,), bias_float32=True),
                ),
                value_width=7,
                blend=Mix((4, 1), batch=2, index=(1, 1, 0)),
                scale=0.4,
            ),
            AWKWARD,
        ),
        "packed": (Plan(2, 3, 13, 16, (Source(13),), layout="packed"), AWKWARD),
        "heads last": (
            Plan(2, 3, 13, 16, (Source(19, mask=(19,)),), layout="heads_last", blend=Mix(0.5)),
            AWKWARD,
        ),
        "primes": (Plan(3, 5, 37, 23, (Source(41),), value_width=29), AWKWARD),
        "one query": (Plan(2, 2, 1, 16, (Source(37),)), AWKWARD),
        "one key": (Plan(2, 2, 9, 16, (Source(1),)), AWKWARD),
        "one of all": (Plan(1, 1, 1, 1, (Source(1),)), AWKWARD),
        "no keys": (Plan(2, 2, 5, 4, (Source(0),)), AWKWARD),
        "no queries": (Plan(2, 2, 0, 4, (Source(5),)), AWKWARD),
        "no batch": (Plan(0, 2, 3, 4, (Source(5),)), AWKWARD),
        "no heads": (Plan(2, 0, 3, 4, (Source(5),)), AWKWARD),
        "odd image": (Plan(1, 1, 33 * 57, 40, (Source(33 * 57),)), REAL),
        "vit block": (Plan(1, 2, 197, 64, (Source(197),)), AWKWARD),
        "text and image": (
            Plan(1, 2, 256, 64, (Source(77), Source(16, group=1, gate=0.6))),
            REAL,
        ),
        "style injection": (
            Plan(
                2,
                2,
                256,
                40,
                (Source(256, batch=1, temperature=1.5),),
                blend=Mix(0.75, batch=1),
            ),
            REAL,
        ),
    }
    for size in (31, 33, 63, 64, 65, 129):
        plans[f"tile {size}"] = (Plan(1, 1, size, 16, (Source(size),)), AWKWARD)
    for width in (2, 3, 40, 72, 80, 96, 128, 160, 256):
        plans[f"width {width}"] = (Plan(1, 2, 19, width, (Source(21),)), AWKWARD)
    large = {
        "a": Plan(2, 8, 4096, 40, (Source(4096),)),
        "b": Plan(1, 10, 4096, 64, (Source(4096),)),
        "c": Plan(2, 20, 1024, 64, (Source(1024),)),
        "v": Plan(8, 12, 197, 64, (Source(197),)),
    }
    for name, plan in large.items():
        plans[f"shape {name}"] = (plan, BENCH)
    return plans


def _case(name: str, plan: Plan, tags: frozenset[str]) -> Case:
    return Case(
        name,
        lambda dtype, device, generator: CallArgs(plan.call, plan.draw(dtype, device, generator)),
        plan.differentiable(),
        tags,
    )


def _one_softmax(plan: Plan) -> bool:
    return all(source.group == 0 and source.gate == 1.0 for source in plan.sources)


def _merge_case(name: str, shape: Shape, parts: int, gates: tuple[object, ...], tags) -> Case:
    """Random outputs and log-sum-exps; ``gates`` are None, numbers or shapes, one per part or
    none."""

    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> CallArgs:
        tensors: Tensors = {}
        for part in range(parts):
            tensors[f"out{part}"] = torch.randn(shape, generator=generator).to(dtype)
            lse = torch.randn(shape[:3], generator=generator)
            if name == "empty rows":
                # Row 0 is empty in every part, row 1 in the first only.
                lse[..., 0] = -torch.inf
                if part == 0:
                    lse[..., 1] = -torch.inf
            tensors[f"lse{part}"] = lse.to(
                torch.float64 if dtype == torch.float64 else torch.float32
            )
            if gates and isinstance(gates[part], tuple):
                gate = torch.rand(gates[part], generator=generator) + 0.5
                tensors[f"gate{part}"] = gate.to(dtype)
        return CallArgs(call, {name: t.to(device) for name, t in tensors.items()})

    def call(op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        return op(
            [tensors[f"out{part}"] for part in range(parts)],
            [tensors[f"lse{part}"] for part in range(parts)],
            [tensors.get(f"gate{part}", gates[part]) for part in range(parts)] if gates else None,
        )

    names = []
    for part in range(parts):
        # The log-sum-exp first: the result is linear in the outputs.
        names += [f"lse{part}", f"out{part}"]
        names += [f"gate{part}"] if gates and isinstance(gates[part], tuple) else []
    return Case(name, make, tuple(names), tags)


# -- cost ---------------------------------------------------------------------------------------


def _flops(args: CallArgs) -> int:
    """Two products per pair of query and key, whatever masks and causality leave out."""
    batch, heads, queries, width = args.tensors["query"].shape
    total = 0
    for name, key in args.tensors.items():
        if name.removeprefix("key").isdigit():
            value = args.tensors[name.replace("key", "value")]
            total += 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])
    return total


def _bytes(args: CallArgs) -> int:
    """Every input once and the output once."""
    query = args.tensors["query"]
    result = query.numel() // max(query.shape[3], 1) * args.tensors["value0"].shape[3]
    return _size(args.tensors) + result * query.element_size()


def _size(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


# -- fuzz ---------------------------------------------------------------------------------------

_SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 63, 65, 67)
_WIDTHS = (1, 2, 3, 7, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 72)


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    """A random plan: sizes around tile borders, features switched independently."""
    batch, key_heads, ratio = choose((1, 2, 3)), choose((1, 2, 3)), choose((1, 1, 2))
    heads, queries = key_heads * ratio, choose(_SIZES)
    sources = []
    groups = choose((1, 1, 2))
    for number in range(choose((1, 1, 2, 3)) if groups == 1 else 2):
        keys = choose(_SIZES)
        shapes = [(keys,), (queries, keys), (batch, 1, 1, keys), (batch, heads, queries, keys)]
        index = choose((False, False, True))
        source_batch = choose((1, 2, 4)) if index else choose((1, batch))
        mix = choose((None, None, 0.0, 1.0, 0.3, (keys,), (source_batch, key_heads, keys)))
        sources.append(
            Source(
                keys,
                batch=source_batch,
                heads=key_heads,
                group=number if groups == 2 else 0,
                gate=choose((1.0, 0.5, (batch, 1, queries))) if groups == 2 else 1.0,
                temperature=choose((1.0, 1.5)),
                bias=choose((None, None, *shapes)),
                bias_forbids=choose((False, True)),
                mask=choose((None, None, *shapes)),
                mask_kind=choose(("random", "random", "none")),
                causal=choose((None, None, "upper_left", "lower_right")),
                index=tuple(choose(range(source_batch)) for _ in range(batch)) if index else None,
                blend=None if mix is None else Mix(mix),
            )
        )
    plan = Plan(
        batch,
        heads,
        queries,
        choose(_WIDTHS),
        tuple(sources),
        value_width=choose((None, None, *_WIDTHS)),
        blend=choose((None, None, Mix(0.0), Mix(0.4), Mix((queries,), batch=1))),
        layout=choose(("contiguous", "heads_last")),
    )
    return _case(repr(plan), plan, frozenset())


# -- raw ops ------------------------------------------------------------------------------------


def _raw_calls(backend: str) -> tuple[RawCall, ...]:
    """The registered C++ ops on a call with every kind of argument the core takes."""
    if backend != "cpu":
        return ()
    generator = torch.Generator().manual_seed(0)
    plan = Plan(
        2,
        2,
        5,
        4,
        (
            Source(6, bias=(2, 1, 1, 6), mask=(5, 6), index=(1, 0), heads=1),
            Source(3, batch=1, temperature=1.5, causal="lower_right", heads=1),
        ),
        value_width=3,
    )
    tensors = plan.draw(torch.float32, torch.device("cpu"), generator)
    names = plan.differentiable()

    def flat(query: Tensor, sources: Sequence[KV], **options: object) -> tuple[object, ...]:
        call = normalise(query, sources, options["blend"], options["scale"])
        present, positions = compact(call.biases)
        lists = (call.keys, call.values, present, positions, call.masks, call.indices)
        windows: list[int] = []
        return (call.query, *lists, call.scales, call.causal, windows)

    def core(requires_grad: bool) -> tuple[object, ...]:
        leaves = {
            n: t.detach().requires_grad_(requires_grad and n in names) for n, t in tensors.items()
        }
        return plan.call(flat, leaves, None)

    ops = torch.ops.transfuse
    plain = core(False)
    query, keys, values, biases, bias_at = plain[:5]
    results = ops.attention_forward(*plain)
    moves = (
        torch.ones_like(query),
        [torch.ones_like(t) for t in keys],
        [torch.ones_like(t) for t in values],
        [None if at < 0 else torch.ones_like(biases[at]) for at in bias_at],
    )
    moved = ops.attention_jvp(*plain, *results, *moves)
    grads = [torch.ones_like(t) for t in results]
    wanted = [at >= 0 for at in bias_at]
    return (
        RawCall("attention_forward", ops.attention_forward.default, core(True)),
        RawCall(
            "attention_backward",
            ops.attention_backward.default,
            (*grads, *plain, *results, wanted),
        ),
        RawCall("attention_jvp", ops.attention_jvp.default, (*plain, *results, *moves)),
        RawCall(
            "attention_jvp_backward",
            ops.attention_jvp_backward.default,
            (*grads, *plain, *results, *moves, *moved, wanted),
        ),
    )


# -- specs --------------------------------------------------------------------------------------

_PLANS = _plans()
_LSE_NAMES = (
    "small",
    "plain",
    "three sources, ragged",
    "masked rows",
    "bias forbids",
    "causal, more queries",
    "index",
    "query blend of query",
    "key blend",
    "grouped heads",
    "self",
    "no keys",
    "all masked",
    "primes",
    "tile 65",
)
# Kernels are differentiated twice; a compiled graph once. torch runs a batched backward outside the
# transforms that autograd functions see.
ATTENTION_REFUSES = {
    "batched backward": "Batching rule not implemented",
    "jvp of jvp": "one more forward-mode derivative is not implemented",
    "compile, double backward": "a compiled graph holds first derivatives only",
    "compile, func.grad": "do not support torch.func transforms",
    "compile, func.jvp": "do not support torch.func transforms",
    "compile, func.vmap": "do not support torch.func transforms",
}
_MERGE_SHAPE = (2, 2, 5, 4)

SPECS = (
    OpSpec(
        name="attend",
        op=attend,
        reference=attend_reference,
        cases=tuple(_case(name, *entry) for name, entry in _PLANS.items()),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_flops,
        bytes=_bytes,
        errors=ATTEND_ERRORS,
        gradcheck=(
            "small",
            "two sources",
            "self",
            "groups",
            "index",
            "query blend of query",
            "grouped heads",
            "causal, more queries",
        ),
        refuses=ATTENTION_REFUSES,
        fuzz=_fuzz,
        raw_calls=_raw_calls,
    ),
    OpSpec(
        name="attend_with_lse",
        op=attend_with_lse,
        reference=attend_with_lse_reference,
        cases=tuple(_case(name, *_PLANS[name]) for name in _LSE_NAMES),
        dtypes=DTYPES,
        backends=BACKENDS,
        flops=_flops,
        bytes=_bytes,
        errors=LSE_ERRORS,
        gradcheck=("small", "index", "query blend of query"),
        refuses=ATTENTION_REFUSES,
        declared_as="attend",
    ),
    OpSpec(
        name="merge_attention",
        op=merge_attention,
        reference=merge_attention_reference,
        cases=(
            _merge_case("two parts", _MERGE_SHAPE, 2, (), TINY),
            _merge_case("one part", _MERGE_SHAPE, 1, (), TINY),
            _merge_case("gates", _MERGE_SHAPE, 3, (0.5, (2, 1, 1), (5,)), TINY),
            _merge_case("empty rows", _MERGE_SHAPE, 3, (), AWKWARD),
            _merge_case("no rows", (2, 2, 0, 4), 2, (), AWKWARD),
        ),
        dtypes=DTYPES,
        # A composition of element-wise torch operations on every device.
        backends=("reference",),
        flops=lambda args: 3 * sum(t.numel() for n, t in args.tensors.items() if "out" in n),
        bytes=lambda args: (
            _size(args.tensors) + args.tensors["out0"].numel() * args.tensors["out0"].element_size()
        ),
        errors=MERGE_ERRORS,
        gradcheck=("two parts", "gates"),
    ),
)
