"""Checks of a call of patch_gram, and the geometry of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What ``torch.nn.functional.unfold`` takes, each for rows and columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def outputs(self, height: int, width: int) -> Pair:
        """Numbers of patches down and across."""
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip((height, width), *self, strict=True)
        )
        return rows, columns

    @property
    def apart(self) -> bool:
        """Whether no two patches share a pixel, and none lacks one: a mere reordering."""
        still = self.padding == (0, 0) and self.dilation == (1, 1)
        return still and self.kernel == self.stride


def normalise(
    x: Tensor, kernel_size: object, stride: object, padding: object, dilation: object
) -> tuple[Tensor, Geometry]:
    """Check the arguments; the tensor, and the geometry as pairs."""
    # Within the backward of a Function, torch.compile does not let layouts be asked for.
    if not torch.compiler.is_compiling():
        _checks.tensor("x", x, ("B", "C", "H", "W"))
        _checks.floating("x", x)
    geometry = Geometry(
        _pair("kernel_size", kernel_size, 1),
        _pair("stride", stride, 1),
        _pair("padding", padding, 0),
        _pair("dilation", dilation, 1),
    )
    rows, columns = geometry.outputs(x.shape[2], x.shape[3])
    if rows < 1 or columns < 1:
        raise ValueError(
            f"kernel_size: expected a kernel that fits into {x.shape[2]} x {x.shape[3]} pixels "
            f"with padding {geometry.padding}, got {geometry.kernel} with dilation "
            f"{geometry.dilation}"
        )
    return x, geometry


def _pair(name: str, value: object, least: int) -> Pair:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{name}: expected one integer or two, got {len(value)}")
        first, second = value
    else:
        first = second = value
    for entry in (first, second):
        if isinstance(entry, bool) or not isinstance(entry, int):
            raise TypeError(f"{name}: expected integers, got {_checks.describe(entry)}")
        if not least <= entry < 2**31:
            raise ValueError(f"{name}: expected integers of at least {least}, got {entry}")
    return first, second
