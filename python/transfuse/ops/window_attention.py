"""Windowed attention: ``window_attention``, ``window_partition`` and ``window_reverse``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse import _backend, _checks, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _attention_ops, _windows
from transfuse.ops._attention_core import Static, functions, raw
from transfuse.ops._attention_reference import _mix, core_reference
from transfuse.ops._sources import (
    CAUSAL_NONE,
    KV,
    Normalised,
    autocast,
    normalise,
    require_one_softmax,
)
from transfuse.ops._window_attention_reference import windowed_core
from transfuse.ops._windows import BIAS_FULL, BIAS_NONE, BIAS_RELATIVE, Grid

__all__ = ["window_attention", "window_partition", "window_reverse"]

_backend.declare("window_attention", ("reference", "cpu", "triton"))


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    size: Sequence[int],
    window: str | int | Sequence[int] = "half",
    shift: int | Sequence[int] = 0,
    wrap: str = "cyclic",
    ragged: str = "exact",
    bias: Tensor | None = None,
    extra: KV | Sequence[KV] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of every token to the tokens of its window, fused.

    .. math:: \mathrm{out}_i = \sum_{j \in w(i)} \operatorname{softmax}_j
              (\mathrm{scale}\; q_i k_j^\top + \mathrm{bias}_{s(i) s(j)})\, v_j

    where on each axis, with period P = size (rounded up to whole windows for ``ragged="pad"``),
    token y stands at position (y - shift) mod P; w is position div window and s, the slot, the
    remainder.
    Tokens keep their order and layout: nothing is rolled, permuted or gathered, the kernels find
    them through the map from window and slot to token.

    Args:
        query: (B, H, N, D) with any strides; N is the product of ``size``.
        key: (B, Hk, N, D), Hk a divisor of H; a batch of 1 is shared.
        value: (B, Hk, N, Dv).

    Keyword Args:
        size: tokens per axis, row-major: (height, width), (frames, height, width) or (length,).
        window: side of a window, one int or one per axis; ``"half"`` is half of each axis, rounded
            up: two windows per axis.
        shift: how far the windows are moved along each axis, one int or one per axis.
        wrap: ``"cyclic"``: tokens that come round the edge attend to those they meet there
            (HiDiffusion). ``"mask"``: they share the window's slots, not its attention (Swin).
            ``"none"``: windows at the border are cut off there.
        ragged: what becomes of an axis that is not a multiple of its window. ``"exact"``: the last
            window is smaller. ``"pad"``: the axis is padded to whole windows before the shift,
            and nothing attends to the padding.
        bias: added to the logits: (H or 1, L, L) for the L slots of a window, row-major; or a
            relative table (H or 1, 2 wy - 1, 2 wx - 1) with one axis per axis of ``size``, whose
            entry (dy + wy - 1, dx + wx - 1) belongs to a query dy rows below and dx columns right
            of its key (Swin's table, transposed and reshaped).
        extra: further keys and values that every window sees, in the same softmax: :class:`KV` of
            group 0 with gate 1 and no causal rule; their bias and mask broadcast to (B, H, N, M).
        scale: default 1 / sqrt(D).
        backend: None, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, H, N, Dv), in the dtype of the query.

    Raises:
        TypeError, ValueError: an argument that does not fit, naming it.
        RuntimeError: a named backend that cannot serve the call.

    Notes:
        Work of 4 B H N L D flops instead of 4 B H N N D; memory beyond the outputs: tiles, O(N)
        statistics and index tables of O(N). Differentiable to second order and in forward mode.
        Deterministic on the CPU for any number of threads.

    Reference:
        Liu et al., Swin Transformer, arXiv 2103.14030, section 3.2; Zhang et al., HiDiffusion,
        arXiv 2311.17528, section 3.3.

    Example:
        >>> import torch
        >>> from transfuse.ops import window_attention
        >>> q, k, v = torch.randn(3, 2, 4, 8 * 12, 16).unbind(0)
        >>> window_attention(q, k, v, size=(8, 12), window=4, shift=2, wrap="mask").shape
        torch.Size([2, 4, 96, 16])
    """
    own = _windows.grid(size, window, shift, wrap, ragged)
    sources = [KV(key, value), *_extra(extra)]
    query, sources, _ = autocast(query, sources, None)
    call = _normalise(query, sources, scale)
    for name, tensor in (("query", call.query), ("key", call.keys[0])):
        _windows.check_tokens(name, tensor.shape[2], own)
    bias, kind = _bias(bias, call.query, own)
    chosen = _backend.choose("window_attention", backend, query.device, query.dtype)
    keys = [
        _mix(*parts)
        for parts in zip(
            call.keys, call.key_others, call.key_weights, call.key_indices, strict=True
        )
    ]
    if chosen == "reference":
        return _gathered(core_reference, call, keys, bias, kind, own)
    if chosen == "composed":
        return _composed(call, keys, bias, kind, own)
    if chosen == "triton":
        return _triton(call, keys, bias, kind, own, _triton_ops.traced(chosen))
    bias, kind = _dense_bias(bias, kind, call.query, own)
    biases = [bias, *call.biases[1:]]
    tensors = (call.query, *keys, *call.values, *biases, *call.masks, *call.indices)
    static = Static(tuple(call.scales), tuple(call.causal), chosen, windows=own.numbers(kind))
    if not needs_derivative(tensors):
        return raw(chosen).forward(
            call.query,
            keys,
            call.values,
            biases,
            call.masks,
            call.indices,
            call.scales,
            call.causal,
            list(static.windows),
        )[0]
    if torch.compiler.is_compiling():
        return _attention_ops._forward(static, tensors)[0]
    return functions.forward(static, tensors)[0]


