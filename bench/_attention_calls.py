"""What the attention benchmarks share: alternatives of one call, and its cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from transfuse import _backend
from transfuse.ops import KV, attend

from .cases import Expression, Setup, Tensors
from .vit import Attention

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
    "64-4096": (2, 10, 4096, 64),
    "64-16384": (2, 10, 16384, 64),
    "128-4608": (1, 24, 4608, 128),
    "128-16384": (1, 24, 16384, 128),
    "80-4096": (2, 8, 4096, 80),
}


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moved(mode: str, inputs: int, outputs: int) -> int:
    """Bytes no implementation can avoid: gradients have the inputs' sizes and need them again."""
    return inputs + outputs if mode == "forward" else 2 * (inputs + outputs)


def flops(mode: str, batch: int, heads: int, pairs: int, width: int) -> int:
    return round(WORK[mode] * 4 * batch * heads * pairs * width)


def map_bytes(batch: int, heads: int, rows: int, columns: int, *, copies: int) -> int:
    """Memory of ``copies`` float32 attention maps, to skip what would not fit."""
    return 4 * batch * heads * rows * columns * copies


def yardstick(setup: Setup) -> str | None:
    """SDPA for half precision on the CPU, where the written-out reference takes minutes."""
    half = setup.dtype in (torch.float16, torch.bfloat16)
    return "sdpa" if half and setup.device.type == "cpu" else None


def half_skips(setup: Setup) -> dict[str, str]:
    """Peers that multiply fp16 matrices one by one, which torch's CPU build does at a crawl."""
    if setup.device.type != "cpu" or setup.dtype != torch.float16:
        return {}
    reason = "eager fp16 products on the CPU are hundreds of times slower than fused SDPA"
    return {"flex": reason, "explicit": reason}


def call_flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value)


def call_xformers(t: Tensors) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    heads_last = (t[name].transpose(1, 2) for name in ("query", "key", "value"))
    return memory_efficient_attention(*heads_last).transpose(1, 2)


def call_flash_attn(t: Tensors) -> torch.Tensor:
    from flash_attn import flash_attn_func

    heads_last = (t[name].transpose(1, 2) for name in ("query", "key", "value"))
    return flash_attn_func(*heads_last).transpose(1, 2)


def call_sdpa_math(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value)


def call_ours(setup: Setup) -> Attention:
    return call_backend(setup.backend)


def call_backend(backend: str) -> Attention:
    return lambda query, key, value: attend(query, KV(key, value), backend=backend)


def other_kernels(setup: Setup, tensors: Tensors) -> dict[str, Expression]:
    """Our other kernels that can run the call, beside those that the run is about."""
    given = [tensors[name] for name in ("query", "key", "value")]
    others = (b for b in ("triton", "cuda") if b != setup.backend and setup.device.type == "cuda")
    return {
        f"transfuse-{backend}": on_qkv(call_backend(backend))
        for backend in others
        if _backend.why_not("attend", backend, setup.device, setup.dtype, given) is None
    }


def on_qkv(attention: Attention) -> Expression:
    return lambda t: attention(t["query"], t["key"], t["value"])
