"""EasyRef: Omni-Generalized Group Image Reference for Diffusion Models via Multimodal LLM.

Zhuofan Zong, Dongzhi Jiang, Bingqi Ma, Guanglu Song, Hao Shao, Dazhong Shen, Yu Liu, Hongsheng Li;
ICML 2025; arXiv 2412.09618; official code TempleX98/EasyRef.

A multimodal language model reads a group of images and the prompt into hidden states H. K learnable
references r are appended, the last layer alone runs on [H ; r], and its K last rows, projected, are
the reference context P (B, K, C). Every cross-attention of the denoiser then computes

    out = softmax(Q K_t^T / sqrt(d)) V_t + lambda softmax(Q K_r^T / sqrt(d)) V_r,
    K_r = P W_k,  V_r = P W_v,

two separate softmaxes under one query, before the layer's output projection.

Deviations from the official code, all deliberate:

- The last layer attends in both directions, as intended. The released code loses that under torch's
  attention, so its weights know causal references (``causal_references=True``).
- P travels beside the text context and not behind it, so that no text token can be taken for a
  reference, and networks that share the context (ControlNet) need no stripping. ``appended=K``
  is the official layout: the last K tokens of the context are the references.
- A mask belongs to its branch: text masks work. The official processor applies one made for text
  and references to the text alone, which fails.
- K_r and V_r are computed once per P and kept while P and the weights stay the same.
- The map Q softmax(K_r^T), which the official processor forms in every layer, is not formed.
- Low-rank adapters of the fine-tuned stages belong on the layer's own projections (peft, or
  ``LowRankAdapters``): the references then use the adapted query, and W_k, W_v have none.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods._attention_layers import (
    attention_scale,
    masked_source,
    run_projected_attention,
    select_attention,
    split_heads,
)
from transfuse.methods._attention_patch import (
    ModelPatch,
    PatchHandle,
    refuse_hidden,
)
from transfuse.methods.diffusion_control._references import (
    Drops,
    PaddedGroups,
    ProjectionMLP,
    ReferenceAggregator,
    pad_groups,
    reference_mask,
    sample_drops,
)
from transfuse.ops import KV, attend

__all__ = [
    "Branch",
    "Drops",
    "EasyRef",
    "EasyRefOptions",
    "PaddedGroups",
    "ProjectionMLP",
    "ReferenceAggregator",
    "decoupled_attention",
    "pad_groups",
    "reference_mask",
    "sample_drops",
]


class Branch(NamedTuple):
    """One softmax of :func:`decoupled_attention`.

    Args:
        key: (1 or B, H, M, D).
        value: (1 or B, H, M, Dv).
        weight: lambda: a number, or a tensor (B,), (B, H) or (B, 1 or H, 1 or N).
        mask: bool (True = may attend) or additive, broadcastable to (B, H, N, M); or None.
    """

    key: Tensor
    value: Tensor
    weight: float | Tensor = 1.0
    mask: Tensor | None = None


def _gate(name: str, weight: object, query: Tensor) -> float | Tensor:
    if not isinstance(weight, Tensor):
        return _checks.number(name, weight)
    if weight.ndim > 3:
        raise ValueError(
            f"{name}: expected a number, (B,), (B, H) or (B, 1 or H, 1 or N) for query "
            f"{tuple(query.shape)}, got {tuple(weight.shape)}"
        )
    gate = weight.reshape(*weight.shape, *[1] * (3 - weight.ndim)) if weight.ndim else weight
    return _checks.coefficient(name, gate, tuple(query.shape[:3]), ("B", "H", "N"), "query", query)


def decoupled_attention(
    query: Tensor,
    branches: Sequence[Branch | tuple],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of one query to several key sets, each under its own softmax.

    .. math:: \mathrm{out} = \sum_i \lambda_i \, \mathrm{softmax}(\mathrm{scale}\, q k_i^\top) v_i

    Args:
        query: (B, H, N, D).
        branches: :class:`Branch` or (key, value[, weight[, mask]]) tuples; the first is the text's
            by custom. A branch whose weight is the number 0 is left out: what remains is computed
            as if it had never been there, bit for bit.
        scale: Logit scale; None is 1/sqrt(D).
        backend: Backend of ``transfuse.ops.attend``.

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError, TypeError: No branch, or parts that do not fit; the message names them.

    Notes:
        One call of ``attend``, one group per branch: the query is read once and no map exists.

    Reference:
        arXiv 2412.09618, equation 4; the decoupled attention of IP-Adapter, arXiv 2308.06721.

    Example:
        >>> q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
        >>> decoupled_attention(q, [(k, v), (k[:1, :, :3], v[:1, :, :3], 0.5)]).shape
        torch.Size([2, 2, 6, 4])
    """
    _checks.tensor("query", query, ("B", "H", "N", "D"))
    if isinstance(branches, (Branch, Tensor)) or len(branches) == 0:
        raise ValueError("branches: expected a sequence of at least one branch")
    sources: list[KV] = []
    width = 0
    for number, entry in enumerate(branches):
        name = f"branches[{number}]"
        if not isinstance(entry, tuple) or not 2 <= len(entry) <= 4:
            raise TypeError(
                f"{name}: expected (key, value[, weight[, mask]]), got {_checks.describe(entry)}"
            )
        branch = Branch(*entry)
        value = _checks.tensor(f"{name}.value", branch.value, ("B", "H", "M", "D"))
        width = value.shape[3]
        gate = _gate(f"{name}.weight", branch.weight, query)
        if not isinstance(gate, Tensor) and gate == 0.0:
            continue
        group = len(sources)
        sources.append(masked_source(branch.key, value, branch.mask, group=group, gate=gate))
    if not sources:
        return query.new_zeros(*query.shape[:3], width)
    return attend(query, sources, scale=scale, backend=backend)