def window_partition(
    x: Tensor,
    *,
    size: Sequence[int],
    window: str | int | Sequence[int] = "half",
    shift: int | Sequence[int] = 0,
) -> Tensor:
    """Tokens gathered by window, cyclically shifted: what :func:`window_attention` does without.

    Args:
        x: (B, N, C), N the product of ``size``.

    Keyword Args:
        size, window, shift: as in :func:`window_attention`, with its ``wrap="cyclic"`` and
            ``ragged="exact"``.

    Returns:
        (B * windows, L, C), ordered by batch entry and window; L is the product of the window's
        sides. Slots beyond the edge of a smaller last window are zero.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> from transfuse.ops import window_partition, window_reverse
        >>> x = torch.randn(2, 8 * 12, 5)
        >>> windows = window_partition(x, size=(8, 12), shift=(1, 2))
        >>> windows.shape
        torch.Size([8, 24, 5])
        >>> torch.equal(window_reverse(windows, size=(8, 12), shift=(1, 2)), x)
        True
    """
    _checks.tensor("x", x, ("B", "N", "C"))
    own = _windows.grid(size, window, shift)
    _windows.check_tokens("x", x.shape[1], own)
    return _windows.partition(x, own, 1).flatten(0, 1)


def window_reverse(
    windows: Tensor,
    *,
    size: Sequence[int],
    window: str | int | Sequence[int] = "half",
    shift: int | Sequence[int] = 0,
) -> Tensor:
    """Windows put back in their places: the inverse of :func:`window_partition`.

    Args:
        windows: (B * windows, L, C), as :func:`window_partition` gives them.

    Keyword Args:
        size, window, shift: as they were there.

    Returns:
        (B, N, C). What stands in slots beyond the edge is dropped.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> from transfuse.ops import window_reverse
        >>> window_reverse(torch.randn(4, 6, 5), size=(4, 6), window=(2, 3)).shape
        torch.Size([1, 24, 5])
    """
    _checks.tensor("windows", windows, ("B * windows", "L", "C"))
    own = _windows.grid(size, window, shift)
    count = _windows.tables(own, windows.device).token.shape[0]
    _checks.size("windows", windows, 1, own.slots, f"slots of a window {own.window}")
    if count == 0 or windows.shape[0] % count != 0:
        raise ValueError(
            f"windows: expected a multiple of {count} (the windows of {own.size}) along axis 0, "
            f"got {windows.shape[0]} (shape {tuple(windows.shape)})"
        )
    return _windows.reverse(windows.unflatten(0, (-1, count)), own, 1)


# ---- internal ------------------------------------------------------------------------------------


def _extra(extra: KV | Sequence[KV] | None) -> list[KV]:
    if extra is None:
        return []
    if isinstance(extra, KV):
        return [extra]
    if not isinstance(extra, (list, tuple)) or not all(isinstance(s, KV) for s in extra):
        raise TypeError(
            f"extra: expected a KV, a list or tuple of KV, or None, got {_checks.describe(extra)}"
        )
    return list(extra)


def _normalise(query: Tensor, sources: Sequence[KV], scale: float | None) -> Normalised:
    call = normalise(query, sources, None, scale, names=("", *_extra_names(len(sources) - 1)))
    require_one_softmax(call)
    for number, rule in enumerate(call.causal):
        if rule != CAUSAL_NONE:
            raise ValueError(
                f"extra[{number - 1}].causal: expected None (tokens of a window have no order "
                f"towards extra keys), got {sources[number].causal!r}"
            )
    return call


def _extra_names(count: int) -> list[str]:
    return [f"extra[{i}]" for i in range(count)]


