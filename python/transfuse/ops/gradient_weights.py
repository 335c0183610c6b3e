"""Weights that published multi-task methods give to T gradients, from their inner products."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.ops import _simplex_call as call
from transfuse.ops._simplex_reference import scaled
from transfuse.ops.simplex import min_norm_simplex, nonneg_qp

__all__ = [
    "aligned_mtl_weights",
    "cagrad_weights",
    "nash_weights",
    "pcgrad_weights",
    "upgrad_weights",
]

_SCALES: dict[object, int] = {"min": 0, "median": 1, "mean": 2}


def pcgrad_weights(gramian: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Weights of projecting conflicting gradients (PCGrad).

    Each gradient in turn loses its component along every other one that it conflicts with:

    .. math:: \tilde g_i \leftarrow \tilde g_i - \frac{\min(\tilde g_i \cdot g_j, 0)}{\|g_j\|^2} g_j
              \quad (j \ne i \text{ in random order}), \qquad \sum_i \tilde g_i = \sum_i w_i g_i

    Args:
        gramian: (..., T, T) inner products of the gradients, floating.
        generator: draws the orders, one for every gradient of every problem; torch's global
            generators are never used. None: always the order of the tasks.

    Returns:
        (..., T) float32 (float64 for float64). They do not sum to 1: without conflicts all are 1.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        T - 1 steps on all gradients of all problems at once, in float64, without waiting for the
        device. Constants for autograd.

    Reference:
        Yu et al. 2020, Gradient surgery for multi-task learning (arXiv:2001.06782), algorithm 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import pcgrad_weights
        >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> pcgrad_weights(g @ g.T)
        tensor([2.0000, 1.5000])
    """
    gramian = call.check_matrix("gramian", gramian)
    c = call.flatten(gramian, 2)
    problems, count = c.shape[:2]
    if generator is None:
        order = torch.arange(count, device=c.device).expand(problems, count, count)
    elif isinstance(generator, torch.Generator):
        drawn = torch.rand(c.shape, generator=generator, device=generator.device)
        order = drawn.to(c.device).argsort(-1)
    else:
        raise TypeError(f"generator: expected a torch.Generator, got {_checks.describe(generator)}")
    number = torch.arange(count, device=c.device)
    own = c.diagonal(dim1=-2, dim2=-1)
    w = torch.eye(count, dtype=c.dtype, device=c.device).expand(problems, count, count)
    for step in range(count):
        other = order[..., step]
        rows = c.gather(1, other[..., None].expand(-1, -1, count))
        against = (rows * w).sum(-1).clamp_max(0.0)
        length = own.gather(1, other)
        share = torch.where((other != number) & (length > 0), against, 0.0)
        share = share / torch.where(length > 0, length, 1.0)
        w = w - share[..., None] * (number == other[..., None]).to(c.dtype)
    return call.unflatten(w.sum(1), gramian)


