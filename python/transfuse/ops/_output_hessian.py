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
from transfuse.ops._module_functions import moved

Product = Callable[[Tensor], Tensor]
CLOSED_FORMS = ("ce", "mse", "bce")
OutputLoss = str | Callable[[Tensor, Any], Tensor]


def output_hessian(loss: OutputLoss, outputs: Tensor, batch: Any) -> Product:
    """``u -> H u`` at detached outputs, for a named loss or any ``(outputs, batch) -> mean``."""
    name = loss.closed_form(outputs, batch) if isinstance(loss, ModuleLoss) else loss
    if isinstance(name, str):
        return {"ce": _cross_entropy, "mse": _squared, "bce": _binary}[name](outputs)
    return _any_loss(loss, outputs, batch)  # type: ignore[arg-type]


class ModuleLoss:
    """A loss of outputs and targets as one of outputs and a batch (inputs, targets)."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self._loss = loss

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        return self._loss(outputs, moved(batch[1], outputs.device))

    def closed_form(self, outputs: Tensor, batch: Any) -> str | None:
        """The name of the closed form that holds for a batch, if there is one."""
        loss, targets = self._loss, batch[1]
        if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
            if loss.weight is not None or loss.label_smoothing != 0.0:
                return None
            return None if bool((targets == loss.ignore_index).any()) else "ce"
        if type(loss) is nn.MSELoss and loss.reduction == "mean":
            # Torch would broadcast, and average over more entries than the outputs have.
            return "mse" if targets.shape == outputs.shape else None
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
