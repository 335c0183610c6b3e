"""Benchmarks of ``transfuse.ops.attend``: every shape and use the op was written for.

Shapes are (B, H, N, D): a = SD1.5 at 64 x 64 latents, b and c = SDXL's two self-attention sizes,
v = ViT-B/16. Each alternative is the shortest fast thing a torch user would write. Blends,
concatenations and sums that replace part of ours are inside their timing; masks that a model
would hold ready are prepared outside it on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transfuse.ops import KV, Blend, attend

from . import vit
from .cases import GRAD, Case, Expression, Setup, Target, Tensors, Workload
from .inputs import DESCRIPTION, normal, photo_heads
from .vit import Attention, explicit_attention

FLOOR = (
    "max(4 B H N M D flops / measured peak, inputs and outputs moved once / measured copy "
    "bandwidth); flops x the share of pairs a mask leaves, x 2.5 for backward, x 3.5 for forward "
    "and backward (both with recomputation), x 9 for a Hessian-vector product"
)
WORK = {"forward": 1.0, "backward": 2.5, "full": 3.5, "hvp": 9.0}

SHAPES = {
    "a": (2, 8, 4096, 40),
    "b": (1, 10, 4096, 64),
    "c": (2, 20, 1024, 64),
    "v": (8, 12, 197, 64),
}
MASK_BLOCK = 128
GAMMA, TEMPERATURE = 0.75, 1.5
ADAPTER_GATE = 0.6


def _bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moved(mode: str, inputs: int, outputs: int) -> int:
    """Bytes no implementation can avoid: gradients have the inputs' sizes and need them again."""
    return inputs + outputs if mode == "forward" else 2 * (inputs + outputs)


def _flops(mode: str, batch: int, heads: int, pairs: int, width: int) -> int:
    return round(WORK[mode] * 4 * batch * heads * pairs * width)


def _map_bytes(batch: int, heads: int, rows: int, columns: int, *, copies: int) -> int:
    """Memory of ``copies`` float32 attention maps, to skip what would not fit."""
    return 4 * batch * heads * rows * columns * copies


def _yardstick(setup: Setup) -> str | None:
    """SDPA for half precision on the CPU, where the written-out reference takes minutes."""
    half = setup.dtype in (torch.float16, torch.bfloat16)
    return "sdpa" if half and setup.device.type == "cpu" else None


def _half_skips(setup: Setup) -> dict[str, str]:
    """Peers that multiply fp16 matrices one by one, which torch's CPU build does at a crawl."""
    if setup.device.type != "cpu" or setup.dtype != torch.float16:
        return {}
    reason = "eager fp16 products on the CPU are hundreds of times slower than fused SDPA"
    return {"flex": reason, "explicit": reason}


def _flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value)


def _xformers(t: Tensors) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    heads_last = (t[name].transpose(1, 2) for name in ("query", "key", "value"))
    return memory_efficient_attention(*heads_last).transpose(1, 2)


