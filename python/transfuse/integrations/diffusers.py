"""transfuse in diffusers: attention processors and patches for UNet-type models.

One line puts a method on a model, ``remove()`` or leaving ``with`` takes it off exactly::

    from transfuse.integrations.diffusers import AttendProcessor, patch

    handle = patch(pipe, AttendProcessor())             # every attention through transfuse.attend
    injector = patch(pipe.unet, StyleInjectionOptions(gamma=0.3))       # style injection
    handle = patch(pipe, TokenMerging(ratio=0.5))       # self-attention on half of the tokens
    handle = patch(pipe, HiDiffusionOptions())          # above the training resolution

Covers models whose layers are diffusers' ``Attention`` (UNets, VAEs, 2-D transformers). Layers with
added key projections, joint text and image attention, or adapter processors are refused by name:
replacing their processor would silently drop what it adds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from transfuse._registry import near_matches
from transfuse.integrations._diffusers_merging import TokenMerging
from transfuse.integrations._require import unusable
from transfuse.methods._attention_layers import (
    attention_scale,
    find_attention,
    layers_named,
    masked_source,
    run_projected_attention,
)
from transfuse.methods._attention_patch import (
    LayerReplacement,
    PatchHandle,
)
from transfuse.methods._hooks import HookHandle
from transfuse.ops import attend

__all__ = [
    "AttendProcessor",
    "AttentionMethod",
    "HookHandle",
    "PatchHandle",
    "TokenMerging",
    "adaptive_guider",
    "patch",
]


class AttentionMethod(Protocol):
    """What :func:`patch` accepts: anything that can attach itself to a model."""

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None): ...


def _require_diffusers():
    try:
        import diffusers
    except Exception as error:
        raise unusable("diffusers", error) from error
    return diffusers


class AttendProcessor:
    """Drop-in attention processor: the layer as it was, its core by ``transfuse.ops.attend``.

    Self- and cross-attention; the attention mask is honoured. Set it with
    ``unet.set_attn_processor(AttendProcessor())``, or with :func:`patch` to be able to remove it.

    Args:
        backend: Backend of ``attend``; None chooses.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.

    Notes:
        Equal to diffusers' default processor up to rounding.
    """

    # diffusers' set_attention_backend and context parallelism look for these two.
    _attention_backend = None
    _parallel_config = None

    idle = False
    plain = True

    def __init__(self, *, backend: str | None = None) -> None:
        _require_diffusers()
        self.backend = backend
        self.name = "attention"
        self.previous: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            source = masked_source(key, value, mask)
            return attend(query, source, scale=attention_scale(attn), backend=self.backend)

        return run_projected_attention(
            attn, core, hidden_states, encoder_hidden_states, attention_mask, temb
        )

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> PatchHandle:
        """Replace the processors of some or all attention layers.

        Args:
            model: A model with attention layers.
            layers: Names of layers, or of modules whose attention layers are all meant; None: all.

        Returns:
            A handle with ``remove()``, usable in ``with``.

        Raises:
            ValueError: No attention layer, a name that matches none, or a layer whose processor
                does more than plain attention.
            TypeError: An entry of ``layers`` is not a name.
        """
        found = find_attention(model, self_only=False)
        if not found:
            raise ValueError(f"{type(model).__name__} has no attention layer")
        chosen = set(found) if layers is None else set()
        if isinstance(layers, str):
            raise TypeError(f"layers must be a sequence of names, got the string {layers!r}")
        for entry in () if layers is None else layers:
            if not isinstance(entry, str):
                raise TypeError(f"layers: expected names of attention layers, got {entry!r}")
            matches = layers_named(entry, found)
            if not matches:
                raise ValueError(
                    f"layers: no attention layer matches {entry!r}; {near_matches(entry, found)}"
                )
            chosen |= matches
        replacements: dict[str, tuple[nn.Module, LayerReplacement]] = {}
        for name, layer in found.items():
            if name in chosen:
                # One copy per layer: each remembers what it replaced.
                replacement = copy.copy(self)
                replacement.name = name
                replacements[name] = (layer, replacement)
        return PatchHandle(replacements)

    def __repr__(self) -> str:
        return f"AttendProcessor(backend={self.backend!r})"


def patch(
    model: object, method: AttentionMethod, *, layers: Sequence[int | str] | None = None
) -> PatchHandle:
    """Put a method on a diffusers model or pipeline.

    Args:
        model: A model, or a pipeline, whose ``unet`` or ``transformer`` is then meant.
        method: :class:`AttendProcessor`, :class:`TokenMerging`, ``StyleInjectionOptions``, or
            anything with ``attach``. What that returns follows the pipeline's scheduler if it can
            (``follow``).
        layers: Which attention layers; None is the method's default. See the method.

    Returns:
        The method's handle: ``remove()`` restores the model exactly (the same processor objects),
        leaving ``with`` does too. For style injection it is the ``StyleInjector``.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        TypeError: Neither a model with attention processors nor a pipeline with such a ``unet``,
            or a method without ``attach``.
        ValueError: The method does not fit the model; see the method.

    Notes:
        Several patches may sit on one model. The last one in runs; a style injector that is in no
        mode passes the call on to the one below. They may be removed in any order.
    """
    _require_diffusers()
    target = getattr(model, "unet", getattr(model, "transformer", model))
    if not isinstance(target, nn.Module) or not hasattr(target, "attn_processors"):
        raise TypeError(
            "model: expected a diffusers model with attention processors, or a pipeline with such "
            f"a unet, got {type(model).__name__}"
        )
    if not hasattr(method, "attach"):
        raise TypeError(
            "method: expected an object with attach(model, layers=...), "
            f"got {type(method).__name__}"
        )
    handle = method.attach(target, layers=layers)
    if hasattr(handle, "follow") and hasattr(model, "scheduler"):
        handle.follow(model)
    return handle


def adaptive_guider(
    *,
    alphas_cumprod: Tensor | None = None,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    threshold: float = 0.991,
    space: str = "original",
    reduce: str = "sample",
    min_guided_steps: int = 0,
    prediction: str = "epsilon",
    start: float = 0.0,
    stop: float = 1.0,
):
    """Adaptive guidance as a guider: ``pipe.update_components(guider=adaptive_guider(...))``.

    Guidance stops sample by sample; once no sample is left, the pipeline evaluates the model once
    per step. (It evaluates whole batches: a sample that stopped early saves nothing by itself.)

    Args:
        alphas_cumprod: table of the scheduler (``pipe.scheduler.alphas_cumprod``), which clean
            latents are computed with. None with ``space="prediction"``.
        guidance_scale: guidance strength.
        guidance_rescale: share of the rescaled prediction, while guided.
        threshold: cosine at which guidance stops.
        space: ``"original"``: cosine of clean latents; ``"prediction"``: of model outputs, for
            models without such a table; then set ``min_guided_steps`` (half the steps is safe).
        reduce: ``"sample"`` or ``"batch"``.
        min_guided_steps: guided steps before the threshold is tested.
        prediction: the scheduler's ``prediction_type``.
        start: share of the steps before guidance starts.
        stop: share of the steps after which it has stopped in any case.

    Returns:
        A ``diffusers.guiders.BaseGuidance`` whose ``guidance`` is the ``AdaptiveGuidance`` (with
        ``switched_at``, ``cosine``). It begins anew at step 0.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        ValueError, TypeError: an option outside its range.
    """
    _require_diffusers()
    from transfuse.integrations._diffusers_guider import AdaptiveGuider

    return AdaptiveGuider(
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        threshold=threshold,
        space=space,
        reduce=reduce,
        min_guided_steps=min_guided_steps,
        prediction=prediction,
        start=start,
        stop=stop,
        alphas_cumprod=alphas_cumprod,
    )
