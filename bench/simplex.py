"""Benchmarks of ``min_norm_simplex``, ``pareto_lp`` and ``nonneg_qp``: many small programmes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _backend
from transfuse.ops import min_norm_simplex, nonneg_qp, pareto_lp

from .cases import Case, Setup, Target, Tensors, Unavailable, Workload
from .inputs import normal

FLOOR = "matrices read once and weights written once; no floor for an active-set method"


def _smallest(points: list[Tensor], values: list[Tensor]) -> Tensor:
    best = torch.stack(values).argmin(0)
    return torch.stack(points).gather(0, best[None, :, None].expand(1, -1, points[0].shape[1]))[0]


def _eager_two(t: Tensors) -> Tensor:
    c = t["gramian"].double()
    across = c[:, 0, 0] + c[:, 1, 1] - 2 * c[:, 0, 1]
    w = ((c[:, 1, 1] - c[:, 0, 1]) / across).clamp(0, 1)
    return torch.stack((w, 1 - w), -1).to(t["gramian"].dtype)


def _eager_three(t: Tensors) -> Tensor:
    """Closed forms of the three edges (their ends included) and of the inside, batched."""
    c = t["gramian"].double()
    points, values = [], []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        along = ((c[:, j, j] - c[:, i, j]) / (c[:, i, i] + c[:, j, j] - 2 * c[:, i, j])).clamp(0, 1)
        w = torch.zeros_like(c[:, 0])
        w[:, i], w[:, j] = along, 1 - along
        points.append(w)
        values.append(torch.einsum("bi,bij,bj->b", w, c, w))
    inside = torch.linalg.solve_ex(c, torch.ones_like(c[..., :1]))[0][..., 0]
    inside = inside / inside.sum(-1, keepdim=True)
    points.append(inside)
    value = torch.einsum("bi,bij,bj->b", inside, c, inside)
    values.append(torch.where((inside >= 0).all(-1), value, torch.inf))
    return _smallest(points, values).to(t["gramian"].dtype)


def _torchjd(t: Tensors) -> Tensor:
    from torchjd.aggregation import MGDAWeighting

    weighting = MGDAWeighting()
    return torch.stack([weighting(c) for c in t["gramian"]])


def _scipy(t: Tensors) -> Tensor:
    """The same programme as least squares, one after the other, from a Cholesky factor."""
    from scipy.optimize import nnls

    g, q = t["g"].double(), t["q"].double()
    factor = torch.linalg.cholesky(g)
    right = torch.linalg.solve_triangular(factor, -q[..., None], upper=False)[..., 0]
    pairs = zip(factor.mT.cpu().numpy(), right.cpu().numpy(), strict=True)
    return torch.stack([torch.from_numpy(nnls(a, b)[0]) for a, b in pairs]).to(t["g"])


def _needs(setup: Setup, op: str, matrix: Tensor) -> None:
    """Raise Unavailable where the backend has no kernel for matrices of this size."""
    setup.need(op)
    reason = _backend.why_not(op, setup.backend, matrix.device, matrix.dtype, (matrix,))
    if reason is not None:
        raise Unavailable(reason)


def _workload(tensors: Tensors, setup: Setup, call: Callable, **more: object) -> Workload:
    """``call(tensors, backend)`` on the backends, and the figures that follow from the tensors."""
    matrices = next(iter(tensors.values()))
    problems, n = matrices.shape[:2]
    return Workload(
        tensors=tensors,
        ours=lambda t: call(t, setup.backend),
        reference=lambda t: call(t, "reference"),
        yardstick=None,
        flops=problems * n**3 // 3,
        bytes=sum(x.numel() * x.element_size() for x in tensors.values()),
        floor_note=FLOOR,
        inputs="inner products of normal gradients",
        shape={"problems": problems, "unknowns": n},
        **more,
    )


def _min_norm(problems: int, count: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        g = normal(problems, count, count + 3, generator=setup.generator(), dtype=setup.dtype,
                   device=setup.device)  # fmt: skip
        c = g @ g.mT
        _needs(setup, "min_norm_simplex", c)
        # The composition of the library itself is what users without kernels run.
        expressions = {"separate": lambda t: min_norm_simplex(t["gramian"], backend="reference")}
        if count == 2:
            expressions |= {"eager": _eager_two, "torchjd": _torchjd}
        if count == 3:
            expressions |= {"eager": _eager_three, "torchjd": _torchjd}
        return _workload(
            {"gramian": c},
            setup,
            lambda t, backend: min_norm_simplex(t["gramian"], backend=backend),
            expressions=expressions,
        )

    return make


def _pareto(problems: int, count: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        shapes = ((problems, count, count + 3), (problems, count + 3, 1))
        g, guide = (
            normal(*s, generator=setup.generator(), dtype=setup.dtype, device=setup.device)
            for s in shapes
        )

        def call(t: Tensors, backend: str) -> Tensor:
            return pareto_lp(t["gramian"], t["guidance"], mode="descent", backend=backend).weights

        return _workload(
            {"gramian": g @ g.mT, "guidance": (g @ guide)[..., 0]},
            setup,
            call,
            expressions={"eager": lambda t: call(t, "reference")},
        )

    return make


def _nonnegative(problems: int, n: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        g, q = (
            normal(*s, generator=generator, dtype=setup.dtype, device=setup.device)
            for s in ((problems, n, 2 * n), (problems, n))
        )

        _needs(setup, "nonneg_qp", g)

        def call(t: Tensors, backend: str) -> Tensor:
            return nonneg_qp(t["g"], t["q"], backend=backend).x

        return _workload(
            {"g": g @ g.mT / n, "q": q},
            setup,
            call,
            expressions={"eager": lambda t: call(t, "reference"), "scipy": _scipy},
        )

    return make


CASES = (
    Case(
        name="min-norm-3",
        title="10,000 min-norm points of 3 gradients",
        make=_min_norm(10_000, 3),
        targets=(Target(dtype="float32", bars={"eager": 2.0, "separate": 10.0}, quick=1),),
        peers=("eager", "eager-compile", "separate"),
        quick_peers=("eager", "separate"),
    ),
    Case(
        name="min-norm-2",
        title="1,000 min-norm points of 2 gradients",
        make=_min_norm(1_000, 2),
        targets=(Target(dtype="float32"),),
        peers=("eager", "eager-compile", "separate", "torchjd"),
    ),
    Case(
        name="min-norm-1",
        title="the min-norm point of 3 gradients, as a training step needs it",
        make=_min_norm(1, 3),
        targets=(Target(dtype="float32"),),
        peers=("eager", "separate", "torchjd"),
    ),
    Case(
        name="min-norm-40",
        title="100 min-norm points of 40 gradients",
        make=_min_norm(100, 40),
        targets=(Target(dtype="float32"),),
        peers=("separate",),
    ),
    Case(
        name="pareto-3",
        title="10,000 Pareto programmes of 3 losses, descent",
        make=_pareto(10_000, 3),
        targets=(Target(dtype="float32", bars={"eager": 5.0}, quick=2),),
        peers=("eager",),
        quick_peers=("eager",),
    ),
    Case(
        name="pareto-1",
        title="one Pareto programme of 3 losses, descent",
        make=_pareto(1, 3),
        targets=(Target(dtype="float32"),),
        peers=("eager",),
    ),
    Case(
        name="nonnegative-40",
        title="100 quadratic programmes of 40 non-negative unknowns",
        make=_nonnegative(100, 40),
        targets=(Target(dtype="float64", bars={"eager": 5.0, "scipy": 2.0}),),
        peers=("eager", "scipy"),
    ),
    Case(
        name="nonnegative-100",
        title="100 quadratic programmes of 100 non-negative unknowns",
        make=_nonnegative(100, 100),
        targets=(Target(dtype="float64"),),
        peers=("eager", "scipy"),
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_min_norm(3, 3),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        hidden=True,
    ),
)