def cagrad_weights(gramian: Tensor, *, c: float, backend: str | None = None) -> Tensor:
    r"""Weights of conflict-averse gradient descent (CAGrad).

    The direction within a ball around the mean gradient that improves the worst loss most:

    .. math:: \max_{\|d - g_0\| \le c \|g_0\|} \min_i g_i \cdot d, \qquad
              g_0 = \tfrac{1}{T} \sum_i g_i, \qquad d = \sum_i w_i g_i

    Args:
        gramian: (..., T, T) inner products of the gradients, floating, T at most 256.
        c: radius of the ball over the norm of the mean, at least 0 (0: the mean itself).
        backend: of :func:`min_norm_simplex`.

    Returns:
        (..., T) float32 (float64 for float64). Zeros where 0 is a convex combination that solves
        the dual problem (Pareto-stationary gradients), where no direction improves the worst loss.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        The dual solution is the min-norm point of the gradients shifted by a multiple of their
        mean, and the multiple is the root of a function of one number: 64 bisections, each one call
        of :func:`min_norm_simplex` for all problems. Exact to rounding. Constants for autograd.

    Reference:
        Liu et al. 2021, Conflict-averse gradient descent for multi-task learning
        (arXiv:2110.14048), equations 2 to 4.

    Example:
        >>> import torch
        >>> from transfuse.ops import cagrad_weights
        >>> g = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cagrad_weights(g @ g.T, c=0.5)
        tensor([0.7500, 0.7500])
    """
    gramian = call.check_matrix("gramian", gramian)
    call.check_size("gramian", gramian, call.EXACT_MOST, "")
    c = _checks.number("c", c)
    if c < 0.0:
        raise ValueError(f"c: expected a number of at least 0, got {c}")
    own = scaled(call.flatten(gramian, 2))
    count = own.shape[-1]
    to_mean = own.mean(-1)
    mean = to_mean.mean(-1).clamp_min(0.0)
    radius = c * mean.sqrt()

    def shifted(multiple: Tensor) -> Tensor:
        """Weights of the min-norm point of g_i + multiple g_0."""
        along = multiple[:, None] * to_mean
        shift = along[:, :, None] + along[:, None, :] + (multiple**2 * mean)[:, None, None]
        return min_norm_simplex(own + shift, backend=backend)

    def length(w: Tensor) -> Tensor:
        return (w * (own @ w[..., None])[..., 0]).sum(-1).clamp_min(0.0).sqrt()

    low = torch.zeros_like(mean)
    largest = own.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(0.0).sqrt()
    high = torch.where(radius > 0, largest / torch.where(radius > 0, radius, 1.0), 0.0)
    for _ in range(64 if c > 0.0 else 0):
        middle = 0.5 * (low + high)
        above = length(shifted(middle)) > radius * middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    w = shifted(high)
    norm = length(w)
    stuck = (norm <= 1e-12) & (radius > 0)
    weights = 1.0 / count + (radius / torch.where(norm > 0, norm, 1.0))[:, None] * w
    return call.unflatten(torch.where(stuck[:, None], 0.0, weights), gramian)


def nash_weights(gramian: Tensor, *, iterations: int = 60) -> Tensor:
    r"""Weights of the Nash bargaining solution between T gradients (Nash-MTL).

    .. math:: C w = 1 / w, \quad w > 0 \qquad\Longleftrightarrow\qquad
              \min_{w > 0} \tfrac{1}{2} w^\top C w - \sum_i \log w_i

    Args:
        gramian: (..., T, T) inner products of the gradients, floating.
        iterations: Newton steps; some ten are enough for positive definite matrices.

    Returns:
        (..., T) float32 (float64 for float64), positive; 0 for a zero gradient, which takes no
        part. They do not sum to 1: :math:`\|\sum_i w_i g_i\|^2 = T`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        Damped Newton steps on the right-hand problem, which is convex and self-concordant, with
        unit diagonal; all problems at once, in float64. Where a positive combination of the
        gradients is 0 there is no solution, and the weights grow until a step overflows. The
        published code limits the norm of the direction afterwards; that is a scale of the weights.
        Constants for autograd.

    Reference:
        Navon et al. 2022, Multi-task learning as a bargaining game (arXiv:2202.01017), section 3.

    Example:
        >>> import torch
        >>> from transfuse.ops import nash_weights
        >>> nash_weights(torch.tensor([[4.0, 0.0], [0.0, 0.25]]))
        tensor([0.5000, 2.0000])
    """
    gramian = call.check_matrix("gramian", gramian)
    iterations = _checks.positive_int("iterations", iterations)
    c = call.flatten(gramian, 2)
    own = c.diagonal(dim1=-2, dim2=-1)
    live = own > 0
    scale = torch.where(live, own, 1.0).rsqrt()
    c = c * scale[:, :, None] * scale[:, None, :]
    c = torch.where(live[:, :, None] & live[:, None, :], c, 0.0) + torch.diag_embed(
        (~live).to(c.dtype)
    )
    w = torch.full_like(own, own.shape[-1] ** -0.5)
    for _ in range(iterations):
        slope = (c @ w[..., None])[..., 0] - 1.0 / w
        step = torch.linalg.solve_ex(c + torch.diag_embed(w**-2.0), slope[..., None])[0][..., 0]
        decrement = (slope * step).sum(-1, keepdim=True).clamp_min(0.0).sqrt()
        # Full steps converge quadratically near the solution; damped ones never leave w > 0.
        moved = w - step / torch.where(decrement < 0.25, 1.0, 1.0 + decrement)
        # Without a solution the system becomes singular in the end.
        w = torch.where((moved.isfinite() & (moved > 0)).all(-1, keepdim=True), moved, w)
    return call.unflatten(torch.where(live, w * scale, 0.0), gramian)


