"""Token merging: find tokens that look alike, make them one, and give them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _backend, _native, _triton_ops
from transfuse._autograd import needs_derivative
from transfuse.ops import _token_merging_call as call
from transfuse.ops import _token_merging_core as core
from transfuse.ops import _token_merging_ops
from transfuse.ops import _token_merging_reference as composed
from transfuse.ops._merge_plan import (
    MergePlan,
    compose_plans,
    identity_plan,
    plan_composed,
)
from transfuse.ops._token_merging_core import Static

__all__ = [
    "MergePlan",
    "Nearest",
    "compose_plans",
    "match_tokens",
    "merge_tokens",
    "nearest_tokens",
    "push_tokens",
    "unmerge_tokens",
]

for _name in ("nearest_tokens", "match_tokens", "merge_tokens", "unmerge_tokens", "push_tokens"):
    _backend.declare(_name, ("reference", "cpu", "triton", "cuda"))
_token_merging_ops.register_triton()
if _native.status().loaded:
    _token_merging_ops.register()


class Nearest(NamedTuple):
    """Cosine similarity (B, N) and token number (B, N) of the nearest reference token."""

    similarity: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a result


def _chosen(name: str, backend: str | None, x: Tensor) -> str:
    chosen = _backend.choose(name, backend, x.device, x.dtype)
    # Both are eager torch; "composed" is what runs where nobody asked for the reference.
    eager = chosen == "reference" or x.numel() == 0
    return "composed" if eager else _triton_ops.traced(chosen)


def _eager_derivative(*tensors: Tensor | None) -> bool:
    return needs_derivative(tensors) and not torch.compiler.is_compiling()


def nearest_tokens(
    x: Tensor,
    reference: Tensor,
    *,
    mask: Tensor | None = None,
    exclude_self: bool = False,
    backend: str | None = None,
) -> Nearest:
    r"""Finds for every token the reference token with the largest cosine.

    .. math:: \mathrm{similarity}_i = \max_j \frac{x_i \cdot r_j}{|x_i| \, |r_j|}

    Args:
        x: (B, N, C) tokens, float32, float64, bfloat16 or float16; any strides.
        reference: (B or 1, M, C), same dtype and device.
        mask: (M,), (1, M) or (B, M) bool, True where a reference token may be chosen.
        exclude_self: token i may not choose reference i (M = N), for neighbours within one set.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        ``Nearest(similarity, index)``, both (B, N): float32 (float64 for float64), and int64. A
        token that may choose nothing gets -inf and -1.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        2 B N M C operations and O(B (N + M)) memory: a running maximum, never a score matrix.
        Products are accumulated in float32 (float64 for float64). A vector shorter than 1e-12 is
        taken as zero and has similarity 0, as has one whose length overflows. Equal similarities
        give the lowest index, and a NaN loses against every number; a token that meets nothing but
        NaN has similarity NaN. The same bits come out on every run and for every number of threads.

        The similarity has derivatives of any order with respect to both sets, the index none.

    Example:
        >>> import torch
        >>> from transfuse.ops import nearest_tokens
        >>> reference = torch.eye(3)[None]
        >>> nearest_tokens(torch.tensor([[[0.0, 2.0, 0.1]]]), reference).index
        tensor([[1]])
    """
    x, reference, mask = call.check_nearest(x, reference, mask, exclude_self)
    chosen = _chosen("nearest_tokens", backend, x)
    return _nearest(x, reference, mask, exclude_self, chosen)


def _nearest(
    x: Tensor, reference: Tensor, mask: Tensor | None, exclude_self: bool, chosen: str
) -> Nearest:
    if chosen == "composed" or reference.numel() == 0:
        return Nearest(*composed.nearest_composed(x, reference, mask, exclude_self=exclude_self))
    static = Static(chosen, exclude_self=exclude_self)
    if not _eager_derivative(x, reference):
        return Nearest(*core.nearest(static, (x, reference, mask)))
    batch = x.shape[0]
    reference = reference.expand(batch, -1, -1)
    mask = None if mask is None else mask.expand(batch, -1)
    return Nearest(*core.functions.nearest(static, (x, reference, mask)))


def match_tokens(
    metric: Tensor,
    merged: int,
    *,
    size: tuple[int, int] | None = None,
    stride: tuple[int, int] = (2, 2),
    destination: Tensor | None = None,
    protect: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> MergePlan:
    """Plans a merge: the ``merged`` sources that are most similar to a destination go into it.

    Every token is a source or a destination. Each source looks for the destination with the
    largest cosine; of all sources, those with the largest of these are merged.

    Args:
        metric: (B, N, C) what similarity is measured on (keys, or the tokens themselves), float32,
            float64, bfloat16 or float16.
        merged: how many tokens disappear, per batch entry. Clamped with a warning to what can be
            merged: between 0 and the number of sources that are not protected.
        size: (H, W) with H * W = N for tokens of an image, row by row: one destination in every
            whole ``stride`` cell, the first or, with a generator, a random one. Rows and columns
            left over are sources. None: see ``destination``.
        stride: (height, width) of a cell, with ``size``.
        destination: int64 or int32 (D,), different token numbers: the destinations. None, without
            ``size``: every odd token.
        protect: token numbers that are neither merged nor merged into (a class token); they become
            the first rows. Where the destinations are a tensor or drawn, protected tokens count
            against the limit whether or not they are sources.
        generator: draws the destination of each cell, the same for the whole batch; torch's global
            generators are never used.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        A :class:`MergePlan` with N - merged rows: protected tokens, unmerged sources, destinations,
        each in ascending token number. Shapes do not depend on numbers, and a plan may be used for
        any tensors of these tokens, again and again.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        Similarities are those of :func:`nearest_tokens`; equal ones go to the lowest destination
        and the lowest source, NaN last. O(B N) memory beside the inputs. ``merged=0`` keeps every
        token in its place. The plan has no derivative.

        With ``torch.compile``, draw destinations outside (a generator cannot be traced) and pass
        them; they are then not checked to be different.

    Reference:
        Bolya et al. 2023, Token merging: your ViT but faster (arXiv:2210.09461), for the alternate
        split; Bolya & Hoffman 2023, Token merging for fast Stable Diffusion (arXiv:2303.17604), for
        cells.

    Example:
        >>> import torch
        >>> from transfuse.ops import match_tokens, merge_tokens, unmerge_tokens
        >>> x = torch.randn(2, 64, 16)
        >>> plan = match_tokens(x, 32, size=(8, 8))
        >>> y = merge_tokens(x, plan)
        >>> y.shape, unmerge_tokens(y, plan).shape
        (torch.Size([2, 32, 16]), torch.Size([2, 64, 16]))
    """
    metric, roles, count = call.check_match(
        metric, merged, size, stride, destination, protect, generator
    )
    chosen = _chosen("match_tokens", backend, metric)
    metric = metric.detach()
    if count == 0:
        return identity_plan(metric.shape[0], metric.shape[1], metric.device)
    if chosen != "cpu":
        return plan_composed(metric, roles, count, _search(chosen))
    static = Static(chosen, protect=roles.protect, merged=count)
    tensors = (metric, roles.destination)
    if _eager_derivative(metric):
        return MergePlan(*core.functions.match(static, tensors))
    return MergePlan(*core.match(static, tensors))


def _search(chosen: str):
    def search(x: Tensor, reference: Tensor, mask: Tensor) -> Nearest:
        return _nearest(x, reference, mask, False, chosen)

    return search


def merge_tokens(
    x: Tensor,
    plan: MergePlan,
    *,
    mode: str = "mean",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Merges tokens as planned.

    .. math:: y_r = \frac{\sum_{i \in r} w_i x_i}{\sum_{i \in r} w_i}

    Args:
        x: (B, N, C) tokens, float32, float64, bfloat16 or float16; any strides.
        plan: of :func:`match_tokens`; one of batch size 1 serves every batch entry.
        mode: ``"mean"`` (with ``weight``: weighted), ``"sum"``, ``"amax"`` (per channel), or
            ``"prune"`` (merged tokens are dropped).
        weight: (B or 1, N) weights for ``"mean"`` and ``"sum"``, dtype of x or float32: the number
            of patches a token stands for. None: 1 each. Rows of total weight 0 become 0.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        (B, R, C) in the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        One reading of x, accumulated in float32 (float64 for float64) in the order of the plan:
        the same bits on every run. Derivatives of any order; the gradient of ``"amax"`` goes to the
        lowest token that has the largest number.

    Example:
        Sizes are merged like tokens, and their logarithms are the bias of proportional attention
        (``KV(bias=...)`` of ``attend``):

        >>> import torch
        >>> from transfuse.ops import match_tokens, merge_tokens
        >>> x, size = torch.randn(1, 9, 4), torch.ones(1, 9)
        >>> plan = match_tokens(x, 3, protect=[0])
        >>> y = merge_tokens(x, plan, weight=size)
        >>> size = merge_tokens(size[..., None], plan, mode="sum")[..., 0]
        >>> bias = size.log()[:, None, None, :]
        >>> y.shape, bias.shape, size.sum().item()
        (torch.Size([1, 6, 4]), torch.Size([1, 1, 1, 6]), 9.0)
    """
    x, plan, code, weight = call.check_merge(x, plan, mode, weight)
    chosen = _chosen("merge_tokens", backend, x)
    if code == call.MODES["amax"]:
        return _amax(x, plan, chosen)
    if weight is None:
        return _linear("segments", x, None, plan, code, chosen)
    weight = weight.to(composed.accumulate(x.dtype)).expand(x.shape[0], -1)
    plain = not (torch.compiler.is_compiling() or needs_derivative((x, weight)))
    if code == call.MODES["mean"] and plain and chosen != "composed":
        return _linear("segments", x, weight, plan, core.AVERAGE, chosen)
    if code == call.MODES["mean"]:
        # Shares of the total, so that only one sum over the tokens is left to do.
        total = _linear("segments", weight[..., None], None, plan, core.SUM, chosen)
        total = _linear("gather", total, None, plan, core.SUM, chosen)[..., 0]
        weight = torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total))
    return _linear("segments", x, weight, plan, core.SUM, chosen)


