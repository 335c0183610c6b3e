"""Element-wise weighted means of models: merging by importance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend, _checks
from transfuse._autograd import needs_derivative
from transfuse.ops._multitensor_call import (
    call_dtype,
    lists_of_tensors,
    one_device,
    same_blocks,
    working_dtype,
)
from transfuse.ops._multitensor_core import kernel, pack_lists
from transfuse.ops.multitensor import multi_norm

__all__ = ["ratio_merge"]

_backend.declare("ratio_merge", ("reference", "cpu", "triton", "cuda"))
_NORMALISE: dict[object, int] = {None: 0, "l2": 1}


class Merge(NamedTuple):
    """A checked call: coefficients (S, M) in float64 on the CPU, floors (M,)."""

    thetas: list[list[Tensor]]
    weights: list[list[Tensor]]
    coefficients: Tensor
    floors: list[float]
    single: bool


def ratio_merge(
    thetas: Sequence[Sequence[Tensor]],
    weights: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: str | None = "l2",
    backend: str | None = None,
) -> list[Tensor] | list[list[Tensor]]:
    r"""Weighted mean of M models, element by element, for many settings of the weights at once.

    .. math:: \theta^*_j = \frac{\sum_k w_k F_{kj} \theta_{kj}}{\sum_k w_k F_{kj}}, \qquad
              w_k = \frac{c_k}{\lVert F_k \rVert_2}

    and :math:`\theta^*_j = \theta_{1j}` where the denominator is 0.

    Args:
        thetas: M lists of m tensors of the same shapes, floating; the first is the target.
        weights: M lists F of the same shapes, at least 0.
        coefficients: c, (M,) or (S, M) for S settings, at least 0, each with a positive sum.
        floor: least weight, set after the norm is taken.
        favor_target: the floor is that of the target only: where nobody is certain, its values
            stay.
        normalize: ``"l2"`` divides each F by its norm over all tensors; None does not.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        m contiguous tensors in the dtypes of the target; for coefficients (S, M) S such lists.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it. Negative or not
            finite weights, and weights that are 0 everywhere while they are to be normalised.
        RuntimeError: a named backend that cannot run here, with the reason.
        NotImplementedError: a derivative is asked for, or inside ``torch.compile``.

    Notes:
        Reads models and weights once for all settings, and writes each result once; eager torch
        needs some 3 M temporaries of the size of a model. float32 (float64 for a tensor j any of
        which is), rounded once. A model of coefficient 0 is not read. The same bits for every
        number of threads.

    Reference:
        Matena & Raffel 2022, Merging models with Fisher-weighted averaging (arXiv:2111.09832),
        equation 1.

    Example:
        >>> import torch
        >>> from transfuse.ops import ratio_merge
        >>> thetas = [[torch.tensor([1.0, 1.0])], [torch.tensor([3.0, 3.0])]]
        >>> fisher = [[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]]
        >>> ratio_merge(thetas, fisher, torch.tensor([0.5, 0.5]), floor=0.0)
        [tensor([1., 3.])]
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "ratio_merge: looks at numbers, so it does not run inside torch.compile"
        )
    call = _checked(thetas, weights, coefficients, floor, favor_target)
    named = _checks.choice("normalize", normalize, _NORMALISE) == 1
    known = pack_lists([*call.thetas, *call.weights])
    if needs_derivative([*known, coefficients]):
        raise NotImplementedError(
            "ratio_merge: has no derivative; pass detached tensors, outside torch.func transforms"
        )
    chosen = "composed"
    if backend != "reference":
        chosen = _backend.choose("ratio_merge", backend, known[0].device, call_dtype(known))
    if named:
        by = "reference" if chosen == "composed" else chosen
        norms = torch.stack([multi_norm(w, backend=by) for w in call.weights])
        call = call._replace(coefficients=_scaled(call.coefficients, norms))
    if chosen != "composed":
        flat = (pack_lists(call.thetas), pack_lists(call.weights))
        table = call.coefficients.to(known[0].device)
        made, refused = kernel(chosen, "ratio_merge")(*flat, table, call.floors)
        _refuse(int(refused))
        m = len(call.thetas[0])
        results = [made[s * m : (s + 1) * m] for s in range(call.coefficients.shape[0])]
    else:
        results = merged(call)
    return results[0] if call.single else results


