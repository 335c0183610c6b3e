"""Hessians of common losses in the outputs of a model, as products row by row.

All losses are means. With p = softmax(f): cross entropy (diag p - p p^T) u / rows; mean squared
error 2 u / entries; binary cross entropy of logits s (1 - s) u / entries, s = sigmoid(f).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse.ops._linearisation import explained

Product = Callable[[Tensor], Tensor]
CLOSED_FORMS = ("ce", "mse", "bce")
OutputLoss = str | Callable[[Tensor, Any], Tensor]


def output_hessian(loss: OutputLoss, outputs: Tensor, batch: Any) -> Product:
    """``u -> H u`` at detached outputs, for a named loss or any ``(outputs, batch) -> mean``."""
    if isinstance(loss, str):
        return {"ce": _cross_entropy, "mse": _squared, "bce": _binary}[loss](outputs)
    return _any_loss(loss, outputs, batch)


def name_of(loss: object) -> str | None:
    """The name of a loss module that one of the closed forms is for."""
    if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
        plain = loss.weight is None and loss.label_smoothing == 0.0
        return "ce" if plain and loss.ignore_index < 0 else None
    if type(loss) is nn.MSELoss and loss.reduction == "mean":
        return "mse"
    if type(loss) is nn.BCEWithLogitsLoss and loss.reduction == "mean":
        return "bce" if loss.weight is None and loss.pos_weight is None else None
    return None


def _wide(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _cross_entropy(outputs: Tensor) -> Product:
    if outputs.dim() == 0:
        raise ValueError("model_fn: expected logits (N, C, ...) for loss 'ce', got a 0-dim tensor")
    axis = 1 if outputs.dim() > 1 else 0
    p = torch.softmax(_wide(outputs), dim=axis)
    scale = outputs.shape[axis] / outputs.numel()

    def product(u: Tensor) -> Tensor:
        weighted = p * u
        return weighted.sub_(p * weighted.sum(axis, keepdim=True)).mul_(scale).to(u.dtype)

    return product


def _squared(outputs: Tensor) -> Product:
    return lambda u: u * (2.0 / outputs.numel())


def _binary(outputs: Tensor) -> Product:
    s = torch.sigmoid(_wide(outputs))
    curvature = s * (1 - s) / outputs.numel()
    return lambda u: (curvature * u).to(u.dtype)


def _any_loss(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, batch: Any) -> Product:
    with torch.enable_grad(), explained():
        leaf = outputs.detach().requires_grad_()
        value = loss(leaf, batch)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(
                "loss: expected a 0-dim tensor (a mean over samples), "
                f"got {_checks.describe(value)}"
            )
        if not value.requires_grad:
            raise ValueError(
                "loss: expected one that depends on the outputs, got one that does not"
            )
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    if not gradient.requires_grad:
        return torch.zeros_like

    def product(u: Tensor) -> Tensor:
        with explained():
            return torch.autograd.grad(gradient, leaf, u, retain_graph=True)[0]

    return product
