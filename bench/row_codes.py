"""Benchmarks of ``transfuse.ops.row_groups``: the joint entropy of a layer's binned activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops import row_groups

from .cases import Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = "every activation read once, at the measured bandwidth; the sort of the codes is not in it"


def _entropy(counts: Tensor) -> Tensor:
    c = counts.double()
    n = c.sum()
    return (n.log2() - (c * c.log2()).sum() / n)[None]


def _make(rows: int, units: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        # A few directions vary, so that samples share cells.
        generator = setup.generator()
        hidden = normal(rows, 2, generator=generator, dtype=torch.float32, device=setup.device)
        mixing = normal(2, units, generator=generator, dtype=torch.float32, device=setup.device)
        x = torch.tanh(0.25 * (4 * hidden).round() @ mixing).to(setup.dtype)
        edges = torch.linspace(-1, 1, 30, device=setup.device)

        def unique(t: Tensors) -> Tensor:
            cells = torch.bucketize(t["x"].float(), edges, right=True)
            return _entropy(torch.unique(cells, dim=0, return_counts=True)[1])

        def packed(t: Tensors) -> Tensor:
            # As published code writes it with NumPy: rows of bytes, sorted as such.
            import numpy as np

            cells = np.digitize(t["x"].float().cpu().numpy(), edges.cpu().numpy())
            cells = np.ascontiguousarray(cells)
            rows_ = cells.view(np.dtype((np.void, cells.dtype.itemsize * cells.shape[1])))
            counts = torch.from_numpy(np.unique(rows_, return_counts=True)[1])
            return _entropy(counts).to(setup.device)

        return Workload(
            tensors={"x": x},
            ours=lambda t: _entropy(row_groups(t["x"], edges, backend=setup.backend).counts),
            reference=unique,
            expressions={"eager": unique, "official": packed},
            yardstick=None,
            flops=0,
            bytes=x.numel() * x.element_size(),
            floor_note=FLOOR,
            inputs="tanh of two rounded directions",
            shape={"x": [rows, units], "edges": 30},
        )

    return make


CASES = (
    Case(
        name="plane-4096",
        title="joint entropy of 10 units on 4,096 samples (one layer and epoch of the plane)",
        make=_make(4096, 10),
        targets=(Target(dtype="float32", bars={"eager": 3.0}, quick=7),),
        peers=("eager", "official"),
        quick_peers=("eager", "official"),
    ),
    Case(
        name="wide-16384",
        title="joint entropy of 512 units on 16,384 samples",
        make=_make(16384, 512),
        targets=(Target(dtype="float32", bar=5.0),),
        peers=("eager", "official"),
        memory=True,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_make(7, 3),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        hidden=True,
    ),
)
