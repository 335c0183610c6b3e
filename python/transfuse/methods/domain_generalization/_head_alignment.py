"""What is aligned between domains: gradients and curvature of a classification head.

Two ways to the same quantities: closed forms for a linear head (``transfuse.ops``), and repeated
differentiation for a head that is any module. Both give gradients as (E, ...) tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.ops import (
    _head_call,
    head_gradient,
    head_hessian_diagonal,
    head_hessian_distance,
    head_hessian_product,
    head_hutchinson_diagonal,
)
from transfuse.ops._rademacher import rademacher


class Pair(NamedTuple):
    """A quantity of each domain, (E, ...), and that of the mean loss over domains."""

    domains: Tensor
    mean: Tensor


class Probes(NamedTuple):
    """Hutchinson's probes: a number and a seed, or given ones in the shape of the head."""

    count: int  # type: ignore[assignment]  # a field, not tuple.count
    seed: int
    independent: bool
    given: Tensor | None


def domain_losses(logits: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    """Mean cross-entropy of each domain, (E,), in float32 at least; one logit is binary."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[-1] == 1:
        targets = labels.reshape(-1, 1).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")[:, 0]
    else:
        each = F.cross_entropy(logits, labels.long(), reduction="none")
    return torch.stack([part.mean() for part in each.split(lengths)])


class LinearHead:
    """Closed forms of a linear head."""

    def __init__(
        self, head: nn.Linear, features: Tensor, labels: Tensor, bounds: list[int]
    ) -> None:
        self.given = (features, head.weight, head.bias)
        self.labels, self.bounds = labels, bounds
        self.lengths = [b - a for a, b in itertools.pairwise(bounds)]

    def losses(self) -> Tensor:
        features, weight, bias = self.given
        wide = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(
                features.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
            )
        return domain_losses(logits, self.labels, self.lengths)

    def gradients(self) -> Pair:
        g = head_gradient(*self.given, self.labels, segments=self.bounds)
        return Pair(g, g.mean(0))

    def hgp(self, g: Pair, detached: bool) -> Pair:
        # What head_hgp gives, without the gradient a second time.
        own = head_hessian_product(*self.given, g.domains[:, None], segments=self.bounds)[:, 0]
        # The mean's Hessian times the mean's gradient, not the mean of the products.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            crossed = head_hessian_product(*self.given, g.mean, segments=self.bounds)
        return Pair(own, crossed.mean(0))

    def hutchinson(self, probes: Probes, g: Pair, detached: bool) -> Pair:
        def estimate(which: Any, seed: int, independent: bool) -> Tensor:
            return head_hutchinson_diagonal(
                *self.given, which, segments=self.bounds, seed=seed, independent=independent
            )

        if probes.given is not None:
            if probes.given.dim() == 3:
                q = estimate(probes.given, 0, False)
                return Pair(q, q.mean(0))
            own, other = estimate(probes.given[1:], 0, False), probes.given[:1]
        else:
            own = estimate(probes.count, probes.seed, probes.independent)
            if not probes.independent:
                return Pair(own, own.mean(0))
            other = None
        # Probes of the mean are others than those of the domains.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            which = probes.count if other is None else other[0]
            return Pair(own, estimate(which, (probes.seed + 1) % 2**64, False).mean(0))

    def exact(self) -> Pair:
        q = head_hessian_diagonal(*self.given, segments=self.bounds)
        return Pair(q, q.mean(0))

    def frobenius(self) -> Tensor:
        """``|H_e - Hbar|_F^2`` of each domain, (E,).

        From pairwise distances: |H_e - Hbar|^2 = mean_f D_ef - mean_fg D_fg / 2.
        """
        distance = head_hessian_distance(*self.given, segments=self.bounds)
        return distance.mean(1) - 0.5 * distance.mean()

    def spectral(self, iterations: int, seed: int, detached: bool) -> Tensor:
        """``|H_e - Hbar|_2`` of each domain, (E,), signed, by power iteration.

        The vectors come without derivatives: at an eigenvector the derivative of the Rayleigh
        quotient with respect to it is 0.
        """
        features, weight, bias = self.given
        domains = len(self.lengths)
        shape = (domains, weight.shape[0], weight.shape[1] + (bias is not None))
        dtype = torch.promote_types(
            torch.promote_types(features.dtype, weight.dtype), torch.float32
        )
        size = shape[1] * shape[2]
        v = rademacher(seed, 0, domains, size, dtype, features.device).reshape(shape)
        v = v / size**0.5

        def apply(v: Tensor) -> tuple[Tensor, Tensor]:
            """H_e v_e and Hbar v_e."""
            every = head_hessian_product(*self.given, v, segments=self.bounds)
            return every.diagonal(dim1=0, dim2=1).movedim(-1, 0), every.mean(0)

        with torch.no_grad():
            for _ in range(iterations):
                own, mean = apply(v)
                difference = own - mean
                length = difference.flatten(1).norm(dim=1)[:, None, None]
                # Equal Hessians have no largest direction; any vector gives their difference, 0.
                v = torch.where(length > 0, difference / torch.where(length > 0, length, 1.0), v)
        own, mean = apply(v)
        mean = mean.detach() if detached else mean
        return ((own - mean) * v).flatten(1).sum(1)


class ModuleHead:
    """Repeated differentiation of any head: a module from features to logits."""

    def __init__(
        self, head: nn.Module, features: Tensor, labels: Tensor, bounds: list[int]
    ) -> None:
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("head: expected parameters that require gradients, got none")
        self.lengths = [b - a for a, b in itertools.pairwise(bounds)]
        with torch.enable_grad():
            logits = head(features)
            if logits.dim() != 2 or logits.shape[0] != features.shape[0]:
                raise ValueError(
                    f"head: expected logits (N, C) with N = {features.shape[0]}, "
                    f"got shape {tuple(logits.shape)}"
                )
            _head_call.targets(labels, logits, logits.shape[1])  # checked, not used
            self._losses = domain_losses(logits, labels, self.lengths)

    def losses(self) -> Tensor:
        return self._losses

    def _flat(self, scalar: Tensor) -> Tensor:
        """Gradient by all parameters, (P,), differentiable."""
        parts = torch.autograd.grad(
            scalar, self.parameters, create_graph=True, materialize_grads=True
        )
        return torch.cat([part.flatten() for part in parts])

    def gradients(self) -> Pair:
        with torch.enable_grad():
            g = torch.stack([self._flat(loss) for loss in self._losses])
        return Pair(g, g.mean(0))

    def _each(self, of: Callable[[Tensor, int], Tensor], g: Pair) -> Pair:
        """``of(g_e, e)`` for every domain and, with number E, for the mean."""
        with torch.enable_grad():
            own = [of(row, e) for e, row in enumerate(g.domains.unbind(0))]
            return Pair(torch.stack(own), of(g.mean, len(own)))

    def hgp(self, g: Pair, detached: bool) -> Pair:
        # H g = grad |g|^2 / 2: no root and no division, so that g = 0 is no exception.
        return self._each(lambda row, e: self._flat(0.5 * row.square().sum()), g)

    def hutchinson(self, probes: Probes, g: Pair, detached: bool) -> Pair:
        size, domains = g.mean.shape[0], g.domains.shape[0]
        if probes.given is not None and probes.given.shape[-1] != size:
            raise ValueError(
                f"probes: expected {size} numbers (parameters of head) in the last dimension, "
                f"got shape {tuple(probes.given.shape)}"
            )

        def signs(e: int, r: int) -> Tensor:
            if probes.given is not None:
                # The mean, which is number E here, comes first there.
                number = (e + 1) % (domains + 1)
                own = probes.given if probes.given.dim() == 2 else probes.given[number]
                return own[r].to(g.mean)
            start = e * probes.count + r if probes.independent else r
            return rademacher(probes.seed, start, 1, size, g.mean.dtype, g.mean.device)[0]

        count = probes.count if probes.given is None else probes.given.shape[-2]

        def estimate(row: Tensor, e: int) -> Tensor:
            total = torch.zeros_like(row)
            for r in range(count):
                z = signs(e, r)
                total = total + z * self._flat((row * z).sum())
            return total / count

        return self._each(estimate, g)
