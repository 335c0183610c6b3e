"""transfuse in timm: token merging (ToMe) in vision transformers, fused windows in Swin ones.

One line puts it on a model, ``remove()`` or leaving ``with`` takes it off exactly::

    from transfuse.integrations.timm import SwinAttention, TokenMerging, patch

    handle = patch(vit, TokenMerging(merged=16))        # 16 tokens fewer after every block
    handle = patch(swin, SwinAttention())               # shifted windows in one kernel

Covers timm's ``VisionTransformer`` with plain ``Block`` and ``Attention`` layers, and models of
``SwinTransformerBlock``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.integrations._require import unusable
from transfuse.integrations._timm_windows import SwinAttention
from transfuse.methods._hooks import HookHandle, Replaced
from transfuse.ops import KV, attend, match_tokens, merge_tokens

__all__ = ["HookHandle", "SwinAttention", "TokenMerging", "patch"]


def _vision_transformer():
    try:
        from timm.layers import Attention
        from timm.models.vision_transformer import Block, VisionTransformer
    except Exception as error:
        raise unusable("timm", error) from error
    return VisionTransformer, Block, Attention


@dataclass(frozen=True, kw_only=True)
class TokenMerging:
    """Merges similar tokens after the attention of every block of a vision transformer.

    Tokens alternate between sources and destinations; similarity is that of their keys, averaged
    over heads; a token that stands for several patches counts for them, in later merges and, with
    ``proportional``, in attention.

    Args:
        merged: How many tokens disappear in each block: one number for all, or one per block. At
            most half of the tokens that are not prefix tokens can; more is clamped.
        proportional: Add the logarithm of a token's size to its attention logits.
        backend: Backend of the ops; None chooses.

    Raises:
        TypeError, ValueError: An option that does not fit.

    Notes:
        Class, distillation and register tokens are never merged and keep their places.

    Reference:
        Bolya et al. 2023, Token merging: your ViT but faster (arXiv:2210.09461).
    """

    merged: int | Sequence[int] = 16
    proportional: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        given: object = self.merged
        many = isinstance(given, Sequence) and not isinstance(given, str)
        counts: list[Any] = list(given) if many else [given]  # type: ignore[call-overload]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
            raise TypeError(f"merged: expected whole numbers, got {self.merged!r}")
        if any(n < 0 for n in counts):
            raise ValueError(f"merged: expected numbers of at least 0, got {self.merged!r}")

    def attach(self, model: nn.Module) -> HookHandle:
        """Merge tokens in all blocks of a model.

        Args:
            model: A timm ``VisionTransformer``.

        Returns:
            A handle with ``remove()``, usable in ``with``.

        Raises:
            TypeError: Another kind of model, or a block of another kind.
            ValueError: As many numbers as there are blocks were expected, or it is patched already.
        """
        transformer, block_class, attention_class = _vision_transformer()
        if not isinstance(model, transformer):
            raise TypeError(f"model: expected a timm VisionTransformer, got {type(model).__name__}")
        blocks = list(model.blocks)
        counts = [self.merged] * len(blocks) if isinstance(self.merged, int) else list(self.merged)
        if len(counts) != len(blocks):
            raise ValueError(f"merged: expected {len(blocks)} numbers, one per block, got {counts}")
        for number, block in enumerate(blocks):
            if type(block) is not block_class or type(block.attn) is not attention_class:
                raise TypeError(
                    f"block {number}: expected a timm Block with its Attention, got "
                    f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
                )
            if "forward" in block.__dict__:
                raise ValueError(f"block {number} is patched already; remove that patch first")
        sizes: dict[int, Tensor | None] = {0: None}
        prefix = tuple(range(model.num_prefix_tokens))
        parts: list[Any] = [
            Replaced(block, "forward", _MergingBlock(self, block, number, count, prefix, sizes))
            for number, (block, count) in enumerate(zip(blocks, counts, strict=True))
        ]
        return HookHandle(tuple(f"blocks.{number}" for number in range(len(blocks))), parts)


class _MergingBlock:
    """What a block computes instead.

    Block i reads the sizes of its tokens at i and leaves those of its result at i + 1, so that a
    block that is computed again (gradient checkpointing) finds the same ones.
    """

    def __init__(
        self,
        options: TokenMerging,
        block: Any,
        number: int,
        count: int,
        prefix: tuple[int, ...],
        sizes: dict[int, Tensor | None],
    ) -> None:
        self._options, self._block, self._number = options, block, number
        self._count, self._prefix, self._sizes = count, prefix, sizes

    def __call__(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("token merging does not follow attention masks; call without them")
        block, backend = self._block, self._options.backend
        size = self._sizes[self._number]
        out, metric = self._attention(block.attn, block.norm1(x), size)
        x = x + block.drop_path1(block.ls1(out))
        half = (x.shape[1] - len(self._prefix)) // 2
        count = min(self._count, half)
        if count > 0:
            plan = match_tokens(metric, count, protect=self._prefix, backend=backend)
            if size is None:
                size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
            x = merge_tokens(x, plan, weight=size, backend=backend)
            size = merge_tokens(size[..., None], plan, mode="sum", backend=backend)[..., 0]
        self._sizes[self._number + 1] = size
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def _attention(self, attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """The layer's attention with the sizes as bias, and its keys averaged over heads."""
        if attn.training and attn.attn_drop.p > 0.0:
            raise ValueError("token merging does not support attention dropout; set it to 0")
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attn.q_norm(query), attn.k_norm(key)
        bias = None
        if size is not None and self._options.proportional:
            bias = size.log()[:, None, None, :]
        source = KV(key, value, bias=bias)
        out = attend(query, source, scale=attn.scale, backend=self._options.backend)
        out = attn.norm(out.transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out)), key.mean(1)


def patch(model: nn.Module, method: TokenMerging | SwinAttention) -> HookHandle:
    """Put a method on a timm model.

    Args:
        model: A timm model.
        method: :class:`TokenMerging` or :class:`SwinAttention`.

    Returns:
        The handle: ``remove()`` restores the model exactly, leaving ``with`` does too.

    Raises:
        ImportError: timm is not installed; the message names the extra.
        TypeError, ValueError: The method does not fit the model; see its ``attach``.
    """
    _vision_transformer()
    if not isinstance(method, TokenMerging | SwinAttention):
        raise TypeError(
            f"method: expected TokenMerging or SwinAttention, got {type(method).__name__}"
        )
    return method.attach(model)
