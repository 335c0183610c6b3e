"""Hessian-vector products through attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import vit
from ._attention_calls import FLOOR, WORK, bytes_of, call_ours, call_sdpa_math, flops, map_bytes
from .cases import Expression, Setup, Tensors, Workload
from .inputs import normal
from .vit import Attention, explicit_attention


def hvp_vit(setup: Setup) -> Workload:
    batch, count = 8, 197
    tensors = vit.make_tensors(
        batch, count, generator=setup.generator(), dtype=setup.dtype, device=setup.device
    )
    parameters = [value for name, value in tensors.items() if name.startswith(vit.PARAMETER)]
    maps = map_bytes(batch, vit.HEADS, count, count, copies=12 * vit.BLOCKS)

    def by(product: Callable[[Tensors, Attention], object], attention: Attention) -> Expression:
        return lambda t: product(t, attention)

    return Workload(
        tensors=tensors,
        ours=by(vit.hvp_double_backward, call_ours(setup)),
        variants={"transfuse-jvp": by(vit.hvp_forward_over_reverse, call_ours(setup))},
        reference=by(vit.hvp_double_backward, explicit_attention),
        expressions={
            "explicit": by(vit.hvp_double_backward, explicit_attention),
            "explicit-jvp": by(vit.hvp_forward_over_reverse, explicit_attention),
            "sdpa-math": by(vit.hvp_double_backward, call_sdpa_math),
        },
        yardstick=None,
        flops=round(WORK["hvp"] * vit.forward_flops(batch, count)),
        bytes=4 * bytes_of(*parameters),
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


def hvp_attention(shape: tuple[int, int, int, int]) -> Callable[[Setup], Workload]:
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
        maps = map_bytes(batch, heads, count, count, copies=12)
        return Workload(
            tensors=tensors,
            ours=product(call_ours(setup)),
            reference=product(explicit_attention),
            expressions={
                "explicit": product(explicit_attention),
                "sdpa-math": product(call_sdpa_math),
            },
            yardstick=None,
            heads=heads,
            flops=flops("hvp", batch, heads, count * count, width),
            bytes=10 * bytes_of(tensors["query"]),
            floor_note=FLOOR,
            inputs="standard normal; loss <weight, out>",
            shape={"query": list(shape), "keys": count},
            needs_bytes={"explicit": maps, "sdpa-math": maps},
        )

    return make
