"""transfuse in transformers: reference tokens through the last layer of a language model.

    decoder = ReferenceDecoder(model.language_model, 64)
    references = projection(decoder(inputs_embeds=embeddings, attention_mask=mask))   # (B, 64, C)

Works on decoder-only models whose core has ``layers``, ``norm`` and ``rotary_emb`` (Llama, Qwen2,
the text part of Qwen2-VL, and those built like them). transformers itself is not imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.methods.diffusion_control.easy_ref import ReferenceAggregator

__all__ = ["ReferenceDecoder"]

_MASKED_BY_HAND = ("sdpa", "eager")


class ReferenceDecoder(ReferenceAggregator):
    """EasyRef's aggregation in a language model: references join before its last layer.

    All layers but the last run causally on the input, as always; the last one and the final norm
    run on [H ; r] under the mask of ``reference_mask``, and the K last rows come back.

    Args:
        model: The model's core (``LlamaModel``, ``Qwen2Model``, ``Qwen2VLTextModel``). It becomes a
            submodule: ``requires_grad_`` and ``state_dict`` reach it.
        num_references: K.
        causal_references: As the released weights were trained; see ``ReferenceAggregator``.
        generator: For the initial references.

    Raises:
        TypeError: The model lacks ``layers``, ``norm`` or ``rotary_emb``.
        ValueError: An attention implementation that does not take an explicit mask.

    Notes:
        References take the positions after the last one of the input (in all axes of a
        multi-dimensional position). The model is changed only while it runs.
    """

    def __init__(
        self,
        model: nn.Module,
        num_references: int,
        *,
        causal_references: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        absent = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(model, name)]
        if absent:
            raise TypeError(
                "model: expected the core of a decoder-only language model, got "
                f"{type(model).__name__}, which has no {', '.join(absent)}"
            )
        config: Any = model.config
        super().__init__(
            model,
            num_references,
            config.hidden_size,
            causal_references=causal_references,
            generator=generator,
        )
        self._check_attention()

    def _check_attention(self) -> None:
        model: Any = self.layer
        name = model.config._attn_implementation
        if name not in _MASKED_BY_HAND:
            raise ValueError(
                f"model: expected attention {' or '.join(_MASKED_BY_HAND)} (the last layer needs "
                f"an explicit mask), got {name!r}"
            )

    def forward(  # type: ignore[override]
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The K reference rows (B, K, D), after the final norm.

        Args:
            input_ids: (B, L); this or ``inputs_embeds``.
            inputs_embeds: (B, L, D): with the image tokens scattered in.
            attention_mask: (B, L), nonzero where a token exists; None: everywhere.
            position_ids: As the model takes them; None: its own.
        """
        self._check_attention()
        valid = None if attention_mask is None else attention_mask.bool()
        model: Any = self.layer
        with self._joined(valid):
            out = model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            )
        return out.last_hidden_state[:, -self.references.shape[0] :]

    @contextlib.contextmanager
    def _joined(self, valid: Tensor | None) -> Iterator[None]:
        """While this lasts, the last layer runs on the longer sequence."""
        model: Any = self.layer
        positions: list[Tensor] = []

        def before_rotary(module: nn.Module, args: tuple, kwargs: dict) -> None:
            positions.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

        def before_last(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            joined, allowed = self.join(args[0], valid)
            known = positions[0]
            steps = torch.arange(1, self.references.shape[0] + 1, device=known.device)
            after = known.amax(dim=-1, keepdim=True) + steps
            longer = torch.cat([known, after], dim=-1)
            lowest = torch.finfo(joined.dtype).min
            mask = torch.zeros_like(allowed, dtype=joined.dtype).masked_fill(~allowed, lowest)
            kwargs = {
                **kwargs,
                "attention_mask": mask,
                "position_embeddings": model.rotary_emb(joined, longer),
            }
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = longer
            return (joined, *args[1:]), kwargs

        hooks = [
            model.rotary_emb.register_forward_pre_hook(before_rotary, with_kwargs=True),
            model.layers[-1].register_forward_pre_hook(before_last, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
