"""Benchmarks of ``transfuse.ops.window_attention``.

The alternative is what model code does: roll the image, cut it into windows, attend with SDPA, and
put everything back. A relative bias is looked up and a shift mask added as Swin implementations do;
the mask itself is prepared outside the timing, as models hold it ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from transfuse.ops import KV, _windows, attend, window_attention

from .cases import GRAD, Case, Setup, Target, Tensors, Workload
from .inputs import normal
from .vit import Attention, explicit_attention

FLOOR = (
    "max(2 B H (pairs of query and key in one window) (D + Dv) flops / measured peak, inputs and "
    "outputs moved once / measured copy bandwidth); flops x 3.5 for forward and backward"
)
WORK = {"forward": 1.0, "backward": 2.5, "full": 3.5}


@dataclass(frozen=True)
class Layer:
    """One attention layer with windows."""

    batch: int
    heads: int
    side: int
    width: int
    window: int
    shift: int
    swin: bool = False

    @property
    def tokens(self) -> int:
        return self.side**2


SWIN = Layer(8, 3, 56, 32, 7, 3, swin=True)
SD15 = Layer(2, 8, 64, 40, 32, 8)
SDXL_1024 = Layer(2, 10, 64, 64, 32, 8)
SDXL_2048 = Layer(2, 10, 128, 64, 64, 16)


def _bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cut(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """Roll and cut: (B, H, N, D) -> (B * windows, H, L, D)."""
    batch, heads, _, width = x.shape
    side, window, shift = layer.side, layer.window, layer.shift
    image = x.view(batch, heads, side, side, width).roll((-shift, -shift), (2, 3))
    count = side // window
    cut = image.view(batch, heads, count, window, count, window, width)
    return cut.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, heads, window * window, width)


def _put_back(windows: torch.Tensor, layer: Layer) -> torch.Tensor:
    heads, width = windows.shape[1], windows.shape[3]
    side, window, shift = layer.side, layer.window, layer.shift
    count = side // window
    image = windows.view(layer.batch, count, count, heads, window, window, width)
    image = image.permute(0, 3, 1, 4, 2, 5, 6).reshape(layer.batch, heads, side, side, width)
    return image.roll((shift, shift), (2, 3)).reshape(layer.batch, heads, layer.tokens, width)


def _shift_mask(layer: Layer, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(windows, 1, L, L): -inf between tokens of one window that the seam separates."""
    token = torch.arange(layer.side)
    wrapped = (token < layer.shift).long()
    region = (wrapped[:, None] * 2 + wrapped[None, :]).flatten()[None, None, :, None].float()
    alone = Layer(1, 1, layer.side, 1, layer.window, layer.shift)
    own = _cut(region, alone)[:, 0, :, 0]
    apart = own[:, :, None] != own[:, None, :]
    mask = torch.zeros(apart.shape, dtype=dtype).masked_fill_(apart, float("-inf"))
    return mask[:, None].to(device)


def _windowed(layer: Layer) -> Callable[[Setup], Workload]:
    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        shape = (layer.batch, layer.heads, layer.tokens, layer.width)
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in ("query", "key", "value", GRAD)
        }
        side = 2 * layer.window - 1
        masks: dict[torch.dtype, torch.Tensor] = {}
        if layer.swin:
            tensors["bias"] = normal(
                layer.heads, side, side, generator=generator, dtype=setup.dtype,
                device=setup.device,
            )  # fmt: skip
            masks = {
                dtype: _shift_mask(layer, dtype, setup.device)
                for dtype in (setup.dtype, torch.float64)
            }
        index = _windows.relative_index((layer.window, layer.window), setup.device).flatten()
        slots = layer.window**2
        windows = (layer.side // layer.window) ** 2

        def ours(t: Tensors) -> torch.Tensor:
            return window_attention(
                t["query"],
                t["key"],
                t["value"],
                size=(layer.side, layer.side),
                window=layer.window,
                shift=layer.shift,
                wrap="mask" if layer.swin else "cyclic",
                bias=t.get("bias"),
                backend=setup.backend,
            )

        def added(t: Tensors) -> torch.Tensor | None:
            if not layer.swin:
                return None
            bias = t["bias"].flatten(1)[:, index].view(1, layer.heads, slots, slots)
            mask = masks[t["query"].dtype] + bias
            return mask.expand(layer.batch, -1, -1, -1, -1).flatten(0, 1)

        def sdpa(t: Tensors) -> torch.Tensor:
            query, key, value = (_cut(t[name], layer) for name in ("query", "key", "value"))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=added(t))
            return _put_back(out, layer)

        def reference(t: Tensors) -> torch.Tensor:
            query, key, value = (_cut(t[name], layer) for name in ("query", "key", "value"))
            scores = (query @ key.transpose(-1, -2)) * layer.width**-0.5
            shift = added(t)
            scores = scores if shift is None else scores + shift
            return _put_back(torch.softmax(scores, dim=-1) @ value, layer)

        table = _windows.tables(
            _windows.grid(
                (layer.side, layer.side), layer.window, layer.shift,
                "mask" if layer.swin else "cyclic",
            ),
            torch.device("cpu"),
        ).token  # fmt: skip
        pairs = int((table < layer.tokens).sum(1).square().sum())
        work = 4 * layer.batch * layer.heads * pairs * layer.width
        moved = _bytes_of(*(tensors[n] for n in ("query", "key", "value", "query")))
        return Workload(
            tensors=tensors,
            ours=ours,
            reference=reference,
            expressions={"sdpa": sdpa},
            yardstick="sdpa" if setup.dtype != torch.float32 else None,
            differentiable=("query", "key", "value", *(("bias",) if layer.swin else ())),
            heads=None if layer.swin else layer.heads,
            flops=round(WORK[setup.mode] * work),
            bytes=moved if setup.mode == "forward" else 2 * moved,
            floor_note=FLOOR,
            inputs="standard normal",
            shape={
                "query": list(shape),
                "size": [layer.side, layer.side],
                "window": layer.window,
                "shift": layer.shift,
                "windows": windows,
                "bias": "relative" if layer.swin else None,
            },
        )

    return make


