"""Lists of tensors as one vector: weighted sums, norms and inner products, never put end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse import _backend, _native
from transfuse._autograd import needs_derivative
from transfuse.ops import _multitensor_core as core
from transfuse.ops import _multitensor_ops
from transfuse.ops import _multitensor_reference as composed
from transfuse.ops._multitensor_call import Partition, call_dtype, combination
from transfuse.ops._multitensor_core import CALLS, RAW, Static, pack_lists

__all__ = ["lincomb", "multi_dot", "multi_gram", "multi_norm"]

_backend.declare("lincomb", ("reference", "cpu", "triton", "cuda"))
for _name in ("multi_dot", "multi_gram", "multi_norm"):
    _backend.declare(_name, ("reference", "cpu", "triton", "cuda"))
_multitensor_ops.register_triton()
if _native.status().loaded:
    _multitensor_ops.register()


def lincomb(
    deltas: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    base: Sequence[Tensor] | None = None,
    partition: Partition = None,
    backend: str | None = None,
) -> list[Tensor]:
    r"""Weighted sum of lists of tensors, with a coefficient per list, per tensor or finer.

    .. math:: y_j = b_j + \sum_i c_{ij} \, \delta_{ij} \qquad\text{or}\qquad
              y_j[e] = b_j[e] + \sum_i c_{i j p_j(e)} \, \delta_{ij}[e]

    Args:
        deltas: T lists of m tensors of the same shapes (the parameters of T models, or task
            vectors), floating, of any dtypes.
        coefficients: (T,), (T, m) or, with a partition, (T, m, K), floating, on their device.
        base: a further list of m tensors, of coefficient 1.
        partition: which of K coefficients each element has: m tensors of uint8 or uint16, in the
            shapes of the lists (an id of K or more: none of the lists there), or an integer, the
            seed of a hash of the element's number, which costs no memory.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        m contiguous tensors in the dtypes of the base, or of the first list.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Everything is read once and written once. Sums are float32 (float64 for a tensor j any of
        which is float64) and rounded at the end, so many terms in half precision lose nothing.

        Whatever requires a gradient gets one, to any order (forward over forward raises), and what
        does not costs nothing: with coefficients alone, the backward pass is one kernel that reads
        lists and gradients once and holds nothing of their size. The same bits on every run and for
        every number of threads. Coefficients that are not finite are not refused: they stay on
        the device, and NaN shows in the result.

    Reference:
        Zhang et al. 2024, Knowledge composition using task vectors with learned anisotropic scaling
        (arXiv:2407.02880), equations 3 and 5.

    Example:
        >>> import torch
        >>> from transfuse.ops import lincomb
        >>> one, two = [torch.ones(2), torch.ones(1)], [torch.ones(2), torch.zeros(1)]
        >>> lincomb([one, two], torch.tensor([[1.0, 2.0], [0.5, 3.0]]))
        [tensor([1.5000, 1.5000]), tensor([2.])]
    """
    call = combination(deltas, coefficients, base, partition)
    if backend == "reference":
        return composed.combined(*call)
    known = [*call.base, *pack_lists(call.deltas)]
    device, dtype = known[0].device, call_dtype(known)
    chosen = _backend.choose("lincomb", backend, device, dtype)
    lists, blocks, count = call.coefficients.shape
    static = Static(lists, blocks, bool(call.base), bool(call.ids), call.keys, count, chosen)
    tensors = (call.coefficients, *known, *call.ids)
    watched = needs_derivative(tensors)
    if watched and not torch.compiler.is_compiling():
        return list(CALLS.lincomb(static, tensors))
    if not watched and chosen in ("cpu", "cuda") and not torch.compiler.is_compiling():
        # Past the autograd kernel, which costs as much as a small call.
        with torch._C._AutoDispatchBelowAutograd():
            return list(core.lincomb_forward(static, tensors))
    return list(core.lincomb_forward(static, tensors))


def multi_norm(
    tensors: Sequence[Tensor],
    *,
    ord: float = 2,
    scale: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""The norm of a list of tensors as one vector.

    .. math:: \lVert s \odot x \rVert_p = \Big( \sum_{j, e} |s_j[e] \, x_j[e]|^p \Big)^{1/p}

    Args:
        tensors: any shapes, floating, one device.
        ord: p: 1, 2 or inf.
        scale: factors of the elements, a list of the same shapes (the parameters, for the norm of
            an adaptive sharpness-aware step).
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        0-dimensional, float32 (float64 if any tensor is).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Sums are float64: squares neither overflow nor vanish. The same bits for every number of
        threads. Derivatives of order 2 come from the kernel of :func:`multi_dot` (0 where the norm
        is 0); those of orders 1 and inf are torch's, of the composition.

    Example:
        >>> import torch
        >>> from transfuse.ops import multi_norm
        >>> multi_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])])
        tensor(5.)
    """
    found, order, factors = composed.norm_arguments(tensors, ord, scale)
    known = [*found, *factors]
    dtype = composed.working_dtype(known)
    if backend == "reference":
        return composed.normed(found, order, factors)
    chosen = _backend.choose("multi_norm", backend, found[0].device, call_dtype(known))
    watched = needs_derivative(known)
    if chosen == "composed" or (watched and order != 2):
        return composed.normed(found, order, factors)
    if watched:
        terms = [x * s for x, s in zip(found, factors, strict=True)] if factors else found
        square = _dots(terms, [terms], chosen).sum()
        # Flat at 0, where the root has no slope.
        positive = square > 0
        return (torch.where(positive, square, 1.0).sqrt() * positive).to(dtype)
    if chosen == "triton":
        total = core.kernel(chosen, "multi_norm")(found, factors, order)
    else:
        sums = torch.ops.transfuse.block_norms.default(found, factors, order)
        total = sums.amax() if order == 0 else sums.sum()
    return (total.sqrt() if order == 2 else total).to(dtype)


