r"""Cauchy-Schwarz Divergence Information Bottleneck for Regression.

Shujian Yu, Xi Yu, Sigurd Løkse, Robert Jenssen, Jose C. Principe; ICLR 2024; arXiv 2404.17951.

A regression network with representation t of x and prediction yhat is trained by

    loss = D(p(y|x), p(yhat|x)) + beta * I(x; t)

Both terms are estimates by Gaussian kernels k(a, b) = exp(-|a - b|^2 / (2 sigma^2)) between the
samples of a batch, without a bound or a Gaussian assumption: D is the Cauchy-Schwarz divergence of
conditional densities (``transfuse.ops.conditional_cs``), I the quadratic mutual information
(``transfuse.ops.cs_qmi``), divided by sqrt(I(x; x) I(t; t)). Logarithms are of base 2.

Deviations, all deliberate:

- The weight of a row in D is 1 / (sum_i K_ji)^2, as dividing a joint by a marginal density gives
  and the paper's proposition says; the released code has 1 / sum_i K_ji^2
  (``row_weight="official"``).
- Targets must have two dimensions. The released housing script passes (N,), which its kernel takes
  for one point with N coordinates: every matrix is then constant and D the summed squared error.
- ``sigma="median"`` is the median distance. ``"official-median"`` is the released rule: ten times
  the median of squared distances in the sample joined to itself, at least 0.01.
- Where I(x; x) or I(t; t) is not above rounding (a constant representation), I is 0.
- If the sum between predictions and targets underflows, it is computed by log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.ops import conditional_cs, cs_qmi, kernel_sums, median_bandwidth
from transfuse.ops._kernel_samples import (
    UNDERFLOW,
    log_row_sums,
    paired,
    promoted,
    result_dtype,
    same_width,
    samples,
)
from transfuse.ops.median_bandwidth import ordered_distances

__all__ = ["CSIBLoss", "CSIBTerms", "gaussian_information", "kde_kl", "official_sigma"]

RULES = ("median", "official-median")


class CSIBTerms(NamedTuple):
    """``loss = prediction + beta * compression``, all in bits, 0-dimensional."""

    loss: Tensor
    prediction: Tensor
    compression: Tensor


@register(
    title="Cauchy-Schwarz Divergence Information Bottleneck for Regression",
    authors=("Shujian Yu", "Xi Yu", "Sigurd Løkse", "Robert Jenssen", "Jose C. Principe"),
    year=2024,
    venue="ICLR",
    arxiv="2404.17951",
    repository="https://github.com/SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck",
    kind="loss",
    ops=("conditional_cs", "cs_qmi", "kernel_sums", "median_bandwidth"),
)
class CSIBLoss(nn.Module):
    r"""Divergence of prediction and target given the input, plus beta times what is kept of it.

    .. math:: D_{CS}(p(y|x) \,\|\, p(\hat y|x)) + \beta\,
              \frac{I(x; t)}{\sqrt{I(x; x)\, I(t; t)}}

    Args:
        beta: weight of the compression, at least 0; the paper's best is about 0.01.
        sigma: bandwidth, for standardised data: a number, ``"median"`` or ``"official-median"``
            (of each of x, y and t, without gradient).
        y_sigma, t_sigma: bandwidths of targets and of the representation, if others.
        row_weight: ``"paper"`` or ``"official"``, see the module.
        normalized: divide the mutual information as above.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Raises:
        TypeError, ValueError: an option that does not fit; the message names it.

    Notes:
        O(N) memory in the batch: no matrix of kernels is formed. Compare runs at one batch size and
        one sigma: the estimates depend on both.

    Reference:
        Yu et al. 2024 (arXiv:2404.17951).

    Example:
        >>> import torch
        >>> from transfuse.methods.information_theory.cs_ib import CSIBLoss
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> t = torch.randn(16, 2, requires_grad=True)
        >>> loss = CSIBLoss(beta=0.01)(x, y, t.sum(1, keepdim=True), t)
        >>> loss.backward()
        >>> bool(t.grad.isfinite().all())
        True
    """

    def __init__(
        self,
        beta: float = 0.01,
        *,
        sigma: float | str = 1.0,
        y_sigma: float | str | None = None,
        t_sigma: float | str | None = None,
        row_weight: str = "paper",
        normalized: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.beta = _checks.number("beta", beta)
        if self.beta < 0.0:
            raise ValueError(f"beta: expected a number of at least 0, got {self.beta}")
        self.sigma = _sigma("sigma", sigma)
        self.y_sigma = self.sigma if y_sigma is None else _sigma("y_sigma", y_sigma)
        self.t_sigma = self.sigma if t_sigma is None else _sigma("t_sigma", t_sigma)
        _checks.choice("row_weight", row_weight, {"paper": 0, "official": 1})
        if not isinstance(normalized, bool):
            got = _checks.describe(normalized)
            raise TypeError(f"normalized: expected True or False, got {got}")
        self.row_weight, self.normalized, self.backend = row_weight, normalized, backend

    def forward(self, x: Tensor, y: Tensor, yhat: Tensor, t: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            x: (N, ...), inputs, flattened but for the first axis; N at least 2.
            y, yhat: (N, dy), targets and predictions; one number per sample is (N, 1).
            t: (N, ...), representations, flattened likewise.

        Returns:
            0-dimensional, float32 (float64 for float64).

        Raises:
            TypeError, ValueError: tensors that do not fit; predictions beyond the reach of the
                bandwidth.
        """
        return self.terms(x, y, yhat, t).loss

    def terms(self, x: Tensor, y: Tensor, yhat: Tensor, t: Tensor) -> CSIBTerms:
        """The loss and its two terms, differentiable; arguments as :meth:`forward`."""
        x, t = _flat("x", x), _flat("t", t)
        y = samples("y", y)
        h, hy = _bandwidth(self.sigma, x), _bandwidth(self.y_sigma, y)
        prediction = conditional_cs(
            x, y, yhat, h, hy, row_weight=self.row_weight, backend=self.backend
        )
        if self.beta == 0.0:
            # Reported, and worth no gradient.
            with torch.no_grad():
                return CSIBTerms(prediction, prediction, self._compression(x, t, h))
        compression = self._compression(x, t, h)
        return CSIBTerms(prediction + self.beta * compression, prediction, compression)

    def _compression(self, x: Tensor, t: Tensor, h: float | Tensor) -> Tensor:
        ht = _bandwidth(self.t_sigma, t)
        return cs_qmi(x, t, h, ht, normalized=self.normalized, backend=self.backend)

    def extra_repr(self) -> str:
        """The options."""
        text = f"beta={self.beta:g}, sigma={self.sigma!r}, y_sigma={self.y_sigma!r}"
        text += f", t_sigma={self.t_sigma!r}, row_weight={self.row_weight!r}"
        return f"{text}, normalized={self.normalized}"


