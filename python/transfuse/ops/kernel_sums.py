"""Sums of kernels, and of products of kernels, over all pairs of points, without their matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse import _backend, _native
from transfuse.ops import _kernel_sums_core, _kernel_sums_ops
from transfuse.ops._kernel_sums_call import KernelFactor, of_factors, of_one, working_dtype
from transfuse.ops._kernel_sums_reference import (
    kernel_product_sums_reference,
    kernel_sums_reference,
)

__all__ = ["KernelFactor", "kernel_product_sums", "kernel_sums"]

_backend.declare("kernel_sums", ("reference", "cpu", "triton"))
_kernel_sums_ops.register_triton()
if _native.status().loaded:
    _kernel_sums_ops.register()


def kernel_sums(
    x: Tensor,
    y: Tensor | None = None,
    bandwidth: float | Sequence[float] | Tensor = 1.0,
    *,
    weights: Tensor | None = None,
    kernel: str = "rbf",
    exclude_diagonal: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Row sums of a kernel matrix that is never formed.

    .. math:: r_i = \sum_j w_j\, k(x_i, y_j), \qquad
              k = \exp\left(-\frac{\lVert x_i - y_j \rVert^2}{2 h^2}\right)
              \text{ or } \left(1 + \frac{\lVert x_i - y_j \rVert^2}{h^2}\right)^{-1}

    Args:
        x: (N, d), float32, float64, bfloat16 or float16; any strides.
        y: (M, d), or None for x itself: then half of the work serves for both halves.
        bandwidth: h, in the units of the points: a number, or several (a sequence or a tensor
            (B,)), which share the distances. A tensor gets a gradient.
        weights: (M,), or None for ones; get a gradient.
        kernel: ``"rbf"`` (the exponential) or ``"imq"`` (the inverse multiquadric).
        exclude_diagonal: leave out the pairs (i, i).
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``; a named one never falls back.

    Returns:
        (N,), or (B, N) for several bandwidths; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. Bandwidths on
            the CPU are read and must be positive; elsewhere a bandwidth of 0 gives NaN.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        O(N M d) operations, O((N + M) d) memory, also for the gradient, which makes the tiles of
        the matrix again. Distances of up to 8 coordinates are sums of squared differences; others
        come from products of points less their mean, not below 0, and lose about 1e-7 times the
        largest squared norm. Both are float32 (float64 for float64) and exactly 0 on the diagonal
        of x with itself; sums are added up in float64.

        The same bits on every run and, on the CPU, for every number of threads. Second
        derivatives and forward mode are composed of torch operations over some rows at a time;
        forward over forward raises.

    Example:
        >>> import torch
        >>> from transfuse.ops import kernel_sums
        >>> x, y = torch.randn(5, 3), torch.randn(7, 3)
        >>> dense = torch.exp(-torch.cdist(x, y).square() / (2 * 0.5**2)).sum(1)
        >>> torch.allclose(kernel_sums(x, y, 0.5), dense, atol=1e-5)
        True
    """
    if backend == "reference":
        return kernel_sums_reference(
            x, y, bandwidth, weights=weights, kernel=kernel, exclude_diagonal=exclude_diagonal
        )
    call, several = of_one(x, y, bandwidth, weights, kernel, exclude_diagonal)
    found = _kernel_sums_core.sums(call, backend).to(working_dtype(x.dtype))
    return found if several else found[0]


def kernel_product_sums(
    factors: Sequence[KernelFactor],
    products: Sequence[Sequence[int]] | None = None,
    *,
    weights: Tensor | None = None,
    kernel: str = "rbf",
    exclude_diagonal: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Row sums of products of kernel matrices, several of them in one pass.

    .. math:: r_{pi} = \sum_j w_j \prod_{f \in p} k_f(x^f_i, y^f_j)

    Args:
        factors: ``KernelFactor(x, y=None, bandwidth=1.0)``, up to 16: each between the rows of
            x (N, d_f) and of y (M, d_f), or of x with itself, as in :func:`kernel_sums`. Factors
            that name the same tensors share their distances.
        products: for each result the numbers of its factors, each at most once; None: one product,
            of all. (The square of a Gaussian kernel is one of bandwidth h / sqrt 2.)
        weights: (M,), or None for ones.
        kernel: ``"rbf"`` or ``"imq"``, of all factors.
        exclude_diagonal: leave out the pairs (i, i).
        backend: as in :func:`kernel_sums`.

    Returns:
        (P, N), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        As :func:`kernel_sums`. Where every factor is of x with itself, half of the tiles serve for
        all; the gradient makes only what it needs.

    Example:
        >>> import torch
        >>> from transfuse.ops import KernelFactor, kernel_product_sums
        >>> x, t = torch.randn(6, 3), torch.randn(6, 2)
        >>> factors = [KernelFactor(x, bandwidth=2.0), KernelFactor(t)]
        >>> kernel_product_sums(factors, [(0,), (1,), (0, 1)]).shape
        torch.Size([3, 6])
    """
    if backend == "reference":
        return kernel_product_sums_reference(
            factors, products, weights=weights, kernel=kernel, exclude_diagonal=exclude_diagonal
        )
    call = of_factors(factors, products, weights, kernel, exclude_diagonal)
    found = _kernel_sums_core.sums(call, backend)
    return found.to(working_dtype(call.points[0].dtype))
