"""Windowed attention written out: tokens gathered by window, ordinary attention, and back.

With the reference of attention in its middle this is the reference of ``window_attention``; with
another differentiable core it serves where no kernel finds tokens by window itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse.ops import _windows
from transfuse.ops._windows import BIAS_RELATIVE, Grid


def windowed_core(
    core: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    bias: Tensor | None,
    bias_kind: int,
    biases: list[Tensor | None],
    masks: list[Tensor | None],
    indices: list[Tensor | None],
    scales: list[float],
    own: Grid,
) -> tuple[Tensor, Tensor]:
    """One softmax per token over the keys of its window and over all further sources.

    Args:
        core: attention of one softmax group, with the arguments of
            :func:`~transfuse.ops._attention_reference.core_reference`.
        query, keys, values, scales: as the attention core takes them; source 0 is windowed.
        bias: (1, heads or 1, 1, codes) of ``bias_kind`` for source 0.
        biases, masks, indices: of all sources; those of source 0 are None but for the index.
        own: the windows.
    """
    batch = query.shape[0]
    count, slots = _windows.tables(own, query.device).token.shape
    taken = _windows.tables(own, query.device).token < own.tokens

    def windowed(x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B * windows, H, slots, D)."""
        return _windows.partition(x, own, 2).transpose(1, 2).flatten(0, 1)

    def rowwise(x: Tensor | None) -> Tensor | None:
        """(B | 1, H | 1, N | 1, M | 1) -> (B * windows, H | 1, slots | 1, M | 1)."""
        if x is None:
            return None
        if x.shape[2] == 1:
            return x.expand(batch, -1, -1, -1).repeat_interleave(count, dim=0)
        return windowed(x.expand(batch, -1, -1, -1))

    def entries(source: int) -> Tensor:
        """(B,): the batch entry of a source that each query batch entry reads."""
        index = indices[source]
        if index is not None:
            return index
        every = torch.arange(batch, device=query.device)
        return torch.zeros_like(every) if keys[source].shape[0] == 1 else every

    own_index = entries(0)[:, None] * count + torch.arange(count, device=query.device)
    own_bias = None
    if bias is not None:
        own_bias = bias.flatten(2)
        if bias_kind == BIAS_RELATIVE:
            index = _windows.relative_index(own.window, query.device)
            own_bias = own_bias[..., index.flatten()]
        own_bias = own_bias.unflatten(-1, (slots, slots))
        own_bias = own_bias.expand(batch, -1, -1, -1).repeat_interleave(count, dim=0)
    own_mask = None
    if own.tokens < count * slots:
        own_mask = taken.repeat(batch, 1)[:, None, None, :]
    rest = range(1, len(keys))
    out, lse = core(
        windowed(query),
        [windowed(keys[0]), *keys[1:]],
        [windowed(values[0]), *values[1:]],
        [own_bias, *(rowwise(biases[s]) for s in rest)],
        [own_mask, *(rowwise(masks[s]) for s in rest)],
        [own_index.flatten(), *(entries(s).repeat_interleave(count) for s in rest)],
        scales,
        [0] * len(keys),
    )

    def back(x: Tensor) -> Tensor:
        return _windows.reverse(x.unflatten(0, (batch, count)).transpose(1, 2), own, 2)

    return back(out), back(lse[..., None])[..., 0]
