"""The weight gradient of TrAct, put in place of the ordinary one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from transfuse.ops import patch_gram

Pair = tuple[int, int]


class Rows(NamedTuple):
    """How the rows x of a layer lie in its input, and the options of the gradient."""

    number: int
    lam: float
    group: object
    # Of a convolution: kernel, stride, padding, dilation.
    geometry: tuple[Pair, Pair, Pair, Pair] | None

    @classmethod
    def linear(cls, number: int, lam: float, group: object) -> Rows:
        """Rows are all but the last dimension."""
        return cls(number, lam, group, None)

    @classmethod
    def convolution(
        cls,
        outputs: torch.Size,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        lam: float,
        group: object,
    ) -> Rows:
        """Rows are patches; ``outputs`` is the shape of z, (m, H, W) or (B, m, H, W)."""
        number = outputs[-1] * outputs[-2] * (outputs[0] if len(outputs) == 4 else 1)
        return cls(number, lam, group, (kernel, stride, padding, dilation))


def preactivation_gradient(z: Tensor, weight: Tensor, x: Tensor, rows: Rows) -> Tensor:
    """z, whose gradient also gives the weight its TrAct gradient.

    z must come from the weight detached, so that this is the only gradient it gets.
    """
    return _Preactivation.apply(z, weight, x.detach(), rows)


class _Preactivation(torch.autograd.Function):
    """The identity of z, with a gradient to the weight."""

    @staticmethod
    def forward(z, weight, x, rows):
        return z.view_as(z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, weight, x, rows = inputs
        ctx.rows, ctx.like = rows, (weight.shape, weight.dtype)
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.like
            dw = _WeightGradient.apply(grad, x, shape, ctx.rows).to(dtype)
        return grad, dw, None, None


class _WeightGradient(torch.autograd.Function):
    """dW of (G, x), which cannot be differentiated again."""

    @staticmethod
    def forward(grad, x, shape, rows):
        # The precision of the whole of it, whatever autocast would choose.
        with torch.autocast(x.device.type, enabled=False):
            return weight_gradient(grad, x, shape, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "TrAct: the weight gradient of the layer cannot be differentiated (it is not the "
            "gradient of a function); unwrap the layer, or leave its weight out of create_graph"
        )


def weight_gradient(grad: Tensor, x: Tensor, shape: torch.Size, rows: Rows) -> Tensor:
    """dW of the shape of the weight, float32 (float64 for float64)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, grad = x.to(dtype), grad.to(dtype)
    if rows.geometry is not None and x.dim() == 3:
        x, grad = x[None], grad[None]
    n = shape.numel() // shape[0]
    if rows.number < n and rows.group is None:
        return _wide(grad, x, rows).reshape(shape)
    if rows.geometry is None:
        x, grad = x.reshape(-1, n), grad.reshape(-1, shape[0])
        moment, plain = x.mT @ x, grad.mT @ x
    else:
        kernel, stride, padding, dilation = rows.geometry
        moment = patch_gram(x, kernel, stride=stride, padding=padding, dilation=dilation)
        plain = conv2d_weight(x, shape, grad, stride, padding, dilation)
        plain = plain.reshape(shape[0], n)
    count = _summed(moment, rows)
    factor = _factor(moment / count, rows.lam)
    return torch.cholesky_solve(plain.mT, factor).mT.reshape(shape)


def _wide(grad: Tensor, x: Tensor, rows: Rows) -> Tensor:
    """Fewer rows than n: ``G^T (x x^T / b + lambda I)^-1 x``, of full accuracy for any lambda."""
    if rows.geometry is None:
        x, grad = x.reshape(rows.number, -1), grad.reshape(rows.number, -1)
    else:
        kernel, stride, padding, dilation = rows.geometry
        x = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
        x, grad = x.mT.flatten(0, 1), grad.flatten(2).mT.flatten(0, 1)
    factor = _factor(x @ x.mT / rows.number, rows.lam)
    if grad.shape[1] <= x.shape[1]:
        return torch.cholesky_solve(grad, factor).mT @ x
    return grad.mT @ torch.cholesky_solve(x, factor)


def _summed(moment: Tensor, rows: Rows) -> float | Tensor:
    """Number of rows; with a group, sums it and the moment (in place) over the processes."""
    if rows.group is None:
        return float(rows.number)
    import torch.distributed as dist

    count = torch.full((), float(rows.number), dtype=moment.dtype, device=moment.device)
    for part in (moment, count):
        dist.all_reduce(part, group=rows.group)  # type: ignore[arg-type]
    return count


def _factor(moment: Tensor, lam: float) -> Tensor:
    """Cholesky factor of ``moment + lam I``; NaN where there is none and asking would wait."""
    moment = moment + lam * torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    factor, info = torch.linalg.cholesky_ex(moment)
    readable = moment.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and int(info) != 0 and bool(moment.isfinite().all()):
        raise RuntimeError(
            f"TrAct: x^T x / b + lam I is not positive definite in {moment.dtype}; lam = "
            f"{lam:g} is too small for inputs of mean square {moment.diagonal().mean():g}"
        )
    return torch.where(info != 0, torch.nan, factor)
