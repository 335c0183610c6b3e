"""Calls of the token merging ops that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.ops import match_tokens
from transfuse.testing.spec import BadCase

_X = torch.ones(2, 6, 4)
_PLAN = match_tokens(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), 2)


def _maker(defaults: dict[str, object], count: int) -> Callable[..., BadCase]:
    """Builds bad cases of a call whose first ``count`` arguments are positional."""

    def bad(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
        arguments = {**defaults, **changes}

        def call(op: Callable[..., object]) -> object:
            given = dict(arguments)
            first = [given.pop(key) for key in list(defaults)[:count]]
            return op(*first, **given)

        return BadCase(name, call, error, match)

    return bad


_nearest = _maker({"x": _X, "reference": torch.ones(2, 3, 4)}, 2)
_push = _maker({"x": _X, "reference": torch.ones(2, 3, 4), "alpha": 0.9, "threshold": 0.5}, 2)
_match = _maker({"metric": _X, "merged": 2}, 2)
_merge = _maker({"x": _X, "plan": _PLAN}, 2)
_unmerge = _maker({"y": torch.ones(2, 4, 4), "plan": _PLAN}, 2)


def _searches(bad: Callable[..., BadCase]) -> tuple[BadCase, ...]:
    """What ``nearest_tokens`` and ``push_tokens`` refuse alike."""
    return (
        bad("x class", TypeError, "x: expected a tensor, got None", x=None),
        bad("x rank", ValueError, r"x: expected 3 dimensions \(B, N, C\), got 2", x=_X[0]),
        bad("x integer", TypeError, "x: expected float32.* got int64", x=_X.long()),
        bad("reference dtype", TypeError, r"reference: expected dtype float32 \(that of x\)",
            reference=torch.ones(2, 3, 4, dtype=torch.float64)),
        bad("reference device", ValueError, "reference: expected device cpu",
            reference=torch.ones(2, 3, 4, device="meta")),
        bad("reference batch", ValueError, r"reference: expected batch 2 .* or 1, got 3",
            reference=torch.ones(3, 3, 4)),
        bad("reference channels", ValueError, "reference: expected 4 in dimension 2",
            reference=torch.ones(2, 3, 5)),
        bad("mask class", TypeError, "mask: expected a bool tensor, got", mask=torch.ones(3)),
        bad("mask length", ValueError, r"mask: expected a shape that broadcasts to \(B, M\)",
            mask=torch.ones(4, dtype=torch.bool)),
        bad("mask of one", ValueError, "mask: expected 3 entries .* got 1",
            mask=torch.ones(1, dtype=torch.bool)),
        bad("mask device", ValueError, "mask: expected device cpu",
            mask=torch.ones(3, dtype=torch.bool, device="meta")),
        bad("unknown backend", ValueError, "backend: expected one of", backend="fast"),
    )  # fmt: skip


NEAREST = (
    *_searches(_nearest),
    _nearest("exclude_self class", TypeError, "exclude_self: expected a bool", exclude_self=1),
    _nearest("exclude_self size", ValueError, "reference: expected 6 in dimension 1 .*exclude_self",
             exclude_self=True),
)  # fmt: skip

PUSH = (
    *_searches(_push),
    _push("alpha class", TypeError, "alpha: expected a Python number", alpha="1"),
    _push("alpha NaN", ValueError, "alpha: expected a finite number", alpha=float("nan")),
    _push("threshold high", ValueError, r"threshold: expected a cosine in \[-1, 1\], got 1.5",
          threshold=1.5),
    _push("threshold low", ValueError, r"threshold: expected a cosine in \[-1, 1\], got -2",
          threshold=-2),
    _push("threshold NaN", ValueError, "threshold: expected a finite number",
          threshold=float("nan")),
)  # fmt: skip

MATCH = (
    _match("metric class", TypeError, "metric: expected a tensor, got None", metric=None),
    _match("metric rank", ValueError, r"metric: expected 3 dimensions \(B, N, C\)", metric=_X[0]),
    _match("metric integer", TypeError, "metric: expected float32", metric=_X.long()),
    _match("merged class", TypeError, "merged: expected a number of tokens, got 0.5", merged=0.5),
    _match("merged bool", TypeError, "merged: expected a number of tokens", merged=True),
    _match("size class", TypeError, "size: expected two integers", size=6),
    _match("size zero", ValueError, "size: expected numbers of at least 1", size=(0, 6)),
    _match("size product", ValueError, r"size: expected height \* width = 6 .* got 2 \* 4 = 8",
           size=(2, 4)),
    _match("stride class", TypeError, "stride: expected two integers", size=(2, 3), stride=2),
    _match("stride zero", ValueError, "stride: expected numbers of at least 1", size=(2, 3),
           stride=(0, 1)),
    _match("destination class", TypeError, "destination: expected an integer tensor",
           destination=[1, 3]),
    _match("destination dtype", TypeError, "destination: expected int64 or int32",
           destination=torch.ones(2)),
    _match("destination rank", ValueError, "destination: expected shape",
           destination=torch.ones(1, 1, dtype=torch.int64)),
    _match("destination range", ValueError, r"destination: expected entries in \[0, 6\), got 6",
           destination=torch.tensor([1, 6])),
    _match("destination twice", ValueError, "destination: expected different tokens, got 1 more",
           destination=torch.tensor([1, 3, 1])),
    _match("destination and size", ValueError, "destination: expected None with size",
           destination=torch.tensor([1]), size=(2, 3)),
    _match("protect class", TypeError, "protect: expected a sequence", protect=0),
    _match("protect entry", TypeError, "protect: expected token numbers, got 0.5", protect=(0.5,)),
    _match("protect range", ValueError, r"protect: expected entries in \[0, 6\), got 7",
           protect=(7,)),
    _match("generator class", TypeError, "generator: expected a torch.Generator", size=(2, 3),
           generator=3),
    _match("generator without size", ValueError, "generator: expected None without size",
           generator=torch.Generator()),
    _match("unknown backend", ValueError, "backend: expected one of", backend="fast"),
)  # fmt: skip

_PLANS = (
    ("plan class", TypeError, "plan: expected a MergePlan, got None", {"plan": None}),
    ("plan dtype", ValueError, "plan: expected an int64 matrix rows",
     {"plan": _PLAN._replace(rows=_PLAN.rows.int())}),
    ("plan order", ValueError, "plan: expected an int64 matrix order",
     {"plan": _PLAN._replace(order=_PLAN.order[:, 1:])}),
    ("plan start", ValueError, "plan: expected an int64 matrix start",
     {"plan": _PLAN._replace(start=_PLAN.start[:, :0])}),
    ("plan device", ValueError, "plan: expected device cpu",
     {"plan": type(_PLAN)(*(t.to("meta") for t in _PLAN))}),
    ("unknown backend", ValueError, "backend: expected one of", {"backend": "fast"}),
)  # fmt: skip

MERGE = (
    *(_merge(name, error, match, **changes) for name, error, match, changes in _PLANS),
    _merge("x class", TypeError, "x: expected a tensor, got None", x=None),
    _merge("x integer", TypeError, "x: expected float32.* got int64", x=_X.long()),
    _merge("x tokens", ValueError, r"x: expected 6 in dimension 1 \(the tokens of the plan\)",
           x=torch.ones(2, 5, 4)),
    _merge("plan batch", ValueError, r"plan: expected batch 3 \(that of x\) or 1, got 2",
           x=torch.ones(3, 6, 4)),
    _merge("mode", ValueError, "mode: expected one of 'mean', 'sum', 'amax', 'prune', got 'max'",
           mode="max"),
    _merge("weight with amax", ValueError, "weight: expected None with mode 'amax'", mode="amax",
           weight=torch.ones(2, 6)),
    _merge("weight class", TypeError, "weight: expected a tensor", weight=1.0),
    _merge("weight rank", ValueError, r"weight: expected 2 dimensions \(B, N\)",
           weight=torch.ones(2, 6, 1)),
    _merge("weight dtype", TypeError, "weight: expected dtype float32",
           weight=torch.ones(2, 6, dtype=torch.int64)),
    _merge("weight shape", ValueError, r"weight: expected shape \(2 or 1, 6\), got \(2, 5\)",
           weight=torch.ones(2, 5)),
)  # fmt: skip

UNMERGE = (
    *(_unmerge(name, error, match, **changes) for name, error, match, changes in _PLANS),
    _unmerge("y class", TypeError, "y: expected a tensor, got None", y=None),
    _unmerge("y rows", ValueError, r"y: expected 4 in dimension 1 \(the rows of the plan\)", y=_X),
    _unmerge("plan batch", ValueError, r"plan: expected batch 3 \(that of y\) or 1, got 2",
             y=torch.ones(3, 4, 4)),
)  # fmt: skip
