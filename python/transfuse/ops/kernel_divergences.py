"""Divergences and dependence of samples by Gaussian kernels: Cauchy-Schwarz and MMD."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops import _kernel_sums_core
from transfuse.ops._kernel_samples import (
    bandwidth as checked_bandwidth,
)
from transfuse.ops._kernel_samples import (
    halved,
    log_total,
    paired,
    promoted,
    result_dtype,
    row_sums,
    same_width,
    samples,
)
from transfuse.ops._kernel_sums_call import of_one
from transfuse.ops._kernel_sums_reference import kernel_sums_reference

__all__ = ["conditional_cs", "cs_divergence", "cs_qmi", "mmd2"]


def cs_divergence(
    a: Tensor, b: Tensor, bandwidth: float | Tensor = 1.0, *, backend: str | None = None
) -> Tensor:
    r"""Cauchy-Schwarz divergence of two samples, in nats.

    .. math:: \log \sum_{ij} k(a_i, a_j) + \log \sum_{ij} k(b_i, b_j)
              - 2 \log \sum_{ij} k(a_i, b_j)

    Args:
        a, b: (M, d), (N, d), floating; M and N may differ.
        bandwidth: h of the Gaussian kernel, a number or a tensor (which gets a gradient).
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64), at least 0 up to rounding.

    Raises:
        TypeError, ValueError: an argument that does not fit, or samples so far apart that the last
            sum vanishes even in logarithms.

    Notes:
        No matrix of kernels is formed (:func:`transfuse.ops.kernel_sums`). The last sum is read; if
        it underflows, it is computed again with logarithms of sums of exponentials. Under
        ``torch.compile`` it is not, and the result is then infinite.

    Reference:
        Principe, Information Theoretic Learning, 2010. Yu et al., Cauchy-Schwarz Divergence
        Information Bottleneck for Regression, ICLR 2024.

    Example:
        >>> import torch
        >>> from transfuse.ops import cs_divergence
        >>> a = torch.tensor([[0.0], [1.0]])
        >>> cs_divergence(a, a)
        tensor(0.)
    """
    a, b = samples("a", a), samples("b", b)
    same_width("b", b, "a", a)
    h = checked_bandwidth("bandwidth", bandwidth)
    dtype = result_dtype(a, b)
    a, b = promoted(a, b)
    within_a, within_b, across = (
        row_sums([(x, y, h)], [(0,)], backend=backend).sum()
        for x, y in ((a, None), (b, None), (a, b if b is not a else None))
    )
    cross = log_total(across, [(a, b, h)], None, "a, b")
    return (within_a.log() + within_b.log() - 2.0 * cross).to(dtype)


def mmd2(
    a: Tensor,
    b: Tensor,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    *,
    kernel: str = "rbf",
    unbiased: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples.

    .. math:: \frac{1}{M^2} \sum_{ij} k(a_i, a_j) + \frac{1}{N^2} \sum_{ij} k(b_i, b_j)
              - \frac{2}{MN} \sum_{ij} k(a_i, b_j)

    Args:
        a, b: (M, d), (N, d), floating; M and N may differ.
        bandwidth: h, or several, whose kernels are added up.
        kernel: ``"rbf"`` or ``"imq"``, see :func:`transfuse.ops.kernel_sums`.
        unbiased: leave out the pairs (i, i) of the first two sums and divide them by M (M - 1) and
            N (N - 1); the result may be negative. Otherwise it is at least 0 up to rounding.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Notes:
        No matrix of kernels is formed; several bandwidths share the distances; sums and their
        difference are float64.

    Reference:
        Gretton et al., A Kernel Two-Sample Test, JMLR 2012, equations 3 and 5.

    Example:
        >>> import torch
        >>> from transfuse.ops import mmd2
        >>> a, b = torch.zeros(3, 2), torch.ones(4, 2)
        >>> mmd2(a, b)
        tensor(1.2642)
    """
    if not isinstance(unbiased, bool):
        raise TypeError(f"unbiased: expected True or False, got {_checks.describe(unbiased)}")
    least = 2 if unbiased else 1
    a, b = samples("a", a, least=least), samples("b", b, least=least)
    same_width("b", b, "a", a)
    dtype = result_dtype(a, b)
    a, b = promoted(a, b)

    def mean(x: Tensor, y: Tensor | None) -> Tensor:
        exclude = unbiased and y is None
        if backend == "reference":
            sums = kernel_sums_reference(
                x, y, bandwidth, kernel=kernel, exclude_diagonal=exclude
            ).double()
        else:
            call, _ = of_one(x, y, bandwidth, None, kernel, exclude)
            sums = _kernel_sums_core.sums(call, backend)
        rows, columns = x.shape[0], (x if y is None else y).shape[0]
        return sums.sum() / (rows * (columns - 1 if exclude else columns))

    return (mean(a, None) + mean(b, None) - 2.0 * mean(a, b)).to(dtype)


