"""Codes of rows: bits by every backend, groups against a direct search, refusals."""

from __future__ import annotations

import pytest
import torch

from transfuse.ops import row_codes, row_groups
from transfuse.testing import inputs

EDGES = torch.linspace(-1, 1, 30)


def rand(*shape, seed=0):
    return 0.6 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digitised(x, edges, wrap):
    index = (x.float()[..., None] >= edges).sum(-1) - 1
    return torch.where(index < 0, len(edges) - 1 if wrap else 0, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1, 1), (130, 7), (67, 1030)])
def test_every_backend_gives_the_same_bits(dtype, shape):
    x = rand(*shape).to(dtype)
    for edges in (None, EDGES, torch.linspace(-1, 1, 200), torch.zeros(1)):
        for wrap in (False, True):
            one, two = (row_codes(x, edges, wrap=wrap, backend=b) for b in ("reference", "cpu"))
            assert torch.equal(one.codes, two.codes)
            assert one.below == two.below
            if edges is not None:
                assert one.below == int((x.float() < edges[0]).sum())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (1, 1), (130, 7), (67, 1030), (16384, 512)])
def test_the_kernel_of_gpus_gives_the_same_bits(dtype, shape):
    x = rand(*shape).to(dtype)
    for edges in (None, EDGES, torch.linspace(-1, 1, 200), torch.zeros(1)):
        moved = None if edges is None else edges.cuda()
        one, two = (row_codes(x.cuda(), moved, wrap=True, backend=b) for b in ("triton", None))
        want = row_codes(x, edges, wrap=True)
        for found in (one, two):
            assert torch.equal(found.codes.cpu(), want.codes)
            assert found.below == want.below


def test_strides_and_threads():
    x = rand(300, 40)
    plain = row_codes(x, EDGES).codes
    for kind in inputs.STRIDES[:4]:
        assert torch.equal(row_codes(inputs.strided(x, kind), EDGES).codes, plain)
    for kind in inputs.FRAMES:
        assert torch.equal(row_codes(inputs.framed(x, kind), EDGES).codes, plain)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(row_codes(x, EDGES).codes, plain)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("edges", [None, EDGES, torch.linspace(-1, 1, 3)])
@pytest.mark.parametrize("wrap", [False, True])
def test_groups_are_those_of_a_direct_search(edges, wrap):
    x = (4 * rand(200, 3)).round() / 4
    symbols = x if edges is None else digitised(x, edges, wrap)
    _, index, counts = torch.unique(symbols, dim=0, return_inverse=True, return_counts=True)
    found = row_groups(x, edges, wrap=wrap)
    assert torch.equal(found.counts.sort().values, counts.sort().values)
    pairs = torch.unique(torch.stack((found.group, index)), dim=1)
    assert pairs.shape[1] == len(counts)
    assert torch.equal(found.group.bincount(), found.counts)


def test_every_pattern_of_signs_is_told_apart():
    """Patterns that differ in sign bits alone, where a linear hash would collide."""
    x = 2.0 * ((torch.arange(4096)[:, None] >> torch.arange(12)) & 1) - 1
    assert len(row_groups(x).counts) == 4096
    assert len(row_groups(x, EDGES).counts) == 4096
    assert len(row_codes(x).codes[:, 1].unique()) == 4096


def test_codes_that_share_half_their_bits(monkeypatch):
    import sys

    module = sys.modules["transfuse.ops.row_codes"]
    codes = torch.tensor([[1, 5], [1, 4], [0, 9], [1, 5]])
    monkeypatch.setattr(module, "row_codes", lambda *a, **k: module.RowCodes(codes, 0))
    found = row_groups(torch.zeros(4, 1))
    assert found.group[0] == found.group[3] != found.group[1]
    assert found.counts.tolist() == [1, 1, 2]


def test_zeros_and_edges():
    x = torch.tensor([[0.0], [-0.0], [-1.0], [1.0], [5.0], [-7.0]])
    groups = row_groups(x).group
    assert groups[0] == groups[1]
    cells = row_groups(x, torch.tensor([-1.0, 0.0, 1.0])).group
    assert cells[3] == cells[4]
    assert cells[2] == cells[5]
    assert cells[0] != cells[2]
    wrapped = row_groups(x, torch.tensor([-1.0, 0.0, 1.0]), wrap=True).group
    assert wrapped[5] == wrapped[3]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: row_codes(torch.tensor([[1.0, float("nan")]])), ValueError, "got 1 NaN"),
        (lambda: row_codes(torch.tensor([[float("nan")]]), EDGES), ValueError, "got 1 NaN"),
        (lambda: row_codes(torch.zeros(3)), ValueError, r"x: expected 2 dimensions \(N, u\)"),
        (lambda: row_codes(torch.zeros(3, 1).long()), TypeError, "x: expected float32"),
        (lambda: row_codes(torch.zeros(3, 1), EDGES.flip(0)), ValueError, "edges: .* ascending"),
        (lambda: row_codes(torch.zeros(3, 1), EDGES[:0]), ValueError, "edges: expected at least"),
        (lambda: row_codes(torch.zeros(3, 1), EDGES, wrap=1), TypeError, "wrap: expected True"),
        (lambda: row_codes(torch.zeros(3, 1), backend="cuda"), RuntimeError, "no cuda kernel"),
    ],
)
def test_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