@dataclass(frozen=True, kw_only=True)
class EasyRefOptions:
    """Options of :class:`EasyRef`.

    Args:
        adapters: Number of reference contexts, each with its own W_k and W_v.
        appended: K when the last K tokens of the text context are the references (the official
            layout, one adapter); None when they are given to :meth:`EasyRef.set_references`.
        weight: lambda of appended references.
        backend: Backend of ``transfuse.ops.attend``; None chooses.

    Raises:
        ValueError, TypeError: A value outside its range.
    """

    adapters: int = 1
    appended: int | None = None
    weight: float = 1.0
    backend: str | None = None

    def __post_init__(self) -> None:
        _checks.positive_int("adapters", self.adapters)
        _checks.number("weight", self.weight)
        if self.appended is not None:
            _checks.positive_int("appended", self.appended)
            if self.adapters != 1:
                raise ValueError(
                    f"adapters: appended references belong to one adapter, got {self.adapters}"
                )

    def attach(self, model: nn.Module, *, layers: Sequence[int | str] | None = None) -> EasyRef:
        """Patch a model with these options: ``EasyRef(model, options=self, ...)``."""
        return EasyRef(model, layers=layers, options=self)


def _copy_of(projection: Any) -> nn.Linear:
    weight = projection.weight
    copy = nn.Linear(
        weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        copy.weight.copy_(weight)
    return copy


class _Projections(nn.Module):
    """W_k and W_v of one adapter in one layer, with the last keys and values they made."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # Started from the text's projections, as adapters of this kind are.
        self.to_k_ref, self.to_v_ref = (_copy_of(own) for own in (layer.to_k, layer.to_v))
        self._source: weakref.ref[Tensor] | None = None
        self._state: tuple | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, context: Tensor, width: int, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hk, K, D), D = ``width``; ``context`` is a part of ``whole``."""
        weights = [self.to_k_ref.weight, self.to_v_ref.weight]
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (context, *weights))
        if tracked or any(x.is_inference() for x in (whole, *weights)):
            return self._project(context, width)
        # An in-place change raises a tensor's version; module.to() replaces what it points to.
        state = tuple((x._version, x.data_ptr(), x.dtype, x.device) for x in (whole, *weights))
        source = None if self._source is None else self._source()
        if source is not whole or state != self._state or self._kept is None:
            self._source, self._state = weakref.ref(whole), state
            self._kept = self._project(context, width)
        return self._kept

    def _project(self, context: Tensor, width: int) -> tuple[Tensor, Tensor]:
        # Fewer key heads than query heads is legal (grouped-query attention).
        heads = self.to_k_ref.out_features // width
        context = context.to(self.to_k_ref.weight)
        return (
            split_heads(self.to_k_ref(context), heads),
            split_heads(self.to_v_ref(context), heads),
        )

    def nbytes(self) -> int:
        return 0 if self._kept is None else sum(x.nbytes for x in self._kept)


