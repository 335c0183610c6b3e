"""Attention problems for the Triton kernels, and what a dense computation makes of them.

For tests that run under Triton's interpreter alone: importing this imports the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from transfuse.triton_kernels import _attention_plan

# So that small shapes cross many block boundaries.
SMALL_BLOCKS = ";".join(
    f"{direction}:{bucket}=16,16,1,1"
    for direction in _attention_plan.TABLE
    for bucket in (16, 32, 64, 128, 256)
)


def framed(tensor):
    """The same values inside a larger buffer of NaN, so that a stray read shows."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    buffer = torch.full([size + 3 for size in tensor.shape], math.nan, dtype=tensor.dtype)
    view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def packed(tensor):
    """The same values with heads and rows exchanged in memory, as projections leave them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def column_major(tensor):
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


@dataclass
class Problem:
    """Arguments of the core; ``biases`` are unexpanded and expanded on the way in."""

    query: torch.Tensor
    keys: list
    values: list
    biases: list = field(default_factory=list)
    masks: list = field(default_factory=list)
    indices: list = field(default_factory=list)
    scales: list = field(default_factory=list)
    causal: list = field(default_factory=list)

    def __post_init__(self):
        count = len(self.keys)
        for name, default in (
            ("biases", None),
            ("masks", None),
            ("indices", None),
            ("scales", self.query.shape[-1] ** -0.5),
            ("causal", 0),
        ):
            if not getattr(self, name):
                setattr(self, name, [default] * count)

    def expand(self, tensors):
        batches, heads, rows, _ = self.query.shape
        return [
            None if t is None else t.expand(batches, heads, rows, key.shape[2])
            for t, key in zip(tensors, self.keys, strict=True)
        ]

    def arguments(self):
        return (
            self.query,
            self.keys,
            self.values,
            self.expand(self.biases),
            self.expand(self.masks),
            self.indices,
            self.scales,
            self.causal,
        )

    def tensors(self):
        return [
            self.query,
            *self.keys,
            *self.values,
            *(b for b in self.biases if b is not None),
        ]

    def dense(self, dtype):
        """(function of tensors() computing (out, lse) densely, tensors() in ``dtype``)."""
        count = len(self.keys)

        def function(query, *rest):
            keys, values = rest[:count], rest[count : 2 * count]
            given = iter(rest[2 * count :])
            biases = [None if b is None else next(given) for b in self.biases]
            return dense_attention(self, query, keys, values, biases)

        return function, [t.detach().to(dtype).contiguous() for t in self.tensors()]


def dense_logits(problem, query, keys, biases):
    batches, heads, rows, _ = query.shape
    logits = []
    for s, key in enumerate(keys):
        if problem.indices[s] is not None:
            key = key[problem.indices[s]]
        key = key.expand(batches, -1, -1, -1).repeat_interleave(heads // key.shape[1], 1)
        score = problem.scales[s] * (query @ key.transpose(-1, -2))
        if biases[s] is not None:
            score = score + biases[s]
        if problem.masks[s] is not None:
            score = score.masked_fill(~problem.masks[s], -math.inf)
        count = key.shape[2]
        if problem.causal[s]:
            shift = 0 if problem.causal[s] == 1 else count - rows
            allowed = torch.ones(rows, count, dtype=torch.bool).tril(shift)
            score = score.masked_fill(~allowed, -math.inf)
        logits.append(score)
    return torch.cat(logits, -1)


def dense_attention(problem, query, keys, values, biases):
    batches, heads = query.shape[:2]
    logits = dense_logits(problem, query, keys, biases)
    spread = []
    for s, value in enumerate(values):
        if problem.indices[s] is not None:
            value = value[problem.indices[s]]
        spread.append(
            value.expand(batches, -1, -1, -1).repeat_interleave(heads // value.shape[1], 1)
        )
    alive = (logits > -math.inf).any(-1)
    safe = torch.where(alive[..., None], logits, 0.0)
    out = torch.softmax(safe, -1) @ torch.cat(spread, -2)
    lse = torch.logsumexp(safe, -1) if safe.shape[-1] else safe.sum(-1)
    return torch.where(alive[..., None], out, 0.0), torch.where(alive, lse, -math.inf)


def check(name, actual, oracle, eager, dtype, factor=4):
    """Pass if error <= 2 * (error of eager torch in this dtype) + factor eps max|oracle|."""
    assert actual.shape == oracle.shape, name
    assert not torch.isnan(actual).any(), name
    infinite = torch.isinf(oracle)
    assert torch.equal(torch.isinf(actual), infinite), name
    if infinite.all():
        return
    difference = (actual.double() - oracle)[~infinite].abs().max()
    allowed = 2 * (eager.double() - oracle)[~infinite].abs().max()
    allowed = allowed + factor * torch.finfo(dtype).eps * oracle[~infinite].abs().max()
    assert difference <= allowed, f"{name}: {difference:.3e} > {allowed:.3e}"


def check_all(names, actual, oracle, eager, dtype, factor=4):
    assert len(names) == len(actual) == len(oracle) == len(eager)
    for each in zip(names, actual, oracle, eager, strict=True):
        check(*each, dtype, factor)


def names_of(problem):
    count = len(problem.keys)
    return (
        ["dq"]
        + [f"dk{s}" for s in range(count)]
        + [f"dv{s}" for s in range(count)]
        + [f"dbias{s}" for s in range(count) if problem.biases[s] is not None]
    )


def flat(gradients):
    query, keys, values, biases = gradients
    return [query, *keys, *values, *biases]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def bools(*shape):
    return torch.rand(*shape) > 0.4


# Problems. Each is a function of the dtype.


def plain(dtype):
    return Problem(
        normal(2, 2, 17, 24, dtype=dtype),
        [normal(2, 2, 35, 24, dtype=dtype)],
        [normal(2, 2, 35, 40, dtype=dtype)],
    )


def even(dtype):
    return Problem(
        normal(1, 2, 32, 16, dtype=dtype),
        [normal(1, 2, 48, 16, dtype=dtype)],
        [normal(1, 2, 48, 16, dtype=dtype)],
    )


def causal_upper(dtype):
    return Problem(
        normal(1, 2, 37, 8, dtype=dtype),
        [normal(1, 1, 50, 8, dtype=dtype)],
        [normal(1, 1, 50, 8, dtype=dtype)],
        causal=[1],
    )


def causal_lower_short(dtype):
    # More queries than keys: the first rows see nothing.
    return Problem(
        normal(1, 2, 50, 8, dtype=dtype),
        [normal(1, 2, 21, 8, dtype=dtype)],
        [normal(1, 2, 21, 8, dtype=dtype)],
        causal=[2],
    )


def causal_lower_long(dtype):
    return Problem(
        normal(1, 2, 20, 8, dtype=dtype),
        [normal(1, 2, 53, 8, dtype=dtype)],
        [normal(1, 2, 53, 8, dtype=dtype)],
        masks=[bools(1, 2, 20, 53)],
        causal=[2],
    )


def mixture(dtype):
    """Every feature at once: grouped heads, maps, biases, masks, causal, an empty source."""
    return Problem(
        framed(normal(2, 2, 18, 20, dtype=dtype)),
        [
            framed(normal(2, 1, 33, 20, dtype=dtype)),
            normal(1, 2, 5, 20, dtype=dtype),
            normal(3, 1, 0, 20, dtype=dtype),
            packed(normal(4, 1, 18, 20, dtype=dtype)),
        ],
        [
            column_major(normal(2, 1, 33, 12, dtype=dtype)),
            framed(normal(1, 2, 5, 12, dtype=dtype)),
            normal(3, 1, 0, 12, dtype=dtype),
            normal(4, 1, 18, 12, dtype=dtype),
        ],
        biases=[
            framed(normal(2, 1, 18, 33, dtype=dtype)),
            normal(1, 2, 1, 5, dtype=dtype),
            None,
            normal(1, 1, 18, 1, dtype=dtype),
        ],
        masks=[bools(2, 1, 1, 33), None, None, bools(1, 2, 18, 18)],
        indices=[None, None, torch.tensor([2, 1]), torch.tensor([3, 3])],
        scales=[0.3, -0.2, 0.1, 0.25],
        causal=[1, 0, 0, 2],
    )


def masked_rows(dtype):
    mask = bools(2, 2, 34, 40)
    mask[0, 0, 5] = False
    mask[:, :, 16:32] = False
    mask[1, 1] = False
    bias = normal(2, 1, 34, 40, dtype=dtype)
    bias[:, :, 3] = -math.inf
    bias[:, :, :, 7:20] = -math.inf
    return Problem(
        normal(2, 2, 34, 8, dtype=dtype),
        [normal(2, 2, 40, 8, dtype=dtype)],
        [normal(2, 2, 40, 8, dtype=dtype)],
        biases=[bias],
        masks=[mask],
    )


def key_bias(dtype):
    return Problem(
        normal(2, 1, 20, 8, dtype=dtype),
        [normal(2, 1, 19, 8, dtype=dtype), normal(1, 1, 17, 8, dtype=dtype)],
        [normal(2, 1, 19, 8, dtype=dtype), normal(1, 1, 17, 8, dtype=dtype)],
        biases=[normal(1, 1, 1, 19, dtype=dtype), normal(2, 1, 1, 1, dtype=dtype)],
    )


def single_token(dtype):
    return Problem(
        normal(2, 3, 1, 1, dtype=dtype),
        [normal(2, 3, 2, 1, dtype=dtype)],
        [normal(2, 3, 2, 1, dtype=dtype)],
        biases=[normal(2, 3, 1, 2, dtype=dtype)],
    )


def many_sources(dtype):
    lengths = [3, 17, 1, 5, 0, 2, 16, 4, 9, 1, 20]
    return Problem(
        normal(1, 2, 18, 8, dtype=dtype),
        [normal(1, 1, m, 8, dtype=dtype) for m in lengths],
        [normal(1, 1, m, 8, dtype=dtype) for m in lengths],
        scales=[0.1 * (s + 1) for s in range(len(lengths))],
    )


def wide_heads(dtype):
    return Problem(
        normal(1, 1, 17, 160, dtype=dtype),
        [normal(1, 1, 18, 160, dtype=dtype)],
        [normal(1, 1, 18, 256, dtype=dtype)],
    )


PROBLEMS = [
    plain,
    even,
    causal_upper,
    causal_lower_short,
    causal_lower_long,
    mixture,
    masked_rows,
    key_bias,
    single_token,
    many_sources,
    wide_heads,
]
DTYPES = [torch.float32, torch.float16]
CALLS = [(make, torch.float32) for make in PROBLEMS]
CALLS += [(plain, torch.float16)]
by_call = pytest.mark.parametrize(
    ("make", "dtype"), CALLS, ids=[f"{make.__name__}-{dtype}" for make, dtype in CALLS]
)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def tangents_like(problem):
    """Random tangents of all tensors, finite where a bias is -inf."""
    return [torch.randn(t.shape).to(t.dtype) for t in problem.tensors()]


def split(problem, tensors):
    """tensors() order to (query, keys, values, expanded biases)."""
    count = len(problem.keys)
    given = iter(tensors[1 + 2 * count :])
    biases = [None if b is None else next(given) for b in problem.biases]
    return tensors[0], tensors[1 : 1 + count], tensors[1 + count : 1 + 2 * count], biases
