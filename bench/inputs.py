"""Inputs: random ones, and activations of two real photographs.

The photographs are scikit-learn's ``china.jpg`` and ``flower.jpg`` (427 x 640). A token is an
overlapping 16 x 16 colour patch on a regular grid, normalised as a layer norm would; queries, keys
and values are three fixed, seeded Gaussian projections of it to heads x width. These are *random
projections of real photographs*, not activations of a pretrained network: what they add over noise
is the correlation between neighbouring tokens and the uneven attention that comes with it.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

from .cases import Unavailable

PHOTOS = ("china", "flower")
PATCH = 16
DESCRIPTION = (
    "seeded random projections of 16 x 16 patches of china.jpg and flower.jpg (not pretrained)"
)


def normal(
    *shape: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal values, drawn in float32 and rounded: every dtype sees the same numbers."""
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


@cache
def photo(name: str) -> torch.Tensor:
    """One photograph, (427, 640, 3) float32 in [0, 1].

    Raises:
        Unavailable: scikit-learn (the pictures) or Pillow (their decoder) is not installed.
    """
    # Found without being imported: importing scikit-learn costs seconds that --quick does not have.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise Unavailable("the photographs come with scikit-learn: pip install 'transfuse[bench]'")
    if importlib.util.find_spec("PIL") is None:
        raise Unavailable("the photographs are read by Pillow: pip install 'transfuse[bench]'")
    import numpy as np
    from PIL import Image

    path = Path(package.origin).parent / "datasets" / "images" / f"{name}.jpg"
    if not path.is_file():
        raise Unavailable(f"this scikit-learn does not carry {name}.jpg")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels)


def photo_tokens(name: str, *, size: tuple[int, int]) -> torch.Tensor:
    """A photograph as layer-normed tokens, row-major over ``size``: (size[0] * size[1], 768)."""
    picture = photo(name)
    rows = torch.linspace(0, picture.shape[0] - PATCH, size[0]).round().long()
    columns = torch.linspace(0, picture.shape[1] - PATCH, size[1]).round().long()
    # (rows, columns, 3, PATCH, PATCH): a view until the index picks the grid's patches.
    patches = picture.unfold(0, PATCH, 1).unfold(1, PATCH, 1)[rows][:, columns]
    tokens = patches.reshape(size[0] * size[1], -1)
    return torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])


def photo_heads(
    name: str,
    *,
    size: tuple[int, int],
    heads: int,
    width: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of one photograph, each (1, heads, size[0] * size[1], width)."""
    tokens = photo_tokens(name, size=size)

    def project() -> torch.Tensor:
        weight = torch.randn(tokens.shape[1], heads * width, generator=generator)
        projected = tokens @ (weight * tokens.shape[1] ** -0.5)
        split = projected.reshape(1, tokens.shape[0], heads, width).transpose(1, 2)
        return split.contiguous().to(device=device, dtype=dtype)

    return project(), project(), project()