def _flash_attn(t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_func

    heads_last = (t[name].transpose(1, 2) for name in ("query", "key", "value"))
    return flash_attn_func(*heads_last).transpose(1, 2)


def _sdpa_math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def _ours(setup: Setup) -> Attention:
    return lambda query, key, value: attend(query, KV(key, value), backend=setup.backend)


def _on_qkv(attention: Attention) -> Expression:
    return lambda t: attention(t["query"], t["key"], t["value"])


# Plain attention.


def _plain(shape: tuple[int, int, int, int]) -> Callable[[Setup], Workload]:
    batch, heads, count, width = shape

    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in ("query", "key", "value", GRAD)
        }
        return Workload(
            tensors=tensors,
            ours=_on_qkv(_ours(setup)),
            reference=_on_qkv(explicit_attention),
            expressions={
                "sdpa": _on_qkv(F.scaled_dot_product_attention),
                "explicit": _on_qkv(explicit_attention),
                "flex": _on_qkv(_flex),
                "xformers": _xformers,
                "flash-attn": _flash_attn,
            },
            yardstick=_yardstick(setup),
            differentiable=("query", "key", "value"),
            heads=heads,
            flops=_flops(setup.mode, batch, heads, count * count, width),
            bytes=_moved(setup.mode, 3 * _bytes_of(tensors["query"]), _bytes_of(tensors["query"])),
            floor_note=FLOOR,
            inputs="standard normal",
            shape={"query": list(shape), "keys": count},
            needs_bytes={
                "explicit": _map_bytes(batch, heads, count, count, copies=3),
                "flex": _map_bytes(batch, heads, count, count, copies=4),
            },
            skips=_half_skips(setup),
        )

    return make


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
        yardstick=_yardstick(setup),
        differentiable=("query", "content", "key", "value"),
        heads=heads,
        flops=_flops(setup.mode, batch, heads, count * tensors["key"].shape[2], width),
        bytes=_moved(
            setup.mode,
            _bytes_of(*(tensors[name] for name in ("query", "content", "key", "value"))),
            _bytes_of(tensors["query"]),
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
            "explicit": _map_bytes(batch, heads, count, count, copies=3),
            "flex": _map_bytes(batch, heads, count, count, copies=4),
        },
    )


def _style_random(setup: Setup) -> Workload:
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


def _style_photo(size: tuple[int, int]) -> Callable[[Setup], Workload]:
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


def _block_mask(setup: Setup) -> Workload:
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
        yardstick=_yardstick(setup),
        differentiable=("query", "key", "value"),
        heads=heads,
        flops=_flops(setup.mode, batch, heads, count * count // 2, width),
        bytes=_moved(
            setup.mode,
            3 * _bytes_of(tensors["query"]) + _bytes_of(mask),
            _bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs=f"standard normal; half of all {MASK_BLOCK} x {MASK_BLOCK} blocks masked at random",
        shape={"query": [batch, heads, count, width], "keys": count, "mask": "50 % of blocks"},
        needs_bytes={"flex": _map_bytes(batch, heads, count, count, copies=4)},
    )


# Own keys and two references in one softmax.


def _references(setup: Setup) -> Workload:
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
        return _flex(t["query"], *joined(t))

    def reference(t: Tensors) -> torch.Tensor:
        return explicit_attention(t["query"], *joined(t))

    inputs = tuple(name for name in names if name != GRAD)
    return Workload(
        tensors=tensors,
        ours=ours,
        reference=reference,
        expressions={"sdpa": sdpa, "flex": flex},
        yardstick=_yardstick(setup),
        differentiable=inputs,
        heads=heads,
        flops=_flops(setup.mode, batch, heads, 3 * count * count, width),
        bytes=_moved(
            setup.mode,
            _bytes_of(*(tensors[name] for name in inputs)),
            _bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs="standard normal; the image's own keys and those of two references",
        shape={"query": [batch, heads, count, width], "keys": [count] * 3},
        needs_bytes={"flex": _map_bytes(batch, heads, count, 3 * count, copies=4)},
    )


# Adapter attention: text and image keys as two gated groups.


def _adapter(setup: Setup) -> Workload:
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
            "flex": two_calls(_flex),
            # Compiled as one expression, inductor cannot fuse the sum into its FlexAttention.
            "flex-parts": two_calls(torch.compile(_flex, fullgraph=True, dynamic=False)),
        },
        yardstick=_yardstick(setup),
        differentiable=inputs,
        heads=heads,
        flops=_flops(setup.mode, batch, heads, count * (text + image), width),
        bytes=_moved(
            setup.mode,
            _bytes_of(*(tensors[name] for name in inputs)),
            _bytes_of(tensors["query"]),
        ),
        floor_note=FLOOR,
        inputs="standard normal; 77 text keys and 16 image keys",
        shape={"query": [batch, heads, count, width], "keys": [text, image], "gate": ADAPTER_GATE},
        needs_bytes={"flex": _map_bytes(batch, heads, count, text + image, copies=4)},
    )


# Hessian-vector products.


