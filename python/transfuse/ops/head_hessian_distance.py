"""Distances between the Hessians of domains, without a Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _backend
from transfuse._autograd import transformed
from transfuse.ops import _head_call, _head_distance, _head_reference
from transfuse.ops._head_call import Head, full_precision

__all__ = ["head_hessian_distance"]

_backend.declare("head_hessian_distance", ("reference",))


def head_hessian_distance(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    segments: object,
    backend: str | None = None,
) -> Tensor:
    r"""Squared Frobenius distances between the Hessians of all pairs of domains.

    .. math:: \lVert H_e - H_f \rVert_F^2, \qquad \langle H_e, H_f \rangle_F =
              \frac{1}{n_e n_f} \sum_{i \in e, j \in f} (\tilde x_i^\top \tilde x_j)^2
              \left[ p_i^\top p_j - p_i^\top p_j^2 - {p_i^2}^\top p_j + (p_i^\top p_j)^2 \right]

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        segments: offsets of the domains.
        backend: None or ``"reference"``, which differentiates to any order and forms N x N
            matrices at once, as None does for up to 1024 samples.

    Returns:
        (E, E), symmetric, at least 0, exactly 0 on the diagonal; dtype of :func:`head_gradient`.
        Not the distance but its square: its root has no derivative where two Hessians agree.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: a second derivative for more than 1024 samples (``"reference"`` has
            it).

    Notes:
        2 N^2 (d + 3 C) operations in float64, whatever the inputs: a distance is a small
        difference of large products. A dense Hessian would take 2 N C^2 d^2. Memory is that of
        blocks of rows, formed again in the backward.

    Reference:
        Hemati et al. 2023, Understanding Hessian Alignment for Domain Generalization
        (arXiv:2308.11778), whose bound is on the spectral norm, at most this distance.

    Example:
        >>> import torch
        >>> from transfuse.ops import head_hessian_distance
        >>> x, head = torch.randn(8, 4), torch.nn.Linear(4, 3)
        >>> distance = head_hessian_distance(x, head.weight, head.bias, segments=[0, 3, 8])
        >>> distance.shape, bool(distance[0, 0] == 0), bool(distance[0, 1] > 0)
        (torch.Size([2, 2]), True, True)
    """
    if segments is None:
        raise TypeError("segments: expected offsets of the domains, got None")
    head = _head_call.head(features, weight, bias, segments)
    dtype = head.features.dtype
    _backend.choose("head_hessian_distance", backend, head.features.device, dtype)
    with full_precision(head.features):
        wide = Head(
            head.features.double(),
            head.weight.double(),
            None if head.bias is None else head.bias.double(),
            head.segments,
        )
        small = head.features.shape[0] ** 2 <= _head_distance.BLOCK
        if small or backend == "reference" or transformed() or torch.compiler.is_compiling():
            return _head_reference.squared_distance(wide).to(dtype)
        p, rest = _head_reference.probabilities(wide)
        static = _head_distance.Static(wide.segments, wide.bias is not None)
        (products,) = _head_distance.inner_products(static, (wide.features, p, p * rest))
        return _head_reference.distances(products).to(dtype)
