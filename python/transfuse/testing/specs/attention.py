"""Specs of ``attend``, ``attend_with_lse`` and ``merge_attention``.

One plan of a call (``_attention_plans.py``) serves ``attend`` and, where it has a single softmax,
``attend_with_lse``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transfuse.ops import KV, attend, attend_with_lse, merge_attention
from transfuse.ops._attention_call import hopper_fits
from transfuse.ops._attention_core import compact
from transfuse.ops._attention_reference import (
    attend_reference,
    attend_with_lse_reference,
    merge_attention_reference,
)
from transfuse.ops._sources import normalise
from transfuse.testing.spec import CallArgs, Case, OpSpec, RawCall, Tensors
from transfuse.testing.specs._attention_cases import AWKWARD, TINY, fuzz_plan, plans
from transfuse.testing.specs._attention_errors import ATTEND_ERRORS, LSE_ERRORS, MERGE_ERRORS
from transfuse.testing.specs._attention_plans import Plan, Shape, Source

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("reference", "cpu", "triton", "cuda")


# -- cases --------------------------------------------------------------------------------------


def _case(name: str, plan: Plan, tags: frozenset[str]) -> Case:
    return Case(
        name,
        lambda dtype, device, generator: CallArgs(plan.call, plan.draw(dtype, device, generator)),
        plan.differentiable(),
        tags,
        _refused_by(plan),
    )


def _refused_by(plan: Plan) -> frozenset[str]:
    widths = (plan.width, plan.width if plan.value_width is None else plan.value_width)
    reason = hopper_fits(widths, len(plan.sources))
    return frozenset() if reason is None else frozenset({"cuda"})


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


def _fuzz(choose: Callable[[Sequence[object]], object]) -> Case:
    plan = fuzz_plan(choose)
    return _case(repr(plan), plan, frozenset())


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

_PLANS = plans()
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
