r"""Understanding Hessian Alignment for Domain Generalization.

Sobhan Hemati, Guojun Zhang, Amir Estiri, Xi Chen; ICCV 2023; arXiv 2308.11778.

One head on features of several labelled domains e = 1..E, each with its mean cross-entropy L_e. A
penalty makes gradients g_e and Hessians H_e by the head's parameters agree between domains:

    penalty = mean_e [ alpha |q_e - qbar|^2 + beta |g_e - gbar|^2 ],     loss = mean_e L_e + penalty

with gbar and qbar those of the mean loss, held fixed, and q_e one of

    "hgp"         H_e g_e, qbar = Hbar gbar                     (the paper's)
    "hutchinson"  (1/R) sum_r z_r * (H_e z_r), random signs z   (the paper's)
    "exact"       diag H_e, what the estimate above tends to

or with |q_e - qbar|^2 replaced by

    "full"        |H_e - Hbar|_F^2
    "spectral"    |H_e - Hbar|_2^2, the norm in the paper's bound

For a linear head all of it is closed forms of features and probabilities: no graph of a gradient is
kept and no Hessian formed. Any other head goes through repeated differentiation, as the official
code does ("hgp" and "hutchinson" only).

Deviations from the official code, all deliberate:

- H g is computed as such, not as |g| grad |g|, which is 0 / 0 at g = 0.
- Probes are shared between domains, so that their noise cancels where domains agree
  (``independent=True``: as the official code). They come from a counter.
- "exact", "full" and "spectral" are additions; so is the default alpha of theirs.
- With one domain the penalty is 0.
- ``reduction="sum", detach_mean=False``: the form of the official Coloured-MNIST scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.domain_generalization._head_alignment import (
    LinearHead,
    ModuleHead,
    Pair,
    Probes,
)
from transfuse.ops import _head_call

__all__ = ["AlignmentTerms", "HessianAlignment"]

# method -> default alpha and beta
DEFAULTS = {
    "hgp": (1e-4, 5e-3),
    "hutchinson": (1e-3, 5e-3),
    "exact": (1e-3, 5e-3),
    "full": (1e-3, 5e-3),
    "spectral": (1e-3, 5e-3),
}
REDUCTIONS = ("mean", "sum")
OF_ANY_HEAD = ("hgp", "hutchinson")


class AlignmentTerms(NamedTuple):
    """What a batch gives.

    ``loss = nll + penalty``. Per domain, without gradient: ``gradient_gap`` |g_e - gbar|^2 and
    ``curvature_gap``, what alpha multiplies, (E,); ``gradients`` g_e and ``signatures`` q_e,
    (E, C, D) for a linear head (bias in the last column), else (E, P); for "full" and "spectral",
    which have no q_e, ``signatures`` is None.
    """

    loss: Tensor
    nll: Tensor
    penalty: Tensor
    gradient_gap: Tensor
    curvature_gap: Tensor
    gradients: Tensor
    signatures: Tensor | None


@register(
    title="Understanding Hessian Alignment for Domain Generalization",
    authors=("Sobhan Hemati", "Guojun Zhang", "Amir Estiri", "Xi Chen"),
    year=2023,
    venue="ICCV",
    arxiv="2308.11778",
    repository="https://github.com/huawei-noah/Federated-Learning",
    kind="loss",
    ops=(
        "head_gradient",
        "head_hessian_diagonal",
        "head_hessian_distance",
        "head_hessian_product",
        "head_hutchinson_diagonal",
    ),
)
class HessianAlignment(nn.Module):
    r"""Cross-entropy plus a penalty on gradients and Hessians of the head that differ by domain.

    .. math:: \frac{1}{E} \sum_e L_e + \frac{1}{E} \sum_e \left[
              \alpha \lVert q_e - \bar q \rVert^2 + \beta \lVert g_e - \bar g \rVert^2 \right]

    Args:
        method: ``"hgp"``, ``"hutchinson"``, ``"exact"``, ``"full"`` or ``"spectral"``, see the
            module. For a linear head ``"exact"`` costs less than one probe of ``"hutchinson"``.
        alpha: weight of the curvature, at least 0; None: 1e-4 for "hgp", 1e-3 for the others.
            Scales differ by orders of magnitude between methods and heads: to be tuned.
        beta: weight of the gradients, at least 0; None: 5e-3.
        reduction: ``"mean"`` or ``"sum"`` over domains, of the penalty.
        detach_mean: hold gbar and qbar fixed. Where qbar is the mean of q_e ("exact", "full",
            "hutchinson" with shared probes) the gradient is the same either way.
        probes: R of "hutchinson".
        independent: "hutchinson": other probes for every domain and for the mean.
        iterations: of "spectral", power iterations.
        seed: names the probes; every call takes new ones. Saved with the number of calls.

    Raises:
        TypeError, ValueError: an option outside its range.

    Notes:
        Features, weight and bias get gradients; a second derivative of the loss is right for
        "hgp" and "exact" and raises for the others. Half features are taken to float32, also under
        autocast. Hutchinson's noise adds about sum Var / R to |q_e - qbar|^2 with independent
        probes, also where all domains agree. NaN in features gives a NaN loss.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_generalization.hessian_alignment import HessianAlignment
        >>> head, criterion = torch.nn.Linear(8, 3), HessianAlignment(method="exact")
        >>> x, y = torch.randn(12, 8, requires_grad=True), torch.arange(12) % 3
        >>> loss = criterion(head, x, y, segments=[0, 4, 12])
        >>> loss.backward()
        >>> bool(x.grad.abs().sum() > 0)
        True
        >>> terms = criterion.terms(head, [x[:4], x[4:]], [y[:4], y[4:]])
        >>> bool(terms.loss == loss), terms.curvature_gap.shape
        (True, torch.Size([2]))
    """

    def __init__(
        self,
        *,
        method: str = "hgp",
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "mean",
        detach_mean: bool = True,
        probes: int = 300,
        independent: bool = False,
        iterations: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, options in (
            ("method", method, tuple(DEFAULTS)),
            ("reduction", reduction, REDUCTIONS),
        ):
            if value not in options:
                raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
        self.method, self.reduction = method, reduction
        usual = DEFAULTS[method]
        self.alpha = _weight("alpha", usual[0] if alpha is None else alpha)
        self.beta = _weight("beta", usual[1] if beta is None else beta)
        for name, flag in (("detach_mean", detach_mean), ("independent", independent)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {_checks.describe(flag)}")
        self.detach_mean, self.independent = detach_mean, independent
        self.probes = _checks.positive_int("probes", probes)
        self.iterations = _checks.positive_int("iterations", iterations)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {_checks.describe(seed)}")
        self.seed, self.calls = seed, 0

    def forward(
        self,
        head: nn.Module,
        features: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        *,
        segments: object = None,
        domains: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            head: ``torch.nn.Linear`` from features to logits, or any other module that maps (N, d)
                to (N, C) ("hgp" and "hutchinson" only). One logit (C = 1) is a binary head.
            features: (N, d), or a list with one such tensor per domain.
            labels: (N,) class numbers, or a list of them; binary also floating, in [0, 1].
            segments: offsets of the domains in features: E + 1 ascending integers from 0 to N.
            domains: instead, the domain number of each sample, int64 (N,), in any order.

        Raises:
            TypeError, ValueError: an argument that does not fit; the message names it.
        """
        return self.terms(head, features, labels, segments=segments, domains=domains).loss

    def terms(
        self,
        head: nn.Module,
        features: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        *,
        segments: object = None,
        domains: Tensor | None = None,
        probes: Tensor | None = None,
    ) -> AlignmentTerms:
        """Everything that a batch gives; arguments of :meth:`forward`, and for "hutchinson"

        Args:
            probes: given instead of drawn ones: (R, C, D) for all domains, or (E + 1, R, C, D),
                first those of the mean, then those of each domain. (R, P) or (E + 1, R, P) for a
                head that is not linear.
        """
        x, y, bounds = _batch(features, labels, segments, domains)
        linear = type(head) is nn.Linear
        if not linear and self.method not in OF_ANY_HEAD:
            raise ValueError(
                f"head: method {self.method!r} expects torch.nn.Linear, whose Hessian has a closed "
                f"form, got {type(head).__name__}; methods for any head: {', '.join(OF_ANY_HEAD)}"
            )
        if probes is not None and self.method != "hutchinson":
            raise ValueError(f"probes: expected None for method {self.method!r}, got a tensor")
        parts: LinearHead | ModuleHead
        if isinstance(head, nn.Linear) and linear:
            parts = LinearHead(head, x, y, bounds)
        else:
            parts = ModuleHead(head, x, y, bounds)
        # Another module's own products stay as autocast wants them.
        with _head_call.full_precision(x) if linear else nullcontext():
            g, losses = parts.gradients(), parts.losses()
            gap = _gaps(g, self.detach_mean)
            q, curvature = self._curvature(parts, g, probes)
        nll = losses.mean()
        if len(bounds) == 2:
            # One domain has nothing to agree with; rounding must not make it something.
            gap, curvature = gap * 0.0, curvature * 0.0
        each = self.alpha * curvature + self.beta * gap
        penalty = each.mean() if self.reduction == "mean" else each.sum()
        return AlignmentTerms(
            nll + penalty,
            nll,
            penalty,
            gap.detach(),
            curvature.detach(),
            g.domains.detach(),
            None if q is None else q.detach(),
        )

    def _curvature(
        self, parts: LinearHead | ModuleHead, g: Pair, probes: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """q_e, if the method has one, and what alpha multiplies."""
        # Odd steps of a 64-bit counter; one more is left for the probes of the mean.
        seed = (self.seed + 0x9E3779B97F4A7C15 * 2 * self.calls) % 2**64
        if self.method in ("hutchinson", "spectral"):
            self.calls += 1
        if isinstance(parts, LinearHead):
            if self.method == "full":
                return None, parts.frobenius()
            if self.method == "spectral":
                return None, parts.spectral(self.iterations, seed, self.detach_mean).square()
            if self.method == "exact":
                q = parts.exact()
                return q.domains, _gaps(q, self.detach_mean)
        if self.method == "hgp":
            q = parts.hgp(g, self.detach_mean)
        else:
            drawn = Probes(self.probes, seed, self.independent, probes)
            q = parts.hutchinson(drawn, g, self.detach_mean)
        return q.domains, _gaps(q, self.detach_mean)

    def get_extra_state(self) -> dict[str, int]:
        """The number of calls that drew probes: a resumed training goes on with new ones."""
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        self.calls = int(state["calls"])

    def extra_repr(self) -> str:
        """Options that matter for the method."""
        text = f"method={self.method!r}, alpha={self.alpha:g}, beta={self.beta:g}"
        text += f", reduction={self.reduction!r}, detach_mean={self.detach_mean}"
        if self.method == "hutchinson":
            text += f", probes={self.probes}, independent={self.independent}, seed={self.seed}"
        if self.method == "spectral":
            text += f", iterations={self.iterations}, seed={self.seed}"
        return text


def _gaps(pair: Pair, detached: bool) -> Tensor:
    mean = pair.mean.detach() if detached else pair.mean
    gaps = (pair.domains - mean).flatten(1)
    # A product of each row with itself: squares are neither stored nor read again.
    return torch.bmm(gaps[:, None], gaps[..., None]).flatten()


def _weight(name: str, value: object) -> float:
    number = _checks.number(name, value)
    if number < 0.0:
        raise ValueError(f"{name}: expected a number of at least 0, got {number}")
    return number


def _batch(
    features: object, labels: object, segments: object, domains: object
) -> tuple[Tensor, Tensor, list[int]]:
    """Samples by domain, and the offsets of the domains."""
    if isinstance(features, Tensor):
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a tensor, got {_checks.describe(labels)}")
        if features.dim() < 1 or features.shape[0] == 0:
            raise ValueError(f"features: expected at least one sample, got {tuple(features.shape)}")
        if (segments is None) == (domains is None):
            raise ValueError(
                "segments, domains: expected one of them with features in one tensor, got "
                f"{'neither' if segments is None else 'both'}"
            )
        if domains is None:
            return features, labels, list(_head_call.offsets(segments, features.shape[0]))
        if not isinstance(domains, Tensor) or domains.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"domains: expected int64 or int32, got {_checks.describe(domains)}")
        if tuple(domains.shape) != tuple(features.shape[:1]):
            raise ValueError(
                f"domains: expected shape ({features.shape[0]},) (rows of features), "
                f"got {tuple(domains.shape)}"
            )
        if labels.shape[:1] != features.shape[:1]:
            raise ValueError(
                f"labels: expected {features.shape[0]} rows, got shape {tuple(labels.shape)}"
            )
        order = domains.argsort(stable=True)
        counts = domains.unique(return_counts=True)[1].cumsum(0).tolist()
        return features[order], labels[order], [0, *counts]
    if not isinstance(features, Sequence) or not isinstance(labels, Sequence):
        raise TypeError(
            "features, labels: expected two tensors or two lists of them, got "
            f"{_checks.describe(features)} and {_checks.describe(labels)}"
        )
    if len(features) != len(labels) or not features:
        raise ValueError(
            "features, labels: expected lists of one length, at least 1, "
            f"got {len(features)} and {len(labels)}"
        )
    if segments is not None or domains is not None:
        raise ValueError("segments, domains: expected None with lists of domains")
    bounds = [0]
    for number, (x, y) in enumerate(zip(features, labels, strict=True)):
        for name, value in (("features", x), ("labels", y)):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}[{number}]: expected a tensor, got {_checks.describe(value)}"
                )
        if x.shape[0] == 0 or y.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"domain {number}: expected at least one sample and as many labels, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        bounds.append(bounds[-1] + x.shape[0])
    return torch.cat(list(features)), torch.cat(list(labels)), bounds
