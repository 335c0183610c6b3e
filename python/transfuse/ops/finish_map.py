"""What makes a picture of saliency maps: size, scale, and one map of several layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _checks
from transfuse._autograd import transformed
from transfuse.ops._saliency_call import working_dtype

__all__ = ["finish_map"]

_NORMALISE = {None: 0, "minmax": 1, "max": 2}
_COMBINE = {"mean": 0, "product": 1}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def finish_map(
    maps: Tensor | Sequence[Tensor],
    *,
    size: int | Sequence[int] | None = None,
    relu: bool = False,
    normalize: str | None = "minmax",
    eps: float = 1e-7,
    combine: str = "mean",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""ReLU, size and scale of saliency maps, in this order, and the combination of several.

    Scales are those of each map of each sample: ``"minmax"``
    :math:`(m - \min m) / (\max m - \min m + \epsilon)`, ``"max"`` :math:`m / (\max m + \epsilon)`.
    With weights w, or the same for all, several maps become :math:`\sum_l w_l m_l / \sum_l w_l`
    (``"mean"``) or :math:`\prod_l m_l^{w_l / \sum w}` (``"product"``; without weights
    :math:`\prod_l m_l`).

    Args:
        maps: (B, *S) of 1 to 3 spatial axes, floating; or a sequence of such maps of one batch,
            device and number of axes, whose sizes may differ if ``size`` is given.
        size: spatial size of the result (linear interpolation of every axis, half-pixel centres,
            no antialiasing), an integer or one for each axis; None: that of the maps.
        relu: whether negative values are set to 0 first.
        normalize: ``"minmax"``, ``"max"`` or None.
        eps: what is added to the divisor, at least 0.
        combine: ``"mean"`` or ``"product"``, of a sequence.
        weights: one number of at least 0 for each map of a sequence, not all 0.

    Returns:
        (B, *size) in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.

    Warns:
        UserWarning: a map that is scaled is constant, and so zero (with ``"max"``: has nothing
            above 0). Said on the CPU only, where reading it waits for nothing, and not under
            ``torch.compile`` or transforms.

    Notes:
        Composed of torch operations, and differentiable as they are. NaN spreads over a scaled map
        of one sample. Maps of a layer can be scaled before they are resized (as Grad-CAM packages
        do) by calling twice.

    Example:
        >>> import torch
        >>> from transfuse.ops import finish_map
        >>> m = torch.tensor([[[-1.0, 1.0], [3.0, 0.0]]])
        >>> finish_map(m, eps=0.0)
        tensor([[[0.0000, 0.5000],
                 [1.0000, 0.2500]]])
        >>> finish_map([m, 2 * m], relu=True, size=(4, 4), combine="product").shape
        torch.Size([1, 4, 4])
    """
    code = _checks.choice("normalize", normalize, _NORMALISE)
    together = _checks.choice("combine", combine, _COMBINE)
    eps = _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu: expected True or False, got {_checks.describe(relu)}")
    alone = isinstance(maps, Tensor)
    if not alone and (not isinstance(maps, Sequence) or len(maps) == 0):
        raise TypeError(f"maps: expected a tensor or several, got {_checks.describe(maps)}")
    found = _checked([maps] if isinstance(maps, Tensor) else list(maps), alone)
    shape = _size(size, found)
    shares = _weights(weights, len(found), alone)
    done = [_finish(m, shape, relu, code, eps) for m in found]
    if alone:
        return done[0]
    if together == 1:
        powers = done if weights is None else [m**w for m, w in zip(done, shares, strict=True)]
        return math.prod(powers[1:], start=powers[0])
    return sum((w * m for m, w in zip(done[1:], shares[1:], strict=True)), shares[0] * done[0])


def _checked(maps: list[Tensor], alone: bool) -> list[Tensor]:
    first = None
    for number, m in enumerate(maps):
        name = "maps" if alone else f"maps[{number}]"
        m = _checks.dense(name, m)
        _checks.floating(name, m)
        if not 2 <= m.dim() <= 4:
            raise ValueError(f"{name}: expected a batch and 1 to 3 axes, got {tuple(m.shape)}")
        if 0 in m.shape[1:]:
            raise ValueError(f"{name}: expected at least one location, got {tuple(m.shape)}")
        first = m if first is None else first
        if m.dim() != first.dim() or m.shape[0] != first.shape[0]:
            raise ValueError(
                f"{name}: expected the batch and number of axes of maps[0], "
                f"{tuple(first.shape)}, got {tuple(m.shape)}"
            )
        _checks.same_device(name, m, "maps[0]", first)
    return maps


def _size(size: object, maps: list[Tensor]) -> tuple[int, ...]:
    shapes = [tuple(m.shape[1:]) for m in maps]
    if size is None:
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"size: expected one for maps of several sizes, got None for {shapes[0]} "
                    f"(maps[0]) and {shape} (maps[{number}])"
                )
        return shapes[0]
    rank = len(shapes[0])
    numbers = [size] * rank if not isinstance(size, Sequence) else list(size)
    if len(numbers) != rank:
        raise ValueError(f"size: expected {rank} integers, got {len(numbers)}")
    return tuple(_checks.positive_int("size", n) for n in numbers)


def _weights(weights: object, count: int, alone: bool) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if alone:
        raise ValueError("weights: expected only with a sequence of maps")
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != count:
        got = len(weights) if isinstance(weights, Sequence) else _checks.describe(weights)
        raise ValueError(f"weights: expected {count} numbers, one for each map, got {got}")
    numbers = [_checks.number(f"weights[{i}]", w) for i, w in enumerate(weights)]
    total = sum(numbers)
    if min(numbers) < 0 or total == 0:
        raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {numbers}")
    return [w / total for w in numbers]


def _finish(m: Tensor, size: tuple[int, ...], relu: bool, code: int, eps: float) -> Tensor:
    m = m.to(working_dtype(m.dtype))
    if relu:
        m = m.relu()
    if tuple(m.shape[1:]) != size:
        if m.shape[0] == 0:
            return m.new_zeros((0, *size))
        mode = _MODES[len(size)]
        m = F.interpolate(m[:, None], size, mode=mode, align_corners=False)[:, 0]
    if code == 0 or m.shape[0] == 0:
        return m
    axes = tuple(range(1, m.dim()))
    if code == 1:
        m = m - m.amin(axes, keepdim=True)
    top = m.amax(axes, keepdim=True)
    # Nothing to scale: zeros, and no division by zero. NaN is not zero.
    empty = top <= 0
    _warn_empty(empty, code)
    return torch.where(empty, 0.0, m / torch.where(empty, 1.0, top + eps))


def _warn_empty(empty: Tensor, code: int) -> None:
    if torch.compiler.is_compiling() or empty.device.type != "cpu" or transformed():
        return
    count = int(empty.sum())
    if count > 0:
        what = "constant" if code == 1 else "nowhere above 0"
        warnings.warn(
            f"{count} of {empty.numel()} saliency maps are {what}: they become zero", stacklevel=4
        )