def _global(layer: Layer) -> Callable[[Setup], Workload]:
    """The same layer without windows, to compare with in one run."""

    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        shape = (layer.batch, layer.heads, layer.tokens, layer.width)
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in ("query", "key", "value", GRAD)
        }

        def on_qkv(attention: Attention) -> Callable[[Tensors], torch.Tensor]:
            return lambda t: attention(t["query"], t["key"], t["value"])

        work = 4 * layer.batch * layer.heads * layer.tokens**2 * layer.width
        return Workload(
            tensors=tensors,
            ours=on_qkv(lambda q, k, v: attend(q, KV(k, v), backend=setup.backend)),
            reference=on_qkv(explicit_attention),
            expressions={"sdpa": on_qkv(F.scaled_dot_product_attention)},
            yardstick="sdpa" if setup.dtype != torch.float32 else None,
            differentiable=("query", "key", "value"),
            heads=layer.heads,
            flops=round(WORK[setup.mode] * work),
            bytes=_bytes_of(*tensors.values()),
            floor_note=FLOOR,
            inputs="standard normal",
            shape={"query": list(shape), "keys": layer.tokens},
        )

    return make


SDPA = ("sdpa", "sdpa-compile")
DERIVATIVES = ("forward", "backward", "full")

CASES = (
    Case(
        name="swin",
        title="Swin stage 1, 7 x 7 windows, shifted, relative bias",
        make=_windowed(SWIN),
        targets=(
            Target(dtype="float32", bar=3.0, quick=6),
            Target(dtype="bfloat16"),
            Target(dtype="float32", mode="full"),
        ),
        peers=SDPA,
        quick_peers=("sdpa",),
        modes=DERIVATIVES,
    ),
    Case(
        name="sd15",
        title="SD1.5 64 x 64, four shifted windows",
        make=_windowed(SD15),
        targets=(Target(dtype="float32", bar=1.25), Target(dtype="bfloat16", bar=2.0)),
        peers=SDPA,
        modes=DERIVATIVES,
    ),
    Case(
        name="sdxl",
        title="SDXL 64 x 64, four shifted windows",
        make=_windowed(SDXL_1024),
        targets=(Target(dtype="float32"),),
        peers=SDPA,
        modes=DERIVATIVES,
    ),
    Case(
        name="sdxl-global",
        title="SDXL 64 x 64 without windows",
        make=_global(SDXL_1024),
        targets=(Target(dtype="float32"),),
        peers=("sdpa",),
    ),
    Case(
        name="sdxl-2048",
        title="SDXL 128 x 128, four shifted windows",
        make=_windowed(SDXL_2048),
        targets=(Target(dtype="bfloat16", bar=2.0),),
        peers=SDPA,
        modes=DERIVATIVES,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_windowed(Layer(1, 2, 8, 4, 4, 2, swin=True)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("sdpa", "natten"),
        quick_peers=("sdpa", "natten"),
        modes=DERIVATIVES,
        hidden=True,
    ),
)
