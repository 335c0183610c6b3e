"""Find the attention layers of a model, and run one with another core.

A layer is any module that exposes ``to_q``, ``to_k``, ``to_v``, ``to_out`` and a head count
(``heads``, ``num_heads`` or ``n_heads``): diffusers' ``Attention``, the ``CrossAttention`` of
latent diffusion code, and most hand-written ones. No model library is imported; optional parts
(norms, residual, rescaling, mask preparation) are used where the layer has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse._registry import near_matches
from transfuse.ops import KV

# (query, key, value, mask) with heads split, (B, H, N, D); mask is None, bool (True = may attend)
# or an additive float bias, broadcastable to (B, H, N, M). Returns (B, H, N, Dv).
AttentionCore = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_HEAD_COUNTS = ("heads", "num_heads", "n_heads")


def head_count(layer: nn.Module) -> int:
    """Number of query heads of an attention layer."""
    for name in _HEAD_COUNTS:
        heads = getattr(layer, name, None)
        if isinstance(heads, int):
            return heads
    raise ValueError(f"{type(layer).__name__} exposes none of {', '.join(_HEAD_COUNTS)}")


def is_attention(module: nn.Module) -> bool:
    """Whether a module exposes the four projections and a head count."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS) and any(
        isinstance(getattr(module, name, None), int) for name in _HEAD_COUNTS
    )


def is_self_attention(module: nn.Module) -> bool:
    """Whether an attention layer projects keys from its own input.

    A layer that says so (``is_cross_attention``) is believed; otherwise a key projection of another
    input width than the query projection means cross-attention. Equal widths cannot be told apart
    here: a layer that then receives a context is refused when it runs.
    """
    if not is_attention(module):
        return False
    declared = getattr(module, "is_cross_attention", None)
    if declared is not None:
        return not declared
    widths = [getattr(layer, "in_features", None) for layer in (module.to_q, module.to_k)]
    return widths[0] == widths[1]


def find_attention(model: nn.Module, *, self_only: bool) -> dict[str, nn.Module]:
    """Name -> layer, in the order of ``model.named_modules()``."""
    wanted = is_self_attention if self_only else is_attention
    return {name: module for name, module in model.named_modules() if wanted(module)}