def unmerge_tokens(y: Tensor, plan: MergePlan, *, backend: str | None = None) -> Tensor:
    r"""Gives every token the row it was merged into.

    .. math:: x_i = y_{r(i)}

    Args:
        y: (B, R, C) merged tokens, or what was made of them; any strides.
        plan: the plan they were merged by; one of batch size 1 serves every batch entry.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        (B, N, C) in the dtype of y, contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        One gather. Derivatives of any order; the gradient is a sum over each row's tokens in the
        order of the plan, the same bits on every run.

    Example:
        >>> import torch
        >>> from transfuse.ops import match_tokens, merge_tokens, unmerge_tokens
        >>> x = torch.randn(1, 8, 4)
        >>> plan = match_tokens(x, 2)
        >>> y = merge_tokens(x, plan, mode="prune")
        >>> torch.equal(merge_tokens(unmerge_tokens(y, plan), plan, mode="prune"), y)
        True
    """
    y, plan = call.check_unmerge(y, plan)
    return _linear("gather", y, None, plan, core.SUM, _chosen("unmerge_tokens", backend, y))


def push_tokens(
    x: Tensor,
    reference: Tensor,
    *,
    alpha: float,
    threshold: float,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Pushes tokens away from the reference token they resemble most.

    .. math:: y_i = x_i + \alpha \, (x_i - r_{j(i)}) \quad\text{if}\quad
              \max_j \cos(x_i, r_j) > \mathrm{threshold}, \quad\text{else } x_i

    Args:
        x: (B, N, C) tokens, float32, float64, bfloat16 or float16; any strides.
        reference: (B or 1, M, C), same dtype and device.
        alpha: strength; negative numbers pull.
        threshold: cosine in [-1, 1] that must be exceeded.
        mask: (M,), (1, M) or (B, M) bool, True where a reference token may be chosen.
        backend: None, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; a named one never
            falls back.

    Returns:
        Shape and dtype of x. Tokens that are not pushed are the same bits.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
        RuntimeError: a named backend that cannot run here, with the reason.

    Notes:
        The cost is that of :func:`nearest_tokens`. Derivatives of any order with respect to x and
        reference; which token is nearest, and whether it is near enough, has none.

    Reference:
        Singh et al. 2024, Negative token merging: image-based adversarial feature guidance
        (arXiv:2412.01339).

    Example:
        >>> import torch
        >>> from transfuse.ops import push_tokens
        >>> x, reference = torch.tensor([[[1.0, 0.2]]]), torch.tensor([[[1.0, 0.0]]])
        >>> push_tokens(x, reference, alpha=0.5, threshold=0.9)
        tensor([[[1.0000, 0.3000]]])
    """
    x, reference, mask = call.check_nearest(x, reference, mask, False)
    alpha, threshold = call.check_push(alpha, threshold)
    chosen = _chosen("push_tokens", backend, x)
    fixed = (x.detach(), reference.detach())
    similarity, index = _nearest(*fixed, mask, False, chosen)
    if chosen == "composed" or reference.numel() == 0:
        return composed.push_composed(x, reference, similarity, index, alpha, threshold)
    static = Static(chosen, alpha=alpha, threshold=threshold)
    if not _eager_derivative(x, reference):
        return core.push(static, (x, reference, similarity, index))[0]
    reference = reference.expand(x.shape[0], -1, -1)
    return core.functions.push(static, (x, reference, similarity, index))[0]


def _linear(
    op: str, x: Tensor, scale: Tensor | None, plan: MergePlan, weighting: int, chosen: str
) -> Tensor:
    """``segments`` or ``gather`` of the core, by the backend that was chosen."""
    if chosen == "composed":
        if op == "gather":
            return composed.gather_composed(x, scale, plan.rows)
        return composed.segments_composed(x, scale, *plan, weighting)
    static = Static(chosen, weighting=weighting)
    if not _eager_derivative(x, scale):
        return getattr(core, op)(static, (x, scale, *plan))[0]
    wide = (t.expand(x.shape[0], -1) for t in plan)
    return getattr(core.functions, op)(static, (x, scale, *wide))[0]


def _amax(x: Tensor, plan: MergePlan, chosen: str) -> Tensor:
    if chosen == "composed":
        wide = (t.expand(x.shape[0], -1) for t in plan)
        return composed.amax_composed(x, *wide)
    static = Static(chosen)
    if torch.compiler.is_compiling():
        needs_derivative((x,))  # refuses transforms
        return core.amax(static, (x, *plan))[0]
    if not needs_derivative((x,)):
        return core.kernels(chosen).amax(x, *plan, False)[0]
    wide = (t.expand(x.shape[0], -1) for t in plan)
    return core.functions.amax(static, (x, *wide))[0]
