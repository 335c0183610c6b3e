"""Benchmarks of the curvature of linear heads: a training step's domain penalty, and distances.

The penalty is that of "Understanding Hessian Alignment for Domain Generalization": mean loss, plus
gaps of gradients and of curvature to their means over domains. The official formulation gets the
Hessian diagonal by 300 double backwards for each of E + 1 losses and the Hessian-gradient product
as norm times gradient of the norm; others write the closed forms in torch, or form Hessians.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from transfuse.ops import (
    head_gradient,
    head_hessian_diagonal,
    head_hessian_distance,
    head_hessian_product,
)

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal
from .peers.torch_peers import compiled

PROBES = 300
# The noise of 300 probes is as large as the gaps themselves. With this weight of the exact diagonal
# the official estimate is within 5 % of the exact gradients, which shows that it is the same step.
ALPHA, BETA = {"exact": 1e-5, "hgp": 1e-3}, 5e-3
FLOOR = (
    "matrix products of 2 N C d operations at the measured rate, {} forward and twice as many "
    "backward; features, weight and the results (E, C, d + 1) are far smaller"
)
DISTANCE_FLOOR = "the products of all pairs of samples, 2 N^2 (d + 3 C) operations in float64"


def _bounds(domains: int, samples: int) -> list[int]:
    return [e * samples for e in range(domains + 1)]


def _losses(t: Tensors, bounds: Sequence[int]) -> list[torch.Tensor]:
    logits = F.linear(t["features"], t["weight"], t["bias"])
    return [F.cross_entropy(logits[a:b], t["labels"][a:b]) for a, b in itertools.pairwise(bounds)]


def _objective(kind, nll, gradients, signatures, mean_gradient, mean_signature) -> torch.Tensor:
    gaps = [
        ALPHA[kind] * (q - mean_signature.detach()).square().sum()
        + BETA * (g - mean_gradient.detach()).square().sum()
        for q, g in zip(signatures, gradients, strict=True)
    ]
    return nll + sum(gaps) / len(gaps)


# ---- ours ----------------------------------------------------------------------------------------


def _ours(kind: str, bounds: list[int], backend: str) -> Callable[[Tensors], torch.Tensor]:
    def step(t: Tensors) -> torch.Tensor:
        head, options = (t["features"], t["weight"], t["bias"]), {"segments": bounds}
        nll = torch.stack(_losses(t, bounds)).mean()
        g = head_gradient(*head, t["labels"], backend=backend, **options)
        if kind == "exact":
            q = head_hessian_diagonal(*head, backend=backend, **options)
            mean = q.mean(0)
        else:
            q = head_hessian_product(*head, g[:, None], backend=backend, **options)[:, 0]
            with torch.no_grad():
                mean = head_hessian_product(*head, g.mean(0), backend=backend, **options).mean(0)
        gaps = [(x - x_mean.detach()).flatten(1) for x, x_mean in ((q, mean), (g, g.mean(0)))]
        curvature, slope = (torch.bmm(x[:, None], x[..., None]).sum() for x in gaps)
        return nll + (ALPHA[kind] * curvature + BETA * slope) / len(q)

    return step


# ---- what others write ---------------------------------------------------------------------------


def _closed(kind: str, bounds: list[int]) -> Callable[[Tensors], torch.Tensor]:
    """The closed forms in torch, a domain at a time."""

    def step(t: Tensors) -> torch.Tensor:
        weight, bias = t["weight"], t["bias"]
        logits = F.linear(t["features"], weight, bias)
        p, rows = torch.softmax(logits, -1), []
        y = F.one_hot(t["labels"], weight.shape[0]).to(p.dtype)
        nll = -(torch.log_softmax(logits, -1) * y).sum(-1)
        parts = list(itertools.pairwise(bounds))
        x = torch.cat((t["features"], torch.ones_like(p[:, :1])), 1)
        slopes = [(p - y)[a:b].T @ x[a:b] / (b - a) for a, b in parts]

        def product(v: torch.Tensor, a: int, b: int) -> torch.Tensor:
            u = x[a:b] @ v.T
            moved = p[a:b] * (u - (p[a:b] * u).sum(-1, keepdim=True))
            return moved.T @ x[a:b] / (b - a)

        mean_slope = sum(slopes) / len(slopes)
        if kind == "exact":
            rows = [(p * (1 - p))[a:b].T @ x[a:b].square() / (b - a) for a, b in parts]
            mean = sum(rows) / len(rows)
        else:
            rows = [product(g, a, b) for g, (a, b) in zip(slopes, parts, strict=True)]
            with torch.no_grad():
                mean = sum(product(mean_slope, a, b) for a, b in parts) / len(parts)
        nlls = torch.stack([nll[a:b].mean() for a, b in parts])
        return _objective(kind, nlls.mean(), slopes, rows, mean_slope, mean)

    return step


def _official(kind: str, bounds: list[int]) -> Callable[[Tensors], torch.Tensor]:
    """Double backward through the head, for every domain and for the mean loss."""

    def step(t: Tensors) -> torch.Tensor:
        parameters: tuple[torch.Tensor, ...] = (t["weight"], t["bias"])
        # Inputs that need no gradient here still need one for double backward.
        if not t["weight"].requires_grad:
            parameters = tuple(p.detach().requires_grad_() for p in parameters)
            t = {**t, "weight": parameters[0], "bias": parameters[1]}
        losses = _losses(t, bounds)
        nll = sum(losses) / len(losses)
        generator = torch.Generator().manual_seed(0)

        def differentiate(scalar: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(scalar, parameters, retain_graph=True, create_graph=True)

        def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([x.reshape(-1) for x in tensors])

        def curvature(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            slopes = differentiate(loss)
            if kind == "hgp":
                norm = torch.stack([g.norm(2) for g in slopes]).norm(2)
                return flat(slopes), flat([norm * h for h in differentiate(norm)])
            total = [torch.zeros_like(g) for g in slopes]
            for _ in range(PROBES):
                signs = [
                    2.0 * torch.randint(0, 2, g.shape, generator=generator).to(g) - 1.0
                    for g in slopes
                ]
                products = differentiate(
                    sum((g * z).sum() for g, z in zip(slopes, signs, strict=True))
                )
                total = [s + z * h for s, z, h in zip(total, signs, products, strict=True)]
            return flat(slopes), flat([s / PROBES for s in total])

        mean_slope, mean = curvature(nll)
        found = [curvature(loss) for loss in losses]
        return _objective(kind, nll, [g for g, _ in found], [q for _, q in found], mean_slope, mean)

    return step


def _dense(bounds: list[int]) -> Callable[[Tensors], torch.Tensor]:
    """Distances of Hessians that are formed by ``torch.func.hessian``."""

    def distances(t: Tensors) -> torch.Tensor:
        rows = torch.cat((t["weight"], t["bias"][:, None]), 1)
        size, hessians = rows.numel(), []
        for a, b in itertools.pairwise(bounds):
            x, y = t["features"][a:b], t["labels"][a:b]

            def loss(rows: torch.Tensor, x=x, y=y) -> torch.Tensor:
                return F.cross_entropy(F.linear(x, rows[:, :-1], rows[:, -1]), y)

            hessians.append(torch.func.hessian(loss)(rows).reshape(size, size))
        gaps = [[(h - k).square().sum() for k in hessians] for h in hessians]
        return torch.stack([torch.stack(row) for row in gaps])

    return distances


def _pairs(bounds: list[int]) -> Callable[[Tensors], torch.Tensor]:
    """Distances from inner products of samples, in float64, without Hessians."""

    def distances(t: Tensors) -> torch.Tensor:
        x, w, b = (t[n].double() for n in ("features", "weight", "bias"))
        p = torch.softmax(F.linear(x, w, b), -1)
        overlap, square = p @ p.T, p * p
        cross = p @ square.T
        pairs = (x @ x.T + 1.0).square() * (overlap - cross - cross.T + overlap.square())
        stretches = list(itertools.pairwise(bounds))
        products = torch.stack(
            [torch.stack([pairs[a:b, c:d].mean() for c, d in stretches]) for a, b in stretches]
        )
        own = products.diagonal()
        return (own[:, None] + own[None] - 2.0 * products).to(t["features"].dtype)

    return distances


# ---- cases ---------------------------------------------------------------------------------------


def _tensors(setup: Setup, samples: int, columns: int, classes: int) -> Tensors:
    generator = setup.generator()

    def draw(*shape: int) -> torch.Tensor:
        return normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)

    return {
        # Like pooled activations: not negative, half of them 0.
        "features": draw(samples, columns).relu(),
        "weight": draw(classes, columns) * columns**-0.5,
        "bias": draw(classes) * 0.1,
        "labels": torch.randint(0, classes, (samples,), generator=generator).to(setup.device),
    }


def _step(kind: str, domains: int, each: int, columns: int, classes: int, forward: int):
    def make(setup: Setup) -> Workload:
        tensors, bounds = _tensors(setup, domains * each, columns, classes), _bounds(domains, each)
        tensors[GRAD] = torch.ones((), dtype=setup.dtype, device=setup.device)
        closed, ours = _closed(kind, bounds), _ours(kind, bounds, setup.backend)
        return Workload(
            tensors=tensors,
            ours=ours,
            # A training step is mostly small operations around the ops.
            variants={"transfuse-compile": compiled(ours, setup.device, setup.mode)},
            reference=closed,
            expressions={"eager": closed, "official": _official(kind, bounds)},
            yardstick=None,
            estimates={"official": 0.05} if kind == "exact" else {},
            differentiable=("features", "weight", "bias"),
            flops=3 * forward * 2 * domains * each * columns * classes,
            bytes=4 * (2 * tensors["features"].numel() + 3 * tensors["weight"].numel()),
            floor_note=FLOOR.format(forward),
            inputs="normal features through a ReLU, a normal head, uniform labels",
            shape={"N": domains * each, "d": columns, "C": classes, "E": domains},
        )

    return make


def _distance(domains: int, each: int, columns: int, classes: int):
    def make(setup: Setup) -> Workload:
        count = domains * each
        tensors, bounds = _tensors(setup, count, columns, classes), _bounds(domains, each)
        return Workload(
            tensors=tensors,
            ours=lambda t: head_hessian_distance(
                t["features"], t["weight"], t["bias"], segments=bounds
            ),
            reference=_dense(bounds),
            expressions={"dense": _dense(bounds), "eager": _pairs(bounds)},
            yardstick=None,
            differentiable=("features", "weight", "bias"),
            flops=2 * count * count * (columns + 3 * classes),
            bytes=8 * (tensors["features"].numel() + count * classes),
            floor_note=DISTANCE_FLOOR,
            inputs="normal features through a ReLU, a normal head",
            shape={"N": count, "d": columns, "C": classes, "E": domains},
        )

    return make


TITLES = {
    "exact": "domain penalty with the exact Hessian diagonal (official: 300 probes)",
    "hgp": "domain penalty with Hessian-gradient products",
}
# Products forward: logits of the loss and of each op, then those of the closed form.
PRODUCTS = {"exact": 3, "hgp": 6}
BARS = {"exact": {"official": 300.0}, "hgp": {"official": 1.5}}

CASES = (
    *(
        Case(
            name=f"{kind}-{classes}",
            title=f"{TITLES[kind]}, 3 x 32 samples, {classes} classes, width 2048",
            make=_step(kind, 3, 32, 2048, classes, PRODUCTS[kind]),
            targets=(
                Target(
                    dtype="float32",
                    mode="full",
                    bars=BARS[kind],
                    quick=4 if (kind, classes) == ("hgp", 7) else 0,
                ),
            ),
            peers=("official", "eager", "eager-compile"),
            quick_peers=("official", "eager") if (kind, classes) == ("hgp", 7) else (),
            modes=("full",),
        )
        for kind in TITLES
        for classes in (7, 65)
    ),
    Case(
        name="exact-many-domains",
        title=f"{TITLES['exact']}, 64 x 6 samples, 7 classes, width 512",
        make=_step("exact", 64, 6, 512, 7, PRODUCTS["exact"]),
        targets=(Target(dtype="float32", mode="full"),),
        peers=("eager", "eager-compile"),
        modes=("full",),
    ),
    Case(
        name="distance",
        title="distances of 3 Hessians, 3 x 64 samples, 10 classes, width 64",
        make=_distance(3, 64, 64, 10),
        targets=(Target(dtype="float32", bars={"dense": 50.0}),),
        peers=("dense", "eager", "eager-compile"),
        modes=("forward",),
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_step("hgp", 2, 3, 5, 4, PRODUCTS["hgp"]),
        targets=(Target(dtype="float32", mode="full", quick=9),),
        peers=("official",),
        quick_peers=("official",),
        modes=("full",),
        hidden=True,
    ),
)
