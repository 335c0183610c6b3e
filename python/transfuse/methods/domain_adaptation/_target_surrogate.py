"""The surrogate of the target loss of Pareto domain adaptation: refined predictions, their mutual
information with the sample, and the class-wise discriminators that refine them."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks

__all__ = [
    "ClasswiseDiscriminator",
    "TargetMimicLoss",
    "classwise_domain_loss",
    "frozen_statistics",
    "refine_predictions",
]

FORMS = ("paper", "official")
_FORM_CODES: dict[object, int] = {form: i for i, form in enumerate(FORMS)}
SOURCE, TARGET = 1, 0  # columns of the domain logits


def check_form(form: object) -> str:
    """One of :data:`FORMS`."""
    return FORMS[_checks.choice("form", form, _FORM_CODES)]


def _check_logits(name: str, value: object) -> Tensor:
    value = _checks.tensor(name, value, ("N", "K"))
    _checks.floating(name, value)
    if value.shape[0] == 0:
        raise ValueError(f"{name}: expected at least one sample, got shape {tuple(value.shape)}")
    if value.shape[1] < 2:
        raise ValueError(f"{name}: expected at least 2 classes, got shape {tuple(value.shape)}")
    return value


def _check_domain_logits(name: str, value: object, logits: Tensor) -> Tensor:
    value = _checks.tensor(name, value, ("N", "K", "2"))
    _checks.floating(name, value)
    if tuple(value.shape) != (*logits.shape, 2):
        raise ValueError(f"{name}: expected shape {(*logits.shape, 2)}, got {tuple(value.shape)}")
    return value


def refine_predictions(logits: Tensor, domain_logits: Tensor, *, form: str = "paper") -> Tensor:
    r"""Class probabilities of target samples, corrected by the class-wise discriminators.

    .. math:: \rho_k(x) = \frac{p(\text{target} \mid x, v_k) \, p_k(x)}
              {\sum_{k'} p(\text{target} \mid x, v_{k'}) \, p_{k'}(x)}

    Args:
        logits: (N, K) of the classifier, floating.
        domain_logits: (N, K, 2) of the K discriminators, (target, source) in the last axis; held
            fixed.
        form: ``"paper"``, or ``"official"``: logits times probability, as the released code has it,
            which is not a distribution.

    Returns:
        (N, K) in the dtype of the logits.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_adaptation.pareto_da import refine_predictions
        >>> refine_predictions(torch.zeros(1, 2), torch.tensor([[[0.0, 0.0], [-9.0, 0.0]]]))
        tensor([[9.9975e-01, 2.4673e-04]])
    """
    logits = _check_logits("logits", logits)
    domain_logits = _check_domain_logits("domain_logits", domain_logits, logits)
    found = refined_logits(logits, domain_logits, check_form(form))
    return found if form == "official" else found.softmax(1)


def refined_logits(logits: Tensor, domain_logits: Tensor | None, form: str) -> Tensor:
    """Numbers whose softmax is what the surrogate is computed of."""
    if domain_logits is None:
        return logits
    share = domain_logits.detach().log_softmax(2)[..., TARGET].to(logits.dtype)
    return logits * share.exp() if form == "official" else logits + share


class TargetMimicLoss(nn.Module):
    r"""Minus the mutual information between target samples and their refined predictions.

    .. math:: L = \sum_k \bar\rho_k \log(\bar\rho_k + \epsilon)
              - \frac{1}{N} \sum_x \sum_k \rho_k(x) \log \rho_k(x), \qquad
              \bar\rho = \frac{1}{N} \sum_x \rho(x)

    Args:
        eps: within the logarithm of the mean, at least 0.
        form: see :func:`refine_predictions`.

    Raises:
        TypeError, ValueError: an option outside its range.

    Notes:
        Between -log K (confident and balanced) and 0. A batch of one sample always has 0, with a
        warning. Half logits are taken to float32.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_adaptation.pareto_da import TargetMimicLoss
        >>> logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
        >>> bool((TargetMimicLoss()(logits) + torch.log(torch.tensor(2.0))).abs() < 1e-5)
        True
    """

    def __init__(self, *, eps: float = 1e-6, form: str = "paper") -> None:
        super().__init__()
        self.eps = _checks.number("eps", eps)
        if self.eps < 0.0:
            raise ValueError(f"eps: expected a number of at least 0, got {eps}")
        self.form = check_form(form)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, form={self.form!r}"

    def forward(self, logits: Tensor, domain_logits: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (N, K) of the classifier.
            domain_logits: (N, K, 2), see :func:`refine_predictions`; None: not refined.
        """
        logits = _check_logits("logits", logits)
        if domain_logits is not None:
            domain_logits = _check_domain_logits("domain_logits", domain_logits, logits)
        if logits.shape[0] == 1:
            warnings.warn(
                "the loss of a batch of one sample is 0 whatever is predicted", stacklevel=3
            )
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_rho = refined_logits(logits, domain_logits, self.form).log_softmax(1)
        rho = log_rho.exp()
        mean = rho.mean(0)
        # 0 log 0 is 0, and so is its gradient: exp(-inf) times -inf would be NaN.
        each = torch.where(rho > 0, rho * torch.where(rho > 0, log_rho, 0.0), 0.0).sum(1).mean()
        # Where eps is 0, so may be the argument.
        together = mean * (mean + self.eps).clamp_min(torch.finfo(mean.dtype).tiny).log()
        return together.sum() - each


def classwise_domain_loss(
    source_logits: Tensor,
    labels: Tensor,
    target_logits: Tensor,
    weights: Tensor,
    *,
    form: str = "paper",
) -> Tensor:
    r"""Cross-entropy of K discriminators, each weighted by how much a sample is of its class.

    .. math:: \frac{1}{2 K} \sum_k \left( \operatorname{mean}_s [y_s = k] \, H(v_k(x_s), 1)
              + \operatorname{mean}_t \rho_k(x_t) \, H(v_k(x_t), 0) \right)

    Args:
        source_logits: (N, K, 2) of the source, (target, source) in the last axis.
        labels: (N,) int64 classes of the source.
        target_logits: (M, K, 2) of the target.
        weights: (M, K) of :func:`refine_predictions`; held fixed.
        form: ``"paper"``, or ``"official"``: the label of the LAST sample stands for all, which is
            what a loop of the released code does.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    form = check_form(form)
    weights = _check_logits("weights", weights)
    target_logits = _check_domain_logits("target_logits", target_logits, weights)
    source_logits = _checks.tensor("source_logits", source_logits, ("N", "K", "2"))
    classes = weights.shape[1]
    if source_logits.shape[0] == 0 or tuple(source_logits.shape[1:]) != (classes, 2):
        raise ValueError(
            f"source_logits: expected shape (N, {classes}, 2) with N of at least 1, "
            f"got {tuple(source_logits.shape)}"
        )
    labels = _checks.index_map(
        "labels", labels, source_logits.shape[0], classes, "one per source sample",
        "source_logits", source_logits,
    )  # fmt: skip
    if form == "official":
        labels = labels[-1:].expand_as(labels)
    member = F.one_hot(labels, classes).to(source_logits.dtype)
    of_source = -source_logits.log_softmax(2)[..., SOURCE]
    of_target = -target_logits.log_softmax(2)[..., TARGET]
    total = (member * of_source).mean(0).sum() + (weights.detach() * of_target).mean(0).sum()
    return total / (2 * classes)


class ClasswiseDiscriminator(nn.Module):
    """One domain discriminator per class, all in the same products. Features are detached.

    Args:
        in_features: d of the features.
        num_classes: K, at least 2.
        hidden: width of the two hidden layers of each.
        batch_norm: normalise the hidden layers.
        generator: draws the initial weights; None: torch's global generator.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Example:
        >>> import torch
        >>> from transfuse.methods.domain_adaptation.pareto_da import ClasswiseDiscriminator
        >>> ClasswiseDiscriminator(8, 3, hidden=16)(torch.randn(5, 8)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden: int = 1024,
        batch_norm: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [
            _checks.positive_int("in_features", in_features),
            *[_checks.positive_int("hidden", hidden)] * 2,
            2,
        ]
        if _checks.positive_int("num_classes", num_classes) < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.weights, self.biases, self.norms = (
            nn.ParameterList(),
            nn.ParameterList(),
            nn.ModuleList(),
        )
        for given, made in itertools.pairwise(sizes):
            bound = given**-0.5
            for group, shape in (
                (self.weights, (num_classes, given, made)),
                (self.biases, (num_classes, 1, made)),
            ):
                drawn = torch.rand(shape, generator=generator) * (2 * bound) - bound
                group.append(nn.Parameter(drawn))
        if batch_norm:
            self.norms.extend(nn.BatchNorm1d(num_classes * hidden) for _ in range(2))

    def extra_repr(self) -> str:
        given, hidden = self.weights[0].shape[1:]
        return f"in_features={given}, num_classes={self.num_classes}, hidden={hidden}"

    def forward(self, features: Tensor) -> Tensor:
        """(N, d) to (N, K, 2), (target, source) in the last axis."""
        features = _checks.tensor("features", features, ("N", "d"))
        _checks.size("features", features, 1, self.weights[0].shape[1], "in_features")
        x = features.detach().expand(self.num_classes, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i == 2:
                return x.transpose(0, 1)
            if len(self.norms) > 0:
                rows = self.norms[i](x.transpose(0, 1).flatten(1))
                x = rows.unflatten(1, (self.num_classes, -1)).transpose(0, 1)
            x = x.relu()
        return x


@contextlib.contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation normalises as usual and does not update running statistics.

    For the forward pass of a held-out batch, which must not be seen by the model.
    """
    norms = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    names = ("running_mean", "running_var", "num_batches_tracked")
    before = [[getattr(m, name) for name in names] for m in norms]
    try:
        for m, kept in zip(norms, before, strict=True):
            for name, buffer in zip(names, kept, strict=True):
                setattr(m, name, None if buffer is None else buffer.clone())
        yield
    finally:
        for m, kept in zip(norms, before, strict=True):
            for name, buffer in zip(names, kept, strict=True):
                setattr(m, name, buffer)
