"""Regions of an image at latent resolution, and noise predictions put together by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _checks

OVERLAPS = ("last_wins", "normalised")


def region_masks(masks: Sequence[Tensor] | Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at latent resolution (L, H, W): averaged over areas; bool ones stay bool (> 1/2).

    Args:
        masks: L masks (h, w), bool or values in [0, 1], any resolution of the same aspect ratio.
        size: (H, W) of the latent.

    Raises:
        ValueError: Another aspect ratio, values outside [0, 1], or shapes that are not (h, w).
        TypeError: Bool and floating masks mixed, or another dtype.

    Example:
        >>> region_masks(torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), (1, 1))
        tensor([[[0.7500]]])
    """
    resized = []
    for number, mask in enumerate(masks):
        name = f"masks[{number}]"
        _checks.tensor(name, mask, ("h", "w"))
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name}: expected bool or floating, got {_checks.describe(mask)}")
        height, width = mask.shape
        if 0 in (height, width) or height * size[1] != width * size[0]:
            raise ValueError(
                f"{name}: expected the aspect ratio of the latent {size[0]} x {size[1]}, "
                f"got {height} x {width}"
            )
        values = mask.float() if mask.dtype == torch.bool else mask
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name}: expected values in [0, 1]")
        values = F.interpolate(values[None, None], size=size, mode="area")[0, 0]
        resized.append(values > 0.5 if mask.dtype == torch.bool else values)
    if not resized:
        return torch.zeros(0, *size, dtype=torch.bool)
    if len({mask.dtype for mask in resized}) > 1:
        raise TypeError("masks: expected all bool or all of one floating dtype")
    return torch.stack(resized)


def fuse_noise(
    base: Tensor,
    styled: Sequence[Tensor] | Tensor,
    masks: Tensor,
    *,
    overlap: str = "last_wins",
) -> Tensor:
    """Noise of one style inside its region, of the base outside all of them.

    Args:
        base: (B, C, H, W).
        styled: L predictions of the same shape, one for each region.
        masks: (L, H, W) bool or values in [0, 1] (see :func:`region_masks`).
        overlap: ``"last_wins"``: e <- (1 - m_l) e + m_l e_l in order. ``"normalised"``: the weights
            of all regions at a place, and of the base, are divided by their sum where it exceeds 1.

    Returns:
        (B, C, H, W). Where masks are 0 or 1 it is one of the predictions bit for bit (with
        ``"normalised"``: where one region alone is). Without regions: the base.

    Raises:
        ValueError: Counts, shapes or sizes that do not fit, or an unknown rule.

    Example:
        >>> base, style = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> fuse_noise(base, [style], torch.tensor([[[False, True]]]))
        tensor([[[[0., 1.]]]])
    """
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap: expected one of {', '.join(OVERLAPS)}, got {overlap!r}")
    _checks.tensor("base", base, ("B", "C", "H", "W"))
    _checks.tensor("masks", masks, ("L", "H", "W"))
    if len(styled) != masks.shape[0]:
        raise ValueError(
            f"masks: expected {len(styled)} (one for each style), got {masks.shape[0]}"
        )
    if tuple(masks.shape[1:]) != tuple(base.shape[2:]):
        raise ValueError(
            f"masks: expected the latent's size {tuple(base.shape[2:])}, "
            f"got {tuple(masks.shape[1:])}"
        )
    for number, one in enumerate(styled):
        if one.shape != base.shape:
            raise ValueError(
                f"styled[{number}]: expected the shape of base {tuple(base.shape)}, "
                f"got {tuple(one.shape)}"
            )
    masks = masks.to(base.device)
    if overlap == "normalised":
        return _normalised(base, styled, masks)
    result = base
    for mask, one in zip(masks, styled, strict=True):
        if mask.dtype == torch.bool:
            result = torch.where(mask, one, result)
        else:
            weight = mask.to(base.dtype)
            mixed = (1 - weight) * result + weight * one
            result = torch.where(weight == 0, result, torch.where(weight == 1, one, mixed))
    return result


def _normalised(base: Tensor, styled: Sequence[Tensor] | Tensor, masks: Tensor) -> Tensor:
    weights = masks.to(base.dtype)
    total = weights.sum(0)
    weights = weights / total.clamp_min(1)
    rest = (1 - total).clamp_min(0)
    # Products with weights of zero are left out: what lies outside a region must not matter.
    result = torch.where(rest == 0, torch.zeros_like(base), rest * base)
    for weight, one in zip(weights, styled, strict=True):
        result = torch.where(weight == 0, result, result + weight * one)
    return result
