"""Attention calls planned as data (:class:`Plan`, :class:`Source`): shapes and features, from which
tensors are drawn and the call is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.ops import KV, Blend
from transfuse.testing.inputs import packed
from transfuse.testing.spec import Tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """A blend: weight a number or the shape of a tensor; batch and index of the other tensor."""

    weight: float | Shape
    batch: int | None = None
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """One source of a plan. Tensors are named by the shape they are drawn with."""

    keys: int
    batch: int | None = None
    heads: int | None = None
    group: int = 0
    gate: float | Shape = 1.0
    temperature: float = 1.0
    bias: Shape | None = None
    bias_forbids: bool = False
    bias_float32: bool = False
    mask: Shape | None = None
    mask_kind: str = "random"
    causal: str | None = None
    index: tuple[int, ...] | None = None
    index_dtype: torch.dtype = torch.int64
    blend: Mix | None = None


@dataclass(frozen=True)
class Plan:
    """Shapes and features of one call. ``layout`` is ``"contiguous"``, ``"packed"`` (query, key,
    value of the first source in one buffer) or ``"heads_last"``."""

    batch: int
    heads: int
    queries: int
    width: int
    sources: tuple[Source, ...]
    value_width: int | None = None
    blend: Mix | None = None
    scale: float | None = None
    layout: str = "contiguous"

    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors a gradient must reach, in the order they are drawn."""
        names = ["query", *_mix_names("query_", self.blend)]
        for number, source in enumerate(self.sources):
            names += [f"key{number}", f"value{number}"]
            names += [f"bias{number}"] if source.bias is not None else []
            names += _mix_names(f"key{number}_", source.blend)
            if isinstance(source.gate, tuple) and f"gate{source.group}" not in names:
                names.append(f"gate{source.group}")
        return tuple(names)

    def draw(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensors:
        """The tensors of the call."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(dtype)

        value_width = self.width if self.value_width is None else self.value_width
        tensors = {"query": normal(self.batch, self.heads, self.queries, self.width)}
        _draw_mix(tensors, "query_", self.blend, tensors["query"].shape, normal, uniform)
        for number, source in enumerate(self.sources):
            batch = self.batch if source.batch is None else source.batch
            heads = self.heads if source.heads is None else source.heads
            tensors[f"key{number}"] = normal(batch, heads, source.keys, self.width)
            tensors[f"value{number}"] = normal(batch, heads, source.keys, value_width)
            if source.bias is not None:
                bias = torch.randn(source.bias, generator=generator)
                if source.bias_forbids:
                    forbidden = torch.rand(source.bias, generator=generator) < 0.3
                    bias = bias.masked_fill(forbidden, -torch.inf)
                bias = bias.to(dtype)
                single = source.bias_float32 and dtype != torch.float64
                tensors[f"bias{number}"] = bias.float() if single else bias
            if source.mask is not None:
                tensors[f"mask{number}"] = _draw_mask(source.mask, source.mask_kind, generator)
            if source.index is not None:
                tensors[f"index{number}"] = torch.tensor(source.index, dtype=source.index_dtype)
            shape = (batch, heads, source.keys, self.width)
            _draw_mix(tensors, f"key{number}_", source.blend, shape, normal, uniform)
            if isinstance(source.gate, tuple) and f"gate{source.group}" not in tensors:
                tensors[f"gate{source.group}"] = uniform(*source.gate) + 0.5
        if self.layout == "packed":
            names = ("query", "key0", "value0")
            tensors.update(zip(names, packed(*(tensors[n] for n in names)), strict=True))
        elif self.layout == "heads_last":
            for name, tensor in tensors.items():
                if tensor.dim() == 4:
                    tensors[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def call(self, op: Callable[..., object], tensors: Tensors, backend: str | None) -> object:
        """Build the sources from the tensors and call ``op``."""
        sources = []
        for number, source in enumerate(self.sources):
            gate = tensors.get(f"gate{source.group}", source.gate)
            sources.append(
                KV(
                    tensors[f"key{number}"],
                    tensors[f"value{number}"],
                    group=source.group,
                    gate=gate,
                    temperature=source.temperature,
                    bias=tensors.get(f"bias{number}"),
                    mask=tensors.get(f"mask{number}"),
                    causal=source.causal,
                    index=tensors.get(f"index{number}"),
                    blend=_build_mix(tensors, f"key{number}_", source.blend),
                )
            )
        blend = _build_mix(tensors, "query_", self.blend)
        options = {} if backend is None else {"backend": backend}
        return op(
            tensors["query"],
            sources[0] if len(sources) == 1 else sources,
            blend=blend,
            scale=self.scale,
            **options,
        )


def _mix_names(prefix: str, mix: Mix | None) -> list[str]:
    if mix is None:
        return []
    # A weight of exactly 0 or 1 leaves one partner out, and its gradient is zero by definition.
    return [f"{prefix}other"] + ([f"{prefix}weight"] if isinstance(mix.weight, tuple) else [])


def _draw_mix(
    tensors: Tensors,
    prefix: str,
    mix: Mix | None,
    shape: Sequence[int],
    normal: Callable[..., Tensor],
    uniform: Callable[..., Tensor],
) -> None:
    if mix is None:
        return
    batch = shape[0] if mix.batch is None else mix.batch
    tensors[f"{prefix}other"] = normal(batch, *shape[1:])
    if isinstance(mix.weight, tuple):
        tensors[f"{prefix}weight"] = uniform(*mix.weight)
    if mix.index is not None:
        tensors[f"{prefix}index"] = torch.tensor(mix.index)


def _build_mix(tensors: Tensors, prefix: str, mix: Mix | None) -> Blend | None:
    if mix is None:
        return None
    weight = tensors.get(f"{prefix}weight", mix.weight)
    return Blend(tensors[f"{prefix}other"], weight, tensors.get(f"{prefix}index"))


def _draw_mask(shape: Shape, kind: str, generator: torch.Generator) -> Tensor:
    """``"random"``; ``"rows"``: some rows wholly forbidden; ``"none"``: everything forbidden;
    ``"blocks"``: allowed and forbidden squares of 32, so that whole tiles can be left out."""
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "blocks":
        rows, columns = (-(-n // 32) for n in shape[-2:])
        blocks = torch.rand((*shape[:-2], rows, columns), generator=generator) < 0.5
        mask = blocks.repeat_interleave(32, -2).repeat_interleave(32, -1)
        return mask[..., : shape[-2], : shape[-1]].contiguous()
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind == "rows":
        mask[..., ::3, :] = False
    return mask