def ratio_merge_reference(
    thetas: Sequence[Sequence[Tensor]],
    weights: Sequence[Sequence[Tensor]],
    coefficients: Tensor,
    *,
    floor: float = 1e-6,
    favor_target: bool = True,
    normalize: str | None = "l2",
) -> list[Tensor] | list[list[Tensor]]:
    """The definition, as :func:`ratio_merge`."""
    return ratio_merge(
        thetas,
        weights,
        coefficients,
        floor=floor,
        favor_target=favor_target,
        normalize=normalize,
        backend="reference",
    )


def merged(call: Merge) -> list[list[Tensor]]:
    """The definition in eager torch, for checked arguments."""
    results = []
    for row in call.coefficients.tolist():
        merged = []
        for j, target in enumerate(call.thetas[0]):
            dtype = working_dtype([p[j] for p in (*call.thetas, *call.weights)])
            above = below = torch.zeros_like(target, dtype=dtype)
            for k, c in enumerate(row):
                weight = call.weights[k][j].to(dtype)
                _refuse(int((~(weight.isfinite() & (weight >= 0))).sum()))
                if c != 0.0:
                    part = c * weight.clamp_min(call.floors[k])
                    above, below = above + part * call.thetas[k][j].to(dtype), below + part
            # Divided where that is defined only: 0 / 0 would be NaN in the branch not taken.
            ratio = above / torch.where(below > 0, below, 1.0)
            merged.append(torch.where(below > 0, ratio, target.to(dtype)).to(target.dtype))
        results.append(merged)
    return results


def _checked(
    thetas: object, weights: object, coefficients: object, floor: object, favor_target: object
) -> Merge:
    models, found = lists_of_tensors("thetas", thetas), lists_of_tensors("weights", weights)
    one_device("thetas[0]", models[0])
    if len(found) != len(models):
        raise ValueError(f"weights: expected {len(models)} lists (as thetas), got {len(found)}")
    same_blocks("weights[0]", found[0], "thetas[0]", models[0])
    table = _checks.dense("coefficients", coefficients)
    _checks.floating("coefficients", table)
    if table.dim() not in (1, 2) or table.shape[-1] != len(models):
        raise ValueError(
            f"coefficients: expected shape ({len(models)},) or (S, {len(models)}), "
            f"got {tuple(table.shape)}"
        )
    # Inside a transform, where a derivative is refused next, there are no values to look at.
    if not torch._C._functorch.is_functorch_wrapped_tensor(table):
        values = table.detach().to(device="cpu", dtype=torch.float64)
        good = values.isfinite() & (values >= 0)
        if not bool(good.all()) or not bool((values.sum(-1) > 0).all()):
            raise ValueError(
                "coefficients: expected finite numbers of at least 0 with a positive sum, got "
                f"{values.tolist()}"
            )
        table = values
    least = _checks.number("floor", floor)
    if least < 0:
        raise ValueError(f"floor: expected a number of at least 0, got {least}")
    if not isinstance(favor_target, bool):
        raise TypeError(f"favor_target: expected a bool, got {_checks.describe(favor_target)}")
    floors = [least if k == 0 or not favor_target else 0.0 for k in range(len(models))]
    single = table.dim() == 1
    table = table[None] if single else table
    return Merge(models, found, table.contiguous(), floors, single)


def _scaled(coefficients: Tensor, norms: Tensor) -> Tensor:
    """Coefficients over norms: with them, the largest product of a model is at most c."""
    values = norms.to(device="cpu", dtype=torch.float64)
    used = (coefficients != 0).any(0).tolist()
    for k, norm in enumerate(values.tolist()):
        if not used[k]:
            values[k] = 1.0
        elif not 0.0 < norm < float("inf"):
            raise ValueError(
                f"weights[{k}]: expected weights of a positive, finite norm to normalise, got a "
                f"norm of {norm}"
            )
    return coefficients / values


def _refuse(count: int) -> None:
    if count > 0:
        raise ValueError(
            f"weights: expected finite numbers of at least 0, got {count} that are not"
        )
