"""What the coefficients of a composition are trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _checks


def addition_loss(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Sum over tasks of the cross-entropy of their own samples under their own head.

    Args:
        logits: per task (B_i, C_i).
        labels: per task (B_i,).

    Raises:
        ValueError: no task, or other numbers of them.

    Example:
        >>> import torch
        >>> logits = [torch.zeros(2, 2), torch.zeros(1, 4)]
        >>> round(float(addition_loss(logits, [torch.tensor([0, 1]), torch.tensor([3])])), 4)
        2.0794
    """
    if len(logits) != len(labels) or len(logits) == 0:
        raise ValueError(
            f"labels: expected those of {len(logits)} tasks, at least one, got {len(labels)}"
        )
    return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).sum()


def negation_loss(
    target: Tensor,
    target_labels: Tensor,
    control: Tensor,
    control_labels: Tensor,
    *,
    cap: float | None = None,
) -> Tensor:
    """Unlearn a target task and keep a control task: - CE(target) + CE(control).

    Args:
        target, control: logits (B, C).
        target_labels, control_labels: (B,).
        cap: largest CE(target) that is rewarded; None: no bound, as published, so that it may
            overflow.

    Raises:
        ValueError: a cap that is not positive.

    Example:
        >>> import torch
        >>> y = torch.tensor([0])
        >>> float(negation_loss(torch.zeros(1, 2), y, torch.zeros(1, 2), y))
        0.0
    """
    ascent = F.cross_entropy(target, target_labels)
    if cap is not None:
        ascent = ascent.clamp_max(_checks.number("cap", cap, positive=True))
    return F.cross_entropy(control, control_labels) - ascent