class _DecoupledLayer:
    """The replacement on one cross-attention layer."""

    plain = False

    def __init__(self, owner: EasyRef, name: str, projections: Sequence[_Projections]) -> None:
        self.name = name
        self.previous: Any = None
        self._owner = owner
        self._projections = projections

    @property
    def idle(self) -> bool:
        return not self._owner.active

    def text_part(self, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The part of the context, and of its mask, that the text's softmax runs over."""
        appended = self._owner.options.appended
        if appended is None:
            return context, mask
        if context.shape[1] <= appended:
            raise ValueError(
                f"layer {self.name!r}: expected a context of more than {appended} tokens (text, "
                f"then {appended} references), got {tuple(context.shape)}"
            )
        length = context.shape[1] - appended
        if mask is not None and mask.shape[-1] == context.shape[1]:
            mask = mask[..., :length]
        return context[:, :length], mask

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
        refuse_hidden(self)
        options = self._owner.options
        if encoder_hidden_states is None:
            raise ValueError(
                f"layer {self.name!r} received no context: references are for cross-attention"
            )
        whole = encoder_hidden_states
        text, text_mask = self.text_part(whole, attention_mask)
        if options.appended is None:
            references = self._owner.references
        else:
            references = [(whole[:, text.shape[1] :], whole, options.weight)]

        def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            branches = [Branch(key, value, 1.0, mask)]
            for projections, (context, source, weight) in zip(
                self._projections, references, strict=True
            ):
                if isinstance(weight, Tensor):
                    weight = weight.to(query.device, query.dtype)
                elif weight == 0.0:
                    continue
                own = projections(context, query.shape[-1], source)
                branches.append(Branch(own[0].to(query.dtype), own[1].to(query.dtype), weight))
            try:
                return decoupled_attention(
                    query, branches, scale=attention_scale(attn), backend=options.backend
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer {self.name!r}: {error}") from error

        return run_projected_attention(attn, core, hidden_states, text, text_mask, temb)


@register(
    title="EasyRef: Omni-Generalized Group Image Reference for Diffusion Models via Multimodal LLM",
    authors=(
        "Zhuofan Zong",
        "Dongzhi Jiang",
        "Bingqi Ma",
        "Guanglu Song",
        "Hao Shao",
        "Dazhong Shen",
        "Yu Liu",
        "Hongsheng Li",
    ),
    year=2025,
    venue="ICML",
    arxiv="2412.09618",
    repository="https://github.com/TempleX98/EasyRef",
    kind="patch",
    ops=("attend",),
)
class EasyRef(nn.Module, ModelPatch):
    """Adds reference contexts to the cross-attention of a denoising model.

    Constructing it patches the layers; :meth:`remove`, or leaving ``with``, restores the model
    exactly. Its parameters are the W_k and W_v of every layer and adapter, started from the text's
    projections; its ``state_dict`` holds nothing else. Without references the model runs as before.

    Args:
        model: A diffusers UNet, an LDM UNet, or any module whose attention layers expose to_q,
            to_k, to_v, to_out and a head count.
        layers: Cross-attention layers: names and decoder block numbers; None: all of the model.
        options: See :class:`EasyRefOptions`.

    Raises:
        ValueError: No cross-attention, a layer that matches nothing, or a layer whose present
            processor does more than plain attention.

    Example:
        >>> class Layer(nn.Module):
        ...     heads, is_cross_attention = 2, True
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in "qkvo")
        ...     def forward(self, x, encoder_hidden_states):
        ...         raise NotImplementedError("the patch computes it")
        >>> layer = Layer()
        >>> with torch.no_grad(), EasyRef(layer).set_references(torch.randn(1, 4, 8)):
        ...     y = layer(torch.randn(2, 5, 8), torch.randn(2, 7, 8))
        >>> y.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int | str] | None = None,
        options: EasyRefOptions | None = None,
    ) -> None:
        super().__init__()
        self.options = EasyRefOptions() if options is None else options
        chosen = select_attention(model, layers, cross=True, default_count=None)
        # adapter -> layer -> its projections; the module list is there for the parameters
        self._projections = [
            [_Projections(layer) for layer in chosen.values()] for _ in range(self.options.adapters)
        ]
        self.adapters = nn.ModuleList(nn.ModuleList(own) for own in self._projections)
        self._references: list[tuple[Tensor, Tensor, float | Tensor]] = []
        self._handle = PatchHandle(
            {
                name: (
                    layer,
                    _DecoupledLayer(self, name, [own[i] for own in self._projections]),
                )
                for i, (name, layer) in enumerate(chosen.items())
            }
        )

    @property
    def active(self) -> bool:
        """Whether model calls use references."""
        return self.options.appended is not None or bool(self._references)

    @property
    def references(self) -> list[tuple[Tensor, Tensor, float | Tensor]]:
        """(context, tensor it is a part of, weight) of each adapter."""
        return self._references

    def set_references(
        self,
        references: Tensor | Sequence[Tensor],
        weight: float | Tensor | Sequence[float | Tensor] = 1.0,
    ) -> EasyRef:
        """References for the model calls to come.

        Args:
            references: P (1 or B, K, C), or one for each adapter. Under classifier-free guidance B
                counts both halves: the unconditional one takes the blank image's P, not zeros.
            weight: lambda, or one for each adapter; see :class:`Branch`.

        Returns:
            The patch itself.

        Raises:
            ValueError, TypeError: Not one P for each adapter, a width that does not fit, a weight
                that is not finite, or references appended to the context already.
        """
        if self.options.appended is not None:
            raise ValueError("references: appended to the context already (option appended)")
        count = len(self.adapters)
        given = [references] if isinstance(references, Tensor) else list(references)
        single = isinstance(weight, (float, int, Tensor))
        weights = [weight] * count if single else list(weight)  # type: ignore[arg-type]
        for name, entries in (("references", given), ("weight", weights)):
            if len(entries) != count:
                raise ValueError(f"{name}: expected {count} (adapters), got {len(entries)}")
        checked: list[tuple[Tensor, Tensor, float | Tensor]] = []
        for number, (context, own) in enumerate(zip(given, weights, strict=True)):
            name = f"references[{number}]"
            _checks.tensor(name, context, ("B", "K", "C"))
            _checks.floating(name, context)
            for projections in self._projections[number]:
                width = projections.to_k_ref.in_features
                _checks.size(name, context, 2, width, "context width of the model")
            if not isinstance(own, Tensor):
                own = _checks.number(f"weight[{number}]", own)
            elif not bool(own.isfinite().all()):
                raise ValueError(f"weight[{number}]: expected finite values")
            checked.append((context, context, own))
        self._references = checked
        return self

    def clear(self) -> None:
        """Forget the references: the model runs as before."""
        self._references = []

    def cached_bytes(self) -> int:
        """Bytes of the reference keys and values kept between model calls."""
        return sum(one.nbytes() for own in self._projections for one in own)

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return (
            f"EasyRef({len(self.layers)} layers, {state}, adapters={len(self.adapters)}, "
            f"appended={self.options.appended}, active={self.active})"
        )
