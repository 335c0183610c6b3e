"""Windowed attention: forward pass, tokens found through a table of window and slot.

One program owns a block of slots of one window, head and batch entry, and walks over the window's
keys with the running maximum, normaliser and accumulator in registers. Nothing is gathered: the
table (windows, slots) gives the token of each slot, or ``tokens`` where the slot is empty.
"""

from typing import Any, NamedTuple

import torch

from ._attention_plan import (
    Launch,
    check_dtypes,
    check_head_dims,
    choose,
    matrix_precision,
    operand,
    options,
    padded,
    run,
)
from ._attention_tiles import LN2, LOG2E, locate
from ._triton import tl, triton


class WindowBias(NamedTuple):
    """A (head, code) bias; query slot i and key slot j read ``query_code[i] + key_code[j]``."""

    data: Any
    head: Any
    column: Any
    query_code: Any
    key_code: Any


@triton.jit
def _slot_tokens(table, window, slots, slot, tokens):
    """Tokens of some slots of a window, ``tokens`` for those empty or outside."""
    return tl.load(table + window * slots + slot, mask=slot < slots, other=tokens)


@triton.jit
def _load(operand, batch, head, token, tokens, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The rows of some tokens, zero for those that do not exist."""
    d = tl.arange(0, COLUMNS)[None, :]
    offset = token.to(tl.int64)[:, None] * operand.row * operand.unit + d * operand.column
    pointers = locate(operand, batch, head, 0) + offset
    return tl.load(pointers, mask=(token[:, None] < tokens) & (d < WIDTH), other=0.0)


@triton.jit
def window_kernel(
    query,
    key,
    value,
    bias,
    out,
    lse,
    table,
    scale,
    heads,
    repeat,
    windows,
    slots,
    tokens,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(scale query key^T + bias) value within each window."""
    tiles = tl.cdiv(slots, BLOCK_M)
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    window = program // tiles % windows
    pair = program // tiles // windows
    batch = pair // heads
    head = pair % heads
    source = 0 if SHARED else batch
    own = head // repeat

    slot_m = first + tl.arange(0, BLOCK_M)
    token_m = _slot_tokens(table, window, slots, slot_m, tokens)
    rows = _load(query, batch, head, token_m, tokens, BLOCK_D, D)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if bias is not None:
        row_code = tl.load(bias.query_code + slot_m, mask=slot_m < slots, other=0)
    for start in range(0, slots, BLOCK_N):
        slot_n = start + tl.arange(0, BLOCK_N)
        token_n = _slot_tokens(table, window, slots, slot_n, tokens)
        keys = _load(key, source, own, token_n, tokens, BLOCK_D, D)
        scores = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        exists = token_n < tokens
        if bias is not None:
            key_code = tl.load(bias.key_code + slot_n, mask=slot_n < slots, other=0)
            code = row_code[:, None] + key_code[None, :]
            pointers = bias.data + head * bias.head + code.to(tl.int64) * bias.column
            both = (slot_m < slots)[:, None] & (slot_n < slots)[None, :]
            scores += tl.load(pointers, mask=both, other=0.0).to(tl.float32) * LOG2E
        scores = tl.where(exists[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.math.exp2(scores - anchor[:, None])
        decay = tl.math.exp2(top - anchor)
        norm = norm * decay + tl.sum(weights, 1)
        values = _load(value, source, own, token_n, tokens, BLOCK_DV, DV)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new_top
    safe = tl.where(norm == 0.0, 1.0, norm)
    acc = acc / safe[:, None]
    there = token_m < tokens
    d = tl.arange(0, BLOCK_DV)[None, :]
    offset = token_m.to(tl.int64)[:, None] * out.row * out.unit + d * out.column
    tl.store(
        locate(out, batch, head, 0) + offset,
        acc.to(out.data.dtype.element_ty),
        mask=there[:, None] & (d < DV),
    )
    result = tl.where(norm == 0.0, float("-inf"), (top + tl.math.log2(safe)) * LN2)
    tl.store(
        locate(lse, batch, head, 0) + token_m.to(tl.int64) * lse.row * lse.unit, result, mask=there
    )


def plan_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    query_code: torch.Tensor | None,
    key_code: torch.Tensor | None,
    table: torch.Tensor,
    scale: float,
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[Launch]]:
    """Results and launches of :func:`window_attention_forward`, not yet run."""
    check_dtypes(("query", [query]), ("key", [key]), ("value", [value]))
    batch, heads, tokens, width = query.shape
    value_width = value.shape[3]
    check_head_dims(width, value_width)
    windows, slots = table.shape
    # Stored as the query is, so that merging the heads costs no copy.
    if query.stride(1) < query.stride(2):
        out = query.new_empty((batch, tokens, heads, value_width)).transpose(1, 2)
    else:
        out = query.new_empty((batch, heads, tokens, value_width))
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    config = choose(
        "forward", query.dtype, max(width, value_width), slots, slots, crowded=bias is not None
    )
    record = None
    if bias is not None:
        # Addresses of a bias tile take as many registers as the logits themselves.
        config = config._replace(block_n=min(config.block_n, 32))
        head = 0 if bias.shape[1] == 1 else bias.stride(1)
        record = WindowBias(bias, head, bias.stride(3), query_code, key_code)
    tiles = triton.cdiv(slots, config.block_m) if slots > 0 else 0
    launch = Launch(
        window_kernel,
        (batch * heads * windows * tiles,),
        {
            "query": operand(query),
            "key": operand(key),
            "value": operand(value),
            "bias": record,
            "out": operand(out),
            "lse": operand(lse),
            "table": table,
            "scale": float(scale),
            "heads": heads,
            "repeat": heads // key.shape[1] if key.shape[1] > 0 else 1,
            "windows": windows,
            "slots": slots,
            "tokens": tokens,
            "SHARED": key.shape[0] == 1,
            "D": width,
            "DV": value_width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": padded(width),
            "BLOCK_DV": padded(value_width),
            "PRECISION": matrix_precision(),
        },
        options(config),
    )
    return (out, lse), [launch]


def window_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    query_code: torch.Tensor | None,
    key_code: torch.Tensor | None,
    table: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention within windows.

    Args:
        query: (B, H, N, D), float32, float16 or bfloat16.
        key, value: (B or 1, Hk, N, D) and (B or 1, Hk, N, Dv), like query.
        bias: (1, H or 1, 1, codes) or None.
        query_code, key_code: int32 (slots,): see :class:`WindowBias`.
        table: int32 (windows, slots), the token in each slot, N where there is none.
        scale: of the logits.
    """
    results, launches = plan_forward(query, key, value, bias, query_code, key_code, table, scale)
    run(launches, query.device)
    return results