def _bias(bias: Tensor | None, query: Tensor, own: Grid) -> tuple[Tensor | None, int]:
    """The bias as (1, heads or 1, 1, codes), and its kind."""
    if bias is None:
        return None, BIAS_NONE
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a tensor or None, got {_checks.describe(bias)}")
    _checks.auxiliary("bias", bias, "query", query)
    heads = query.shape[1]
    full, relative = (own.slots, own.slots), tuple(2 * w - 1 for w in own.window)
    shape = tuple(bias.shape)
    if len(shape) > 0 and shape[0] in (1, heads):
        for rest, kind in ((full, BIAS_FULL), (relative, BIAS_RELATIVE)):
            if shape[1:] == rest:
                return bias.reshape(1, shape[0], 1, -1), kind
    raise ValueError(
        f"bias: expected shape ({heads} or 1, {own.slots}, {own.slots}) (slots of a window) or "
        f"({heads} or 1, {', '.join(map(str, relative))}) (relative), got {shape}"
    )


def _dense_bias(
    bias: Tensor | None, kind: int, query: Tensor, own: Grid
) -> tuple[Tensor | None, int]:
    """A relative bias of small windows as a full one.

    Rows of a full bias are read in order; those of a relative one are looked up key by key. While
    it is no larger than the query, the full one is cheap to make and to hold.
    """
    if bias is None or kind != BIAS_RELATIVE or bias.shape[1] * own.slots**2 > query.numel():
        return bias, kind
    index = _windows.relative_index(own.window, query.device)
    return bias.index_select(3, index.flatten()), BIAS_FULL


def _gathered(
    core: Callable[..., tuple[Tensor, Tensor]],
    call: Normalised,
    keys: list[Tensor],
    bias: Tensor | None,
    kind: int,
    own: Grid,
) -> Tensor:
    out, _ = windowed_core(
        core,
        call.query,
        keys,
        call.values,
        bias,
        kind,
        call.biases,
        call.masks,
        call.indices,
        call.scales,
        own,
    )
    return out


def _triton(
    call: Normalised, keys: list[Tensor], bias: Tensor | None, kind: int, own: Grid, backend: str
) -> Tensor:
    """One kernel without derivatives or extra keys, else Triton attention on gathered windows."""
    traced = backend == _triton_ops.COMPILED
    plain = len(keys) == 1 and call.indices[0] is None
    if plain and not needs_derivative((call.query, *keys, *call.values, bias)):
        tensors = (call.query, keys[0], call.values[0], bias)
        if traced:
            op = torch.ops.transfuse.window_attention_triton
            return op(*tensors, own.numbers(kind), call.scales[0])
        return _launch(*tensors, own, kind, call.scales[0])

    def core(query, keys, values, biases, masks, indices, scales, causal):
        static = Static(tuple(scales), tuple(causal), backend)
        tensors = (query, *keys, *values, *biases, *masks, *indices)
        return (_attention_ops._forward if traced else functions.forward)(static, tensors)

    return _gathered(core, call, keys, bias, kind, own)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    own: Grid,
    kind: int,
    scale: float,
) -> Tensor:
    """The Triton kernel of a grid, and of a bias of ``kind``."""
    tables = _windows.kernel_tables(own, kind, query.device)
    kernel = _triton_ops.kernel("window_attention", "window_attention_forward")
    return kernel(query, key, value, bias, *tables, scale)[0]


def _fake(query, key, value, bias, windows, scale):
    return _attention_ops._like_query(query, value.shape[3])


# The kernel's index tables are made for the device by the first call, and kept.
_triton_ops.wrap(
    "window_attention",
    lambda query, key, value, bias, windows, scale: _launch(
        query, key, value, bias, *_windows.grid_of(windows), scale
    ),
    "(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] windows, float scale) -> Tensor",
    recorded=False,
)
torch.library.register_fake("transfuse::window_attention_triton", _fake)


def _composed(
    call: Normalised, keys: list[Tensor], bias: Tensor | None, kind: int, own: Grid
) -> Tensor:
    """Eager torch where no kernel is a default: SDPA on gathered windows."""
    if len(keys) > 1 or call.indices[0] is not None:
        return _gathered(core_reference, call, keys, bias, kind, own)
    query = call.query
    batch, heads = query.shape[:2]
    tables = _windows.tables(own, query.device)

    def windowed(x: Tensor) -> Tensor:
        if x.shape[1] != heads:
            x = x.repeat_interleave(heads // x.shape[1], dim=1)
        return _windows.partition(x.expand(batch, -1, -1, -1), own, 2).movedim(2, 1)

    shift = None
    taken = tables.token < own.tokens
    if own.tokens < tables.token.numel():
        shift = torch.where(taken, 0.0, -torch.inf).to(query.dtype)[:, None, None, :]
    if bias is not None:
        if kind == BIAS_RELATIVE:
            index = _windows.relative_index(own.window, query.device)
            bias = bias.index_select(3, index.flatten())
        dense = bias.view(1, -1, own.slots, own.slots).to(query.dtype)
        shift = dense if shift is None else shift + dense
    out = F.scaled_dot_product_attention(
        windowed(query),
        windowed(keys[0]),
        windowed(call.values[0]),
        attn_mask=shift,
        scale=call.scales[0],
    )
    return _windows.reverse(out.movedim(1, 2), own, 2)
