"""Gradients and Hessians of linear classification heads, domain by domain, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _backend, _native, _triton_ops
from transfuse._autograd import needs_derivative, transformed
from transfuse.ops import _head_call, _head_core, _head_reference
from transfuse.ops._head_call import Head, full_precision

__all__ = [
    "head_gradient",
    "head_hessian_diagonal",
    "head_hessian_product",
    "head_hessian_trace",
    "head_hgp",
]

_backend.declare("head_hessian_trace", ("reference",))
for _name in ("head_gradient", "head_hessian_diagonal", "head_hessian_product", "head_hgp"):
    _backend.declare(
        _name,
        ("reference", "cpu", "triton", "cuda"),
        limits={"triton": _head_call.triton_limit, "cuda": _head_call.cuda_limit},
    )
_head_core.register(_triton_ops.COMPILED)
if _native.status().loaded:
    _head_core.register("cpu")


def head_gradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    segments: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Gradient of each domain's mean cross-entropy with respect to a linear head.

    .. math:: g_e = \frac{1}{n_e} \sum_{n \in e} (p_n - y_n)\, \tilde x_n^\top, \qquad
              p = \mathrm{softmax}(W x + b), \quad \tilde x = (x, 1)

    Args:
        features: (N, d), what the head takes, float32, float64, bfloat16 or float16.
        weight: (C, d), any of these dtypes. One row (C = 1) is the binary head: one logit,
            :math:`p = \mathrm{sigmoid}`, binary cross-entropy.
        bias: (C,), or None for a head without one.
        labels: (N,) class numbers in [0, C), int64 or int32. Binary: 0 or 1, or floating numbers
            in [0, 1] of shape (N,) or (N, 1).
        segments: offsets of the domains, E + 1 ascending integers from 0 to N (a list, or an
            int64 or int32 tensor, whose entries are read): domain e has the samples
            ``segments[e]`` to ``segments[e + 1] - 1``, at least one. None: all samples are one
            domain.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (E, C, D), without ``segments`` (C, D): gradient by weight in the first d columns, by bias
        in the last (D = d + 1), or by weight alone without a bias (D = d). float32; float64 where
        any argument is.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Two matrix products of 2 N C d operations, on the CPU in one kernel for all domains, and
        one for the gradients; in Triton two launches for all domains, and two for the gradients
        (with more than 32 classes three, and up to five), while N d C is at most 2^29 or C at most
        16. Arithmetic is float32 (float64), also for half inputs and under
        autocast. The same bits come out for every number of threads. A sample that is not finite
        makes the results of its domain NaN and leaves those of others: features are not searched
        for such numbers.

        Second derivatives are composed of eager torch operations, third ones raise; forward mode
        and ``torch.func`` transforms run the composition (``"reference"``), which has all orders.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_gradient
        >>> x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        >>> head = torch.nn.Linear(4, 3)
        >>> g = head_gradient(x, head.weight, head.bias, y)
        >>> torch.nn.functional.cross_entropy(head(x), y).backward()
        >>> torch.allclose(g, torch.cat((head.weight.grad, head.bias.grad[:, None]), 1), atol=1e-6)
        True
        >>> head_gradient(x, head.weight, None, y, segments=[0, 3, 8]).shape
        torch.Size([2, 3, 4])
    """
    head = _head_call.head(features, weight, bias, segments)
    targets = _head_call.targets(labels, head.features, head.classes)
    chosen = _chosen("head_gradient", backend, head)
    with full_precision(head.features):
        return head.segments.shape(_run(chosen, head, targets, None))