def decoder_block_numbers(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Number of the decoder block that holds each named layer, counted from 0.

    UNets of diffusers (``up_blocks.i.attentions.j``) count one block per resnet of the decoder, as
    the ``output_blocks`` of latent diffusion code do, so both layouts give the same numbers. Layers
    outside the decoder are left out.
    """
    numbers: dict[str, int] = {}
    for name in names:
        match = re.match(r"((?:.*\.)?up_blocks)\.(\d+)\.attentions\.(\d+)\.", name + ".")
        if match is not None:
            blocks, index, position = match[1], int(match[2]), int(match[3])
            decoder: Any = model.get_submodule(blocks)
            numbers[name] = sum(len(block.resnets) for block in decoder[:index]) + position
            continue
        match = re.match(r"(?:.*\.)?output_blocks\.(\d+)\.", name + ".")
        if match is not None:
            numbers[name] = int(match[1])
    return numbers


def layers_named(entry: str, found: Iterable[str]) -> set[str]:
    """Names equal to ``entry`` or lying below it."""
    return {name for name in found if name == entry or name.startswith(entry + ".")}


def select_attention(
    model: nn.Module,
    layers: Sequence[int | str] | None,
    *,
    cross: bool = False,
    default_count: int | None,
) -> dict[str, nn.Module]:
    """Choose self- or cross-attention layers of a model by name, number, or the default rule.

    Args:
        model: The model to search.
        layers: Names (a layer, or a module whose layers of the wanted kind are all meant) and
            numbers (decoder blocks; in a model without a decoder, positions among its layers of
            that kind). The exact name of any attention layer is taken at its word. None: see
            ``default_count``.
        cross: Cross-attention instead of self-attention.
        default_count: The default choice is the last so many layers of the decoder, or of the model
            if it has no decoder; all of them if there are fewer. None: every layer of the model.

    Returns:
        Name -> layer, in the model's order.

    Raises:
        ValueError: No layer of the kind in the model, or a name or number that matches none.
        TypeError: ``layers`` is one string, or an entry is neither name nor number.
    """
    kind = "cross-attention" if cross else "self-attention"
    every = find_attention(model, self_only=False)
    found = {name: layer for name, layer in every.items() if is_self_attention(layer) != cross}
    if not found and layers is None:
        raise ValueError(
            f"{type(model).__name__} has no {kind} layer "
            "(a module with to_q, to_k, to_v, to_out and a head count)"
        )
    numbers = decoder_block_numbers(model, found)
    if not numbers:
        numbers = {name: position for position, name in enumerate(found)}
    if layers is None:
        return (
            found
            if default_count is None
            else {name: found[name] for name in list(numbers)[-default_count:]}
        )
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names or numbers, got the string {layers!r}")
    chosen: set[str] = set()
    for entry in layers:
        if isinstance(entry, str):
            matches = {entry} if entry in every else layers_named(entry, found)
            hint = near_matches(entry, found)
        elif isinstance(entry, int) and not isinstance(entry, bool):
            matches = {name for name, number in numbers.items() if number == entry}
            hint = f"numbers with {kind}: {sorted(set(numbers.values()))}"
        else:
            raise TypeError(f"layers: expected names or numbers, got {entry!r}")
        if not matches:
            raise ValueError(f"layers: no {kind} layer matches {entry!r}; {hint}")
        chosen |= matches
    if not chosen:
        raise ValueError(f"layers is empty: choose at least one {kind} layer")
    return {name: layer for name, layer in every.items() if name in chosen}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H D) to (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _prepare_mask(layer: nn.Module, mask: Tensor, batch: int, tokens: int) -> Tensor:
    """Bring an attention mask to (B, H | 1, N | 1, M)."""
    prepare = getattr(layer, "prepare_attention_mask", None)
    if prepare is None:
        if mask.ndim == 2:
            return mask[:, None, None, :]
        return mask[:, None] if mask.ndim == 3 else mask
    mask = prepare(mask, tokens, batch)
    return mask.view(batch, head_count(layer), -1, mask.shape[-1])


def run_projected_attention(
    layer: Any,
    core: AttentionCore,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """Everything an attention layer does around softmax(q k^T) v, with ``core`` in its middle.

    Spatial norm, (B, C, H, W) inputs, group norm, norm of the context, projections, q and k norms,
    then the core, then output projection, residual and rescaling, each where the layer has it.

    Args:
        layer: An attention layer (see the module docstring).
        core: The attention itself, on split heads.
        hidden_states: (B, N, C), or (B, C, H, W).
        encoder_hidden_states: (B, M, C') context for cross-attention, or None.
        attention_mask: Mask in the form the layer's library uses, or None.
        temb: Time embedding for a spatial norm, or None.

    Returns:
        A tensor of the shape of ``hidden_states`` (last axis: the output width).
    """
    residual = hidden_states
    spatial_norm = getattr(layer, "spatial_norm", None)
    if spatial_norm is not None:
        hidden_states = spatial_norm(hidden_states, temb)

    image_size = hidden_states.shape[-2:] if hidden_states.ndim == 4 else None
    if image_size is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)

    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    mask = attention_mask
    if mask is not None:
        mask = _prepare_mask(layer, mask, context.shape[0], context.shape[1])

    group_norm = getattr(layer, "group_norm", None)
    if group_norm is not None:
        hidden_states = group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if encoder_hidden_states is None:
        context = hidden_states
    elif getattr(layer, "norm_cross", None) is not None:
        context = layer.norm_encoder_hidden_states(encoder_hidden_states)

    heads = head_count(layer)
    query, key, value = layer.to_q(hidden_states), layer.to_k(context), layer.to_v(context)
    # Fewer key heads than query heads is legal (grouped-query attention).
    key_heads = key.shape[-1] * heads // query.shape[-1]
    query, key = split_heads(query, heads), split_heads(key, key_heads)
    value = split_heads(value, key_heads)
    for name in ("norm_q", "norm_k"):
        norm = getattr(layer, name, None)
        if norm is not None and name == "norm_q":
            query = norm(query)
        elif norm is not None:
            key = norm(key)

    out = core(query, key, value, mask).transpose(1, 2).flatten(2).to(query.dtype)

    stages = layer.to_out if isinstance(layer.to_out, nn.ModuleList) else (layer.to_out,)
    for stage in stages:
        out = stage(out)
    if image_size is not None:
        out = out.transpose(1, 2).unflatten(2, image_size)
    if getattr(layer, "residual_connection", False):
        out = out + residual
    factor = getattr(layer, "rescale_output_factor", 1.0)
    return out if factor == 1.0 else out / factor


def masked_source(
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    group: int = 0,
    gate: float | Tensor = 1.0,
    temperature: float = 1.0,
) -> KV:
    """Keys and values under a mask as layers carry it: None, bool (True: attend) or additive."""
    bias = None
    if mask is not None and mask.is_floating_point():
        bias, mask = mask, None
    elif mask is not None and mask.dtype != torch.bool:
        mask = mask.bool()
    return KV(key, value, group=group, gate=gate, temperature=temperature, bias=bias, mask=mask)


def attention_scale(layer: nn.Module) -> float | None:
    """The layer's own logit scale, or None for the usual 1/sqrt(D)."""
    scale = getattr(layer, "scale", None)
    return float(scale) if isinstance(scale, (int, float)) else None
