"""Benchmarks of the ops on lists of tensors: merging, composition, norms, products, trimming."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops import (
    lincomb,
    multi_gram,
    ratio_merge,
    sam_perturb_,
    sam_restore_,
    ties_merge,
)

from .cases import Case, Setup, Target, Tensors, Workload
from .inputs import normal

FLOOR = "every tensor read once and every result written once, at the measured bandwidth of a copy"
# How far peers may be from the exact result, as a part of it, where the sums are their own: in half
# precision over a whole tensor, and in float32 over millions of numbers. Ours has the usual bound.
HALF_SUMS, LONG_SUMS = 0.01, 0.02

Shapes = tuple[tuple[int, ...], ...]


def transformer(width: int, depth: int, patch: int = 16, tokens: int = 197) -> Shapes:
    """Parameters of a vision transformer: 152 tensors and 86 million numbers for (768, 12)."""
    block: Shapes = (
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    )  # fmt: skip
    ends: Shapes = ((width, 3, patch, patch), (width,), (tokens, width), (width,), (width,))
    return (*ends, *(shape for _ in range(depth) for shape in block))


VIT_B, VIT_S = transformer(768, 12), transformer(384, 12)
SMALL: Shapes = tuple((64 * (1 + j % 12),) for j in range(600))


def _draw(setup: Setup, shapes: Shapes, name: str, dtype: torch.dtype) -> Tensors:
    generator = setup.generator()
    generator.manual_seed(hash_of(name))
    return {
        f"{name}_{j}": normal(*shape, generator=generator, dtype=dtype, device=setup.device)
        for j, shape in enumerate(shapes)
    }


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name))


def _list(tensors: Tensors, name: str, shapes: Shapes) -> list[Tensor]:
    return [tensors[f"{name}_{j}"] for j in range(len(shapes))]


def _lists(tensors: Tensors, count: int, shapes: Shapes, name: str = "d") -> list[list[Tensor]]:
    return [_list(tensors, f"{name}{i}", shapes) for i in range(count)]


def _workload(
    setup: Setup,
    tensors: Tensors,
    shapes: Shapes,
    count: int,
    ours: Callable[[Tensors], object],
    reference: Callable[[Tensors], object],
    expressions: dict[str, Callable[[Tensors], object]],
    written: int,
    flops: int,
    estimates: dict[str, float] | None = None,
) -> Workload:
    read = sum(t.numel() * t.element_size() for t in tensors.values())
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=reference,
        expressions=expressions,
        yardstick=None,
        flops=flops,
        bytes=read + written,
        floor_note=FLOOR,
        inputs="normal",
        shape={"lists": count, "tensors": len(shapes), "numbers": _numbers(shapes)},
        estimates={} if estimates is None else estimates,
    )


def _numbers(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def _merge(shapes: Shapes, count: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        tensors: Tensors = {}
        for i in range(count):
            tensors |= _draw(setup, shapes, f"d{i}", setup.dtype)
        weights = [0.1 + 0.1 * i for i in range(count)]
        table = torch.tensor(weights, device=setup.device)

        def ours(t: Tensors) -> object:
            return lincomb(_lists(t, count, shapes), table, backend=setup.backend)

        def loop(t: Tensors) -> object:
            # A state dict at a time, as merging scripts write it.
            lists = _lists(t, count, shapes)
            return [sum(w * x for w, x in zip(weights, parts)) for parts in zip(*lists)]  # noqa: B905

        def foreach(t: Tensors) -> object:
            lists = _lists(t, count, shapes)
            total = torch._foreach_mul(lists[0], weights[0])
            for w, part in zip(weights[1:], lists[1:], strict=True):
                torch._foreach_add_(total, part, alpha=w)
            return total

        def stack(t: Tensors) -> object:
            lists = _lists(t, count, shapes)
            return [
                torch.einsum("t,t...->...", table.to(parts[0].dtype), torch.stack(parts))
                for parts in zip(*lists, strict=True)
            ]

        size = torch.finfo(setup.dtype).bits // 8
        return _workload(
            setup, tensors, shapes, count, ours, loop,
            {"eager": loop, "foreach": foreach, "stack": stack},
            size * _numbers(shapes), 2 * count * _numbers(shapes),
        )  # fmt: skip

    return make


def _composition(shapes: Shapes, count: int) -> Callable[[Setup], Workload]:
    """Parameters from half-precision task vectors, and the gradient of their coefficients."""

    def make(setup: Setup) -> Workload:
        tensors = _draw(setup, shapes, "base", torch.float32)
        for i in range(count):
            tensors |= _draw(setup, shapes, f"d{i}", torch.float16)
        tensors |= _draw(setup, shapes, "grad", torch.float32)
        generator = setup.generator()
        table = normal(count, len(shapes), generator=generator, dtype=torch.float32,
                       device=setup.device)  # fmt: skip
        tensors["coefficients"] = table

        def gradient(made: list[Tensor], t: Tensors, table: Tensor) -> Tensor:
            return torch.autograd.grad(made, table, _list(t, "grad", shapes))[0]

        def leaf(t: Tensors) -> Tensor:
            return t["coefficients"].detach().requires_grad_()

        def ours(t: Tensors) -> object:
            with torch.enable_grad():
                table = leaf(t)
                lists, base = _lists(t, count, shapes), _list(t, "base", shapes)
                made = lincomb(lists, table, base=base, backend=setup.backend)
                return gradient(made, t, table)

        def official(t: Tensors) -> object:
            # Per tensor products with 0-dimensional coefficients, in half precision, and their sums
            # of all tensors before the first is added to the base.
            with torch.enable_grad():
                table = leaf(t)
                lists, base = _lists(t, count, shapes), _list(t, "base", shapes)
                changes = [
                    sum([part[j] * table[i, j] for i, part in enumerate(lists)])
                    for j in range(len(base))
                ]
                made = [change + b for change, b in zip(changes, base, strict=True)]
                return gradient(made, t, table)

        def wide(t: Tensors) -> object:
            # The same without half-precision products.
            with torch.enable_grad():
                table = leaf(t)
                lists, base = _lists(t, count, shapes), _list(t, "base", shapes)
                made = [
                    b + sum(table[i, j] * part[j].to(b.dtype) for i, part in enumerate(lists))
                    for j, b in enumerate(base)
                ]
                return gradient(made, t, table)

        return _workload(
            setup, tensors, shapes, count, ours, wide, {"official": official, "eager": wide},
            4 * _numbers(shapes), 4 * count * _numbers(shapes), {"official": HALF_SUMS},
        )  # fmt: skip

    return make


def _ratio(shapes: Shapes, settings: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        tensors: Tensors = {}
        for k in range(2):
            tensors |= _draw(setup, shapes, f"d{k}", setup.dtype)
            fisher = _draw(setup, shapes, f"f{k}", setup.dtype)
            tensors |= {name: t.square() for name, t in fisher.items()}
        first = torch.linspace(0, 1, settings, dtype=torch.float64)
        table = torch.stack((1 - first, first), 1)

        def ours(t: Tensors) -> object:
            lists, fishers = _lists(t, 2, shapes), _lists(t, 2, shapes, "f")
            return ratio_merge(lists, fishers, table, backend=setup.backend)

        def eager(t: Tensors) -> object:
            lists, fishers = _lists(t, 2, shapes), _lists(t, 2, shapes, "f")
            norms = [
                torch.linalg.vector_norm(torch.stack(torch._foreach_norm(f))).item()
                for f in fishers
            ]
            found = []
            for c in table.tolist():
                for x0, x1, f0, f1 in zip(*lists, *fishers, strict=True):
                    w0 = c[0] / norms[0] * f0.clamp_min(1e-6)
                    w1 = c[1] / norms[1] * f1
                    below = w0 + w1
                    mean = (w0 * x0 + w1 * x1) / below
                    found.append(torch.where(below > 0, mean, x0))
            return found

        size = torch.finfo(setup.dtype).bits // 8
        return _workload(
            setup, tensors, shapes, 2, ours, eager, {"eager": eager},
            size * settings * _numbers(shapes), 8 * settings * _numbers(shapes),
        )  # fmt: skip

    return make


def _gram(shapes: Shapes, count: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        tensors: Tensors = {}
        for i in range(count):
            tensors |= _draw(setup, shapes, f"d{i}", setup.dtype)

        def ours(t: Tensors) -> object:
            return multi_gram(_lists(t, count, shapes), backend=setup.backend)

        def wide(t: Tensors) -> object:
            total = torch.zeros((), dtype=torch.float64, device=setup.device)
            for parts in zip(*_lists(t, count, shapes), strict=True):
                rows = torch.stack([x.flatten() for x in parts]).double()
                total = total + rows @ rows.mT
            return total.to(t["d0_0"].dtype)

        def eager(t: Tensors) -> object:
            rows = [torch.cat([x.flatten() for x in part]) for part in _lists(t, count, shapes)]
            flat = torch.stack(rows)
            return flat @ flat.mT

        def separate(t: Tensors) -> object:
            total = torch.zeros((), dtype=setup.dtype, device=setup.device)
            for parts in zip(*_lists(t, count, shapes), strict=True):
                rows = torch.stack([x.flatten() for x in parts])
                total = total + rows @ rows.mT
            return total

        return _workload(
            setup, tensors, shapes, count, ours, wide, {"eager": eager, "separate": separate},
            0, count * (count + 1) * _numbers(shapes),
            dict.fromkeys(("eager", "separate"), LONG_SUMS),
        )  # fmt: skip

    return make


def _sam(shapes: Shapes) -> Callable[[Setup], Workload]:
    """Perturb and restore; what is compared is the norm, for the parameters end as they began."""

    def make(setup: Setup) -> Workload:
        setup.need("sam_perturb_")
        tensors = _draw(setup, shapes, "d0", setup.dtype) | _draw(setup, shapes, "d1", setup.dtype)

        def ours(t: Tensors) -> object:
            params, grads = _lists(t, 2, shapes)
            step = sam_perturb_(params, grads, 0.05, adaptive=True, backend=setup.backend)
            sam_restore_(params, step.backup, backend=setup.backend)
            return step.norm

        def wide(t: Tensors) -> object:
            pairs = zip(*_lists(t, 2, shapes), strict=True)
            norms = [torch.linalg.vector_norm(p.double() * g.double()) for p, g in pairs]
            return torch.linalg.vector_norm(torch.stack(norms)).to(t["d0_0"].dtype)

        def foreach(t: Tensors) -> object:
            params, grads = _lists(t, 2, shapes)
            kept = [p.clone() for p in params]
            norms = torch._foreach_norm(torch._foreach_mul(params, grads))
            norm = torch.linalg.vector_norm(torch.stack(norms))
            moves = torch._foreach_mul(params, params)
            torch._foreach_mul_(moves, grads)
            torch._foreach_mul_(moves, 0.05 / (norm + 1e-12))
            torch._foreach_add_(params, moves)
            torch._foreach_copy_(params, kept)
            return norm

        size = torch.finfo(setup.dtype).bits // 8
        return _workload(
            setup, tensors, shapes, 1, ours, wide, {"foreach": foreach},
            6 * size * _numbers(shapes), 8 * _numbers(shapes), {"foreach": LONG_SUMS},
        )  # fmt: skip

    return make


def _ties(shapes: Shapes, count: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        setup.need("ties_merge")
        tensors = _draw(setup, shapes, "base", setup.dtype)
        for i in range(count):
            tensors |= _draw(setup, shapes, f"d{i}", setup.dtype)

        def ours(t: Tensors) -> object:
            base = _list(t, "base", shapes)
            lists = _lists(t, count, shapes)
            return ties_merge(lists, base=base, density=0.2, scale=0.5, backend=setup.backend)

        def eager(t: Tensors) -> object:
            # As released: one vector per model, its threshold by kthvalue, dense masks.
            flat = torch.stack(
                [torch.cat([x.flatten() for x in part]) for part in _lists(t, count, shapes)]
            )
            rank = flat.shape[1] - -(-flat.shape[1] // 5) + 1
            least = flat.abs().kthvalue(rank, dim=1, keepdim=True).values
            flat = flat * (flat.abs() >= least)
            sign = flat.sum(0).sign()
            agrees = torch.where(sign[None] > 0, flat > 0, flat < 0)
            kept = flat * agrees
            mean = kept.sum(0) / (kept != 0).sum(0).float().clamp_min(1)
            parts = mean.split([torch.Size(s).numel() for s in shapes])
            base = _list(t, "base", shapes)
            return [b + 0.5 * p.view(b.shape) for b, p in zip(base, parts, strict=True)]

        size = torch.finfo(setup.dtype).bits // 8
        return _workload(
            setup, tensors, shapes, count, ours, eager, {"eager": eager},
            size * (3 * count + 1) * _numbers(shapes), 4 * count * _numbers(shapes),
        )  # fmt: skip

    return make


def _case(
    name: str,
    title: str,
    make: Callable[[Setup], Workload],
    peers: tuple[str, ...],
    targets: tuple[Target, ...],
) -> Case:
    quick = peers if any(t.quick for t in targets) else ()
    return Case(
        name=name,
        title=title,
        make=make,
        targets=targets,
        peers=peers,
        quick_peers=quick,
        memory=True,
    )


_SINGLE = (Target(dtype="float32"),)

CASES = (
    _case(
        "merge-4",
        "weighted sum of 4 models of 22 million parameters (ViT-S)",
        _merge(VIT_S, 4),
        ("eager", "foreach", "stack"),
        (Target(dtype="float32", bar=2.5, quick=7), Target(dtype="bfloat16", bar=2.5)),
    ),
    _case(
        "merge-small",
        "weighted sum of 4 lists of 600 tensors of 64 to 768 numbers",
        _merge(SMALL, 4),
        ("eager", "foreach", "stack"),
        _SINGLE,
    ),
    _case(
        "atlas-8",
        "aTLAS with 8 half-precision task vectors of ViT-B, forward and backward",
        _composition(VIT_B, 8),
        ("official", "eager"),
        (Target(dtype="float32", bar=3.0, memory_bar=3.0),),
    ),
    _case(
        "atlas-small-8",
        "aTLAS with 8 half-precision task vectors of ViT-S, forward and backward",
        _composition(VIT_S, 8),
        ("official", "eager"),
        _SINGLE,
    ),
    _case(
        "ratio-2",
        "Fisher merge of 2 models of 22 million parameters, 5 settings",
        _ratio(VIT_S, 5),
        ("eager",),
        _SINGLE,
    ),
    _case(
        "gram-8",
        "inner products of 8 gradients of 22 million parameters",
        _gram(VIT_S, 8),
        ("eager", "separate"),
        _SINGLE,
    ),
    _case(
        "sam",
        "adaptive perturbation and restoring of 22 million parameters",
        _sam(VIT_S),
        ("foreach",),
        _SINGLE,
    ),
    _case(
        "ties-4",
        "TIES merge of 4 models of 22 million parameters",
        _ties(VIT_S, 4),
        ("eager",),
        (Target(dtype="float32", bar=10.0),),
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_merge(((3, 5), (7,)), 2),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        hidden=True,
    ),
)
