"""Benchmarks of kernel sums: discrepancies and dependence of samples, by their users' formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops import conditional_cs, cs_qmi, mmd2

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal

EXP = 10  # floating-point operations that an exponential counts as
FLOOR = (
    "one matrix product of each pair of blocks (half of them where a sample meets itself), and "
    "with gradients two or three products more, at the measured peak"
)


def _dense(a: Tensor, b: Tensor, h: float) -> Tensor:
    """The kernel matrix by one matrix product."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2.0 * (a @ b.T)
    return torch.exp(squares.clamp_min(0.0) * (-0.5 / h**2))


def _one(like: Tensor) -> Tensor:
    """The gradient of a number by itself."""
    return torch.ones((), dtype=like.dtype, device=like.device)


def _work(pairs: float, width: int, mode: str) -> int:
    """Of pairs whose kernels are made; gradients make them again and have two products more."""
    products = 1 if mode == "forward" else 4
    return int(pairs * (2 * width * products + EXP * (1 if mode == "forward" else 2)))


def _mmd(n: int, d: int, h: float) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        a, b = (
            normal(n, d, generator=generator, dtype=setup.dtype, device=setup.device) + shift
            for shift in (0.0, 0.1)
        )

        def dense(t: Tensors) -> Tensor:
            a, b = t["a"], t["b"]
            # A mean in single precision of terms that are all positive.
            return _dense(a, a, h).mean() + _dense(b, b, h).mean() - 2 * _dense(a, b, h).mean()

        def cdist(t: Tensors) -> Tensor:
            a, b = t["a"], t["b"]

            def mean(x: Tensor, y: Tensor) -> Tensor:
                return torch.exp(torch.cdist(x, y).square() * (-0.5 / h**2)).mean()

            return mean(a, a) + mean(b, b) - 2 * mean(a, b)

        def joined(t: Tensors) -> Tensor:
            # As published code writes it: one matrix of both samples, cut in four.
            both = torch.cat((t["a"], t["b"]))
            k = _dense(both, both, h)
            return k[:n, :n].mean() + k[n:, n:].mean() - k[:n, n:].mean() - k[n:, :n].mean()

        return Workload(
            tensors={"a": a, "b": b, GRAD: _one(a)},
            ours=lambda t: mmd2(t["a"], t["b"], h, backend=setup.backend),
            reference=dense,
            expressions={"eager": dense, "separate": cdist, "dense": joined},
            yardstick="eager",
            differentiable=("a", "b"),
            flops=_work(2 * n * n, d, setup.mode),
            bytes=2 * n * d * a.element_size(),
            floor_note=FLOOR,
            inputs="normal, means 0.1 apart, bandwidth sqrt(width)",
            shape={"a": [n, d], "b": [n, d], "bandwidth": h},
            needs_bytes={"dense": 8 * (2 * n) ** 2 * a.element_size()},
        )

    return make