def multi_dot(xs: Sequence[Tensor], ys: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    r"""The inner product of two lists of tensors.

    .. math:: \sum_{j, e} x_j[e] \, y_j[e]

    Args:
        xs: any shapes, floating, one device.
        ys: of the same shapes.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        0-dimensional, float32 (float64 if any tensor is).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Sums are float32 (float64) over 2048 elements and float64 beyond. The same bits for every
        number of threads. Derivatives of any order are kernels too; forward over forward raises.

    Example:
        >>> import torch
        >>> from transfuse.ops import multi_dot
        >>> multi_dot([torch.ones(3), torch.ones(1)], [torch.ones(3), 2 * torch.ones(1)])
        tensor(5.)
    """
    left, right = composed.dot_arguments(xs, ys)
    known = [*left, *right]
    if backend == "reference":
        return composed.dotted(left, right)
    chosen = _backend.choose("multi_dot", backend, left[0].device, call_dtype(known))
    return _dots(left, [right], chosen).sum().to(composed.working_dtype(known))


def multi_gram(lists: Sequence[Sequence[Tensor | None]], *, backend: str | None = None) -> Tensor:
    r"""Inner products of T lists of tensors (the gradients of T losses) with each other.

    .. math:: G_{ik} = \sum_{j, e} x_{ij}[e] \, x_{kj}[e]

    Args:
        lists: T lists of m tensors of the same shapes, floating; None counts as zeros (a parameter
            that a loss does not reach).
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        (T, T), symmetric to the bit, float32 (float64 if any tensor is).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Every list is read once (by Triton, once for every 8 lists) and nothing of its size is
        allocated. Sums are float32 (float64) over 1024 elements (Triton: up to 8192, of one list)
        and float64 beyond. The same bits on every run and for every number of threads. With
        derivatives (by kernels, of any order; forward over forward raises) lists are read T
        times.

    Example:
        >>> import torch
        >>> from transfuse.ops import multi_gram
        >>> multi_gram([[torch.ones(2), torch.ones(1)], [torch.ones(2), None]])
        tensor([[3., 2.],
                [2., 2.]])
    """
    found = composed.gram_arguments(lists)
    known = [entry for part in found for entry in part if entry is not None]
    dtype = composed.working_dtype(known)
    if backend == "reference":
        return composed.grammed(found)
    chosen = _backend.choose("multi_gram", backend, known[0].device, call_dtype(known))
    if chosen == "composed":
        return composed.grammed(found)
    if needs_derivative(known):
        rows = _without_none(found)
        products = torch.stack([_dots(row, rows, chosen).sum(1) for row in rows])
        return products.to(dtype)
    sizes = [
        max(0 if t is None else t.numel() for t in parts) for parts in zip(*found, strict=True)
    ]
    none = known[0].new_empty(0)
    flat = [none if t is None else t for part in found for t in part]
    return core.kernel(chosen, "multi_gram")(flat, len(found), sizes).to(dtype)


def _without_none(lists: list[list[Tensor | None]]) -> list[list[Tensor]]:
    """Zeros where a tensor is absent; tensors that all lists lack are left out."""
    columns = []
    for parts in zip(*lists, strict=True):
        like = next((t for t in parts if t is not None), None)
        if like is not None:
            columns.append([torch.zeros_like(like) if t is None else t for t in parts])
    return [list(row) for row in zip(*columns, strict=True)]


def _dots(xs: list[Tensor], lists: list[list[Tensor]], backend: str) -> Tensor:
    """(T, m) float64: inner products of each tensor with those of T lists."""
    static = Static(len(lists), len(xs), True, False, (), 1, backend)
    tensors = (*xs, *pack_lists(lists))
    watched = needs_derivative(tensors) and not torch.compiler.is_compiling()
    return (CALLS if watched else RAW).dots(static, tensors)[0][:, :, 0]
