"""Put replacements in the place of attention layers, several on one layer, and take them off."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from transfuse.methods._attention_layers import attention_scale, run_projected_attention

# Processors that compute plain softmax attention over the layer's own to_q/to_k/to_v. Replacing
# any other one (adapters, added text keys, joint attention) would silently drop what it adds.
PLAIN_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnProcessorNPU",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
        "XLAFlashAttnProcessor2_0",
    }
)


class LayerReplacement(Protocol):
    """What :class:`PatchHandle` puts in the place of a layer's attention.

    ``previous`` is the processor (or forward function) that was there before; the replacement may
    call it, and removal links around it. An ``idle`` replacement only passes the call on, a
    ``plain`` one computes what the layer alone would.
    """

    name: str
    previous: Any
    plain: bool

    @property
    def idle(self) -> bool: ...

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor: ...


def refuse_hidden(replacement: LayerReplacement) -> None:
    """Refuse to run a replacement that would silently switch off another active one below it.

    Raises:
        RuntimeError: A method below on the same layer is active; the message names both.
    """
    below = replacement.previous
    while hasattr(below, "previous"):
        if not below.idle and not below.plain:
            raise RuntimeError(
                f"layer {replacement.name!r}: {type(replacement).__name__} and, below it, "
                f"{type(below).__name__} are both active, and one attention cannot be replaced "
                "twice; use them on different layers or at different times"
            )
        below = below.previous


class SelfAttentionOwner(Protocol):
    """What a :class:`SelfAttentionLayer` asks for the attention itself."""

    def run_layer(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float | None,
    ) -> Tensor: ...


class SelfAttentionLayer:
    """The replacement on one self-attention layer whose attention its patch computes.

    A subclass says when it is ``idle``, and in ``reason`` why it cannot follow a context.

    Args:
        owner: The patch.
        name: The layer's name.
    """

    plain = False
    reason: str

    def __init__(self, owner: SelfAttentionOwner, name: str) -> None:
        self.name = name
        self.previous: Any = None
        self._owner = owner

    @property
    def idle(self) -> bool:
        raise NotImplementedError("a subclass says when it only passes the call on")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        if self.idle:
            return self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is not None:
            raise ValueError(
                f"layer {self.name!r} received a context: it is cross-attention, and "
                f"{self.reason}; leave it out of layers"
            )
        refuse_hidden(self)

        def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return self._owner.run_layer(
                self.name, query, key, value, mask, scale=attention_scale(attn)
            )

        return run_projected_attention(attn, core, hidden_states, None, attention_mask, temb)


def _has_processor(layer: nn.Module) -> bool:
    return hasattr(layer, "processor") and hasattr(layer, "set_processor")


# What plain layers call their context and their mask.
_CONTEXT_NAMES = ("context", "encoder_hidden_states", "key_value_states")
_MASK_NAMES = ("mask", "attention_mask")


class _ForwardSlot:
    """Stands in for ``layer.forward`` and gives a plain layer the processor protocol."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._saved = layer.__dict__.get("forward")  # None: the class's own forward
        self._original = layer.forward
        self._extra_names = list(inspect.signature(self._original).parameters)[1:]
        self._own = self._run_original  # one object: a bound method is made anew at each access
        self.processor: Any = self._own
        functools.update_wrapper(self, self._original)

    def _run_original(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The layer's own forward, called as a processor."""
        named = {}
        for names, value in (
            (_CONTEXT_NAMES, encoder_hidden_states),
            (_MASK_NAMES, attention_mask),
        ):
            if value is not None:
                named[next(name for name in names if name in self._extra_names)] = value
        return self._original(hidden_states, **named)

    # The layer's own argument names are unknown here, so its call is forwarded as it came.
    def __call__(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        processor = self.processor
        while processor is not self._own and processor.idle:
            processor = processor.previous
        if processor is self._own:
            return self._original(hidden_states, *args, **kwargs)
        extras = dict(zip(self._extra_names, args, strict=False)) | kwargs
        given = {name: value for name, value in extras.items() if value is not None}
        known = [
            next((given.pop(name) for name in names if name in given), None)
            for names in (_CONTEXT_NAMES, _MASK_NAMES)
        ]
        if given:
            raise ValueError(
                f"layer {processor.name!r} received {', '.join(given)} beside its input: "
                "only attention with a context and a mask is supported here"
            )
        return processor(self._layer, hidden_states, *known)

    def set_processor(self, processor: Callable[..., Tensor]) -> None:
        self.processor = processor
        if processor is not self._own:
            self._layer.forward = self
        elif self._saved is None:
            del self._layer.forward
        else:
            self._layer.forward = self._saved


def _slot(layer: nn.Module) -> Any:
    """What holds the layer's processor: the layer itself, or a stand-in for its forward."""
    if _has_processor(layer):
        return layer
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, _ForwardSlot) else _ForwardSlot(layer)


def check_replaceable(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose current attention is more than plain attention.

    Raises:
        ValueError: The layer has added key projections, or a processor that adds something.
    """
    if getattr(layer, "added_kv_proj_dim", None) is not None:
        raise ValueError(f"layer {name!r} has added key/value projections, which are not supported")
    if not _has_processor(layer):
        return
    processor = layer.processor
    if type(processor).__name__ in PLAIN_PROCESSORS or hasattr(processor, "previous"):
        return
    raise ValueError(
        f"layer {name!r} uses the processor {type(processor).__name__}: replacing it would drop "
        "what it does beyond plain attention; choose other layers or unload it first"
    )


class PatchHandle:
    """A set of layer replacements that can be taken out again.

    Several handles may sit on the same layer and may be removed in any order: each takes out
    exactly its own replacements. ``with handle: ...`` removes on leaving, also after an exception.
    A replacement that somebody else has overwritten meanwhile is left alone, with a warning.

    Args:
        replacements: Layer name -> (layer, replacement).
    """

    def __init__(self, replacements: dict[str, tuple[nn.Module, LayerReplacement]]) -> None:
        for name, (layer, _) in replacements.items():
            check_replaceable(name, layer)
        self._replacements = replacements
        self._installed = True
        for layer, replacement in replacements.values():
            slot = _slot(layer)
            replacement.previous = slot.processor
            slot.set_processor(replacement)

    @property
    def installed(self) -> bool:
        """Whether the replacements are still in the model."""
        return self._installed

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the replaced layers."""
        return tuple(self._replacements)

    def remove(self) -> None:
        """Give every layer back what it had; a second call does nothing."""
        if not self._installed:
            return
        self._installed = False
        lost = [
            name
            for name, (layer, replacement) in self._replacements.items()
            if not _unlink(layer, replacement)
        ]
        if lost:
            warnings.warn(
                "the attention of these layers was replaced by someone else after this patch, and "
                f"is left as it is: {', '.join(lost)}",
                stacklevel=2,
            )

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "installed" if self._installed else "removed"
        return f"{type(self).__name__}({len(self._replacements)} layers, {state})"


def _unlink(layer: nn.Module, replacement: LayerReplacement) -> bool:
    """Take a replacement out of the chain on its layer; False if it is not there any more."""
    slot = _slot(layer)
    if slot.processor is replacement:
        slot.set_processor(replacement.previous)
        return True
    above = slot.processor
    while above is not None:
        below = getattr(above, "previous", None)
        if below is replacement:
            above.previous = replacement.previous
            return True
        above = below
    return False


Patch = TypeVar("Patch", bound="ModelPatch")


class ModelPatch:
    """What a method on a model offers: its layers, whether it is installed, and its removal.

    A subclass sets ``_handle``, and ``_hooks`` if it registers any.
    """

    _handle: PatchHandle
    _hooks: tuple[Any, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the patched layers, in the model's order."""
        return self._handle.layers

    @property
    def installed(self) -> bool:
        """Whether the model is still patched."""
        return self._handle.installed

    def remove(self) -> None:
        """Restore the model; what the method learnt or stored stays. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._handle.remove()

    def __enter__(self: Patch) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
