"""The plans of the attention specs' cases: one feature at a time, awkward sizes, real uses; and
random ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from transfuse.testing.specs._attention_plans import Mix, Plan, Source

TINY = frozenset({"tiny"})
AWKWARD = frozenset({"awkward"})
REAL = frozenset({"real"})
BENCH = frozenset({"bench"})


def plans() -> dict[str, tuple[Plan, frozenset[str]]]:
    own = Source(11)
    base = Plan(2, 4, 9, 8, (own,))

    def with_source(**changes: object) -> Plan:
        return replace(base, sources=(replace(own, **changes),))

    b, h, n, m = 2, 4, 9, 11
    found = {
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
        found[f"tile {size}"] = (Plan(1, 1, size, 16, (Source(size),)), AWKWARD)
    for width in (2, 3, 40, 72, 80, 96, 128, 160, 256):
        found[f"width {width}"] = (Plan(1, 2, 19, width, (Source(21),)), AWKWARD)
    large = {
        "a": Plan(2, 8, 4096, 40, (Source(4096),)),
        "b": Plan(1, 10, 4096, 64, (Source(4096),)),
        "c": Plan(2, 20, 1024, 64, (Source(1024),)),
        "v": Plan(8, 12, 197, 64, (Source(197),)),
    }
    for name, plan in large.items():
        found[f"shape {name}"] = (plan, BENCH)
    return found


_SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 31, 32, 33, 63, 65, 67)
_WIDTHS = (1, 2, 3, 7, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 72)


def fuzz_plan(choose: Callable[[Sequence[object]], object]) -> Plan:
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
    return Plan(
        batch,
        heads,
        queries,
        choose(_WIDTHS),
        tuple(sources),
        value_width=choose((None, None, *_WIDTHS)),
        blend=choose((None, None, Mix(0.0), Mix(0.4), Mix((queries,), batch=1))),
        layout=choose(("contiguous", "heads_last")),
    )