def _hvp_vit(setup: Setup) -> Workload:
    batch, count = 8, 197
    tensors = vit.make_tensors(
        batch, count, generator=setup.generator(), dtype=setup.dtype, device=setup.device
    )
    parameters = [value for name, value in tensors.items() if name.startswith(vit.PARAMETER)]
    maps = _map_bytes(batch, vit.HEADS, count, count, copies=12 * vit.BLOCKS)

    def by(product: Callable[[Tensors, Attention], object], attention: Attention) -> Expression:
        return lambda t: product(t, attention)

    return Workload(
        tensors=tensors,
        ours=by(vit.hvp_double_backward, _ours(setup)),
        variants={"transfuse-jvp": by(vit.hvp_forward_over_reverse, _ours(setup))},
        reference=by(vit.hvp_double_backward, explicit_attention),
        expressions={
            "explicit": by(vit.hvp_double_backward, explicit_attention),
            "explicit-jvp": by(vit.hvp_forward_over_reverse, explicit_attention),
            "sdpa-math": by(vit.hvp_double_backward, _sdpa_math),
        },
        yardstick=None,
        flops=round(WORK["hvp"] * vit.forward_flops(batch, count)),
        bytes=4 * _bytes_of(*parameters),
        floor_note=FLOOR,
        inputs="standard normal tokens; random parameters and direction",
        shape={
            "tokens": [batch, count, vit.WIDTH],
            "blocks": vit.BLOCKS,
            "heads": vit.HEADS,
            "mlp_ratio": vit.MLP_RATIO,
        },
        needs_bytes={"explicit": maps, "explicit-jvp": maps, "sdpa-math": maps},
    )


def _hvp_attention(shape: tuple[int, int, int, int]) -> Callable[[Setup], Workload]:
    batch, heads, count, width = shape
    parts = ("query", "key", "value")

    def product(attention: Attention) -> Expression:
        def run(t: Tensors) -> tuple[torch.Tensor, ...]:
            leaves = tuple(t[name].detach().requires_grad_() for name in parts)
            loss = (attention(*leaves) * t["weight"]).sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            inner = sum(
                (gradient * t[f"direction_{name}"]).sum()
                for name, gradient in zip(parts, gradients, strict=True)
            )
            return torch.autograd.grad(inner, leaves)

        return run

    def make(setup: Setup) -> Workload:
        generator = setup.generator()
        names = (*parts, "weight", *(f"direction_{name}" for name in parts))
        tensors = {
            name: normal(*shape, generator=generator, dtype=setup.dtype, device=setup.device)
            for name in names
        }
        maps = _map_bytes(batch, heads, count, count, copies=12)
        return Workload(
            tensors=tensors,
            ours=product(_ours(setup)),
            reference=product(explicit_attention),
            expressions={
                "explicit": product(explicit_attention),
                "sdpa-math": product(_sdpa_math),
            },
            yardstick=None,
            heads=heads,
            flops=_flops("hvp", batch, heads, count * count, width),
            bytes=10 * _bytes_of(tensors["query"]),
            floor_note=FLOOR,
            inputs="standard normal; loss <weight, out>",
            shape={"query": list(shape), "keys": count},
            needs_bytes={"explicit": maps, "sdpa-math": maps},
        )

    return make


SDPA = ("sdpa", "sdpa-compile")
FLEX = ("flex", "flex-compile")
VENDORS = ("xformers", "flash-attn", "natten")
DERIVATIVES = ("forward", "backward", "full")

