"""Negative Token Merging: Image-based Adversarial Feature Guidance ("NegToMe").

Jaskirat Singh, Lindsey Li, Weijia Shi, Ranjay Krishna, Yejin Choi, Pang Wei Koh, Michael F. Cohen,
Stephen Gould, Liang Zheng, Luke Zettlemoyer; 2024; arXiv 2412.01339; official code
1jsingh/negtome.

Images denoised together: x (F, N, D) are the outputs of one attention layer, image 0 is the
reference. For every other image f and token i, with s_f[i, j] = cos(x_f,i , x_0,j),

    j* = argmax_j s_f[i, j],     y_f,i = x_f,i + alpha (x_f,i - x_0,j*)   if s_f[i, j*] > tau,

and x_f,i otherwise (``variant="paper"``). The official code takes the maximum over the other axis:
for every *position* j the best generated token i* = argmax_i s_f[i, j], and then the reference
token of that number, y_f,j = x_f,j + alpha (x_f,j - x_0,i*) if s_f[i*, j] > tau
(``variant="official"``). Both are here; the paper's is the default.

Deviations, all deliberate:

- Image 0 is left alone bit for bit ((1 + alpha) x - alpha x is x only up to rounding).
- A mask of the reference says which of its tokens may be matched; a token that may match none
  stays. With ``variant="official"`` it says, as there, which positions may be pushed. It may have
  any aspect, where the official FLUX code takes square ones.
- The choice of tokens has no gradient; by default none flows into the reference either.
- A reference image of the user's own (the paper's RAG setting) is image 0 of the batch, put there
  before each step by :func:`place_reference`, clean or at the step's noise level; encoding it is
  left to the model's autoencoder.
- ``against`` also pushes every image from all others, or from their mean: extensions.
- A negative alpha is refused; ``transfuse.ops.push_tokens`` pulls.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods._attention_layers import find_attention
from transfuse.methods._hooks import HookHandle, choose_names
from transfuse.methods.diffusion_control._token_pushing import (
    VARIANTS,
    place_reference,
    push_all_pairs,
    push_from_first,
    push_from_mean,
    push_from_reference,
)

__all__ = [
    "NegToMe",
    "NegToMeOptions",
    "place_reference",
    "push_all_pairs",
    "push_from_first",
    "push_from_mean",
    "push_from_reference",
]

_AGAINST = ("first", "all", "mean")


@dataclass(frozen=True, kw_only=True)
class NegToMeOptions:
    """How and when :class:`NegToMe` pushes.

    Args:
        alpha: Strength, at least 0.
        threshold: Cosine that must be exceeded; None: 0.65 for joint transformers (FLUX), 0.7 else.
        variant: ``"paper"`` or ``"official"``.
        start: First time label at which it acts (sampling goes down from 1000).
        end: Last one; None: 900 for joint transformers, 800 else.
        dropout: Probability with which a pushed token stays as it was.
        seed: Of the private generator of the dropout.
        against: ``"first"``: image 0, as published. ``"all"`` or ``"mean"``: every image against
            the tokens, or the token-wise mean, of all others; without mask, variant ``"paper"``.
        guidance: The batch is [unconditional ; conditional] halves, each with an image 0 of its
            own; odd batches are then refused.
        min_side: Layers of UNets with fewer than ``min_side ** 2`` tokens are left alone.
        backend: Backend of the ops; None chooses.
    """

    alpha: float = 0.9
    threshold: float | None = None
    variant: str = "paper"
    start: float = 1000.0
    end: float | None = None
    dropout: float = 0.0
    seed: int = 0
    against: str = "first"
    guidance: bool = False
    min_side: int = 32
    backend: str | None = None

    def __post_init__(self) -> None:
        if _checks.number("alpha", self.alpha) < 0.0:
            raise ValueError(f"alpha: expected a number of at least 0, got {self.alpha}")
        if self.threshold is not None and not -1.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold: expected a cosine in [-1, 1], got {self.threshold}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {VARIANTS}, got {self.variant!r}")
        if self.against not in _AGAINST:
            raise ValueError(
                f"against: expected one of {', '.join(_AGAINST)}, got {self.against!r}"
            )
        if self.against != "first" and self.variant != "paper":
            raise ValueError(
                f"against: expected 'first' with variant {self.variant!r}, got {self.against!r}"
            )
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability, got {self.dropout}")

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> NegToMe:
        """``NegToMe(model, self, layers=layers)``: what ``patch`` of an integration calls."""
        return NegToMe(model, self, layers=layers)


@register(
    title="Negative Token Merging: Image-based Adversarial Feature Guidance",
    authors=(
        "Jaskirat Singh",
        "Lindsey Li",
        "Weijia Shi",
        "Ranjay Krishna",
        "Yejin Choi",
        "Pang Wei Koh",
        "Michael F. Cohen",
        "Stephen Gould",
        "Liang Zheng",
        "Luke Zettlemoyer",
    ),
    year=2024,
    venue="arXiv",
    arxiv="2412.01339",
    repository="https://github.com/1jsingh/negtome",
    kind="patch",
    ops=("nearest_tokens", "push_tokens", "noise_mix"),
)
class NegToMe(HookHandle):
    """Pushes the images of a batch away from the first, in a model's attention layers.

    Args:
        model: A joint transformer (``transformer_blocks`` and ``single_transformer_blocks``, as
            FLUX), a UNet with ``up_blocks``, or any model with attention layers.
        options: How and when; None: the defaults.
        layers: Names of blocks (joint transformers) or attention layers, or of modules that hold
            them. None: all blocks of a joint transformer, self- and cross-attention of a UNet's
            decoder, all self-attention of another model.
        mask: (H, W) bool, where the reference image may be matched; brought to each layer's grid.

    Raises:
        ValueError: A model without such layers, or a name that matches none.
        TypeError: An entry of ``layers`` is not a name.

    Notes:
        In joint transformers image tokens are pushed after attention and before the output
        projection, text tokens never; elsewhere the layer's output is pushed. One image is left
        alone. ``remove()``, or leaving ``with``, restores the model exactly.
    """

    def __init__(
        self,
        model: nn.Module,
        options: NegToMeOptions | None = None,
        *,
        layers: Sequence[int | str] | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.options = NegToMeOptions() if options is None else options
        if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
            raise ValueError(f"mask: expected a bool tensor (H, W), got {_checks.describe(mask)}")
        if mask is not None and self.options.against != "first":
            raise ValueError("mask: a mask is of image 0, which against='first' alone pushes from")
        self._mask = mask
        self._joint = hasattr(model, "single_transformer_blocks")
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._time: float | None = None
        self._text = 0
        found = self._places(model)
        chosen = choose_names(found, layers, "place to push")
        self._signature = inspect.signature(model.forward)
        parts: list[Any] = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name in chosen:
            parts += found[name]()
        super().__init__(tuple(chosen), parts)

    # ---- where ----------------------------------------------------------------------------------

    def _places(self, model: Any) -> dict[str, Callable[[], list[Any]]]:
        """Name of a place -> what hooks it."""
        places: dict[str, Callable[[], list[Any]]] = {}
        if self._joint:
            for n, block in enumerate(model.transformer_blocks):
                places[f"transformer_blocks.{n}"] = partial(self._hook_joint, block)
            for n, block in enumerate(model.single_transformer_blocks):
                places[f"single_transformer_blocks.{n}"] = partial(self._hook_single, block)
            return places
        decoder = hasattr(model, "up_blocks")
        found = find_attention(model, self_only=not decoder)
        for name, layer in found.items():
            if not decoder or "up_blocks" in name:
                places[name] = partial(self._hook_layer, layer)
        if not places:
            raise ValueError(f"{type(model).__name__} has no self-attention layer to push")
        return places

    def _hook_joint(self, block: Any) -> list[Any]:
        return [block.attn.to_out[0].register_forward_pre_hook(self._joint_hook)]

    def _hook_single(self, block: Any) -> list[Any]:
        return [
            block.register_forward_pre_hook(self._length_hook, with_kwargs=True),
            block.attn.register_forward_hook(self._single_hook),
        ]

    def _hook_layer(self, layer: nn.Module) -> list[Any]:
        return [layer.register_forward_hook(self._layer_hook)]

    # ---- hooks ----------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments.get("timestep")
        if given is None:
            raise ValueError("NegToMe needs a model that is called with a timestep")
        time = float(torch.as_tensor(given).flatten()[0])
        # FLUX counts time from 1 down to 0, UNets from 1000.
        self._time = 1000.0 * time if self._joint else time

    def _joint_hook(self, layer: nn.Module, args: tuple[Any, ...]):
        return (self._push(args[0]), *args[1:])

    def _length_hook(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
        self._text = text.shape[1]

    def _single_hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        text, image = output[:, : self._text], output[:, self._text :]
        return torch.cat([text, self._push(image)], dim=1)

    def _layer_hook(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.dim() != 3 or output.shape[1] < self.options.min_side**2:
            return output
        return self._push(output)

    def _active(self) -> bool:
        end = self.options.end
        if end is None:
            end = 900.0 if self._joint else 800.0
        return self._time is not None and end <= self._time <= self.options.start

    def _push(self, x: Tensor) -> Tensor:
        if not self._active():
            return x
        if not self.options.guidance:
            return self._push_images(x)
        if x.shape[0] % 2 == 1:
            raise ValueError(
                f"guidance=True expects an even batch (two halves), got {x.shape[0]} images"
            )
        return torch.cat([self._push_images(half) for half in x.chunk(2)])

    def _push_images(self, x: Tensor) -> Tensor:
        if x.shape[0] < 2:
            return x
        options = self.options
        threshold = options.threshold
        if threshold is None:
            threshold = 0.65 if self._joint else 0.7
        if options.against != "first":
            push = push_all_pairs if options.against == "all" else push_from_mean
            y = push(x, alpha=options.alpha, threshold=threshold, backend=options.backend)
        else:
            mask = self._mask
            mask = None if mask is None else mask_on_grid(mask, x.shape[1]).to(x.device)
            y = push_from_first(
                x,
                mask=mask,
                variant=options.variant,
                alpha=options.alpha,
                threshold=threshold,
                backend=options.backend,
            )
        if options.dropout == 0.0:
            return y
        drawn = torch.rand(x.shape[:2], generator=self._generator).to(x.device)
        return torch.where((drawn < options.dropout)[..., None], x, y)


def mask_on_grid(mask: Tensor, tokens: int) -> Tensor:
    """A mask (H, W) on the grid of the same aspect with this many tokens, (tokens,), nearest-exact.

    Raises:
        ValueError: No grid of that aspect has so many tokens.
    """
    height = round(mask.shape[0] * math.sqrt(tokens / max(1, mask.numel())))
    width = tokens // height if height > 0 else 0
    if height * width != tokens:
        raise ValueError(
            f"mask: expected the aspect of a grid of {tokens} tokens, got {tuple(mask.shape)}"
        )
    image = mask[None, None].to(torch.float32)
    grid = nn.functional.interpolate(image, size=(height, width), mode="nearest-exact")
    return grid.flatten() > 0.5