def head_hessian_diagonal(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    segments: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact diagonal of each domain's Hessian with respect to a linear head.

    .. math:: \mathrm{diag}(H_e) = \frac{1}{n_e} \sum_{n \in e}
              p_n (1 - p_n)\, (\tilde x_n \odot \tilde x_n)^\top

    The Hessian is that of the domain's mean cross-entropy; labels do not enter it.

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        segments: offsets of the domains, or None.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (E, C, D), without ``segments`` (C, D); layout and dtype of :func:`head_gradient`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Two matrix products of 2 N C d operations: less than the price of one Hutchinson probe, for
        what infinitely many would give. Squares of the features are made where they are read, and
        :math:`1 - p` of a class near 1 is the sum of the others, so that it has all its digits.
        Else as :func:`head_gradient`.

    Reference:
        Hemati et al. 2023, Understanding Hessian Alignment for Domain Generalization
        (arXiv:2308.11778), which estimates it by Hutchinson's method.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_hessian_diagonal
        >>> x, head = torch.randn(8, 4), torch.nn.Linear(4, 3)
        >>> head_hessian_diagonal(x, head.weight, head.bias, segments=[0, 3, 8]).shape
        torch.Size([2, 3, 5])
    """
    head = _head_call.head(features, weight, bias, segments)
    chosen = _chosen("head_hessian_diagonal", backend, head)
    with full_precision(head.features):
        return head.segments.shape(_run(chosen, head, None, None))


def _chosen(op: str, backend: str | None, head: Head) -> str:
    """The backend that runs. Transforms and forward mode take the composition, whose derivatives of
    any order and direction are torch's own."""
    x = head.features
    chosen = _backend.choose(op, backend, x.device, x.dtype, (x, head.weight))
    return "composed" if chosen == "reference" or transformed() else chosen


def _run(chosen: str, head: Head, targets: Tensor | None, vectors: Tensor | None) -> Tensor:
    """The gradient (with targets), the product with vectors (E, C, D) or (1, C, D), or the
    diagonal (with neither), (E, C, D)."""
    if chosen == "composed":
        return _head_core.composed(head, targets, vectors)
    tensors = [
        None if t is None else t.contiguous()
        for t in (head.features, head.weight, head.bias, targets, vectors)
    ]
    eager = not torch.compiler.is_compiling()
    static = _head_core.Static(head.segments.bounds, _triton_ops.traced(chosen))
    call = _head_core.functions if eager and needs_derivative(tensors) else _head_core
    return call.forward(static, tensors)[0]


def head_hessian_trace(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    segments: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Exact trace of each domain's Hessian with respect to a linear head.

    .. math:: \mathrm{tr}(H_e) = \frac{1}{n_e} \sum_{n \in e}
              (1 - \lVert p_n \rVert^2)\, \lVert \tilde x_n \rVert^2

    (:math:`p (1 - p) \lVert \tilde x \rVert^2` for the binary head).

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        segments: offsets of the domains, or None.
        backend: None or ``"reference"``.

    Returns:
        (E,), without ``segments`` a scalar; dtype of :func:`head_gradient`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        One matrix product, and one pass over the features. A composition of torch operations, on
        purpose: the product is a library GEMM, which is nearly all of it.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_hessian_diagonal, head_hessian_trace
        >>> x, head = torch.randn(8, 4), torch.nn.Linear(4, 3)
        >>> trace = head_hessian_trace(x, head.weight, head.bias)
        >>> diagonal = head_hessian_diagonal(x, head.weight, head.bias)
        >>> torch.allclose(trace, diagonal.sum())
        True
    """
    head = _head_call.head(features, weight, bias, segments)
    _backend.choose("head_hessian_trace", backend, head.features.device, head.features.dtype)
    with full_precision(head.features):
        return head.segments.shape(_head_reference.trace(head))


def head_hessian_product(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Tensor,
    *,
    segments: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Products of each domain's Hessian with vectors in the shape of the head.

    .. math:: H_e V = \frac{1}{n_e} \sum_{n \in e} t_n \tilde x_n^\top, \qquad
              t = p \odot (u - p^\top u), \quad u = V \tilde x

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        vectors: (C, D), one for all domains; (R, C, D), R of them for all domains; or
            (E, R, C, D), R for each. Floating; D and its columns as in :func:`head_gradient`.
        segments: offsets of the domains, or None.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (E, R, C, D): without E if there are no ``segments``, without R for one vector (C, D).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        4 N R C d operations beside the logits. Differentiable in vectors as well. With one vector
        for each domain, or for all, a kernel runs; R of them are a composition of matrix
        products R times as large, which torch's GEMM does best. Else as :func:`head_gradient`.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_gradient, head_hessian_product, head_hgp
        >>> x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        >>> head = torch.nn.Linear(4, 3)
        >>> g = head_gradient(x, head.weight, head.bias, y)
        >>> hg = head_hessian_product(x, head.weight, head.bias, g)
        >>> torch.allclose(hg, head_hgp(x, head.weight, head.bias, y))
        True
    """
    vectors = _head_call.vectors(vectors)
    head = _head_call.head(features, weight, bias, segments, vectors)
    vectors = _head_call.fit_vectors("vectors", vectors, head)
    chosen = _chosen("head_hessian_product", backend, head)
    many = vectors[None] if vectors.dim() == 2 else vectors
    with full_precision(head.features):
        if chosen != "composed" and (many.shape[-3] == 1 or backend is not None):
            # The runs are the first axis, or the one behind the domains.
            own = many[:, None] if many.dim() == 3 else many.transpose(0, 1)
            parts = [_run(chosen, head, None, own[run]) for run in range(own.shape[0])]
            result = torch.stack(parts, 1) if parts else _head_reference.product(head, many)
        else:
            result = _head_reference.product(head, many)
        return head.segments.shape(result[:, 0] if vectors.dim() == 2 else result)


def head_hgp(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    segments: object = None,
    backend: str | None = None,
) -> Tensor:
    r"""Hessian-gradient product of each domain: its Hessian times its own gradient.

    .. math:: H_e\, g_e = \lVert g_e \rVert\, \nabla \lVert g_e \rVert

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        labels: (N,), as in :func:`head_gradient`.
        segments: offsets of the domains, or None.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (E, C, D), without ``segments`` (C, D); layout and dtype of :func:`head_gradient`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Five matrix products of 2 N C d operations. Else as :func:`head_gradient`. For the mean of
        the losses of several domains, take the mean of :func:`head_hessian_product` with the mean
        gradient: the mean of these products is something else. Where a gradient is 0 the product is
        0; the norm-gradient form is 0 / 0 there.

    Reference:
        Hemati et al. 2023, Understanding Hessian Alignment for Domain Generalization
        (arXiv:2308.11778), section 4.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_hgp
        >>> x, y = torch.randn(8, 4), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
        >>> head = torch.nn.Linear(4, 1)  # binary
        >>> head_hgp(x, head.weight, head.bias, y, segments=[0, 3, 8]).shape
        torch.Size([2, 1, 5])
    """
    head = _head_call.head(features, weight, bias, segments)
    targets = _head_call.targets(labels, head.features, head.classes)
    chosen = _chosen("head_hgp", backend, head)
    with full_precision(head.features):
        if chosen == "composed":
            return head.segments.shape(_head_reference.hgp(head, targets))
        slope = _run(chosen, head, targets, None)
        return head.segments.shape(_run(chosen, head, None, slope))