def _conditional(n: int, dx: int, dy: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        x, y, yhat = (
            normal(n, d, generator=generator, dtype=setup.dtype, device=setup.device)
            for d in (dx, dy, dy)
        )
        h = float(dx) ** 0.5

        def expanded(a: Tensor, b: Tensor, h: float) -> Tensor:
            # The released form: norms and products in matrices of their own, all of them kept.
            first = (a * a).sum(-1).reshape(-1, 1).expand(a.shape[0], b.shape[0])
            second = (b * b).sum(-1).reshape(1, -1).expand(a.shape[0], b.shape[0])
            return torch.exp(-(first + second - 2 * torch.mm(a, b.T)) / (2 * h * h))

        def official(t: Tensors) -> Tensor:
            x, y, yhat = t["x"], t["y"], t["yhat"]
            k = expanded(x, x, h)
            one, two, across = expanded(y, y, h), expanded(yhat, yhat, h), expanded(yhat, y, h)
            w = 1.0 / (k**2).sum(-1)
            terms = [torch.log2((w * (k * m).sum(-1)).sum()) for m in (one, two, across)]
            return terms[0] + terms[1] - 2 * terms[2]

        return Workload(
            tensors={"x": x, "y": y, "yhat": yhat, GRAD: _one(x)},
            ours=lambda t: conditional_cs(
                t["x"], t["y"], t["yhat"], h, row_weight="official", backend=setup.backend
            ),
            reference=official,
            expressions={"official": official, "eager": official},
            yardstick="official",
            differentiable=("yhat",),
            flops=_work(n * n, dx + 3 * dy, setup.mode),
            bytes=n * (dx + 2 * dy) * x.element_size(),
            floor_note=FLOOR,
            inputs="normal, bandwidth sqrt(width of x)",
            shape={"x": [n, dx], "y": [n, dy], "yhat": [n, dy], "bandwidth": h},
        )

    return make


def _qmi(n: int, dx: int, dt: int) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        x, layer, noise = (
            normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for shape in ((n, dx), (dx, dt), (n, dt))
        )
        # Without anything in common the gradient is a difference of equals, and has no digits.
        t = torch.tanh(x @ layer * (2.0 * dx**-0.5)) + 0.1 * noise
        hx, ht = float(dx) ** 0.5, float(dt) ** 0.5

        def rows(given: Tensors) -> Tensor:
            # Without the two products of N^3 operations that the released code has.
            k, q = _dense(given["x"], given["x"], hx), _dense(given["t"], given["t"], ht)
            a, b = k.sum(1), q.sum(1)
            return (k * q).sum().log2() + (a.sum() * b.sum()).log2() - 2 * (a * b).sum().log2()

        def official(given: Tensors) -> Tensor:
            k, q = _dense(given["x"], given["x"], hx), _dense(given["t"], given["t"], ht)
            ones = torch.ones(n, 1, dtype=k.dtype, device=k.device)
            first = torch.trace(k @ q.T) / n**2
            second = (ones.T @ k @ ones) * (ones.T @ q @ ones) / n**4
            third = ones.T @ (k @ q) @ ones / n**3
            return (torch.log2(first) + torch.log2(second) - 2 * torch.log2(third)).squeeze()

        return Workload(
            tensors={"x": x, "t": t, GRAD: _one(x)},
            ours=lambda given: cs_qmi(given["x"], given["t"], hx, ht, backend=setup.backend),
            reference=rows,
            expressions={"official": official, "eager": rows},
            yardstick="eager",
            differentiable=("t",),
            flops=_work(n * n / 2, dx + dt, setup.mode),
            bytes=n * (dx + dt) * x.element_size(),
            floor_note=FLOOR,
            inputs="normal x, t a noisy layer of tanh on it, bandwidths sqrt(width)",
            shape={"x": [n, dx], "t": [n, dt]},
        )

    return make


CASES = (
    Case(
        name="mmd-8192",
        title="MMD of two samples of 8,192 in 64 dimensions",
        make=_mmd(8192, 64, 8.0),
        targets=(
            Target(dtype="float32", bar=1.8),
            Target(dtype="float32", mode="full", bar=2.0, memory_bar=4.0),
        ),
        peers=("eager", "eager-compile", "separate", "separate-compile", "dense"),
        modes=("forward", "backward", "full"),
        memory=True,
    ),
    Case(
        name="mmd-1024",
        title="MMD of two samples of 1,024 in 512 dimensions",
        make=_mmd(1024, 512, 512.0**0.5),
        targets=(Target(dtype="float32", quick=6), Target(dtype="float32", mode="full")),
        peers=("eager", "eager-compile", "separate"),
        quick_peers=("eager", "separate"),
        modes=("forward", "backward", "full"),
    ),
    Case(
        name="conditional-4096",
        title="conditional Cauchy-Schwarz divergence of 4,096 samples",
        make=_conditional(4096, 64, 1),
        targets=(
            Target(dtype="float32", bars={"official": 5.0}),
            Target(dtype="float32", mode="full", bars={"official": 5.0}),
        ),
        peers=("official", "eager-compile"),
        modes=("forward", "backward", "full"),
        memory=True,
    ),
    Case(
        name="qmi-4096",
        title="Cauchy-Schwarz mutual information of 4,096 samples with their representation",
        make=_qmi(4096, 64, 128),
        targets=(Target(dtype="float32"), Target(dtype="float32", mode="full")),
        peers=("official", "eager", "eager-compile"),
        modes=("forward", "backward", "full"),
        memory=True,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_mmd(9, 3, 2.0),
        targets=(Target(dtype="float32", quick=9),),
        peers=("eager",),
        quick_peers=("eager",),
        modes=("forward", "backward", "full"),
        hidden=True,
    ),
)
