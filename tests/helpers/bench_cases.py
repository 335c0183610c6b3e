"""A small benchmark case, and runs of it."""

from __future__ import annotations

import torch

from transfuse.bench import harness, machine, records
from transfuse.bench.cases import GRAD, Case, Setup, Target, Workload
from transfuse.bench.timing import Budget

CPU = torch.device("cpu")
SHORT = Budget(seconds=0.01, min_repeats=2, max_repeats=4, warmups=1)
TARGET = Target(dtype="float32")


def double(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["x"] * 2


def make_case(ours=double, expressions=None, *, names=("eager",), reference=double, **more) -> Case:
    """A case whose right answer is 2 x, on a small tensor."""
    expressions = {"eager": double} if expressions is None else expressions

    def make(setup: Setup) -> Workload:
        x = torch.randn(2, 3, 5, generator=setup.generator()).to(setup.dtype)
        return Workload(
            tensors={"x": x, GRAD: torch.ones_like(x)},
            ours=ours,
            reference=reference,
            expressions=expressions,
            yardstick=None,
            differentiable=("x",),
            flops=30,
            bytes=240,
            floor_note="none",
            inputs="normal",
            shape={"x": [2, 3, 5]},
            **more,
        )

    return Case(
        name="doubling",
        title="twice",
        make=make,
        targets=(TARGET,),
        peers=names,
        modes=("forward", "backward", "full"),
    )


def settings(**changes) -> harness.Settings:
    return harness.Settings(**({"device": CPU, "budget": SHORT} | changes))


def run(case: Case, target: Target = TARGET, **changes) -> dict[str, object]:
    return harness.run_case("test", case, target, settings(**changes))


def row(result: dict[str, object], name: str) -> dict[str, object]:
    return next(c for c in result["candidates"] if c["name"] == name)


def make_record(*results: dict[str, object]) -> dict[str, object]:
    environment = machine.environment(CPU)
    return records.make_record(results, environment=environment, limits=None, settings={})


def find(op: str, name: str) -> Case:
    return harness.find_case(op, name)