def aligned_mtl_weights(gramian: Tensor, *, scale: str = "min") -> Tensor:
    r"""Weights of aligning the principal components of T gradients (Aligned-MTL).

    .. math:: w = \sqrt{\sigma} \, V \Lambda^{-1/2} V^\top \tfrac{1}{T} \mathbf{1}, \qquad
              C = V \Lambda V^\top

    over the eigenvalues that are not 0; :math:`\sigma` is the smallest of them.

    Args:
        gramian: (..., T, T) inner products of the gradients, floating.
        scale: ``"min"`` (the paper), ``"median"`` (the lower one) or ``"mean"`` of the eigenvalues
            that are not 0.

    Returns:
        (..., T) float32 (float64 for float64); 1/T where all gradients are 0.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Notes:
        One batched symmetric eigendecomposition in float64. An eigenvalue counts as 0 below
        T eps of the largest, with eps of the dtype of the matrix. Constants for autograd.

    Reference:
        Senushkin et al. 2023, Independent component alignment for multi-task learning (CVPR,
        arXiv:2305.19000), algorithm 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import aligned_mtl_weights
        >>> aligned_mtl_weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 0.5000])
    """
    gramian = call.check_matrix("gramian", gramian)
    code = _checks.choice("scale", scale, _SCALES)
    c = scaled(call.flatten(gramian, 2))
    count = c.shape[-1]
    values, vectors = torch.linalg.eigh(0.5 * (c + c.mT))
    eps = torch.finfo(gramian.dtype).eps
    kept = values > values.amax(-1, keepdim=True).clamp_min(0.0) * count * eps
    rank = kept.sum(-1, keepdim=True)
    if code == _SCALES["mean"]:
        size = torch.where(kept, values, 0.0).sum(-1, keepdim=True) / rank.clamp_min(1)
    else:
        first = count - rank
        place = first if code == 0 else first + (rank - 1).clamp_min(0) // 2
        size = values.gather(-1, place.clamp_max(count - 1))
    factor = torch.where(kept, (size / torch.where(kept, values, 1.0)).clamp_min(0.0).sqrt(), 0.0)
    spread = (factor[:, None, :] * vectors) @ vectors.mT
    weights = torch.where(rank == 0, 1.0 / count, spread.mean(-1))
    return call.unflatten(weights, gramian)


def upgrad_weights(
    gramian: Tensor, *, preference: Tensor | None = None, backend: str | None = None
) -> Tensor:
    r"""Weights of the mean of the gradients, each made harmless to all losses first (UPGrad).

    Every gradient is projected onto the cone of directions that increase no loss:

    .. math:: w = \sum_i \arg\min_{v \ge p_i e_i} v^\top C v

    Args:
        gramian: (..., T, T) inner products of the gradients, floating, T at most 256.
        preference: (T,) non-negative weights p of the gradients; None: 1/T each.
        backend: of :func:`nonneg_qp`.

    Returns:
        (..., T) float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        T programmes of T unknowns per problem, in one call of :func:`nonneg_qp`; without the
        regularisation of other implementations. Constants for autograd.

    Reference:
        Quinton & Rey 2024, Jacobian descent for multi-objective optimization (arXiv:2406.16232),
        section 3.

    Example:
        >>> import torch
        >>> from transfuse.ops import upgrad_weights
        >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> upgrad_weights(g @ g.T)
        tensor([1.0000, 0.7500])
    """
    gramian = call.check_matrix("gramian", gramian)
    call.check_size("gramian", gramian, call.EXACT_MOST, "")
    c = call.flatten(gramian, 2)
    problems, count = c.shape[:2]
    if preference is None:
        start = torch.full((count,), 1.0 / count, dtype=c.dtype, device=c.device)
    else:
        start = call.check_preference("preference", preference, "gramian", gramian).to(c.dtype)
    start = torch.diag(start)
    slope = start @ c
    each = c[:, None].expand(problems, count, count, count)
    weights = nonneg_qp(each, slope, backend=backend).x + start
    return call.unflatten(weights.sum(1), gramian)