def trusted_samples(
    probabilities: Tensor, *, per_class: int | None = None, form: str = "paper"
) -> tuple[Tensor, Tensor]:
    """The most confident samples of every class, for test-time adaptation.

    Args:
        probabilities: (N, C) of the pre-trained model, on all test samples.
        per_class: how many of each class; None: min(N / (10 C), 100), at least 1.
        form: ``"paper"``; ``"official"``: every sample is trusted, as the released mask says.

    Returns:
        trusted (N,) bool, and labels (N,) int64: the class they are trusted for (the more probable
        of several), the most probable class elsewhere.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> trusted_samples(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), per_class=1)
        (tensor([ True, False,  True]), tensor([0, 0, 1]))
    """
    p = _checks.tensor("probabilities", probabilities, ("N", "C"))
    _checks.floating("probabilities", p)
    _check_form(form)
    n, classes = p.shape
    labels = p.argmax(1)
    if form == "official":
        return torch.ones(n, dtype=torch.bool, device=p.device), labels
    k = max(1, min(n // (10 * classes), 100)) if per_class is None else per_class
    k = min(_checks.positive_int("per_class", k), n)
    top = p.argsort(dim=0, descending=True, stable=True)[:k]
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(0, top, True)
    best = torch.where(chosen, p, -1.0).argmax(1)
    trusted = chosen.any(1)
    return trusted, torch.where(trusted, best, labels)


def ufm_loss(
    weak: Tensor,
    strong: Tensor,
    *,
    targets: Tensor | None = None,
    trusted: Tensor | None = None,
    threshold: float = 0.99,
) -> Tensor:
    """Cross-entropy of a strong view with pseudo-labels of a weak one, where they are confident.

    Args:
        weak: logits (B, C) of the weak view; no gradient flows into them.
        strong: logits (B, C) of the strong view.
        targets: labels (B,) of trusted samples.
        trusted: (B,) bool, which samples have one.
        threshold: least largest probability of a sample that counts; trusted ones always do.

    Returns:
        The mean over samples that count; 0, with a gradient of 0, where none does.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> import torch
        >>> weak = torch.tensor([[9.0, 0.0], [1.0, 0.0]])
        >>> round(float(ufm_loss(weak, torch.zeros(2, 2))), 4)
        0.6931
    """
    weak, strong = (
        _checks.tensor(name, t, ("B", "C")) for name, t in (("weak", weak), ("strong", strong))
    )
    if weak.shape != strong.shape:
        raise ValueError(
            f"strong: expected shape {tuple(weak.shape)} (that of weak), got {tuple(strong.shape)}"
        )
    if (targets is None) != (trusted is None):
        raise ValueError("targets, trusted: expected both or neither")
    limit = _checks.number("threshold", threshold)
    p = (
        weak.detach().float().softmax(-1)
        if weak.dtype != torch.float64
        else weak.detach().softmax(-1)
    )
    if targets is not None and trusted is not None:
        sure = F.one_hot(targets.long(), p.shape[1]).to(p.dtype)
        p = torch.where(trusted.bool()[:, None], sure, p)
    counts = p.amax(-1) > limit
    losses = -(p * strong.to(p.dtype).log_softmax(-1)).sum(-1)
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp_min(1)


def coefficient_penalty(coefficients: Tensor, p: int = 1, *, weight: float = 0.5) -> Tensor:
    """The regulariser: ``weight`` times the mean over blocks of the p-norm over tasks.

    Args:
        coefficients: (n, m), or (n, m, K), of which each partition counts as a block.
        p: 1 or 2.
        weight: 0.5 as published.

    Raises:
        ValueError: another p, or one coefficient per task.

    Example:
        >>> import torch
        >>> coefficient_penalty(torch.tensor([[3.0, 0.0], [-4.0, 1.0]]), 2)
        tensor(1.5000)
    """
    if p not in (1, 2):
        raise ValueError(f"p: expected 1 or 2, got {p!r}")
    if coefficients.dim() < 2:
        raise ValueError(
            f"coefficients: expected (n, m) or (n, m, K), got {tuple(coefficients.shape)}"
        )
    return weight * torch.linalg.vector_norm(coefficients, p, dim=0).mean()


def select_by_gradient(gradient: Tensor, budget: int) -> Tensor:
    """The task vectors that move the loss most, for each block.

    Args:
        gradient: (n, m) or (n, m, K): d loss / d coefficients where all are 0.
        budget: how many of n are used for a block.

    Returns:
        (n, m) bool, for ``Composition.active``.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> select_by_gradient(torch.tensor([[1.0, 0.1], [-2.0, 0.0]]), 1)
        tensor([[False,  True],
                [ True, False]])
    """
    if gradient.dim() not in (2, 3):
        raise ValueError(f"gradient: expected (n, m) or (n, m, K), got {tuple(gradient.shape)}")
    size = gradient.abs() if gradient.dim() == 2 else torch.linalg.vector_norm(gradient, dim=2)
    return _largest(size, budget)


def select_by_similarity(features: Tensor, target: Tensor, budget: int) -> Tensor:
    """The tasks whose mean feature is closest to the target's, by cosine.

    Args:
        features: (n, d), a mean feature per task.
        target: (d,).
        budget: how many of n are used.

    Returns:
        (n,) bool.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> import torch
        >>> select_by_similarity(torch.eye(2), torch.tensor([0.1, 1.0]), 1)
        tensor([False,  True])
    """
    features = _checks.tensor("features", features, ("n", "d"))
    target = _checks.tensor("target", target, ("d",))
    cosine = F.cosine_similarity(features, target[None], dim=1)
    return _largest(cosine[:, None], budget)[:, 0]


def _largest(size: Tensor, budget: int) -> Tensor:
    count = _checks.positive_int("budget", budget)
    order = size.argsort(dim=0, descending=True, stable=True)[:count]
    return torch.zeros_like(size, dtype=torch.bool).scatter(0, order, True)


def _check_form(form: object) -> None:
    if form not in ("paper", "official"):
        raise ValueError(f"form: expected paper or official, got {form!r}")
