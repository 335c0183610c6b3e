"""Token merging in diffusers' UNets: the behaviour of tomesd, by forward hooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.methods._hooks import (
    HookHandle,
    choose_names,
    first_argument,
    with_first_argument,
)
from transfuse.ops import MergePlan, match_tokens, merge_tokens, unmerge_tokens
from transfuse.ops._token_merging_call import random_of_cells


def merge_geometry(
    size: tuple[int, int], tokens: int, ratio: float, max_downsample: int
) -> tuple[int, int, int] | None:
    """Height and width of a layer's token grid, and how many tokens it merges; None: none.

    Args:
        size: Height and width of the latent.
        tokens: Tokens of the layer.
        ratio: Share of tokens to merge.
        max_downsample: Layers of a coarser grid are left alone.
    """
    downsample = math.ceil(math.sqrt(size[0] * size[1] // tokens))
    if downsample > max_downsample:
        return None
    return math.ceil(size[0] / downsample), math.ceil(size[1] / downsample), int(tokens * ratio)


@dataclass(frozen=True, kw_only=True)
class TokenMerging:
    """Merges similar tokens around the attention of a UNet's transformer blocks.

    ``patch(pipe, TokenMerging(ratio=0.5))``; the handle's ``remove()`` restores the model. Each
    block matches its input tokens, computes its self-attention on the merged ones, and gives the
    result back to all.

    Args:
        ratio: Share of the tokens to merge, in [0, 1). At most ``1 - 1 / (height * width)`` of the
            stride can be merged; more is clamped with a warning.
        max_downsample: Merge in layers whose grid is at most this much coarser than the latent: 1
            for the finest only, 8 for all.
        stride: (height, width) of the cells of which one token each is a destination.
        random: Draw each cell's destination. Off for odd batches, in which the two halves of
            classifier-free guidance cannot be together.
        attention: Merge for self-attention.
        cross_attention: Merge for cross-attention.
        feed_forward: Merge for the feed-forward layers.
        seed: Of the private generator; torch's global ones are never used.
        backend: Backend of the ops; None chooses.

    Raises:
        TypeError, ValueError: An option that does not fit.

    Notes:
        Any resolution; rows and columns that no whole cell covers are never destinations. With
        ``random=False`` the same tokens are merged as by tomesd 0.1.3 with ``use_rand=False``.
        Destinations are drawn once per call of the model and grid, not once per block as there:
        they cost less, and a block that is recomputed (gradient checkpointing) finds them again.

    Reference:
        Bolya & Hoffman 2023, Token merging for fast Stable Diffusion (arXiv:2303.17604).
    """

    ratio: float = 0.5
    max_downsample: int = 1
    stride: tuple[int, int] = (2, 2)
    random: bool = True
    attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False
    seed: int = 0
    backend: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio: expected a number, got {self.ratio!r}")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio: expected a number in [0, 1), got {self.ratio}")
        if self.max_downsample not in (1, 2, 4, 8):
            raise ValueError(f"max_downsample: expected 1, 2, 4 or 8, got {self.max_downsample!r}")
        if len(self.stride) != 2 or min(self.stride) < 1:
            raise ValueError(f"stride: expected two numbers of at least 1, got {self.stride!r}")

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> HookHandle:
        """Merge tokens in some or all transformer blocks.

        Args:
            model: A UNet whose input is (B, C, H, W).
            layers: Names of transformer blocks, or of modules whose blocks are all meant; None:
                all.

        Returns:
            A handle with ``remove()``, usable in ``with``.

        Raises:
            ValueError: No transformer block, or a name that matches none.
            TypeError: An entry of ``layers`` is not a name.
        """
        from diffusers.models.attention import BasicTransformerBlock

        found = {n: m for n, m in model.named_modules() if isinstance(m, BasicTransformerBlock)}
        if not found:
            raise ValueError(f"{type(model).__name__} has no BasicTransformerBlock")
        chosen = choose_names(found, layers, "transformer block")
        call = _ModelCall(self, torch.Generator().manual_seed(self.seed))
        parts: list[Any] = [model.register_forward_pre_hook(call.begin, with_kwargs=True)]
        for name in chosen:
            parts += _Block(name, call).hook(found[name])
        return HookHandle(tuple(chosen), parts)


@dataclass
class _ModelCall:
    """What the blocks of one call of the model share."""

    options: TokenMerging
    generator: torch.Generator
    size: tuple[int, int] | None = None
    destinations: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = first_argument(args, kwargs, "sample")
        if sample.dim() != 4:
            raise ValueError(
                "token merging needs a model input of shape (B, C, H, W), "
                f"got {tuple(sample.shape)}"
            )
        self.size = (sample.shape[2], sample.shape[3])
        self.destinations.clear()

    def plan(self, x: Tensor) -> MergePlan | None:
        """The plan for a block's input tokens; None to leave them alone."""
        options = self.options
        if self.size is None:
            return None  # the block was called by itself, without its model
        geometry = merge_geometry(self.size, x.shape[1], options.ratio, options.max_downsample)
        if geometry is None or geometry[2] == 0:
            return None
        height, width, merged = geometry
        if height * width != x.shape[1]:
            raise ValueError(
                f"token merging: a latent of {self.size} has no grid of {x.shape[1]} tokens "
                f"({height} x {width} expected)"
            )
        if not options.random or x.shape[0] % 2 == 1:
            return match_tokens(
                x, merged, size=(height, width), stride=options.stride, backend=options.backend
            )
        if (height, width) not in self.destinations:
            drawn = random_of_cells(height, width, options.stride, self.generator)
            self.destinations[height, width] = drawn.to(x.device)
        return match_tokens(
            x, merged, destination=self.destinations[height, width], backend=options.backend
        )


class _Block:
    """The hooks of one transformer block."""

    def __init__(self, name: str, call: _ModelCall) -> None:
        self.name = name
        self.call = call
        self.plan: MergePlan | None = None

    def hook(self, block: nn.Module) -> list[Any]:
        options = self.call.options
        parts = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave, always_call=True),
        ]
        wanted = {
            "attn1": options.attention,
            "attn2": options.cross_attention,
            "ff": options.feed_forward,
        }
        for name, on in wanted.items():
            layer = getattr(block, name, None)
            if on and layer is not None:
                parts.append(layer.register_forward_pre_hook(self._merge, with_kwargs=True))
                parts.append(layer.register_forward_hook(self._unmerge))
        return parts

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.plan = self.call.plan(first_argument(args, kwargs, "hidden_states"))

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.plan = None

    def _merge(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        if self.plan is None:
            return None
        context = kwargs.get("encoder_hidden_states")
        if context is None and kwargs.get("attention_mask") is not None:
            raise ValueError(
                f"token merging: {self.name} received a mask of its own tokens, which merging "
                "cannot follow"
            )
        x = first_argument(args, kwargs, "hidden_states")
        merged = merge_tokens(x, self.plan, backend=self.call.options.backend)
        return with_first_argument(args, kwargs, "hidden_states", merged)

    def _unmerge(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor):
        if self.plan is None:
            return None
        return unmerge_tokens(output, self.plan, backend=self.call.options.backend)
