"""Adversarial losses that align the features of two domains: DANN, CDAN and MDD.

Each is called with (source features, source logits, target features, target logits) and trains its
own discriminator to tell the domains apart while a reversed gradient trains the features to be
alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks

__all__ = ["ConditionalAlignment", "DomainAdversarialAlignment", "MarginDisparityAlignment"]


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (coefficient,) = ctx.saved_tensors
        return -coefficient.to(grad.dtype) * grad, None


class _Alignment(nn.Module):
    """A discriminator behind a reversal of gradients that grows with the training steps:
    ``2 / (1 + exp(-i / ramp)) - 1`` in step i."""

    step: Tensor

    def __init__(self, discriminator: nn.Module, *, ramp: int = 1000) -> None:
        super().__init__()
        if not isinstance(discriminator, nn.Module):
            raise TypeError(
                f"discriminator: expected a module, got {_checks.describe(discriminator)}"
            )
        self.discriminator = discriminator
        self.ramp = _checks.positive_int("ramp", ramp)
        self.register_buffer("step", torch.zeros((), dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"ramp={self.ramp}"

    def _reverse(self, *features: Tensor) -> list[Tensor]:
        coefficient = 2.0 / (1.0 + torch.exp(-self.step / self.ramp)) - 1.0
        if self.training:
            self.step += 1
        return [_Reversal.apply(f, coefficient) for f in features]

    def _domain_loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Half the sum of the cross-entropies; source is 1."""
        source, target = (self.discriminator(f).float() for f in (source, target))
        for logits in (source, target):
            if logits.dim() != 2 or logits.shape[1] != 1:
                raise ValueError(
                    f"discriminator: expected logits of shape (N, 1), got {tuple(logits.shape)}"
                )
        return 0.5 * (
            F.binary_cross_entropy_with_logits(source, torch.ones_like(source))
            + F.binary_cross_entropy_with_logits(target, torch.zeros_like(target))
        )


class DomainAdversarialAlignment(_Alignment):
    """DANN: a discriminator of features (Ganin et al. 2016, arXiv:1505.07818).

    Args:
        discriminator: maps features (N, d) to one logit (N, 1).
        ramp: steps over which the reversed gradient grows; the official code has 1000.
    """

    def forward(
        self, source: Tensor, source_logits: Tensor, target: Tensor, target_logits: Tensor
    ) -> Tensor:
        """The loss, a scalar."""
        return self._domain_loss(*self._reverse(source, target))


class ConditionalAlignment(_Alignment):
    """CDAN: a discriminator of products of features and predictions (Long et al. 2018,
    arXiv:1705.10667, equations 5 and 6). The predictions are held fixed.

    Args:
        discriminator: maps (N, d K), features times each of K probabilities, to one logit (N, 1).
        ramp: see :class:`DomainAdversarialAlignment`.
    """

    def forward(
        self, source: Tensor, source_logits: Tensor, target: Tensor, target_logits: Tensor
    ) -> Tensor:
        """The loss, a scalar."""
        joint = [
            (logits.detach().softmax(1)[:, :, None] * features[:, None, :]).flatten(1)
            for features, logits in ((source, source_logits), (target, target_logits))
        ]
        return self._domain_loss(*self._reverse(*joint))


class MarginDisparityAlignment(_Alignment):
    """MDD: a second classifier that agrees with the first on the source and not on the target
    (Zhang et al. 2019, arXiv:1904.05801, equation 30).

    Args:
        discriminator: the second classifier, features (N, d) to logits (N, K).
        margin: weight of the source, greater than 0; the paper has 1 to 4.
        ramp: see :class:`DomainAdversarialAlignment`.
    """

    def __init__(self, discriminator: nn.Module, *, margin: float = 4.0, ramp: int = 1000) -> None:
        super().__init__(discriminator, ramp=ramp)
        self.margin = _checks.number("margin", margin, positive=True)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, {super().extra_repr()}"

    def forward(
        self, source: Tensor, source_logits: Tensor, target: Tensor, target_logits: Tensor
    ) -> Tensor:
        """The loss, a scalar."""
        source, target = self._reverse(source, target)
        on_source, on_target = (
            self.discriminator(source).float(),
            self.discriminator(target).float(),
        )
        agreement = F.cross_entropy(on_source, source_logits.argmax(1))
        # log(1 - p) of the class the first classifier chose, from the logits of the others.
        chosen = F.one_hot(target_logits.argmax(1), on_target.shape[1]).bool()
        others = on_target.masked_fill(chosen, -torch.inf).logsumexp(1)
        return self.margin * agreement - (others - on_target.logsumexp(1)).mean()
