"""Scores from exact Jacobian rows: how much attention's weights matter to what is made of them.

The arithmetic of Grad-SAM (see ``grad_sam``) on tensors and functions, without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from transfuse import _checks
from transfuse.methods.diffusion_control._subjects import subject_columns

PHI = ("abs", "relu")


def check_phi(phi: object) -> None:
    if phi not in PHI:
        raise ValueError(f"phi: expected one of {', '.join(PHI)}, got {phi!r}")


def rectify(gradient: Tensor, phi: str) -> Tensor:
    return gradient.abs() if phi == "abs" else gradient.clamp_min(0)


def column_scores(attention: Tensor, gradient: Tensor, *, phi: str = "abs") -> Tensor:
    """sum_{h, q} A[h, q, c] phi(g[m, h, q, c]): scores of m output elements at given columns.

    Args:
        attention: (..., H, N, n) softmax weights at n columns.
        gradient: (m, ..., H, N, n) gradients of m output elements.
        phi: ``"abs"`` or ``"relu"``, inside the sum: signed sums cancel.

    Returns:
        (m, ..., n), float32 (float64 for float64).

    Example:
        >>> column_scores(torch.ones(1, 2, 1), torch.tensor([[[[1.0], [-3.0]]]]))
        tensor([[4.]])
    """
    check_phi(phi)
    if gradient.shape[1:] != attention.shape:
        raise ValueError(
            f"gradient: expected (m, {', '.join(map(str, attention.shape))}), "
            f"got {tuple(gradient.shape)}"
        )
    work = torch.float64 if attention.dtype == torch.float64 else torch.float32
    rectified = rectify(gradient.detach().to(work), phi)
    return torch.einsum("...hqc,m...hqc->m...c", attention.detach().to(work), rectified)


def _one_hot_chunks(count: int, chunk: int, like: Tensor) -> Iterator[Tensor]:
    """The rows of the identity of size ``count``, ``chunk`` at a time."""
    for start in range(0, count, chunk):
        rows = like.new_zeros(min(chunk, count - start), count)
        rows.diagonal(offset=start).fill_(1)
        yield rows


def attention_jacobian_scores(
    fn: Callable[[Tensor], Tensor],
    attention: Tensor,
    subjects: Sequence[int | Sequence[int]],
    *,
    phi: str = "abs",
    chunk: int = 32,
    mode: str = "reverse",
) -> Tensor:
    """Scores of every element of ``fn(attention)`` for each subject, from exact Jacobian rows.

    Args:
        fn: Attention weights -> output of any shape, differentiable.
        attention: (H, N, L) weights.
        subjects: One token position, or the positions of a subject's sub-words, for each subject.
        phi: ``"abs"`` or ``"relu"``.
        chunk: Rows (or columns) of the Jacobian computed at once.
        mode: ``"reverse"``: one product for each output element. ``"forward"``: one for each
            weight of the subjects' columns; cheaper when those are fewer.

    Returns:
        (subjects, *output shape), float32 (float64 for float64), without graph.

    Raises:
        ValueError, TypeError: Arguments out of range.

    Notes:
        ``fn`` takes the whole map, so its backward forms ``chunk`` gradients of the map, of which
        the subjects' columns are kept. :class:`GradSAM` knows that attention is linear in its map
        and forms neither.

    Example:
        >>> a = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]])
        >>> attention_jacobian_scores(lambda a: a[0, :, 1] * torch.tensor([2.0, -4.0]), a, [1])
        tensor([[1.5000, 0.0000]])
    """
    _checks.tensor("attention", attention, ("H", "N", "L"))
    _checks.floating("attention", attention)
    _checks.positive_int("chunk", chunk)
    check_phi(phi)
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode: expected reverse or forward, got {mode!r}")
    chosen = subject_columns(subjects, attention.shape[2])
    columns = chosen.columns.to(attention.device)
    base = attention.detach()
    weights = base.index_select(2, columns)

    def perturbed(delta: Tensor) -> Tensor:
        return fn(base.index_add(2, columns, delta))

    if mode == "forward":
        scores = _forward_scores(perturbed, weights, phi, chunk)
    else:
        delta = torch.zeros_like(weights[None], requires_grad=True)
        with torch.enable_grad():
            output = perturbed(delta[0])[None]
            (scores,) = reverse_scores(output, [weights[None]], [delta], phi, chunk)
        scores = scores[0]
    member = chosen.member.to(scores)
    return torch.tensordot(member, scores, dims=([1], [0]))


def _forward_scores(fn: Callable, weights: Tensor, phi: str, chunk: int) -> Tensor:
    """(n, *output): one tangent for each weight, batched."""
    zero = torch.zeros_like(weights)

    def column(tangent: Tensor) -> Tensor:
        return torch.func.jvp(fn, (zero,), (tangent.view_as(zero),))[1]

    heads, rows, count = weights.shape
    flat = weights.flatten()
    # Weights of one column are heads * rows apart: bring the columns to the front.
    order = torch.arange(flat.numel(), device=weights.device).view(heads, rows, count)
    order = order.permute(2, 0, 1).flatten()
    scores: Tensor | None = None
    for start in range(0, order.numel(), chunk):
        part = order[start : start + chunk]
        tangents = flat.new_zeros(part.numel(), flat.numel())
        tangents.scatter_(1, part[:, None], 1.0)
        jacobian = torch.func.vmap(column)(tangents)
        work = torch.float64 if jacobian.dtype == torch.float64 else torch.float32
        if scores is None:
            scores = torch.zeros(count, *jacobian.shape[1:], dtype=work, device=weights.device)
        amount = flat[part].to(work).view(-1, *[1] * (jacobian.ndim - 1))
        owner = torch.arange(start, start + part.numel(), device=weights.device) // (heads * rows)
        scores.index_add_(0, owner, amount * rectify(jacobian.detach().to(work), phi))
    if scores is None:
        raise ValueError(f"attention: expected no empty dimension, got {tuple(weights.shape)}")
    return scores


def _row_gradients(
    flat: Tensor, deltas: list[Tensor], unit: Tensor, *, batched: bool
) -> list[Tensor | None]:
    """Gradients (m, *delta) of m output elements each; None where a delta has no part in them."""
    rows = unit[:, None].expand(-1, flat.shape[0], -1)
    options = {"retain_graph": True, "allow_unused": True}
    if batched:
        return list(
            torch.autograd.grad(flat, deltas, grad_outputs=rows, is_grads_batched=True, **options)
        )
    single = [torch.autograd.grad(flat, deltas, grad_outputs=row, **options) for row in rows]
    return [None if own[0] is None else torch.stack(own) for own in zip(*single, strict=True)]


def reverse_scores(
    output: Tensor, weights: list[Tensor], deltas: list[Tensor], phi: str, chunk: int
) -> list[Tensor]:
    """For each layer (B, n, *element): one product for each output element, all samples together.

    ``output`` is (B, *element); samples are independent, so a row of the Jacobian is taken of the
    sum over samples and falls apart into theirs.
    """
    element = output.shape[1:]
    count = math.prod(element)
    rows: list[list[Tensor]] = [[] for _ in deltas]
    flat = output.reshape(output.shape[0], count)
    batched = True
    for unit in _one_hot_chunks(count, chunk, flat):
        try:
            gradients = _row_gradients(flat, deltas, unit, batched=batched)
        except RuntimeError as error:
            # Compiled ops behind an early layer (attend among them) have no batched backward.
            if not batched or "Batching rule" not in str(error):
                raise
            batched = False
            gradients = _row_gradients(flat, deltas, unit, batched=False)
        for own, amount, gradient in zip(rows, weights, gradients, strict=True):
            if gradient is None:
                gradient = amount.new_zeros(()).expand(unit.shape[0], *amount.shape)
            own.append(column_scores(amount, gradient, phi=phi))
    joined = [torch.cat(own) for own in rows]  # (m, B, n)
    return [own.movedim(0, -1).unflatten(-1, element) for own in joined]
