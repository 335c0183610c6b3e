"""A small vision transformer as plain functions, for Hessian-vector products with any attention.

Functional rather than an ``nn.Module`` so that the same loss serves ``torch.autograd`` and
``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .cases import Tensors
from .inputs import normal

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

BLOCKS, HEADS, WIDTH, MLP_RATIO, CLASSES = 4, 3, 192, 4, 10
# Prefixes of the parameters and of the direction they are differentiated along, among the tensors.
PARAMETER, DIRECTION = "parameter.", "direction."


def make_tensors(
    batch: int, tokens: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Random tokens, labels, parameters and a random direction of the parameters' shapes."""

    def draw(*shape: int) -> torch.Tensor:
        return normal(*shape, generator=generator, dtype=dtype, device=device)

    hidden = MLP_RATIO * WIDTH
    shapes: dict[str, tuple[int, ...]] = {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}
    for block in range(BLOCKS):
        for name, out_width, in_width in (
            ("qkv", 3 * WIDTH, WIDTH),
            ("projection", WIDTH, WIDTH),
            ("up", hidden, WIDTH),
            ("down", WIDTH, hidden),
        ):
            shapes[f"{block}.{name}.weight"] = (out_width, in_width)
            shapes[f"{block}.{name}.bias"] = (out_width,)
        for name in ("norm1", "norm2"):
            shapes[f"{block}.{name}.weight"] = (WIDTH,)
            shapes[f"{block}.{name}.bias"] = (WIDTH,)
    tensors: Tensors = {"tokens": draw(batch, tokens, WIDTH)}
    tensors["labels"] = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    for name, shape in shapes.items():
        # Matrices keep the signal's variance; norms start near one, as in a trained network.
        value = draw(*shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.02)
        tensors[PARAMETER + name] = (
            value + 1 if ".norm" in name and name.endswith("weight") else value
        )
        tensors[DIRECTION + name] = draw(*shape)
    return tensors


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Torch's, over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias)


def logits(
    parameters: Tensors,
    tokens: torch.Tensor,
    attention: Attention,
    normalise: Callable[..., torch.Tensor] = layer_norm,
) -> torch.Tensor:
    """Classes of the pre-norm transformer's first token, dropout-free."""
    batch, count, width = tokens.shape

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return normalise(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    x = tokens
    for block in range(BLOCKS):
        packed = linear(norm(x, f"{block}.norm1"), f"{block}.qkv")
        query, key, value = packed.view(batch, count, 3, HEADS, width // HEADS).permute(
            2, 0, 3, 1, 4
        )
        mixed = attention(query, key, value).transpose(1, 2).reshape(batch, count, width)
        x = x + linear(mixed, f"{block}.projection")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.up")), f"{block}.down")
    return linear(x[:, 0], "head")


def loss(
    parameters: Tensors, tokens: torch.Tensor, labels: torch.Tensor, attention: Attention
) -> torch.Tensor:
    """Cross entropy of the logits."""
    return F.cross_entropy(logits(parameters, tokens, attention), labels)


def split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Parameters and direction by the parameters' names."""
    parameters = {n[len(PARAMETER) :]: t for n, t in tensors.items() if n.startswith(PARAMETER)}
    directions = {n[len(DIRECTION) :]: t for n, t in tensors.items() if n.startswith(DIRECTION)}
    return parameters, directions


def hvp_double_backward(tensors: Tensors, attention: Attention) -> tuple[torch.Tensor, ...]:
    """Hessian of the loss times the direction: gradient of <gradient, direction>."""
    parameters, directions = split(tensors)
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    inputs = tuple(leaves.values())
    value = loss(leaves, tensors["tokens"], tensors["labels"], attention)
    gradients = torch.autograd.grad(value, inputs, create_graph=True)
    inner = sum((g * directions[name]).sum() for name, g in zip(leaves, gradients, strict=True))
    return torch.autograd.grad(inner, inputs)


def hvp_forward_over_reverse(tensors: Tensors, attention: Attention) -> tuple[torch.Tensor, ...]:
    """The same product as the directional derivative of the gradient (``torch.func``)."""
    parameters, directions = split(tensors)
    gradient = torch.func.grad(
        lambda point: loss(point, tensors["tokens"], tensors["labels"], attention)
    )
    _, tangent = torch.func.jvp(gradient, (parameters,), (directions,))
    return tuple(tangent[name] for name in parameters)


def forward_flops(batch: int, tokens: int) -> int:
    """Multiply-adds of all products of one forward pass, times two."""
    dense = 2 * batch * tokens * WIDTH * WIDTH * (4 + 2 * MLP_RATIO)
    return BLOCKS * (dense + 4 * batch * tokens * tokens * WIDTH)


def explicit_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, written out."""
    scores = (query @ key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]))
    return torch.softmax(scores, dim=-1) @ value