CASES = (
    Case(
        name="plain-a",
        title="self-attention, SD1.5 64 x 64",
        make=_plain(SHAPES["a"]),
        targets=(
            Target(dtype="bfloat16", bar=1.7),
            Target(dtype="float32", bar=1.1),
            Target(dtype="float16", bar=1.5),
        ),
        peers=(*SDPA, *FLEX, *VENDORS),
        modes=DERIVATIVES,
    ),
    Case(
        name="plain-b",
        title="self-attention, SDXL 64 x 64",
        make=_plain(SHAPES["b"]),
        targets=(
            Target(dtype="bfloat16", bar=1.7),
            Target(dtype="float32", bar=1.1),
            Target(dtype="float16", bar=1.5),
        ),
        peers=(*SDPA, *FLEX, *VENDORS),
        modes=DERIVATIVES,
    ),
    Case(
        name="plain-c",
        title="self-attention, SDXL 32 x 32",
        make=_plain(SHAPES["c"]),
        targets=(
            Target(dtype="bfloat16", bar=1.7),
            Target(dtype="float32", bar=1.1),
            Target(dtype="bfloat16", mode="full", bar=1.3),
            Target(dtype="float32", mode="full", bar=1.0),
        ),
        peers=(*SDPA, "explicit", *FLEX, *VENDORS),
        modes=DERIVATIVES,
    ),
    Case(
        name="plain-v",
        title="self-attention, ViT-B/16",
        make=_plain(SHAPES["v"]),
        targets=(Target(dtype="float32", bar=1.3, quick=3),),
        peers=(*SDPA, "explicit", "explicit-compile", *FLEX, *VENDORS),
        quick_peers=("sdpa", "explicit", *VENDORS),
        modes=DERIVATIVES,
    ),
    Case(
        name="style-injection",
        title="style injection: query blend, temperature, foreign keys and values",
        make=_style_random,
        targets=(Target(dtype="bfloat16", bar=1.7),),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="style-injection-photo",
        title="style injection on photographs, 64 x 64 tokens",
        make=_style_photo((64, 64)),
        targets=(Target(dtype="bfloat16"), Target(dtype="float32")),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="style-injection-photo-32",
        title="style injection on photographs, 32 x 32 tokens",
        make=_style_photo((32, 32)),
        targets=(Target(dtype="float32", quick=1), Target(dtype="bfloat16", quick=5)),
        peers=(*SDPA, "explicit", *FLEX),
        quick_peers=(*SDPA, "explicit"),
        modes=DERIVATIVES,
    ),
    Case(
        name="block-mask",
        title="half of the key blocks masked",
        make=_block_mask,
        targets=(Target(dtype="float32", bar=1.7),),
        peers=(*SDPA, "sdpa-bias", *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="references",
        title="own keys and two references in one softmax",
        make=_references,
        targets=(Target(dtype="bfloat16", bar=1.6),),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="adapter",
        title="text and image keys as two gated groups",
        make=_adapter,
        targets=(Target(dtype="float32", bar=1.3, quick=4),),
        peers=(*SDPA, "explicit", "explicit-compile", "flex", "flex-parts"),
        quick_peers=("sdpa", "explicit"),
        modes=DERIVATIVES,
    ),
    Case(
        name="hvp-vit",
        title="Hessian-vector product, 4-block ViT-Ti",
        make=_hvp_vit,
        targets=(Target(dtype="float32", mode="hvp", bar=1.3),),
        peers=("explicit", "explicit-compile", "explicit-jvp", "explicit-jvp-compile", "sdpa-math",
               "jvp-flash-attention"),
        modes=("hvp",),
    ),
    Case(
        name="hvp-attention",
        title="Hessian-vector product of one attention, 4096 tokens",
        make=_hvp_attention((1, 8, 4096, 64)),
        targets=(Target(dtype="float32", mode="hvp", memory_bar=10.0),),
        peers=("explicit", "sdpa-math", "jvp-flash-attention"),
        modes=("hvp",),
        memory=True,
    ),
    Case(
        name="tiny",
        title="a call of microseconds: checks the machinery, says nothing about speed",
        make=_plain((1, 2, 17, 8)),
        targets=(Target(dtype="float32", quick=9),),
        peers=("sdpa", "natten"),
        quick_peers=("sdpa", "natten"),
        modes=DERIVATIVES,
        hidden=True,
    ),
    Case(
        name="tiny-hvp",
        title="the machinery of second derivatives",
        make=_hvp_attention((1, 2, 17, 8)),
        targets=(Target(dtype="float32", mode="hvp", quick=9),),
        peers=("explicit", "sdpa-math"),
        quick_peers=("explicit",),
        modes=("hvp",),
        hidden=True,
    ),
)  # fmt: skip
