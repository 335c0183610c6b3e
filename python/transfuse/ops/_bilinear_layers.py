"""Linear and convolution layers with a second derivative of their own, put in place of torch's
while a loss is differentiated.

A layer y = B(x, W) + b is bilinear in input and weight; so is batch normalisation by fixed
statistics. Its second derivative is written with the
layer's own fast products (torch decomposes that of a convolution), and knows three kinds of passes
through the graph of a gradient:

- of a product H v: every cotangent is passed on;
- of tangents alone, J v: only those of activations are;
- of a quadratic form v^T H v: with tangents x', W' = v, y' = B(x', W) + B(x, W') + b' of all
  activations along v,

      v^T H v = sum over layers of <g_y, 2 B(x', W')> + <c_y, y'>, plus <c_p, v_p> of other
                parameters p,

  where g_y is the gradient at y and c the cotangent that curved operations between two layers (an
  activation, a normalisation, attention, the loss) send back, which stops at the next layer. That
  takes three products of a layer's size for each vector, and a product H v six.

Both are exact whatever lies between the layers, since every cotangent meets the tangent of the
place it stops at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from transfuse._autograd import under_transform

aten = torch.ops.aten
Kind = Literal["product", "tangent", "form"]


class Passes:
    """What the layers of one graph share: the kind of the pass now under way, and its sum."""

    def __init__(self) -> None:
        self.kind: Kind = "product"
        self.number = 0
        self.total: Tensor | None = None

    def begin(self, kind: Kind) -> None:
        self.kind = kind
        self.number += 1
        self.total = None

    def add(self, first: Tensor, second: Tensor, factor: float) -> None:
        """total += factor x <first, second>; terms are added in float64."""
        wide = torch.promote_types(first.dtype, torch.float32)
        term = torch.dot(first.reshape(-1).to(wide), second.reshape(-1).to(wide)).double() * factor
        self.total = term if self.total is None else self.total + term


class _Layer(NamedTuple):
    """B and its two adjoints."""

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    to_input: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_weight: Callable[[Tensor, Tensor, Tensor], Tensor]
    bias_axes: Callable[[Tensor], list[int]]


class _Site:
    """One call of a layer: the tangent y' of the pass under way."""

    def __init__(self, layer: _Layer, passes: Passes) -> None:
        self.layer, self.passes = layer, passes
        self.tangent: tuple[int, Tensor] | None = None


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, site: _Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.site = site
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return site.layer.apply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        site, needs = ctx.site, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            x, weight = ctx.saved_tensors
            return (None, *_BilinearBackward.apply(site, needs, grad, x, weight))
        if site.passes.kind == "form":
            tangent = site.tangent
            site.tangent = None
            if tangent is not None and tangent[0] == site.passes.number:
                site.passes.add(grad, tangent[1], 1.0)
            return None, None, None, None
        return (None, *_adjoints(site.layer, needs, grad, *ctx.saved_tensors))


class _BilinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, site: _Site, needs, grad: Tensor, x: Tensor, weight: Tensor):
        ctx.site = site
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight)
        return _adjoints(site.layer, needs, grad, x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None):
        site, layer = ctx.site, ctx.site.layer
        grad, x, weight = ctx.saved_tensors
        tangent = None if x_t is None else layer.apply(x_t, weight, bias_t)
        if weight_t is not None:
            more = layer.apply(x, weight_t, bias_t if tangent is None else None)
            tangent = more if tangent is None else tangent.add_(more)
        if tangent is None and bias_t is not None:
            axes = layer.bias_axes(grad)
            shape = [1 if axis in axes else n for axis, n in enumerate(grad.shape)]
            tangent = bias_t.view(shape).expand_as(grad)
        cot_x = cot_weight = None
        if site.passes.kind == "form":
            if tangent is not None:
                site.tangent = (site.passes.number, tangent)
            if x_t is not None and weight_t is not None:
                site.passes.add(grad, layer.apply(x_t, weight_t, None), 2.0)
        elif site.passes.kind == "product":
            if weight_t is not None and ctx.needs_input_grad[3]:
                cot_x = layer.to_input(grad, x, weight_t)
            if x_t is not None and ctx.needs_input_grad[4]:
                cot_weight = layer.to_weight(grad, x_t, weight)
        return None, None, tangent, cot_x, cot_weight