def cs_qmi(
    x: Tensor,
    t: Tensor,
    bandwidth: float | Tensor = 1.0,
    t_bandwidth: float | Tensor | None = None,
    *,
    normalized: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Cauchy-Schwarz quadratic mutual information of paired samples, in bits.

    .. math:: I = \log_2 \frac{1}{N^2} \sum_{ij} K_{ij} Q_{ij}
                + \log_2 \frac{1}{N^4} \sum_{ij} K_{ij} \sum_{ij} Q_{ij}
                - 2 \log_2 \frac{1}{N^3} \sum_i \sum_j K_{ij} \sum_j Q_{ij}

    Args:
        x, t: (N, dx) and (N, dt), floating, N at least 2; K and Q are their Gaussian kernels.
        bandwidth: of x (and of t, without ``t_bandwidth``): a number or a tensor.
        t_bandwidth: of t.
        normalized: :math:`I(x, t) / \sqrt{I(x, x)\, I(t, t)}`, 0 where one of these is not above
            rounding (a constant sample, or a bandwidth far beyond its spread), with a warning on
            the CPU.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Notes:
        One pass over half of the pairs makes every sum.

    Reference:
        Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression, ICLR 2024.

    Example:
        >>> import torch
        >>> from transfuse.ops import cs_qmi
        >>> x = torch.arange(6.0)[:, None]
        >>> cs_qmi(x, -x, normalized=True)
        tensor(1.)
    """
    x = samples("x", x, least=2)
    t = paired("t", t, "x", x)
    if not isinstance(normalized, bool):
        raise TypeError(f"normalized: expected True or False, got {_checks.describe(normalized)}")
    h = checked_bandwidth("bandwidth", bandwidth)
    ht = h if t_bandwidth is None else checked_bandwidth("t_bandwidth", t_bandwidth)
    dtype = result_dtype(x, t)
    x, t = promoted(x, t)
    factors: list[object] = [(x, None, h), (t, None, ht)]
    products: list[tuple[int, ...]] = [(0,), (1,), (0, 1)]
    if normalized:
        factors += [(x, None, halved(h)), (t, None, halved(ht))]
        products += [(2,), (3,)]
    sums = row_sums(factors, products, backend=backend)
    k, q = sums[0], sums[1]
    both = _information(sums[2], k, q)
    if not normalized:
        return both.to(dtype)
    own = torch.stack((_information(sums[3], k, k), _information(sums[4], q, q)))
    fit = own > 16 * torch.finfo(dtype).eps
    _warn_of_constants(fit)
    safe = torch.where(fit.all(), own, 1.0)
    return torch.where(fit.all(), both / safe.prod().sqrt(), 0.0 * both).to(dtype)


def _information(joint: Tensor, k: Tensor, q: Tensor) -> Tensor:
    """Of row sums of K * Q, K and Q; the numbers of samples cancel."""
    logs = joint.sum().log2() + k.sum().log2() + q.sum().log2()
    return logs - 2.0 * (k * q).sum().log2()


def _warn_of_constants(fit: Tensor) -> None:
    if torch.compiler.is_compiling() or fit.device.type != "cpu":
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(fit) or bool(fit.all()):
        return
    which = [name for name, ok in zip(("x", "t"), fit.tolist(), strict=True) if not ok]
    warnings.warn(
        f"cs_qmi: {' and '.join(which)} carries no information at this bandwidth (a constant "
        "sample, or one much narrower than the bandwidth); the normalised value is 0",
        stacklevel=3,
    )


def conditional_cs(
    x: Tensor,
    y: Tensor,
    yhat: Tensor,
    bandwidth: float | Tensor = 1.0,
    y_bandwidth: float | Tensor | None = None,
    *,
    row_weight: str = "paper",
    backend: str | None = None,
) -> Tensor:
    r"""Cauchy-Schwarz divergence of the conditional densities p(y | x) and p(yhat | x), in bits.

    .. math:: D = \log_2 \sum_j w_j \sum_i K_{ji} L^1_{ji}
                + \log_2 \sum_j w_j \sum_i K_{ji} L^2_{ji}
                - 2 \log_2 \sum_j w_j \sum_i K_{ji} L^{21}_{ji}

    with Gaussian kernels K of x, L1 of y, L2 of yhat, L21 between yhat (rows) and y, and
    :math:`w_j = (\sum_i K_{ji})^{-2}`.

    Args:
        x: (N, dx), conditions; N at least 2.
        y, yhat: (N, dy), targets and predictions. One number per sample is ``y[:, None]``.
        bandwidth: of x (and of y and yhat, without ``y_bandwidth``): a number or a tensor.
        y_bandwidth: of y and yhat.
        row_weight: ``"paper"``, or ``"official"`` for :math:`w_j = (\sum_i K_{ji}^2)^{-1}` of the
            released code.
        backend: as in :func:`transfuse.ops.kernel_sums`.

    Returns:
        0-dimensional, float32 (float64 for float64). An estimate may be slightly negative.

    Raises:
        TypeError, ValueError: an argument that does not fit, or predictions so far from every
            target that the last sum vanishes even in logarithms.

    Notes:
        One pass over the pairs makes every sum; the gradient makes the kernels it needs again (of
        ``yhat`` alone: K, L2 and L21). The last sum is read, as in
        :func:`transfuse.ops.cs_divergence`.

    Reference:
        Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression, ICLR 2024.

    Example:
        >>> import torch
        >>> from transfuse.ops import conditional_cs
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> bool(conditional_cs(x, y, y).abs() < 1e-6)
        True
    """
    x = samples("x", x, least=2)
    y = paired("y", y, "x", x)
    yhat = paired("yhat", yhat, "x", x)
    same_width("yhat", yhat, "y", y)
    official = bool(_checks.choice("row_weight", row_weight, {"paper": 0, "official": 1}))
    h = checked_bandwidth("bandwidth", bandwidth)
    hy = h if y_bandwidth is None else checked_bandwidth("y_bandwidth", y_bandwidth)
    dtype = result_dtype(x, y, yhat)
    x, y, yhat = promoted(x, y, yhat)
    factors: list[tuple[Tensor, Tensor | None, float | Tensor]] = [
        (x, None, h),
        (y, None, hy),
        (yhat, None, hy),
        (yhat, y, hy),
    ]
    products: list[tuple[int, ...]] = [(0, 1), (0, 2), (0, 3), (0,)]
    if official:
        factors.append((x, None, halved(h)))
        products[-1] = (4,)
    sums = row_sums(factors, products, backend=backend)
    log_weights = sums[3].log() * (-1.0 if official else -2.0)
    weights = log_weights.exp()
    one, two, across = ((weights * sums[i]).sum() for i in range(3))
    cross = log_total(across, [factors[0], factors[3]], log_weights, "y, yhat")
    return ((one.log() + two.log() - 2.0 * cross) / math.log(2.0)).to(dtype)
