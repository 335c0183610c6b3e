"""Swin transformers of timm with fused windowed attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transfuse.integrations._require import unusable
from transfuse.methods._hooks import HookHandle, Replaced
from transfuse.ops import window_attention

__all__ = ["SwinAttention"]


def _swin():
    try:
        from timm.models import swin_transformer
    except Exception as error:
        raise unusable("timm", error) from error
    return swin_transformer


@dataclass(frozen=True, kw_only=True)
class SwinAttention:
    """The windowed attention of a Swin transformer in one kernel: shift, mask and relative bias.

    Args:
        backend: Backend of ``window_attention``; None chooses.

    Notes:
        Equal to the model up to rounding (tokens that the shift mask separates get weight 0, in
        timm about 1e-44). Feature maps must be whole windows; others are refused when they come.
    """

    backend: str | None = None

    def attach(self, model: nn.Module) -> HookHandle:
        """Replace the attention of all Swin blocks of a model.

        Args:
            model: A timm model with ``SwinTransformerBlock`` layers.

        Returns:
            A handle with ``remove()``, usable in ``with``.

        Raises:
            ImportError: timm is not installed; the message names the extra.
            TypeError: The model has no Swin block, or one with another attention.
            ValueError: A block is patched already.
        """
        swin = _swin()
        blocks = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, swin.SwinTransformerBlock)
        }
        if not blocks:
            raise TypeError(f"model: expected a timm Swin model, got {type(model).__name__}")
        for name, block in blocks.items():
            if type(block.attn) is not swin.WindowAttention:
                raise TypeError(
                    f"block {name!r}: expected timm's WindowAttention, got "
                    f"{type(block.attn).__name__}"
                )
            if "_attn" in block.__dict__:
                raise ValueError(f"block {name!r} is patched already; remove that patch first")
        parts: list[Any] = [
            Replaced(block, "_attn", _Windows(block, name, self.backend))
            for name, block in blocks.items()
        ]
        return HookHandle(tuple(blocks), parts)


class _Windows:
    """What a block computes in place of roll, partition, attention, reverse and roll."""

    def __init__(self, block: Any, name: str, backend: str | None) -> None:
        self._block, self._name, self._backend = block, name, backend

    def __call__(self, x: Tensor) -> Tensor:
        block, attn = self._block, self._block.attn
        batch, height, width, _ = x.shape
        window = block.window_size
        if height % window[0] != 0 or width % window[1] != 0:
            raise ValueError(
                f"block {self._name!r}: expected a feature map of whole {window[0]} x {window[1]} "
                f"windows, got {height} x {width}; choose another image size, or remove the patch"
            )
        if attn.training and attn.attn_drop.p > 0.0:
            raise ValueError("fused windows do not support attention dropout; set it to 0")
        qkv = attn.qkv(x).view(batch, height * width, 3, attn.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sides = (2 * window[0] - 1, 2 * window[1] - 1)
        table = attn.relative_position_bias_table.T.unflatten(1, sides)
        out = window_attention(
            query,
            key,
            value,
            size=(height, width),
            window=window,
            shift=block.shift_size,
            wrap="mask",
            bias=table.to(query.dtype),
            scale=attn.scale,
            backend=self._backend,
        )
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
        return out.unflatten(1, (height, width))
