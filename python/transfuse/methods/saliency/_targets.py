"""What a saliency map explains: the score that is differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transfuse import _checks

# None: the most likely class of each sample. An integer: a class for all; several: one for each.
# A function of the model's output: any score, one number or one for each sample.
Targets = None | int | Sequence[int] | Tensor | Callable[[object], Tensor]


def logits_of(output: object) -> Tensor:
    """The (B, K) scores in a model's output: the output itself, or its ``logits``.

    Raises:
        TypeError: there are none.
        ValueError: they have other axes.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "targets: classes need a model that returns a tensor or an object with `logits`, got "
            f"{_checks.describe(output)}; pass a function of the output instead"
        )
    if found.dim() != 2 or found.shape[1] == 0:
        raise ValueError(
            f"targets: classes need an output of shape (B, K), got {tuple(found.shape)}; pass a "
            "function of the output instead"
        )
    return found


def classes_of(logits: Tensor, targets: object) -> Tensor:
    """(B,) numbers of classes, checked."""
    batch, count = logits.shape
    if targets is None:
        return logits.argmax(1)
    if isinstance(targets, int) and not isinstance(targets, bool):
        targets = [targets] * batch
    if isinstance(targets, Sequence) and not isinstance(targets, str):
        for entry in targets:
            if isinstance(entry, bool) or not isinstance(entry, int):
                raise TypeError(f"targets: expected integers, got {_checks.describe(entry)}")
        targets = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    if not isinstance(targets, Tensor):
        raise TypeError(
            "targets: expected None, an integer, integers, an integer tensor or a function, got "
            f"{_checks.describe(targets)}"
        )
    return _checks.index_map(
        "targets", targets.to(logits.device), batch, count, "one class per sample", "x", logits
    )


def total_score(output: object, targets: object) -> Tensor:
    """The sum over the batch of what is differentiated: a tensor of no axes."""
    if callable(targets):
        score = targets(output)
        if not isinstance(score, Tensor) or not score.is_floating_point() or score.dim() > 1:
            raise TypeError(
                "targets: expected the function to return one floating number or one per sample, "
                f"got {_checks.describe(score)}"
            )
        return score.sum()
    logits = logits_of(output)
    classes = classes_of(logits, targets)
    _warn_probabilities(logits.detach())
    return logits.gather(1, classes[:, None]).sum()


def _warn_probabilities(logits: Tensor) -> None:
    if logits.shape[1] < 2 or logits.shape[0] == 0 or logits.device.type != "cpu":
        return
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the model's outputs are positive and sum to 1: gradients of probabilities vanish "
            "where it is sure; explain its logits, before the softmax",
            stacklevel=6,
        )
