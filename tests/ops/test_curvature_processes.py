"""Curvature operators over several processes: the products of one, and failures all hear of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys
import torch
from torch import distributed, nn
from transfuse.ops import GGNOperator, HessianOperator, hutchinson_trace, lanczos_eigenpairs

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
if world > 1:
    where = dict(init_method=f"file://{store}", rank=rank, world_size=world)
    distributed.init_process_group("gloo", **where)
group = distributed.group.WORLD if world > 1 else None
generator = torch.Generator().manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
with torch.no_grad():
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator))
x = torch.randn(13, 4, dtype=torch.float64, generator=generator)
y = torch.arange(13) % 3
batches = list(zip(x.split(3), y.split(3)))
mine = batches[rank::world]  # unequal shards; of 4 processes one has two batches
vectors = torch.randn(67, 3, dtype=torch.float64, generator=generator)
loss = nn.CrossEntropyLoss()
results = {}
for kind in (HessianOperator, GGNOperator):
    operator = kind.from_module(model, loss, mine, group=group)
    results[kind.__name__] = operator @ vectors
    results[kind.__name__ + " trace"] = torch.tensor(hutchinson_trace(operator, 7).mean)
    results[kind.__name__ + " top"] = lanczos_eigenpairs(operator, 2, tol=1e-10).values
if world > 1:
    operator = HessianOperator.from_module(model, loss, [] if rank == 0 else batches, group=group)
    product = operator @ vectors  # an empty shard
    whole = HessianOperator.from_module(model, loss, batches) @ vectors
    assert (product - whole).abs().max() < 1e-12
    try:
        operator @ (vectors + rank)
        raise SystemExit("different vectors were accepted")
    except ValueError as error:
        assert "the same in every process" in str(error), error
    broken = [(x * float("nan"), y)] if rank == world - 1 else batches
    try:
        HessianOperator.from_module(model, loss, broken, group=group) @ vectors
        raise SystemExit("a failure went unnoticed")
    except (ValueError, RuntimeError) as error:
        expected = "finite loss" if rank == world - 1 else "failed in another process"
        assert expected in str(error), error
    distributed.destroy_process_group()
if rank == world - 1:
    torch.save(results, out)
"""


def run(world: int, folder: Path) -> dict[str, torch.Tensor]:
    """The results of the last of ``world`` processes."""
    out, store = folder / f"{world}.pt", folder / f"store{world}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(world), str(store), str(out)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), "\n".join(errors)[-4000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(1, tmp_path_factory.mktemp("one"))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(one, world, tmp_path):
    several = run(world, tmp_path)
    assert several.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(several[name], expected, rtol=1e-9, atol=1e-12, msg=name)
