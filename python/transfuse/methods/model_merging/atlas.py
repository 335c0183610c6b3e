r"""Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (aTLAS).

Frederic Z. Zhang, Paul Albert, Cristian Rodriguez-Opazo, Anton van den Hengel, Ehsan Abbasnejad;
NeurIPS 2024; arXiv 2407.02880. Official code: fredzzhang/atlas.

A pre-trained model theta_0 of m tensors, and task vectors tau_i = theta_i - theta_0 of n fine-tuned
copies. Only coefficients are learned, one per task and tensor:

    theta^(j) = theta_0^(j) + sum_i lambda_i^(j) tau_i^(j)
    d loss / d lambda_i^(j) = <d loss / d theta^(j), tau_i^(j)>

Variants: one coefficient per task; K per task and tensor, every entry having one of them at random
(aTLAS x K); the first-order model f(theta_0) + J sum_i lambda_i tau_i. Objectives: task addition
and negation, few-shot learning (cross-entropy, without the target's own vector), test-time
adaptation with pseudo-labels (UFM).

Deviations from the official code, all deliberate:

- Products are summed in float32 and rounded once; the official composition rounds every product and
  partial sum to half precision.
- Tensors are matched by name (official: by position, which goes wrong where there are buffers), and
  buffers stay theta_0's. Tied parameters have one coefficient.
- Granularity K moves all tensors; ``rank2_only=True`` moves matrices alone, as released. Partitions
  are hashed per tensor, or given (official: one mask per shape, stored).
- UFM trusts the most confident samples of each class (official: a mask that trusts every sample:
  ``form="official"``), and gives 0 where no sample counts (official: 0 / 0).
- Gradients are unscaled before they are clipped.
- Task vectors may be low-rank pairs, which stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.model_merging._composition import Composition, Vectors
from transfuse.methods.model_merging._composition_losses import (
    addition_loss,
    coefficient_penalty,
    negation_loss,
    select_by_gradient,
    select_by_similarity,
    trusted_samples,
    ufm_loss,
)
from transfuse.methods.model_merging._task_vectors import (
    LowRankPair,
    LowRankTaskVector,
    TaskVector,
    adapter_task_vector,
)
from transfuse.ops._progress import Progress, reporter

__all__ = [
    "Atlas",
    "LowRankPair",
    "LowRankTaskVector",
    "TaskVector",
    "adapter_task_vector",
    "addition_loss",
    "coefficient_penalty",
    "few_shot_vectors",
    "fit",
    "negation_loss",
    "select_by_gradient",
    "select_by_similarity",
    "trusted_samples",
    "ufm_loss",
]


@register(
    title="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
    authors=(
        "Frederic Z. Zhang",
        "Paul Albert",
        "Cristian Rodriguez-Opazo",
        "Anton van den Hengel",
        "Ehsan Abbasnejad",
    ),
    year=2024,
    venue="NeurIPS",
    arxiv="2407.02880",
    repository="https://github.com/fredzzhang/atlas",
    kind="merger",
    ops=("lincomb", "multi_dot", "multi_norm"),
)
class Atlas(Composition):
    r"""A model moved along task vectors by learned coefficients, one per task and tensor or finer.

    .. math:: \theta^{(j)} = \theta_0^{(j)} + \sum_i \lambda_i^{(j)} \tau_i^{(j)}

    Everything is that of its base class, where arguments and options are described: coefficients
    are ``coef``, the model is called as ever, and ``materialize()`` writes the result once.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> tau = TaskVector.of({n: torch.ones_like(p) for n, p in model.named_parameters()})
        >>> Atlas(model, [tau]).coef.shape
        torch.Size([1, 2])
    """


def few_shot_vectors(vectors: Vectors, target: str, *, allow_own: bool = False) -> list:
    """Task vectors for few-shot learning of a target: all but its own.

    Args:
        vectors: task vectors with names.
        target: the task to learn.
        allow_own: keep its own vector.

    Raises:
        ValueError: a vector without a name, or none that is left.

    Example:
        >>> import torch
        >>> named = [TaskVector.of({"w": torch.ones(1)}, name=name) for name in ("cars", "dtd")]
        >>> [vector.name for vector in few_shot_vectors(named, "dtd")]
        ['cars']
    """
    unnamed = [i for i, vector in enumerate(vectors) if vector.name is None]
    if unnamed and not allow_own:
        raise ValueError(f"vectors: expected names, to leave out that of {target!r}, got {unnamed}")
    found = [v for v in vectors if allow_own or v.name != target]
    if not found:
        raise ValueError(f"vectors: expected one of another task than {target!r}, got none")
    return found


def fit(
    composed: Composition,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    score: Callable[[], float] | None = None,
    every: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    progress: Progress = False,
) -> Sequence[float]:
    """Train the coefficients as published: AdamW, gradients clipped.

    Args:
        composed: the composition; only its coefficients change.
        loss: ``step -> loss``, which calls ``composed`` on a batch.
        steps: how many.
        lr: 1e-3; 1e-1 for few-shot learning.
        weight_decay, clip_norm: of AdamW, and the largest norm of the gradient.
        score: what the coefficients are kept for: those of the highest score after any ``every``
            steps remain. None: the last ones.
        every: steps between two scores.
        scaler: of the loss; gradients are unscaled before they are clipped.
        progress: see ``transfuse.ops.hutchinson_trace``.

    Returns:
        The losses.

    Raises:
        TypeError, ValueError: options out of range; a loss that is not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> tau = TaskVector.of({"weight": torch.ones(1, 1)})
        >>> composed, x = Atlas(model, [tau]), torch.ones(4, 1)
        >>> losses = fit(composed, lambda step: (composed(x) - 3).square().mean(), steps=50, lr=0.1)
        >>> losses[-1] < losses[0]
        True
    """
    steps, every = _checks.positive_int("steps", steps), _checks.positive_int("every", every)
    lr = _checks.number("lr", lr, positive=True)
    if clip_norm is not None:
        clip_norm = _checks.number("clip_norm", clip_norm, positive=True)
    report = reporter(progress, "coefficients", steps)
    optimizer = torch.optim.AdamW([composed.coef], lr=lr, weight_decay=weight_decay)
    losses: list[float] = []
    best: tuple[float, Tensor] | None = None
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(step)
        losses.append(float(value.detach()))
        if not torch.isfinite(value.detach()).all():
            raise ValueError(f"loss: expected a finite number, got {losses[-1]} in step {step}")
        (value if scaler is None else scaler.scale(value)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([composed.coef], clip_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if score is not None and ((step + 1) % every == 0 or step + 1 == steps):
            with torch.no_grad():
                found = float(score())
            if best is None or found > best[0]:
                best = found, composed.coef.detach().clone()
        report(step + 1)
    if best is not None:
        with torch.no_grad():
            composed.coef.copy_(best[1])
    return losses
