"""Calls on lists of tensors that must be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from transfuse.testing.spec import BadCase


def _bad(
    defaults: dict[str, object],
    positional: tuple[str, ...],
    name: str,
    error: type[Exception],
    match: str,
    **changes: object,
) -> BadCase:
    arguments = {**defaults, **changes}

    def call(op: Callable[..., object]) -> object:
        given = dict(arguments)
        first = [given.pop(p) for p in positional]
        return op(*first, **given)

    return BadCase(name, call, error, match)


def _lists(count: int) -> list[list[torch.Tensor]]:
    return [[torch.zeros(2, 3), torch.zeros(4)] for _ in range(count)]


def _lincomb(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    defaults = {"deltas": _lists(2), "coefficients": torch.zeros(2)}
    return _bad(defaults, ("deltas", "coefficients"), name, error, match, **changes)


LINCOMB = (
    _lincomb("no lists", ValueError, "deltas: expected at least one list", deltas=[]),
    _lincomb("a tensor", TypeError, "deltas: expected a list of lists", deltas=torch.zeros(2)),
    _lincomb("not lists", TypeError, r"deltas\[0\]: expected a list", deltas=[torch.zeros(2)]),
    _lincomb(
        "fewer tensors",
        ValueError,
        r"deltas\[1\]: expected 2 tensors \(as deltas\[0\]\), got 1",
        deltas=[_lists(1)[0], [torch.zeros(2, 3)]],
    ),
    _lincomb(
        "other shape",
        ValueError,
        r"deltas\[1\]\[1\]: expected shape \(4,\) .* got \(5,\)",
        deltas=[_lists(1)[0], [torch.zeros(2, 3), torch.zeros(5)]],
    ),
    _lincomb(
        "integers",
        TypeError,
        r"deltas\[0\]\[0\]: expected float32.* got int8",
        deltas=[[torch.zeros(2, dtype=torch.int8)]] * 2,
    ),
    _lincomb("base", ValueError, r"base\[0\]: expected shape \(2, 3\)", base=_lists(1)[0][::-1]),
    _lincomb(
        "coefficients",
        ValueError,
        r"coefficients: expected shape \(2,\), \(2, 2\) or \(2, 2, K\), got \(3,\)",
        coefficients=torch.zeros(3),
    ),
    _lincomb(
        "coefficients list", TypeError, "coefficients: expected a tensor", coefficients=[0.5, 0.5]
    ),
    _lincomb(
        "no partition",
        ValueError,
        r"expected \(T,\) or \(T, m\) without a partition, got shape \(2, 2, 5\)",
        coefficients=torch.zeros(2, 2, 5),
    ),
    _lincomb("partition alone", ValueError, r"expected \(T, m, K\) with", partition=3),
    _lincomb(
        "partition dtype",
        TypeError,
        r"partition\[0\]: expected a uint8 or uint16 tensor, got a int64",
        coefficients=torch.zeros(2, 2, 5),
        partition=[torch.zeros(2, 3, dtype=torch.int64)] * 2,
    ),
    _lincomb("backend", ValueError, "backend: expected one of", backend="opencl"),
    _lincomb("backend cuda", RuntimeError, "backend 'cuda' cannot run", backend="cuda"),
)


def _ratio(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    defaults = {
        "thetas": _lists(2),
        "weights": [[torch.ones(2, 3), torch.ones(4)] for _ in range(2)],
        "coefficients": torch.ones(2),
    }
    return _bad(defaults, ("thetas", "weights", "coefficients"), name, error, match, **changes)


RATIO = (
    _ratio("weights", ValueError, "weights: expected 2 lists", weights=_lists(1)),
    _ratio("zero norm", ValueError, r"weights\[0\]: expected .* positive", weights=_lists(2)),
    _ratio(
        "negative weight",
        ValueError,
        "weights: expected finite numbers of at least 0, got 4 that are not",
        weights=[_lists(1)[0], [torch.ones(2, 3), -torch.ones(4)]],
        normalize=None,
    ),
    _ratio(
        "coefficients shape",
        ValueError,
        r"coefficients: expected shape \(2,\) or \(S, 2\), got \(3,\)",
        coefficients=torch.ones(3),
    ),
    _ratio(
        "negative coefficient",
        ValueError,
        "coefficients: expected finite numbers of at least 0 with a positive sum",
        coefficients=torch.tensor([1.0, -1.0]),
    ),
    _ratio("no coefficient", ValueError, "with a positive sum", coefficients=torch.zeros(1, 2)),
    _ratio(
        "not finite", ValueError, "expected finite", coefficients=torch.tensor([1.0, float("nan")])
    ),
    _ratio("floor", ValueError, "floor: expected a number of at least 0", floor=-1.0),
    _ratio("favour", TypeError, "favor_target: expected a bool", favor_target=1),
    _ratio("normalise", ValueError, "normalize: expected one of", normalize="l1"),
    _ratio("backend", ValueError, "backend: expected one of", backend="opencl"),
)


def _norm(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    return _bad({"tensors": _lists(1)[0]}, ("tensors",), name, error, match, **changes)


NORM = (
    _norm("none", ValueError, "tensors: expected at least one tensor", tensors=[]),
    _norm("order", ValueError, "ord: expected 1, 2 or inf, got 3", ord=3),
    _norm("order class", ValueError, "ord: expected 1, 2 or inf, got 'fro'", ord="fro"),
    _norm("scale", ValueError, "scale: expected 2 tensors", scale=[torch.zeros(2, 3)]),
    _norm("backend", ValueError, "backend: expected one of", backend="opencl"),
)


def _dot(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    one, two = _lists(2)
    return _bad({"xs": one, "ys": two}, ("xs", "ys"), name, error, match, **changes)


DOT = (
    _dot("fewer", ValueError, r"ys: expected 2 tensors \(as xs\)", ys=[torch.zeros(2, 3)]),
    _dot("None", TypeError, r"xs\[0\]: expected a tensor, got None", xs=[None, torch.zeros(4)]),
)


def _gram(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    return _bad({"lists": _lists(2)}, ("lists",), name, error, match, **changes)


GRAM = (
    _gram("nothing", ValueError, "at least one tensor, got only None", lists=[[None], [None]]),
    _gram(
        "shape",
        ValueError,
        r"lists\[2\]\[0\]: expected shape \(3,\) \(that of lists\[1\]\[0\]\), got \(2,\)",
        lists=[[None], [torch.zeros(3)], [torch.zeros(2)]],
    ),
)


def _ties(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    return _bad({"deltas": _lists(2)}, ("deltas",), name, error, match, **changes)


TIES = (
    _ties("density", ValueError, "density: expected a number above 0 and at most 1", density=0.0),
    _ties("scale", ValueError, "scale: expected a finite number", scale=float("inf")),
    _ties(
        "dtypes",
        TypeError,
        r"deltas\[0\]\[1\]: expected dtype float32",
        deltas=[[torch.zeros(2), torch.zeros(2).half()]],
    ),
    _ties("backend", ValueError, "backend: expected one of", backend="opencl"),
)


def _trim(name: str, error: type[Exception], match: str, **changes: object) -> BadCase:
    defaults = {"tensors": _lists(1)[0], "density": 0.5}
    return _bad(defaults, ("tensors", "density"), name, error, match, **changes)


TRIM = (
    _trim("none", ValueError, "tensors: expected at least one tensor", tensors=[]),
    _trim("density", ValueError, "density: .* got 1.5", density=1.5),
)