def _adjoints(layer: _Layer, needs, grad: Tensor, x: Tensor, weight: Tensor):
    return (
        layer.to_input(grad, x, weight) if needs[0] else None,
        layer.to_weight(grad, x, weight) if needs[1] else None,
        grad.sum(layer.bias_axes(grad)) if needs[2] else None,
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


_LINEAR = _Layer(
    apply=F.linear,
    to_input=lambda grad, x, weight: grad @ weight,
    to_weight=lambda grad, x, weight: _rows(grad).mT @ _rows(x),
    bias_axes=lambda grad: list(range(grad.dim() - 1)),
)


def _convolution(dimensions: int, stride, padding, dilation, groups: int) -> _Layer:
    options = (stride, padding, dilation, False, [0] * dimensions, groups)

    def to_input(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [True, False, False]
        return aten.convolution_backward(grad, x, weight, None, *options, mask)[0]

    def to_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        mask = [False, True, False]
        return aten.convolution_backward(grad, x, weight, None, *options, mask)[1]

    return _Layer(
        apply=lambda x, weight, bias: aten.convolution(x, weight, bias, *options),
        to_input=to_input,
        to_weight=to_weight,
        bias_axes=_not_channels,
    )


def _channels(tensor: Tensor, like: Tensor) -> Tensor:
    """(C,) so that it broadcasts over dimension 1."""
    return tensor.view(-1, *[1] * (like.dim() - 2))


def _scale(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = _channels(weight, x)
    return x * weight if bias is None else torch.addcmul(_channels(bias, x), x, weight)


def _not_channels(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]


_SCALE = _Layer(
    apply=_scale,
    to_input=lambda grad, x, weight: grad * _channels(weight, x),
    to_weight=lambda grad, x, weight: (grad * x).sum(_not_channels(x)),
    bias_axes=_not_channels,
)


class BilinearLayers(TorchFunctionMode):
    """Calls of layers with a weight that is differentiated go to these ones."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self._passes = passes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        take = _TAKEN.get(func)
        if take is not None and torch.is_grad_enabled():
            call = None if under_transform() else take(*args, **kwargs)
            if call is not None and _fits(*call[1:]):
                layer, x, weight, bias = call
                return _Bilinear.apply(_Site(layer, self._passes), x, weight, bias)
        return func(*args, **kwargs)


def _fits(x: Any, weight: Any, bias: Any) -> bool:
    """Plain tensors of one dtype, a weight that is differentiated, and no autocast in between."""
    given = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
        and weight.requires_grad
        and x.is_floating_point()
        and all(t.dtype == x.dtype for t in given)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _take_linear(input, weight, bias=None):
    return (_LINEAR, input, weight, bias) if weight.dim() == 2 else None


def _take_matmul(input, other):
    if not isinstance(other, Tensor) or other.dim() != 2 or input.dim() < 2:
        return None
    return _LINEAR, input, other.mT, None


def _take_addmm(input, mat1, mat2, *, beta=1, alpha=1):
    plain = beta == 1 and alpha == 1 and input.dim() == 1 and input.shape[0] == mat2.shape[1]
    return (_LINEAR, mat1, mat2.mT, input) if plain else None


def _take_convolution(dimensions: int):
    def take(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        # Not torch's padding by name, nor an input without a batch.
        if isinstance(padding, str) or input.dim() != dimensions + 2:
            return None

        def each(value) -> list[int]:
            value = [value] if isinstance(value, int) else list(value)
            return value * dimensions if len(value) == 1 else value

        layer = _convolution(dimensions, each(stride), each(padding), each(dilation), groups)
        return layer, input, weight, bias

    return take


def _take_batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """Batch normalisation by fixed statistics scales and shifts channels."""
    if training or weight is None or bias is None or input.dim() < 2:
        return None
    scale = weight * torch.rsqrt(running_var + eps)
    return _SCALE, input, scale, torch.addcmul(bias, running_mean, scale, value=-1)


_TAKEN: dict[Any, Callable] = {
    F.linear: _take_linear,
    torch.matmul: _take_matmul,
    torch.mm: _take_matmul,
    Tensor.matmul: _take_matmul,
    Tensor.__matmul__: _take_matmul,
    Tensor.mm: _take_matmul,
    torch.addmm: _take_addmm,
    F.batch_norm: _take_batch_norm,
    torch.conv1d: _take_convolution(1),
    torch.conv2d: _take_convolution(2),
    torch.conv3d: _take_convolution(3),
}
