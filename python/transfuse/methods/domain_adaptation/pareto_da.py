r"""Pareto Domain Adaptation.

Fangrui Lv, Jian Liang, Kaixiong Gong, Shuang Li, Chi Harold Liu, Han Li, Di Liu, Guoren Wang;
NeurIPS 2021; arXiv 2112.04137. Official code: BIT-DA/ParetoDA (its linear programmes after the EPO
search of Mahapatra & Rajan 2020).

Labelled source, unlabelled target; shared features theta, a classifier, a domain discriminator, K
class-wise domain discriminators v_k on detached features. Three losses of theta in every step: L_S
source cross-entropy; L_D of an alignment method; L_T, minus the mutual information between target
samples and their predictions, refined by v_k (``_target_surrogate``). L_Val is L_T on a held-out
target batch. With G the gradients by theta and C = G G^T, a = G g_Val, weights w on the simplex
come from a linear programme (``transfuse.ops.pareto_lp``): along a, not against the losses, while
L_Val is above its floor; else the steepest common descent.

    theta:   T sum_j w_j grad L_j            (T = 3 losses)
    others:  grad (L_S + L_D + L_cd),        L_cd the loss of the v_k

Deviations from paper and official code, all deliberate:

- Both switch to guidance while L_Val > 0, which never holds: L_Val lies in [-log K, 0]. Here it is
  L_Val + log K > eps. ``form="official"``: descent alone, as the released program runs.
- Where the programme is infeasible: w = 1/T, and a counter (official: w = 1).
- One forward pass per step; the gradient of theta is that of the combination. The official loop
  has a second one for the update.
- Parameters that a loss does not reach have gradient 0 (official: dropped, so lengths differ).
- Refinement by Bayes' rule, and the source term of L_cd sample by sample; see
  ``refine_predictions`` and ``classwise_domain_loss`` for what ``form="official"`` does instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.domain_adaptation._alignment_losses import (
    ConditionalAlignment,
    DomainAdversarialAlignment,
    MarginDisparityAlignment,
)
from transfuse.methods.domain_adaptation._target_surrogate import (
    ClasswiseDiscriminator,
    TargetMimicLoss,
    check_form,
    classwise_domain_loss,
    frozen_statistics,
    refine_predictions,
)
from transfuse.ops import multi_gram, pareto_lp

__all__ = [
    "ClasswiseDiscriminator",
    "ConditionalAlignment",
    "DomainAdversarialAlignment",
    "MarginDisparityAlignment",
    "ParetoDALoss",
    "ParetoLosses",
    "ParetoStep",
    "ParetoWeights",
    "TargetMimicLoss",
    "classwise_domain_loss",
    "frozen_statistics",
    "refine_predictions",
]

Gradients = Sequence[Tensor | None]


class ParetoStep(NamedTuple):
    """Weights (T,), inner products C of the gradients (T, T) and with the guiding one (T,), whether
    the step was guided, and the status of the programme (see ``pareto_lp``)."""

    weights: Tensor
    gramian: Tensor
    guidance: Tensor
    guided: Tensor
    status: Tensor


class ParetoLosses(NamedTuple):
    """Losses of a batch, scalars; ``validation`` is ``surrogate`` on the held-out batch."""

    source: Tensor
    alignment: Tensor
    surrogate: Tensor
    classwise: Tensor
    validation: Tensor


def _gradient_gram(gradients: Sequence[Gradients]) -> Tensor:
    """Inner products of lists of gradients, in float64; None is 0."""
    if all(p is None for parts in gradients for p in parts):
        return torch.zeros((len(gradients), len(gradients)), dtype=torch.float64)
    return multi_gram(gradients).double()


@register(
    title="Pareto Domain Adaptation",
    authors=(
        "Fangrui Lv",
        "Jian Liang",
        "Kaixiong Gong",
        "Shuang Li",
        "Chi Harold Liu",
        "Han Li",
        "Di Liu",
        "Guoren Wang",
    ),
    year=2021,
    venue="NeurIPS",
    arxiv="2112.04137",
    repository="https://github.com/BIT-DA/ParetoDA",
    kind="aggregator",
    ops=("pareto_lp", "multi_gram"),
)
class ParetoWeights(nn.Module):
    r"""Weights of several losses by which they descend together, steered by a held-out loss.

    Args:
        num_tasks: T, 1 to 6 losses.
        floor: smallest value the held-out loss can have (-log K for :class:`TargetMimicLoss`).
        eps: guidance ends where the held-out loss is within this of its floor, at least 0.
        form: ``"paper"``, or ``"official"``: descent alone, and weights of 1 where infeasible.

    Attributes:
        infeasible: how many programmes had no solution (int64 tensor, saved).

    Raises:
        TypeError, ValueError: an option outside its range.

    Notes:
        Reads one number per step to refuse gradients that are not finite, which waits for the
        device; everything else stays there.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_adaptation.pareto_da import ParetoWeights
        >>> gradients = [[torch.tensor([1.0, 0.2])], [torch.tensor([-0.5, 1.0])]]
        >>> chosen = ParetoWeights(num_tasks=2)
        >>> chosen(gradients, [torch.tensor([1.0, 1.0])], torch.tensor(0.7))
        tensor([1., 0.])
    """

    infeasible: Tensor

    def __init__(
        self, *, num_tasks: int = 3, floor: float = 0.0, eps: float = 1e-3, form: str = "paper"
    ) -> None:
        super().__init__()
        self.num_tasks = _checks.positive_int("num_tasks", num_tasks)
        if self.num_tasks > 6:
            raise ValueError(f"num_tasks: expected at most 6, got {num_tasks}")
        self.floor = _checks.number("floor", floor)
        self.eps = _checks.number("eps", eps)
        if self.eps < 0.0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}")
        self.form = check_form(form)
        self.register_buffer("infeasible", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return (
            f"num_tasks={self.num_tasks}, floor={self.floor:g}, eps={self.eps:g}, "
            f"form={self.form!r}"
        )

    def forward(
        self,
        gradients: Sequence[Gradients],
        guidance_gradient: Gradients,
        guidance_loss: Tensor | float,
    ) -> Tensor:
        """(T,) weights on the simplex, float32 (float64 for float64 gradients).

        Args:
            gradients: T lists, one tensor per shared parameter, in one order; None is 0.
            guidance_gradient: such a list of the held-out loss.
            guidance_loss: its value.

        Raises:
            TypeError, ValueError: an argument that does not fit, or is not finite.
        """
        return self.step(gradients, guidance_gradient, guidance_loss).weights

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Gradients],
        guidance_gradient: Gradients,
        guidance_loss: Tensor | float,
    ) -> ParetoStep:
        """The same, with what the weights were made of."""
        lists = [*gradients, guidance_gradient]
        dtype, device = self._check(lists)
        loss = torch.as_tensor(guidance_loss, dtype=torch.float64, device=device).detach()
        if loss.dim() != 0:
            raise ValueError(f"guidance_loss: expected a scalar, got shape {tuple(loss.shape)}")
        gram = _gradient_gram(lists)
        if not bool(gram.isfinite().all() & loss.isfinite()):
            raise ValueError(
                "gradients, guidance_loss: expected finite numbers, got a guidance loss of "
                f"{loss.item()} and squared norms of {gram.diagonal().tolist()}"
            )
        c, a = gram[:-1, :-1], gram[:-1, -1]
        guided = loss - self.floor > self.eps
        if self.form == "official":
            guided = torch.zeros_like(guided)
        weights, status = pareto_lp(c, a, mode="descent")
        if self.form == "paper":
            along = pareto_lp(c, a, mode="guide")
            weights = torch.where(guided, along.weights, weights)
            status = torch.where(guided, along.status, status)
        else:
            weights = torch.where(status == 1, 1.0, weights)
        self.infeasible += (status == 1).to(self.infeasible.device)
        return ParetoStep(weights.to(dtype), c, a, guided, status)

    def _check(self, lists: list[Gradients]) -> tuple[torch.dtype, torch.device]:
        """The dtype of weights, and the device."""
        if len(lists) != self.num_tasks + 1:
            raise ValueError(f"gradients: expected {self.num_tasks} lists, got {len(lists) - 1}")
        length = len(lists[0])
        shapes: dict[int, torch.Size] = {}
        first = None
        for t, entries in enumerate(lists):
            name = "guidance_gradient" if t == self.num_tasks else f"gradients[{t}]"
            if len(entries) != length:
                raise ValueError(
                    f"{name}: expected {length} entries (None where a parameter is not reached), "
                    f"got {len(entries)}"
                )
            for i, entry in enumerate(entries):
                if entry is None:
                    continue
                if not isinstance(entry, Tensor):
                    raise TypeError(
                        f"{name}[{i}]: expected a tensor or None, got {_checks.describe(entry)}"
                    )
                _checks.floating(f"{name}[{i}]", entry)
                if entry.shape != shapes.setdefault(i, entry.shape):
                    raise ValueError(
                        f"{name}[{i}]: expected shape {tuple(shapes[i])}, got {tuple(entry.shape)}"
                    )
                first = entry if first is None else first
        if first is None:
            raise ValueError("gradients: expected at least one tensor, got none at all")
        return (torch.float64 if first.dtype == torch.float64 else torch.float32), first.device


class ParetoDALoss(nn.Module):
    """The losses of Pareto domain adaptation, and the gradients they give to every parameter.

    Args:
        classifier: module of features (N, d) to logits (N, K).
        alignment: module called with (source features, source logits, target features, target
            logits) that returns a scalar: :class:`DomainAdversarialAlignment`,
            :class:`ConditionalAlignment`, :class:`MarginDisparityAlignment`, or any other.
        discriminators: :class:`ClasswiseDiscriminator`, or a module of features to (N, K, 2).
        eps: see :class:`ParetoWeights`.
        form: ``"paper"`` or ``"official"``, see the module.

    Raises:
        TypeError, ValueError: an option outside its range.

    Notes:
        A step costs one forward and four backward passes through what is shared. Features of the
        held-out batch are best made within ``frozen_statistics(backbone)``, so that batch
        normalisation does not see it; for the modules here that is done.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_adaptation.pareto_da import *
        >>> body, head = torch.nn.Linear(6, 4), torch.nn.Linear(4, 3)
        >>> align = DomainAdversarialAlignment(torch.nn.Linear(4, 1))
        >>> criterion = ParetoDALoss(head, align, ClasswiseDiscriminator(4, 3, hidden=8))
        >>> source, target, held_out = (body(torch.randn(8, 6)) for _ in range(3))
        >>> losses = criterion(source, torch.arange(8) % 3, target, held_out)
        >>> step = criterion.backward(losses, body.parameters())
        >>> step.weights.shape, body.weight.grad.shape
        (torch.Size([3]), torch.Size([4, 6]))
    """

    def __init__(
        self,
        classifier: nn.Module,
        alignment: nn.Module,
        discriminators: nn.Module,
        *,
        eps: float = 1e-3,
        form: str = "paper",
    ) -> None:
        super().__init__()
        for name, module in (
            ("classifier", classifier),
            ("alignment", alignment),
            ("discriminators", discriminators),
        ):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a module, got {_checks.describe(module)}")
        self.classifier, self.alignment, self.discriminators = classifier, alignment, discriminators
        self.weights = ParetoWeights(eps=eps, form=form)
        self.mimic = TargetMimicLoss(form=form)

    def forward(
        self, source: Tensor, labels: Tensor, target: Tensor, held_out: Tensor
    ) -> ParetoLosses:
        """The losses of one batch.

        Args:
            source: (N, d) features of labelled source samples.
            labels: (N,) int64 classes.
            target: (M, d) features of target samples.
            held_out: (L, d) features of target samples that are used for nothing else.

        Raises:
            TypeError, ValueError: an argument that does not fit; the message names it.
        """
        for name, features in (("source", source), ("target", target), ("held_out", held_out)):
            _checks.tensor(name, features, ("N", "d"))
            if features.shape[0] == 0:
                raise ValueError(f"{name}: expected at least one sample, got none")
        on_source, on_target = self.classifier(source), self.classifier(target)
        of_source, of_target = self.discriminators(source), self.discriminators(target)
        with frozen_statistics(self.classifier, self.discriminators):
            on_held_out, of_held_out = self.classifier(held_out), self.discriminators(held_out)
        refined = refine_predictions(on_target.detach(), of_target, form=self.mimic.form)
        self.weights.floor = -math.log(on_target.shape[1])
        return ParetoLosses(
            F.cross_entropy(on_source, labels),
            self.alignment(source, on_source, target, on_target),
            self.mimic(on_target, of_target),
            classwise_domain_loss(of_source, labels, of_target, refined, form=self.mimic.form),
            self.mimic(on_held_out, of_held_out),
        )

    def backward(self, losses: ParetoLosses, shared: Sequence[Tensor]) -> ParetoStep:
        """Adds to the ``grad`` of every parameter what the method gives it.

        Args:
            losses: of this module.
            shared: the parameters that features are made of (theta), each once.

        Returns:
            The weights, and what they were made of.

        Raises:
            TypeError, ValueError: an argument that does not fit, or a loss that is not finite.
        """
        shared = list(shared)
        own = [p for p in self.parameters() if p.requires_grad]
        if not shared or any(not isinstance(p, Tensor) or not p.requires_grad for p in shared):
            raise ValueError(
                "shared: expected parameters that require a gradient, got "
                f"{len(shared)} of which some do not"
                if shared
                else "shared: expected parameters, got none"
            )
        if len({id(p) for p in (*shared, *own)}) != len(shared) + len(own):
            raise ValueError(
                "shared: expected each parameter once and none of classifier, alignment or "
                "discriminators, got one of them or one twice"
            )
        if not bool(torch.stack([x.detach().double() for x in losses]).isfinite().all()):
            values = {name: x.item() for name, x in losses._asdict().items()}
            raise ValueError(f"losses: expected finite numbers, got {values}")
        guide = _gradients(losses.validation, shared)
        of_surrogate = _gradients(losses.surrogate, shared)
        of_alignment = _gradients(losses.alignment, [*shared, *own])
        of_source = _gradients(losses.source, [*shared, *own])
        of_classwise = _gradients(losses.classwise, own, last=True)
        count = len(shared)
        lists = [of_source[:count], of_alignment[:count], of_surrogate]
        step = self.weights.step(lists, guide, losses.validation)
        for gradients, weight in zip(lists, 3 * step.weights, strict=True):
            _accumulate(shared, gradients, weight)
        for gradients in (of_source[count:], of_alignment[count:], of_classwise):
            _accumulate(own, gradients, None)
        return step


def _gradients(loss: Tensor, by: Sequence[Tensor], *, last: bool = False) -> Gradients:
    if not loss.requires_grad:
        return [None] * len(by)
    return torch.autograd.grad(loss, by, retain_graph=not last, allow_unused=True)


def _accumulate(parameters: Sequence[Tensor], gradients: Gradients, weight: Tensor | None) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            moved = gradient if weight is None else gradient * weight.to(gradient.dtype)
            parameter.grad = moved if parameter.grad is None else parameter.grad + moved
