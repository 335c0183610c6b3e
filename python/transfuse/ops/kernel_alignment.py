"""Dependence and similarity of paired samples by kernels: HSIC and CKA."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops._kernel_samples import (
    bandwidth as checked_bandwidth,
)
from transfuse.ops._kernel_samples import (
    halved,
    paired,
    promoted,
    result_dtype,
    row_sums,
    samples,
)

__all__ = ["cka", "hsic"]

# Numbers of a Gram matrix of wide samples that are held at a time.
CHUNK = 2**23


def hsic(
    x: Tensor,
    t: Tensor,
    bandwidth: float | Tensor = 1.0,
    t_bandwidth: float | Tensor | None = None,
    *,
    unbiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Hilbert-Schmidt independence criterion of paired samples under Gaussian kernels.

    .. math:: \frac{\mathrm{tr}(K H L H)}{(N - 1)^2}, \quad H = I - \frac{1}{N} 1 1^T, \qquad
              \text{unbiased: } \frac{1}{N (N - 3)} \left[ \mathrm{tr}(\tilde K \tilde L)
              + \frac{1^T \tilde K 1\, 1^T \tilde L 1}{(N - 1)(N - 2)}
              - \frac{2}{N - 2} 1^T \tilde K \tilde L 1 \right]

    with the diagonals of :math:`\tilde K, \tilde L` zero.

    Args:
        x, t: (N, dx) and (N, dt), floating; N at least 2, for the unbiased estimate 4.
        bandwidth: of x (and of t, without ``t_bandwidth``): a number or a tensor.
        t_bandwidth: of t.
        unbiased: the second form; it may be negative.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Notes:
        One pass over half of the pairs makes every sum, in float64; no matrix is formed.

    Reference:
        Gretton et al. 2005, Measuring Statistical Dependence with Hilbert-Schmidt Norms. Song et
        al., Feature Selection via Dependence Maximization, JMLR 2012, equation 4.

    Example:
        >>> import torch
        >>> from transfuse.ops import hsic
        >>> x = torch.arange(8.0)[:, None]
        >>> bool(hsic(x, x) > hsic(x, x % 2))
        True
    """
    x, t, dtype = _pair("t", x, t, unbiased)
    h = checked_bandwidth("bandwidth", bandwidth)
    ht = h if t_bandwidth is None else checked_bandwidth("t_bandwidth", t_bandwidth)
    sums = row_sums(
        [(x, None, h), (t, None, ht)], [(0,), (1,), (0, 1)], exclude=unbiased, backend=backend
    )
    return _dependence(sums[2].sum(), sums[0], sums[1], unbiased).to(dtype)


def cka(
    x: Tensor,
    y: Tensor,
    bandwidth: float | Tensor = 1.0,
    y_bandwidth: float | Tensor | None = None,
    *,
    kernel: str = "linear",
    debiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Centred kernel alignment of two representations of the same samples.

    .. math:: \frac{\mathrm{HSIC}(x, y)}{\sqrt{\mathrm{HSIC}(x, x)\, \mathrm{HSIC}(y, y)}}

    Args:
        x, y: (N, dx) and (N, dy), floating; N at least 2, debiased 4.
        bandwidth: of ``"rbf"``, for x (and y, without ``y_bandwidth``).
        y_bandwidth: of ``"rbf"``, for y.
        kernel: ``"linear"`` (inner products) or ``"rbf"``.
        debiased: of the unbiased estimates.
        backend: of ``"rbf"``, as in :func:`transfuse.ops.kernel_sums`; ``"linear"`` is composed of
            matrix products.

    Returns:
        0-dimensional, float32 (float64 for float64); NaN where a representation is constant.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Notes:
        ``"rbf"`` takes one pass over half of the pairs. ``"linear"`` multiplies features where
        they are fewer than samples, else some rows of the Gram matrices at a time.

    Reference:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019. Nguyen
        et al., Do Wide and Deep Networks Learn the Same Things?, ICLR 2021 (debiased).

    Example:
        >>> import torch
        >>> from transfuse.ops import cka
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
        >>> cka(x, 3 * x.flip(1))
        tensor(1.)
    """
    x, y, dtype = _pair("y", x, y, debiased)
    linear = not _checks.choice("kernel", kernel, {"linear": 0, "rbf": 1})
    if linear:
        if backend not in (None, "reference"):
            raise RuntimeError(f"cka: the linear kernel is composed, got backend {backend!r}")
        # Centred, products do not cancel; neither estimate changes.
        x, y = (t - t.mean(0, keepdim=True) for t in (x.to(dtype), y.to(dtype)))
        parts = [_linear(a, b, debiased) for a, b in ((x, y), (x, x), (y, y))]
    else:
        h = checked_bandwidth("bandwidth", bandwidth)
        hy = h if y_bandwidth is None else checked_bandwidth("y_bandwidth", y_bandwidth)
        sums = row_sums(
            [(x, None, h), (y, None, hy), (x, None, halved(h)), (y, None, halved(hy))],
            [(0,), (1,), (0, 1), (2,), (3,)],
            exclude=debiased,
            backend=backend,
        )
        k, q = sums[0], sums[1]
        parts = [
            _dependence(sums[2].sum(), k, q, debiased),
            _dependence(sums[3].sum(), k, k, debiased),
            _dependence(sums[4].sum(), q, q, debiased),
        ]
    across, own_x, own_y = parts
    return (across / (own_x * own_y).sqrt()).to(dtype)


def _pair(name: str, x: object, t: object, unbiased: object) -> tuple[Tensor, Tensor, torch.dtype]:
    if not isinstance(unbiased, bool):
        raise TypeError(
            f"unbiased, debiased: expected True or False, got {_checks.describe(unbiased)}"
        )
    x = samples("x", x, least=4 if unbiased else 2)
    t = paired(name, t, "x", x)
    dtype = result_dtype(x, t)
    x, t = promoted(x, t)
    return x, t, dtype


def _dependence(joint: Tensor, k: Tensor, q: Tensor, unbiased: bool) -> Tensor:
    """HSIC of the sum of K * Q and the row sums of K and Q (without diagonals if unbiased)."""
    n = k.shape[-1]
    across, totals = (k * q).sum(), k.sum() * q.sum()
    if unbiased:
        inner = joint + totals / ((n - 1) * (n - 2)) - 2.0 * across / (n - 2)
        return inner / (n * (n - 3))
    return (joint - 2.0 * across / n + totals / n**2) / (n - 1) ** 2


def _linear(x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """HSIC of centred features under inner products."""
    n = x.shape[0]
    if x.shape[1] * y.shape[1] <= n * (x.shape[1] + y.shape[1]):
        joint = (x.mT @ y).double().square().sum()
    else:
        step = max(1, CHUNK // n)
        joint = torch.stack(
            [((a @ x.mT) * (b @ y.mT)).sum(dtype=torch.float64)
             for a, b in zip(x.split(step), y.split(step), strict=True)]
        ).sum()  # fmt: skip
    if not unbiased:
        return joint / (n - 1) ** 2
    one, two = x.square().sum(1, dtype=torch.float64), y.square().sum(1, dtype=torch.float64)
    # Rows of centred products sum to 0, so that without the diagonal they are minus it.
    return _dependence(joint - (one * two).sum(), -one, -two, True)
