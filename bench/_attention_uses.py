"""Attention as methods use it: style injection, masked blocks, references, adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from transfuse.ops import KV, Blend, attend

from ._attention_calls import (
    FLOOR,
    SHAPES,
    bytes_of,
    call_flex,
    flops,
    map_bytes,
    moved,
    yardstick,
)
from .cases import GRAD, Expression, Setup, Tensors, Workload
from .inputs import DESCRIPTION, normal, photo_heads
from .vit import Attention, explicit_attention

MASK_BLOCK = 128
GAMMA, TEMPERATURE = 0.75, 1.5
ADAPTER_GATE = 0.6

# Style injection: a blended query against the keys and values of another image.


def _style(tensors: Tensors, setup: Setup, *, inputs: str) -> Workload:
    batch, heads, count, width = tensors["query"].shape
    scale = TEMPERATURE * width**-0.5

    def ours(t: Tensors) -> torch.Tensor:
        # The style's batch of one is broadcast by the op.
        return attend(
            t["query"],
            KV(t["key"], t["value"], temperature=TEMPERATURE),
            blend=Blend(t["content"], GAMMA),
            backend=setup.backend,
        )

    def mixed(t: Tensors) -> torch.Tensor:
        return torch.lerp(t["query"], t["content"], GAMMA)

    def sdpa(t: Tensors) -> torch.Tensor:
        key, value = (t[name].expand(batch, -1, -1, -1) for name in ("key", "value"))
        return F.scaled_dot_product_attention(mixed(t), key, value, scale=scale)

    def flex(t: Tensors) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        key, value = (t[name].expand(batch, -1, -1, -1) for name in ("key", "value"))
        return flex_attention(mixed(t), key, value, scale=scale)

    def reference(t: Tensors) -> torch.Tensor:
        query = (1 - GAMMA) * t["query"] + GAMMA * t["content"]
        return explicit_attention(TEMPERATURE * query, t["key"], t["value"])

    return Workload(
        tensors=tensors,
        ours=ours,
        reference=reference,
        expressions={"sdpa": sdpa, "explicit": reference, "flex": flex},
        yardstick=yardstick(setup),
        differentiable=("query", "content", "key", "value"),
        heads=heads,
        flops=flops(setup.mode, batch, heads, count * tensors["key"].shape[2], width),
        bytes=moved(
            setup.mode,
            bytes_of(*(tensors[name] for name in ("query", "content", "key", "value"))),
            bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs=inputs,
        shape={
            "query": [batch, heads, count, width],
            "keys": tensors["key"].shape[2],
            "blend": GAMMA,
            "temperature": TEMPERATURE,
        },
        needs_bytes={
            "explicit": map_bytes(batch, heads, count, count, copies=3),
            "flex": map_bytes(batch, heads, count, count, copies=4),
        },
    )


def style_random(setup: Setup) -> Workload:
    batch, heads, count, width = SHAPES["a"]
    generator = setup.generator()
    sizes = {"query": batch, "content": batch, "key": 1, "value": 1, GRAD: batch}
    tensors = {
        name: normal(
            size, heads, count, width, generator=generator, dtype=setup.dtype, device=setup.device
        )
        for name, size in sizes.items()
    }
    return _style(tensors, setup, inputs="standard normal; one style for the whole batch")


def style_photo(size: tuple[int, int]) -> Callable[[Setup], Workload]:
    _, heads, _, width = SHAPES["a"]

    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        # One set of projection weights for both pictures, as one network would have.
        seed = int(torch.randint(2**31, (1,), generator=generator))

        def heads_of(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return photo_heads(
                name,
                size=size,
                heads=heads,
                width=width,
                generator=torch.Generator().manual_seed(seed),
                dtype=setup.dtype,
                device=setup.device,
            )

        content, _, _ = heads_of("china")
        _, key, value = heads_of("flower")
        noise = normal(*content.shape, generator=generator, dtype=setup.dtype, device=setup.device)
        grad = normal(*content.shape, generator=generator, dtype=setup.dtype, device=setup.device)
        tensors = {
            # The query of the image being generated: the content's, half drowned in noise.
            "query": torch.lerp(content, noise, 0.5),
            "content": content,
            "key": key,
            "value": value,
            GRAD: grad,
        }
        return _style(tensors, setup, inputs=DESCRIPTION)

    return make


# Half of the key blocks masked.


def block_mask(setup: Setup) -> Workload:
    batch, heads, count, width = SHAPES["b"]
    generator = setup.generator()
    tensors = {
        name: normal(
            batch, heads, count, width, generator=generator, dtype=setup.dtype, device=setup.device
        )
        for name in ("query", "key", "value", GRAD)
    }
    blocks = count // MASK_BLOCK
    order = torch.rand(blocks, blocks, generator=generator).argsort(dim=-1)
    # Exactly half of every row of blocks.
    table = (order < blocks // 2).to(setup.device)
    mask = table.repeat_interleave(MASK_BLOCK, 0).repeat_interleave(MASK_BLOCK, 1)
    tensors["mask"] = mask
    bias = torch.zeros(mask.shape, dtype=setup.dtype, device=setup.device)
    bias.masked_fill_(~mask, float("-inf"))
    prepared: list[object] = []

    def ours(t: Tensors) -> torch.Tensor:
        source = KV(t["key"], t["value"], mask=t["mask"])
        return attend(t["query"], source, backend=setup.backend)

    def sdpa(t: Tensors) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["query"], t["key"], t["value"], attn_mask=t["mask"])

    def sdpa_bias(t: Tensors) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["query"], t["key"], t["value"], attn_mask=bias)

    def blocks_of_flex() -> object:
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            lambda b, h, q, k: table[q // MASK_BLOCK, k // MASK_BLOCK],
            B=None,
            H=None,
            Q_LEN=count,
            KV_LEN=count,
            device=setup.device,
            BLOCK_SIZE=MASK_BLOCK,
        )

    def flex(t: Tensors) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(t["query"], t["key"], t["value"], block_mask=prepared[0])

    def reference(t: Tensors) -> torch.Tensor:
        scores = (t["query"] @ t["key"].transpose(-1, -2)) * width**-0.5
        scores = scores.masked_fill(~t["mask"], float("-inf"))
        return torch.softmax(scores, dim=-1) @ t["value"]

    prepared.append(blocks_of_flex())
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=reference,
        expressions={"sdpa": sdpa, "sdpa-bias": sdpa_bias, "flex": flex},
        yardstick=yardstick(setup),
        differentiable=("query", "key", "value"),
        heads=heads,
        flops=flops(setup.mode, batch, heads, count * count // 2, width),
        bytes=moved(
            setup.mode,
            3 * bytes_of(tensors["query"]) + bytes_of(mask),
            bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs=f"standard normal; half of all {MASK_BLOCK} x {MASK_BLOCK} blocks masked at random",
        shape={"query": [batch, heads, count, width], "keys": count, "mask": "50 % of blocks"},
        needs_bytes={"flex": map_bytes(batch, heads, count, count, copies=4)},
    )


# Own keys and two references in one softmax.


def references(setup: Setup) -> Workload:
    batch, heads, count, width = SHAPES["b"]
    generator = setup.generator()
    names = ["query", GRAD] + [f"{part}{i}" for i in range(3) for part in ("key", "value")]
    tensors = {
        name: normal(
            batch, heads, count, width, generator=generator, dtype=setup.dtype, device=setup.device
        )
        for name in names
    }

    def ours(t: Tensors) -> torch.Tensor:
        sources = [KV(t[f"key{i}"], t[f"value{i}"]) for i in range(3)]
        return attend(t["query"], sources, backend=setup.backend)

    def joined(t: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.cat([t[f"key{i}"] for i in range(3)], dim=2),
            torch.cat([t[f"value{i}"] for i in range(3)], dim=2),
        )

    def sdpa(t: Tensors) -> torch.Tensor:
        return F.scaled_dot_product_attention(t["query"], *joined(t))

    def flex(t: Tensors) -> torch.Tensor:
        return call_flex(t["query"], *joined(t))

    def reference(t: Tensors) -> torch.Tensor:
        return explicit_attention(t["query"], *joined(t))

    inputs = tuple(name for name in names if name != GRAD)
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=reference,
        expressions={"sdpa": sdpa, "flex": flex},
        yardstick=yardstick(setup),
        differentiable=inputs,
        heads=heads,
        flops=flops(setup.mode, batch, heads, 3 * count * count, width),
        bytes=moved(
            setup.mode,
            bytes_of(*(tensors[name] for name in inputs)),
            bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs="standard normal; the image's own keys and those of two references",
        shape={"query": [batch, heads, count, width], "keys": [count] * 3},
        needs_bytes={"flex": map_bytes(batch, heads, count, 3 * count, copies=4)},
    )


# Adapter attention: text and image keys as two gated groups.


def adapter(setup: Setup) -> Workload:
    batch, heads, count, width = 2, 10, 4096, 64
    text, image = 77, 16
    generator = setup.generator()
    sizes = {"query": count, "text_key": text, "text_value": text, "image_key": image,
             "image_value": image, GRAD: count}  # fmt: skip
    tensors = {
        name: normal(
            batch, heads, size, width, generator=generator, dtype=setup.dtype, device=setup.device
        )
        for name, size in sizes.items()
    }

    def ours(t: Tensors) -> torch.Tensor:
        return attend(
            t["query"],
            [
                KV(t["text_key"], t["text_value"], group=0),
                KV(t["image_key"], t["image_value"], group=1, gate=ADAPTER_GATE),
            ],
            backend=setup.backend,
        )

    def two_calls(attention: Attention) -> Expression:
        def run(t: Tensors) -> torch.Tensor:
            first = attention(t["query"], t["text_key"], t["text_value"])
            second = attention(t["query"], t["image_key"], t["image_value"])
            return torch.add(first, second, alpha=ADAPTER_GATE)

        return run

    inputs = tuple(name for name in sizes if name != GRAD)
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=two_calls(explicit_attention),
        expressions={
            "sdpa": two_calls(F.scaled_dot_product_attention),
            # With so few keys the whole map is small, and writing it out may well be the fastest.
            "explicit": two_calls(explicit_attention),
            "flex": two_calls(call_flex),
            # Compiled as one expression, inductor cannot fuse the sum into its FlexAttention.
            "flex-parts": two_calls(torch.compile(call_flex, fullgraph=True, dynamic=False)),
        },
        yardstick=yardstick(setup),
        differentiable=inputs,
        heads=heads,
        flops=flops(setup.mode, batch, heads, count * (text + image), width),
        bytes=moved(
            setup.mode,
            bytes_of(*(tensors[name] for name in inputs)),
            bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs="standard normal; 77 text keys and 16 image keys",
        shape={"query": [batch, heads, count, width], "keys": [text, image], "gate": ADAPTER_GATE},
        needs_bytes={"flex": map_bytes(batch, heads, count, text + image, copies=4)},
    )
