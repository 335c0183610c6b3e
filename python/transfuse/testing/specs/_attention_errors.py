"""Calls of the attention ops that must be refused, and what the refusal must say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops._sources import KV, Blend
from transfuse.testing.spec import BadCase

_B, _H, _N, _M, _D = 2, 4, 5, 6, 8


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _query() -> Tensor:
    return _new(_B, _H, _N, _D)


def _key(batch: int = _B, heads: int = _H, keys: int = _M, width: int = _D) -> Tensor:
    return _new(batch, heads, keys, width)


def _one(name: str, error: type[Exception], match: str, **options: object) -> BadCase:
    """One source with a bad option."""
    return BadCase(name, lambda op: op(_query(), KV(_key(), _key(), **options)), error, match)


def _call(name: str, error: type[Exception], match: str, build: Callable[..., object]) -> BadCase:
    return BadCase(name, build, error, match)


_KEY = r"sources\.key: expected "
_SHARED = (
    # rank, class, dtype, device
    _call("query rank", ValueError, r"query: expected 4 dimensions \(B, H, N, D\), got 3",
          lambda op: op(_new(_B, _N, _D), KV(_key(), _key()))),
    _call("query class", TypeError, "query: expected a tensor, got an object of type list",
          lambda op: op([1.0], KV(_key(), _key()))),
    _call("query integer", TypeError, "query: expected float32.* got int64",
          lambda op: op(_query().long(), KV(_key().long(), _key().long()))),
    _call("query complex", TypeError, "query: expected float32.* got complex64",
          lambda op: op(_query().to(torch.complex64), KV(_key(), _key()))),
    _call("query sparse", TypeError, "query: expected a dense",
          lambda op: op(_query().to_sparse(), KV(_key(), _key()))),
    _call("key rank", ValueError, r"sources\.key: expected 4 dimensions \(Bs, Hk, M, D\), got 2",
          lambda op: op(_query(), KV(_new(_M, _D), _key()))),
    _call("value rank", ValueError, r"sources\.value: expected 4 dimensions",
          lambda op: op(_query(), KV(_key(), _new(_B, _M, _D)))),
    _call("key class", TypeError, r"sources\.key: expected a tensor, got None",
          lambda op: op(_query(), KV(None, _key()))),
    _call("key dtype", TypeError, r"sources\.key: expected dtype float32 .* got float64",
          lambda op: op(_query(), KV(_key().double(), _key()))),
    _call("value dtype", TypeError, r"sources\.value: expected dtype float32 .* got bfloat16",
          lambda op: op(_query(), KV(_key(), _key().bfloat16()))),
    _call("key device", ValueError, r"sources\.key: expected device cpu .* got meta",
          lambda op: op(_query(), KV(_key().to("meta"), _key()))),
    _call("mask device", ValueError, r"sources\.mask: expected device cpu .* got meta",
          lambda op: op(_query(), KV(_key(), _key(), mask=torch.ones(_M, dtype=torch.bool,
                                                                     device="meta")))),
    # sizes
    _call("key batch", ValueError, _KEY + r"batch 2 .* got 3",
          lambda op: op(_query(), KV(_key(3), _key(3)))),
    _call("value batch", ValueError, r"sources\.value: expected 2 in dimension 0 .* got 1",
          lambda op: op(_query(), KV(_key(), _key(1)))),
    _call("key heads", ValueError, _KEY + r"a head count that divides the 4 heads .* got 3",
          lambda op: op(_query(), KV(_key(heads=3), _key(heads=3)))),
    _call("no key heads", ValueError, _KEY + r"a head count that divides the 4 heads .* got 0",
          lambda op: op(_query(), KV(_key(heads=0), _key(heads=0)))),
    _call("key heads differ", ValueError,
          r"sources\[1\]\.key: expected 4 in dimension 1 \(head count of the first source\), got 2",
          lambda op: op(_query(), [KV(_key(), _key()), KV(_key(heads=2), _key(heads=2))])),
    _call("value heads", ValueError, r"sources\.value: expected 4 in dimension 1 .* got 2",
          lambda op: op(_query(), KV(_key(), _key(heads=2)))),
    _call("key width", ValueError, _KEY + r"8 in dimension 3 \(head dim of query\), got 9",
          lambda op: op(_query(), KV(_key(width=9), _key()))),
    _call("value count", ValueError, r"sources\.value: expected 6 in dimension 2 .* got 7",
          lambda op: op(_query(), KV(_key(), _key(keys=7)))),
    _call("value widths", ValueError, r"sources\[1\]\.value: expected 8 in dimension 3 .* got 5",
          lambda op: op(_query(), [KV(_key(), _key()), KV(_key(), _key(width=5))])),
    _call("head dim 257", ValueError, "query: expected a last dimension of 1 to 256, got 257",
          lambda op: op(_new(_B, _H, _N, 257), KV(_key(width=257), _key()))),
    _call("head dim 0", ValueError, "query: expected a last dimension of 1 to 256, got 0",
          lambda op: op(_new(_B, _H, _N, 0), KV(_key(width=0), _key()))),
    _call("value width 257", ValueError,
          r"sources\.value: expected a last dimension of 1 to 256, got 257",
          lambda op: op(_query(), KV(_key(), _key(width=257)))),
    # sources
    _call("no sources", ValueError, "sources: expected at least one KV, got none",
          lambda op: op(_query(), [])),
    _call("sources class", TypeError, "sources: expected a KV or a list or tuple",
          lambda op: op(_query(), _key())),
    _call("source class", TypeError, r"sources\[1\]: expected a KV, got an object of type tuple",
          lambda op: op(_query(), [KV(_key(), _key()), (_key(), _key())])),
    # numbers
    _one("temperature NaN", ValueError, r"sources\.temperature: expected a finite number, got nan",
         temperature=float("nan")),
    _one("temperature infinite", ValueError, r"sources\.temperature: expected a finite number",
         temperature=float("inf")),
    _one("temperature 0", ValueError, r"sources\.temperature: .* greater than 0, got 0",
         temperature=0.0),
    _one("temperature negative", ValueError, r"sources\.temperature: .* greater than 0, got -1",
         temperature=-1.0),
    _one("temperature tensor", TypeError, r"sources\.temperature: expected a Python number",
         temperature=torch.ones(())),
    _call("scale NaN", ValueError, "scale: expected a finite number, got nan",
          lambda op: op(_query(), KV(_key(), _key()), scale=float("nan"))),
    _call("scale text", TypeError, "scale: expected a Python number, got 'auto'",
          lambda op: op(_query(), KV(_key(), _key()), scale="auto")),
    # bias and mask
    _one("bias shape", ValueError,
         r"sources\.bias: expected a shape that broadcasts to \(B, H, N, M\) = \(2, 4, 5, 6\), "
         r"got \(2, 6\)", bias=_new(_B, _M)),
    _one("bias rank", ValueError, r"sources\.bias: expected a shape that broadcasts",
         bias=_new(1, 1, 1, 1, _M)),
    _one("bias integer", TypeError, r"sources\.bias: expected dtype float32 .* got int64",
         bias=torch.zeros(_M, dtype=torch.int64)),
    _one("bias boolean", TypeError, r"sources\.bias: expected dtype float32 .* got bool",
         bias=torch.zeros(_M, dtype=torch.bool)),
    _one("bias dtype", TypeError, r"sources\.bias: expected dtype float32 .* got float64",
         bias=_new(_M, dtype=torch.float64)),
    _one("bias class", TypeError, r"sources\.bias: expected a tensor or None, got 0.5", bias=0.5),
    _one("mask shape", ValueError, r"sources\.mask: expected a shape that broadcasts to .*"
         r"got \(2, 6\)", mask=torch.ones(_B, _M, dtype=torch.bool)),
    _one("mask floating", TypeError, r"sources\.mask: expected a bool tensor .*got a float32",
         mask=_new(_M)),
    _one("mask class", TypeError, r"sources\.mask: expected a bool tensor .*got True", mask=True),
    # causal
    _one("causal True", ValueError, r"sources\.causal: expected one of None, 'upper_left', "
         r"'lower_right', got True", causal=True),
    _one("causal name", ValueError, r"sources\.causal: expected one of .* got 'left'",
         causal="left"),
    # index
    _one("index dtype", TypeError, r"sources\.index: expected int64 or int32, got float32",
         index=_new(_B)),
    _one("index bool", TypeError, r"sources\.index: expected int64 or int32, got bool",
         index=torch.zeros(_B, dtype=torch.bool)),
    _one("index shape", ValueError, r"sources\.index: expected shape \(2,\) .* got \(3,\)",
         index=torch.zeros(3, dtype=torch.int64)),
    _one("index list", TypeError, r"sources\.index: expected an integer tensor", index=[0, 1]),
    _one("index too large", ValueError, r"sources\.index: expected entries in \[0, 2\), got 2",
         index=torch.tensor([0, 2])),
    _one("index negative", ValueError, r"sources\.index: expected entries in \[0, 2\), got -1",
         index=torch.tensor([0, -1], dtype=torch.int32)),
    _call("index into nothing", ValueError, r"sources\.index: expected entries in \[0, 0\), got 0",
          lambda op: op(_query(), KV(_key(0), _key(0), index=torch.zeros(_B, dtype=torch.int64)))),
    # blends
    _call("blend class", TypeError, "blend: expected a Blend or None, got an object of type tuple",
          lambda op: op(_query(), KV(_key(), _key()), blend=(_query(), 0.5))),
    _call("blend width", ValueError, r"blend\.other: expected 8 in dimension 3 \(D of query\)",
          lambda op: op(_query(), KV(_key(), _key()), blend=Blend(_new(_B, _H, _N, 9), 0.5))),
    _call("blend batch", ValueError, r"blend\.other: expected batch 2 .* got 3",
          lambda op: op(_query(), KV(_key(), _key()), blend=Blend(_new(3, _H, _N, _D), 0.5))),
    _call("blend dtype", TypeError, r"blend\.other: expected dtype float32 .* got float16",
          lambda op: op(_query(), KV(_key(), _key()), blend=Blend(_query().half(), 0.5))),
    _call("blend weight NaN", ValueError, r"blend\.weight: expected a finite number, got nan",
          lambda op: op(_query(), KV(_key(), _key()), blend=Blend(_query(), float("nan")))),
    _call("blend weight shape", ValueError,
          r"blend\.weight: expected a shape that broadcasts to \(B, H, N\) = \(2, 4, 5\), "
          r"got \(2,\)",
          lambda op: op(_query(), KV(_key(), _key()), blend=Blend(_query(), _new(_B)))),
    _call("blend index", ValueError, r"blend\.index: expected entries in \[0, 2\), got 5",
          lambda op: op(_query(), KV(_key(), _key()),
                        blend=Blend(_query(), 0.5, torch.tensor([0, 5])))),
    _call("key blend shape", ValueError, r"sources\.blend\.other: expected 6 in dimension 2",
          lambda op: op(_query(), KV(_key(), _key(), blend=Blend(_key(keys=7), 0.5)))),
    _call("key blend weight", ValueError,
          r"sources\.blend\.weight: expected a shape that broadcasts to \(Bs, Hk, M\)",
          lambda op: op(_query(), KV(_key(), _key(), blend=Blend(_key(), _new(_N))))),
    # group numbers
    _one("group negative", ValueError, r"sources\.group: expected an int >= 0, got -1", group=-1),
    _one("group text", ValueError, r"sources\.group: expected an int >= 0, got 'text'",
         group="text"),
    _one("group gap", ValueError, r"sources: expected groups numbered from 0 .* got groups \[1\]",
         group=1),
    # gates
    _one("gate NaN", ValueError, r"sources\.gate: expected a finite number, got nan",
         gate=float("nan")),
    _one("gate text", TypeError, r"sources\.gate: expected a Python number, got 'on'", gate="on"),
)  # fmt: skip

_BACKEND = (
    _call("backend name", ValueError, "backend: expected one of .*'gpu'",
          lambda op: op(_query(), KV(_key(), _key()), backend="gpu")),
)  # fmt: skip

ATTEND_ERRORS = _SHARED + _BACKEND + (
    _call("group gap of two", ValueError,
          r"sources: expected groups numbered from 0 without gaps, got groups \[0, 2\]",
          lambda op: op(_query(), [KV(_key(), _key()), KV(_key(), _key(), group=2)])),
    _one("gate shape", ValueError,
         r"sources\.gate: expected a shape that broadcasts to \(B, H, N\) = \(2, 4, 5\), "
         r"got \(2,\)", gate=_new(_B)),
    _one("gate rank", ValueError, r"sources\.gate: expected a shape that broadcasts to \(B, H, N\)",
         gate=_new(_B, _H, _N, 1)),
    _one("gate dtype", TypeError, r"sources\.gate: expected dtype float32 .* got int64",
         gate=torch.ones(_N, dtype=torch.int64)),
    _call("gates differ", ValueError, r"sources\[1\]\.gate: expected the gate of sources\[0\]",
          lambda op: op(_query(), [KV(_key(), _key(), gate=0.5), KV(_key(), _key(), gate=0.25)])),
    _call("gate tensors differ", ValueError, r"sources\[1\]\.gate: expected the gate of sources\[0",
          lambda op: op(_query(), [KV(_key(), _key(), gate=_new(_N)),
                                   KV(_key(), _key(), gate=_new(_N))])),
)  # fmt: skip

LSE_ERRORS = _SHARED + _BACKEND + (
    _call("two groups", ValueError, "sources: expected one group .* got 2 groups",
          lambda op: op(_query(), [KV(_key(), _key()), KV(_key(), _key(), group=1)])),
    _one("gate", ValueError, r"sources: expected gate 1\.0 .* got 0\.5", gate=0.5),
    _one("gate tensor", ValueError, r"sources: expected gate 1\.0 .* got a float32 tensor",
         gate=_new(_N)),
)  # fmt: skip


def _merge(
    name: str, error: type[Exception], match: str, outs: object, lses: object, gates: object = None
) -> BadCase:
    return BadCase(name, lambda op: op(outs, lses, gates), error, match)


_OUT, _LSE = _new(_B, _H, _N, _D), _new(_B, _H, _N)
MERGE_ERRORS = (
    _merge("no parts", ValueError, "outs: expected at least one", [], []),
    _merge("outs class", TypeError, "outs: expected a list or tuple, got a float32", _OUT, [_LSE]),
    _merge("lse count", ValueError, "lses: expected 2 entries", [_OUT, _OUT], [_LSE]),
    _merge("gate count", ValueError, "gates: expected 1 entries", [_OUT], [_LSE], [1.0, 1.0]),
    _merge("out shape", ValueError, r"outs\[1\]: expected shape", [_OUT, _OUT[:1]], [_LSE, _LSE]),
    _merge("out dtype", TypeError, r"outs\[1\]: expected dtype", [_OUT, _OUT.half()], [_LSE] * 2),
    _merge("lse shape", ValueError, r"lses\[0\]: expected shape \(2, 4, 5\)", [_OUT], [_LSE[:1]]),
    _merge("lse rank", ValueError, r"lses\[0\]: expected 3 dimensions", [_OUT], [_OUT]),
    _merge("gate shape", ValueError, r"gates\[0\]: expected a shape", [_OUT], [_LSE], [_new(_B)]),
    _merge(
        "gate NaN", ValueError, r"gates\[0\]: expected a finite", [_OUT], [_LSE], [float("nan")]
    ),
)