def _sigma(name: str, value: object) -> float | str:
    if isinstance(value, str):
        _checks.choice(name, value, {rule: 0 for rule in RULES})
        return value
    return _checks.number(name, value, positive=True)


def _flat(name: str, value: object) -> Tensor:
    value = _checks.dense(name, value)
    return samples(name, value.flatten(1) if value.dim() > 2 else value, least=2)


def _bandwidth(sigma: float | str, x: Tensor) -> float | Tensor:
    if not isinstance(sigma, str):
        return sigma
    if sigma == "official-median":
        return official_sigma(x)
    try:
        return median_bandwidth(x)
    except ValueError as error:
        raise ValueError(f'sigma="median": {error}; give a number') from error


def official_sigma(x: Tensor) -> Tensor:
    """Ten times the released median rule: the bandwidth of the official automatic choice.

    The median of squared distances over the pairs of the sample joined to itself (every pair four
    times, and N distances of 0), at least 0.01.

    Args:
        x: (N, d), floating, N at least 2.

    Returns:
        0-dimensional, float32 (float64 for float64), without gradient.

    Raises:
        TypeError, ValueError: not such a sample.

    Example:
        >>> official_sigma(torch.tensor([[0.0], [1.0], [3.0]]))
        tensor(40.)
    """
    x = samples("x", x, least=2)
    n = x.shape[0]
    total = n * (2 * n - 1)
    middle = ((total - 1) // 2, total // 2)
    # The N zeros come first.
    found = ordered_distances(x, [max(0, k - n) // 4 for k in middle])
    found = torch.stack([d if k >= n else 0.0 * d for d, k in zip(found, middle, strict=True)])
    return 10.0 * found.mean().clamp_min(1e-2)


def kde_kl(
    y: Tensor, yhat: Tensor, sigma: float | Tensor = 1.0, *, backend: str | None = None
) -> Tensor:
    r"""Kullback-Leibler divergence of targets and predictions by kernel densities, in nats.

    .. math:: \frac{1}{N} \sum_j \left[ \log \sum_i k(y_i, y_j) - \log \sum_i k(y_i, \hat y_j)
              \right]

    Args:
        y, yhat: (N, dy), floating.
        sigma: bandwidth, a number or a tensor.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> y = torch.tensor([[0.0], [1.0]])
        >>> kde_kl(y, y)
        tensor(0.)
    """
    y = samples("y", y)
    yhat = paired("yhat", yhat, "y", y)
    same_width("yhat", yhat, "y", y)
    dtype = result_dtype(y, yhat)
    y, yhat = promoted(y, yhat)
    own = kernel_sums(y, None, sigma, backend=backend).double().log()
    across = kernel_sums(yhat, y, sigma, backend=backend).double()
    if bool((across.detach() > UNDERFLOW).all()):
        across = across.log()
    else:
        across = log_row_sums([(yhat, y, sigma)])
    return (own - across).mean().to(dtype)


def gaussian_information(y: Tensor, yhat: Tensor) -> Tensor:
    """The released scripts' proxy of I(t; y) in bits: half the log of variance over error.

    ``0.5 log2(Var y / MSE)``, over all entries.

    Args:
        y, yhat: (N, dy), floating, N at least 2.

    Returns:
        0-dimensional, float32 (float64 for float64); infinite for exact predictions.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Example:
        >>> y = torch.tensor([[0.0], [2.0]])
        >>> gaussian_information(y, y + 0.5)
        tensor(1.)
    """
    y = samples("y", y, least=2)
    yhat = paired("yhat", yhat, "y", y)
    same_width("yhat", yhat, "y", y)
    dtype = result_dtype(y, yhat)
    y, yhat = y.to(dtype), yhat.to(dtype)
    error = (y - yhat).square().mean()
    variance = (y - y.mean(0, keepdim=True)).square().mean()
    return 0.5 * (variance / error).log2()
