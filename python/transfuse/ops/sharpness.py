"""Perturbation of parameters along their gradients, in place, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend, _checks
from transfuse._autograd import under_transform
from transfuse.ops._multitensor_call import (
    call_dtype,
    one_device,
    same_blocks,
    tensor_list,
    working_dtype,
)
from transfuse.ops.multitensor import multi_norm

__all__ = ["Perturbation", "sam_perturb_", "sam_restore_"]

_backend.declare("sam_perturb_", ("reference", "cpu", "cuda"))
_backend.declare("sam_restore_", ("reference", "cpu", "cuda"))


class Perturbation(NamedTuple):
    """What parameters were before, and the norm the radius was divided by (0-dimensional)."""

    backup: list[Tensor]
    norm: Tensor


@torch.no_grad()
def sam_perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    radius: Tensor | float,
    *,
    adaptive: bool = False,
    eps: float = 1e-12,
    norm: Tensor | None = None,
    backup: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Perturbation:
    r"""Move parameters to the worst point nearby, in place (the ascent of SAM and ASAM).

    .. math:: \theta \leftarrow \theta + \rho \, \frac{g}{\lVert g \rVert + \epsilon}
              \qquad\text{adaptive:}\qquad
              \theta \leftarrow \theta + \rho \,
              \frac{\theta^2 g}{\lVert \theta g \rVert + \epsilon}

    Args:
        params: any shapes, floating, one device; written, under ``no_grad`` as optimisers do.
        grads: of the same shapes.
        radius: rho, a number or a 0-dimensional tensor.
        adaptive: scale each direction by the parameter squared.
        eps: added to the norm.
        norm: to divide by instead of that of these lists (for parameters in several groups), 0-dim.
        backup: tensors of the same shapes and dtypes to keep the parameters in; None: new ones.
        backend: None, ``"reference"``, ``"cpu"`` or ``"cuda"``; a named one never falls back.

    Returns:
        ``Perturbation(backup, norm)``; :func:`sam_restore_` takes the first.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: inside a ``torch.func`` transform.

    Notes:
        One reading for the norm, one for everything else, for all tensors at once. The step is
        float32 (float64) and rounded once. Parameters that are not contiguous take eager torch.
        The same bits for every number of threads.

    Reference:
        Foret et al. 2021, Sharpness-aware minimization (arXiv:2010.01412); Kwon et al. 2021, ASAM
        (arXiv:2102.11600).

    Example:
        >>> import torch
        >>> from transfuse.ops import sam_perturb_, sam_restore_
        >>> params, grads = [torch.zeros(2)], [torch.tensor([3.0, 4.0])]
        >>> step = sam_perturb_(params, grads, 0.5)
        >>> params
        [tensor([0.3000, 0.4000])]
        >>> sam_restore_(params, step.backup)
        >>> params
        [tensor([0., 0.])]
    """
    found, moves = tensor_list("params", params), tensor_list("grads", grads)
    one_device("params", found)
    same_blocks("grads", moves, "params", found)
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive: expected a bool, got {_checks.describe(adaptive)}")
    eps = _checks.number("eps", eps)
    rho = _scalar("radius", radius, found[0])
    known = [*found, *moves]
    if norm is None:
        size = multi_norm(moves, scale=found if adaptive else None, backend=backend)
    else:
        size = _scalar("norm", norm, found[0])
    kept = _backup(backup, found)
    factor = rho.to(torch.float64) / (size.to(torch.float64) + eps)
    if _kernel("sam_perturb_", backend, known, (found, kept)):
        torch.ops.transfuse.sam_perturb_.default(found, moves, kept, factor, adaptive)
        torch.autograd.graph.increment_version([*found, *kept])
        return Perturbation(kept, size)
    torch._foreach_copy_(kept, found)
    for param, move in zip(found, moves, strict=True):
        dtype = working_dtype([param, move])
        x, g = param.to(dtype), move.to(dtype)
        param.copy_(x + factor.to(dtype) * (x * x * g if adaptive else g))
    return Perturbation(kept, size)


@torch.no_grad()
def sam_restore_(
    params: Sequence[Tensor], backup: Sequence[Tensor], *, backend: str | None = None
) -> None:
    """Parameters exactly as they were, in place.

    Args:
        params: as given to :func:`sam_perturb_`; written.
        backup: what it returned.
        backend: None, ``"reference"``, ``"cpu"`` or ``"cuda"``; a named one never falls back.

    Returns:
        None.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Example:
        >>> import torch
        >>> from transfuse.ops import sam_restore_
        >>> params = [torch.zeros(2)]
        >>> sam_restore_(params, [torch.ones(2)])
        >>> params
        [tensor([1., 1.])]
    """
    found, kept = tensor_list("params", params), tensor_list("backup", backup)
    one_device("params", found)
    same_blocks("backup", kept, "params", found)
    for j, (entry, param) in enumerate(zip(kept, found, strict=True)):
        _checks.same_dtype(f"backup[{j}]", entry, f"params[{j}]", param)
    if _kernel("sam_restore_", backend, found, (found,)):
        torch.ops.transfuse.copy_lists_.default(found, kept)
        torch.autograd.graph.increment_version(found)
    else:
        torch._foreach_copy_(found, kept)


def _kernel(
    op: str, backend: str | None, known: list[Tensor], written: Sequence[list[Tensor]]
) -> bool:
    """Whether the kernel runs: on tensors that can be written where they lie."""
    if under_transform():
        raise NotImplementedError(f"{op}: writes in place, which torch.func does not see")
    if backend == "reference":
        return False
    chosen = _backend.choose(op, backend, known[0].device, call_dtype(known))
    fits = all(t.is_contiguous() for part in written for t in part)
    if not fits and backend is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run: a tensor is not contiguous")
    return chosen != "composed" and fits


def _scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        # Filled on the device: a copy from the host could not be captured in a CUDA graph.
        return torch.full((), _checks.number(name, value), dtype=torch.float64, device=like.device)
    _checks.floating(name, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one number, got {_checks.describe(value)}")
    _checks.same_device(name, value, "params", like)
    return value.detach().reshape(())


def _backup(backup: Sequence[Tensor] | None, params: list[Tensor]) -> list[Tensor]:
    if backup is None:
        return [torch.empty_like(p) for p in params]
    kept = tensor_list("backup", backup)
    same_blocks("backup", kept, "params", params)
    for j, (entry, param) in enumerate(zip(kept, params, strict=True)):
        _checks.same_dtype(f"backup[{j}]", entry, f"params[{j}]", param)
        if entry.data_ptr() == param.data_ptr() and entry.numel() > 0:
            raise ValueError(f"backup[{j}]: expected memory of its own, got that of params[{j}]")
    return kept
