"""Small models that methods are tried on, built here so that no model library is needed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Hand-written attention: four projections, a head count, no processor protocol."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        self.num_heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        source = width if context_width is None else context_width
        self.to_k, self.to_v = (nn.Linear(source, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        p = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.to_out((p @ v).transpose(1, 2).flatten(2))


class PlainDenoiser(nn.Module):
    """Image in, image out, through eight attention blocks; takes a timestep."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 8) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(PlainAttention(width, heads) for _ in range(depth))

    def forward(self, sample: Tensor, timestep: int | Tensor) -> Tensor:
        x = self.inward(sample.flatten(2).transpose(1, 2))
        x = x + 0.001 * torch.as_tensor(timestep, dtype=x.dtype, device=x.device).mean()
        for block in self.blocks:
            x = x + block(x)
        return self.outward(x).transpose(1, 2).unflatten(2, sample.shape[-2:])


class TextDenoiser(PlainDenoiser):
    """The same with cross-attention to a text after each self-attention; its own text if none."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 8, text: int = 12) -> None:
        super().__init__(width, heads, depth)
        self.cross = nn.ModuleList(PlainAttention(width, heads, text) for _ in range(depth))
        self.register_buffer("empty", torch.randn(1, 5, text))

    def forward(
        self, sample: Tensor, timestep: int | Tensor, context: Tensor | None = None
    ) -> Tensor:
        context = self.empty if context is None else context
        x = self.inward(sample.flatten(2).transpose(1, 2))
        x = x + 0.001 * torch.as_tensor(timestep, dtype=x.dtype, device=x.device).mean()
        for block, cross in zip(self.blocks, self.cross, strict=True):
            x = x + block(x)
            x = x + cross(x, context.expand(x.shape[0], -1, -1))
        return self.outward(x).transpose(1, 2).unflatten(2, sample.shape[-2:])


@pytest.fixture
def text_denoiser() -> nn.Module:
    torch.manual_seed(0)
    return TextDenoiser().eval()


@pytest.fixture
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return PlainDenoiser().eval()


@pytest.fixture
def plain_attention() -> type[nn.Module]:
    return PlainAttention
