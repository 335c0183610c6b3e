"""The low-rank adapted layers written out, with an adapted weight for every sample: their
specification and oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.ops._lora_call import conv2d_call, linear_call


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float | Tensor = 1.0,
    expert: int | Tensor | None = None,
) -> Tensor:
    """As ``transfuse.ops.lora_linear``."""
    chosen, scale = linear_call(x, weight, bias, down, up, scale, expert)
    full, number = _sample_weights(x, weight, down, up, chosen, scale)
    parts = [F.linear(x[b], full[b], _shift(bias, number[b])) for b in range(x.shape[0])]
    return torch.stack(parts) if parts else F.linear(x, weight)


def lora_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    *,
    scale: float | Tensor = 1.0,
    expert: int | Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """As ``transfuse.ops.lora_conv2d``."""
    chosen, scale = conv2d_call(x, weight, bias, down, up, scale, expert)
    full, number = _sample_weights(x, weight, down, up, chosen, scale)
    options = (stride, padding, dilation)
    parts = [
        F.conv2d(x[b : b + 1], full[b], _shift(bias, number[b]), *options)
        for b in range(x.shape[0])
    ]
    return torch.cat(parts) if parts else F.conv2d(x, weight, None, *options)


def _sample_weights(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    expert: int | Tensor,
    scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """``W + scale_e reshape(B_e A_e)`` of every sample, and the experts, (B,)."""
    if not isinstance(expert, Tensor):
        expert = torch.full((x.shape[0],), expert, dtype=torch.int64, device=x.device)
    delta = up.index_select(0, expert) @ down.index_select(0, expert)
    delta = delta.reshape(x.shape[0], *weight.shape)
    if isinstance(scale, Tensor):
        scale = scale.to(x.dtype).index_select(0, expert).view(-1, *([1] * weight.dim()))
    return weight + scale * delta, expert


def _shift(bias: Tensor | None, expert: Tensor) -> Tensor | None:
    """The bias of one sample."""
    if bias is None or bias.dim() == 1:
        return bias
    return bias.index_select(0, expert.view(1))[0]
