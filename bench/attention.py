"""Benchmarks of ``transfuse.ops.attend``: every shape and use the op was written for.

Shapes are (B, H, N, D): a = SD1.5 at 64 x 64 latents, b and c = SDXL's two self-attention sizes,
v = ViT-B/16; those named by head dim and tokens are for GPUs (SDXL's at 1024 and 2048 pixels,
FLUX's, SD1.5's at 1024). Each alternative is the shortest fast thing a torch user would write.
Blends, concatenations and sums that replace part of ours are inside their timing; masks that a
model would hold ready are prepared outside it on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from ._attention_calls import (
    FLOOR,
    SHAPES,
    bytes_of,
    call_flash_attn,
    call_flex,
    call_ours,
    call_xformers,
    flops,
    half_skips,
    map_bytes,
    moved,
    on_qkv,
    other_kernels,
    yardstick,
)
from ._attention_second import hvp_attention, hvp_vit
from ._attention_uses import adapter, block_mask, references, style_photo, style_random
from .cases import GRAD, Case, Setup, Target, Workload
from .inputs import normal
from .vit import explicit_attention


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
            ours=on_qkv(call_ours(setup)),
            reference=on_qkv(explicit_attention),
            expressions={
                "sdpa": on_qkv(F.scaled_dot_product_attention),
                "explicit": on_qkv(explicit_attention),
                "flex": on_qkv(call_flex),
                "xformers": call_xformers,
                "flash-attn": call_flash_attn,
            },
            variants=other_kernels(setup, tensors),
            yardstick=yardstick(setup),
            differentiable=("query", "key", "value"),
            heads=heads,
            flops=flops(setup.mode, batch, heads, count * count, width),
            bytes=moved(setup.mode, 3 * bytes_of(tensors["query"]), bytes_of(tensors["query"])),
            floor_note=FLOOR,
            inputs="standard normal",
            shape={"query": list(shape), "keys": count},
            needs_bytes={
                "explicit": map_bytes(batch, heads, count, count, copies=3),
                "flex": map_bytes(batch, heads, count, count, copies=4),
            },
            skips=half_skips(setup),
        )

    return make


SDPA = ("sdpa", "sdpa-compile")
FLEX = ("flex", "flex-compile")
# torch's CUDA kernels by name: it does not always choose the fastest.
SDPA_KERNELS = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
VENDORS = ("xformers", "flash-attn", "natten")
DERIVATIVES = ("forward", "backward", "full")

CASES = (
    *(
        Case(
            name=f"plain-{name}",
            title=f"self-attention, head dim and tokens {name}",
            make=_plain(SHAPES[name]),
            targets=(Target(dtype="bfloat16", bar=0.9),),
            peers=(*SDPA, *SDPA_KERNELS, *FLEX, *VENDORS),
            modes=DERIVATIVES,
            devices=("cuda",),
        )
        for name in ("64-4096", "64-16384", "128-4608", "128-16384", "80-4096")
    ),
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
        make=style_random,
        targets=(Target(dtype="bfloat16", bar=1.7),),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="style-injection-photo",
        title="style injection on photographs, 64 x 64 tokens",
        make=style_photo((64, 64)),
        targets=(Target(dtype="bfloat16"), Target(dtype="float32")),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="style-injection-photo-32",
        title="style injection on photographs, 32 x 32 tokens",
        make=style_photo((32, 32)),
        targets=(Target(dtype="float32", quick=1), Target(dtype="bfloat16", quick=5)),
        peers=(*SDPA, "explicit", *FLEX),
        quick_peers=(*SDPA, "explicit"),
        modes=DERIVATIVES,
    ),
    Case(
        name="block-mask",
        title="half of the key blocks masked",
        make=block_mask,
        targets=(Target(dtype="float32", bar=1.7),),
        peers=(*SDPA, "sdpa-bias", *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="references",
        title="own keys and two references in one softmax",
        make=references,
        targets=(Target(dtype="bfloat16", bar=1.6),),
        peers=(*SDPA, *FLEX),
        modes=DERIVATIVES,
    ),
    Case(
        name="adapter",
        title="text and image keys as two gated groups",
        make=adapter,
        targets=(Target(dtype="float32", bar=1.3, quick=4),),
        peers=(*SDPA, "explicit", "explicit-compile", "flex", "flex-parts"),
        quick_peers=("sdpa", "explicit"),
        modes=DERIVATIVES,
    ),
    Case(
        name="hvp-vit",
        title="Hessian-vector product, 4-block ViT-Ti",
        make=hvp_vit,
        targets=(Target(dtype="float32", mode="hvp", bar=1.3),),
        peers=("explicit", "explicit-compile", "explicit-jvp", "explicit-jvp-compile", "sdpa-math",
               "jvp-flash-attention"),
        modes=("hvp",),
    ),
    Case(
        name="hvp-attention",
        title="Hessian-vector product of one attention, 4096 tokens",
        make=hvp_attention((1, 8, 4096, 64)),
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
        make=hvp_attention((1, 2, 17, 8)),
        targets=(Target(dtype="float32", mode="hvp", quick=9),),
        peers=("explicit", "sdpa-math"),
        quick_peers=("explicit",),
        modes=("hvp",),
        hidden=True,
    ),
)  # fmt: skip
