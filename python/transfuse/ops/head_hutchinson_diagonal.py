"""Hutchinson's estimate of the diagonal of the Hessians of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _backend, _checks
from transfuse._autograd import transformed
from transfuse.ops import _head_call, _head_hutchinson, _head_reference
from transfuse.ops._head_call import Head, Segments, full_precision
from transfuse.ops._rademacher import rademacher

__all__ = ["head_hutchinson_diagonal"]

_backend.declare("head_hutchinson_diagonal", ("reference",))


def head_hutchinson_diagonal(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probes: int | Tensor,
    *,
    segments: object = None,
    seed: int = 0,
    independent: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Hutchinson's estimate of the diagonal of each domain's Hessian of a linear head.

    .. math:: Q_e = \frac{1}{R} \sum_{r=1}^{R} z_r \odot (H_e z_r), \qquad
              \mathrm{E}\, Q_e = \mathrm{diag}(H_e)

    For a linear head :func:`head_hessian_diagonal` has the exact diagonal for less than the price
    of one probe. This op reproduces what is published with the estimate.

    Args:
        features: (N, d), see :func:`head_gradient`, as the others.
        weight: (C, d); C = 1 is the binary head.
        bias: (C,) or None.
        probes: R, a number of Rademacher probes; or the probes themselves, (R, C, D) or, for each
            domain its own, (E, R, C, D), floating (D as in :func:`head_gradient`).
        segments: offsets of the domains, or None.
        seed: 64-bit integer that names the probes, where ``probes`` is a number.
        independent: domain e takes probes e R to e R + R - 1 of the seed; otherwise all take the
            first R. With shared probes the noise of the estimates cancels in differences between
            domains that agree; with independent ones it stays, as in the official code.
        backend: None or ``"reference"``, which differentiates to any order and keeps all probes.

    Returns:
        (E, C, D), without ``segments`` (C, D); layout and dtype of :func:`head_gradient`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        NotImplementedError: a second derivative of the result (``"reference"`` has it).

    Notes:
        4 N R C d operations forward, twice as many backward. Probes come from a counter
        (``_rademacher.py`` defines them), the same on every machine; they are made in chunks and
        never kept, nor are the products. The variance of an entry i is
        :math:`\frac{1}{R} \sum_{j \ne i} H_{ij}^2`. No global generator is read.

    Reference:
        Bekas, Kokiopoulou & Saad 2007, An estimator for the diagonal of a matrix; Hemati et al.
        2023, Understanding Hessian Alignment for Domain Generalization (arXiv:2308.11778).

    Example:
        >>> import torch
        >>> from transfuse.ops import head_hessian_diagonal, head_hutchinson_diagonal
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(32, 4, generator=generator), torch.zeros(3, 4)
        >>> estimate = head_hutchinson_diagonal(x, w, None, 2000, seed=1)
        >>> exact = head_hessian_diagonal(x, w, None)
        >>> bool((estimate - exact).norm() < 0.05 * exact.norm())
        True
    """
    given = None
    if isinstance(probes, Tensor):
        given = _head_call.vectors(probes, "probes")
        if given.dim() == 2:
            raise ValueError(
                f"probes: expected shape (R, C, D) or (E, R, C, D), got {tuple(given.shape)}"
            )
        count = given.shape[-3]
        if count == 0:
            raise ValueError(f"probes: expected at least one, got shape {tuple(given.shape)}")
        if given.requires_grad:
            raise ValueError("probes: expected a tensor without gradient, got one that requires it")
    else:
        count = _checks.positive_int("probes", probes)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an integer, got {_checks.describe(seed)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a 64-bit integer, got {seed}")
    if not isinstance(independent, bool):
        raise TypeError(f"independent: expected a bool, got {_checks.describe(independent)}")
    head = _head_call.head(features, weight, bias, segments, given)
    if given is not None:
        given = _head_call.fit_vectors("probes", given, head)
    dtype, device = head.features.dtype, head.features.device
    _backend.choose("head_hutchinson_diagonal", backend, device, dtype)
    with full_precision(head.features):
        if backend == "reference" or transformed() or torch.compiler.is_compiling():
            if given is None:
                runs = head.segments.domains if independent else 1
                shape = (count, head.classes, head.width)
                size = head.classes * head.width
                given = rademacher(seed, 0, runs * count, size, dtype, device)
                given = given.reshape(runs, *shape) if independent else given.reshape(shape)
            result = (_head_reference.product(head, given) * given).mean(1)
            return head.segments.shape(result)
        p, _ = _head_reference.probabilities(head)
        return head.segments.shape(_estimates(head, p, given, count, seed, independent))


def _estimates(
    head: Head, p: Tensor, given: Tensor | None, count: int, seed: int, independent: bool
) -> Tensor:
    """(E, C, D), one call of the chunked estimate for each set of probes."""
    bias = head.bias is not None
    if not independent and (given is None or given.dim() == 3):
        static = _head_hutchinson.Static(head.segments, bias, count, seed, 0)
        return _head_hutchinson.estimate(static, (head.features, p, given))[0]
    lengths, results = head.segments.lengths, []
    stretches = zip(head.features.split(lengths), p.split(lengths), strict=True)
    for domain, (x, q) in enumerate(stretches):
        own = None if given is None else given if given.dim() == 3 else given[domain]
        alone = Segments((0, x.shape[0]), True)
        static = _head_hutchinson.Static(alone, bias, count, seed, domain * count)
        results.append(_head_hutchinson.estimate(static, (x, q, own))[0])
    return torch.cat(results)
