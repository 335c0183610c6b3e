"""Transformers as Support Vector Machines.

Davoud Ataee Tarzanagh, Yingcong Li, Christos Thrampoulidis, Samet Oymak; NeurIPS 2023 workshop on
mathematics of modern machine learning; arXiv 2308.16898; official code umich-sota/TF-as-SVM.

One attention layer f = v^T X^T softmax(X W z), trained by gradient descent, converges in direction
to a hard-margin support vector machine that separates the token it selects in each sequence from
the others:

    min |W|   subject to   (x_{i,alpha_i} - x_{it})^T W z_i >= 1   for all i and t != alpha_i,

with the Frobenius norm where W itself is trained, and the nuclear norm where its factors K and Q
are. Heads that are not linear may keep several tokens; then W ~ W_fin + R W_dir, where W_fin makes
the ratios of the tokens that stay and W_dir separates them from the rest.

Deviations from the official code, all deliberate:

- Solvers of its own, batched over instances: least distance programming on the Gram matrix (exact)
  for the Frobenius norm, splitting with a certified gap for the nuclear norm; the code calls a
  conic solver for each instance, and returns None where there is no solution; here it raises.
- The norm is the Frobenius norm by default; the code's default is the nuclear norm.
- The gradient is computed in the log domain. Plain float64 loses the direction once the softmax is
  saturated (``gradient="naive"``).
- Several tokens: from log-probabilities, which the code takes of numbers that may be 0.
- W is that of the formula; the code's linear layer holds its transpose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transfuse import _checks
from transfuse._registry import register
from transfuse.methods.optimization._attention_probe import (
    AttentionProbe,
    Descent,
    normalized_gd,
    stable_gradient,
)
from transfuse.methods.optimization._margin_rows import Polyhedron, Rows
from transfuse.methods.optimization._nuclear import smallest_nuclear

__all__ = [
    "AttentionProbe",
    "AttentionSVM",
    "Descent",
    "SeveralTokens",
    "TokenSelection",
    "alignment",
    "att_svm",
    "head_weights",
    "normalized_gd",
    "selection_report",
    "several_tokens",
    "stable_gradient",
]

NORMS = ("fro", "nuc")


class AttentionSVM(NamedTuple):
    """W (..., d, d), its norm (...), margins (x_alpha - x_t)^T W z (..., n, T) with inf at alpha,
    and the tokens on the margin (..., n, T) bool."""

    weight: Tensor
    norm: Tensor
    margins: Tensor
    support: Tensor


@register(
    title="Transformers as Support Vector Machines",
    authors=(
        "Davoud Ataee Tarzanagh",
        "Yingcong Li",
        "Christos Thrampoulidis",
        "Samet Oymak",
    ),
    year=2023,
    venue="NeurIPS workshop",
    arxiv="2308.16898",
    repository="https://github.com/umich-sota/TF-as-SVM",
    kind="procedure",
    ops=(),
)
def att_svm(
    x: Tensor,
    query: Tensor | int,
    selected: Tensor,
    *,
    norm: str = "fro",
    tol: float = 1e-8,
) -> AttentionSVM:
    r"""The smallest W that separates the selected token of each sequence from its others.

    .. math:: \min_W \lVert W \rVert \quad\text{subject to}\quad
              (x_{i,\alpha_i} - x_{it})^T W z_i \ge 1

    Args:
        x: tokens (n, T, d), or (I, n, T, d) for I instances at once; floating.
        query: z, (n, d) or (I, n, d); or the number of the token of each sequence that is its
            query.
        selected: alpha, (n,) or (I, n) integers.
        norm: ``"fro"`` or ``"nuc"`` (sum of singular values).
        tol: margins are at least 1 - tol; for ``"nuc"``, the gap to the smallest norm is at most
            max(tol, 1e-7) of it.

    Returns:
        :class:`AttentionSVM`, float64. One token per sequence: W = 0.

    Raises:
        ValueError: nothing separates: a query that is 0, a token equal to the selected one, or any
            other set without a solution; the message names the instance, and sequence if it can.
        TypeError, ValueError: shapes that do not fit, numbers out of range.
        RuntimeError: the gap did not close.

    Notes:
        Constraints are never formed as rows of d^2 numbers: their R^2 products, R = n T, are those
        of token differences times those of queries. Work is O(k I R^3) with k about the number of
        support tokens. The nuclear norm's smallest W need not be unique: compare norms and margins.

        A set whose margin is below 1e-6 of its largest row counts as one that nothing separates.

    Reference:
        Ataee Tarzanagh et al. 2023 (arXiv:2308.16898), equation Att-SVM.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> att_svm(x, torch.tensor([[1.0, 0.0]]), torch.tensor([0])).weight
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  0.0000]], dtype=torch.float64)
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected fro or nuc, got {norm!r}")
    tol = _checks.number("tol", tol, positive=True)
    flat, z, lead = _sequences(x, query)
    alpha = _selected(selected, flat, lead)
    instances, n, tokens, d = flat.shape
    chosen = torch.zeros((instances, n, tokens), dtype=torch.bool, device=flat.device)
    chosen.scatter_(-1, alpha[..., None], True)
    top = flat.gather(-2, alpha[..., None, None].expand(-1, -1, 1, d))
    delta = top - flat
    _refuse_hopeless(delta, z, ~chosen)
    rows = _rows(delta, z, ~chosen, torch.ones_like(delta[..., 0]), chosen & False)
    polyhedron = Polyhedron(rows, min(tol, 1e-9))
    found = polyhedron.project()
    _refuse_infeasible(found.feasible)
    w = found.weight
    if norm == "nuc":
        w = smallest_nuclear(polyhedron, found, max(tol, 1e-7))
    margins = rows.apply(w).unflatten(-1, (n, tokens))
    if bool((torch.where(chosen, 1.0, margins) < 1 - tol).any()):
        raise RuntimeError(f"att_svm: margins reach only {margins[~chosen].min():.10f}")
    margins = torch.where(chosen, torch.inf, margins)
    size = _norm(w, norm)
    return AttentionSVM(
        *(t.reshape((*lead, *t.shape[1:])) for t in (w, size, margins, margins <= 1 + 1e-6))
    )


def alignment(w: Tensor, other: Tensor) -> Tensor:
    """Cosine of two matrices (..., d, d), or of batches of them; NaN where one is 0.

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(0.)
    """
    if w.shape[-2:] != other.shape[-2:]:
        raise ValueError(
            f"w and other: expected matrices of one shape, got {tuple(w.shape)} and "
            f"{tuple(other.shape)}"
        )
    size = torch.linalg.matrix_norm(w) * torch.linalg.matrix_norm(other)
    return (w * other).sum((-2, -1)) / size


class SeveralTokens(NamedTuple):
    """W_fin and W_dir (..., d, d), the tokens that stay (..., n, T) bool, and, if a trained W was
    given, R (...), W_fin + R W_dir, and its cosine with the trained W (...)."""

    finite: Tensor
    direction: Tensor
    kept: Tensor
    ratio: Tensor | None
    prediction: Tensor | None
    correlation: Tensor | None


def several_tokens(
    x: Tensor,
    query: Tensor | int,
    log_probs: Tensor,
    *,
    trained: Tensor | None = None,
    norm: str = "fro",
    threshold: float = 1e-3,
    tol: float = 1e-8,
) -> SeveralTokens:
    r"""What a layer converges to that keeps several tokens of a sequence.

    .. math:: (x_t - x_u)^T W_{\mathrm{fin}} z = \log s_t - \log s_u, \quad
              (x_t - x_u)^T W_{\mathrm{dir}} z = 0 \quad\text{for } t, u \in O, \qquad
              (x_t - x_u)^T W_{\mathrm{dir}} z \ge 1 \quad\text{for } t \in O, u \notin O

    Args:
        x, query, norm, tol: see :func:`att_svm`.
        log_probs: log s of the trained layer, (n, T) or (I, n, T).
        trained: the trained W, (d, d) or (I, d, d); R is fitted to it by least squares.
        threshold: tokens with s of at least this stay in O.

    Returns:
        :class:`SeveralTokens`, float64. Where all tokens stay, W_dir is 0.

    Raises:
        ValueError: ratios that no W makes, or tokens that nothing separates.
        TypeError, ValueError: shapes that do not fit, numbers out of range.

    Example:
        >>> x, z = torch.eye(3)[None], torch.tensor([[1.0, 0.0, 0.0]])
        >>> log_s = torch.tensor([[0.6, 0.4, 0.0]]).log()
        >>> found = several_tokens(x, z, log_s)
        >>> torch.softmax(x[0].double() @ (found.finite + 40 * found.direction)[:, 0], 0)
        tensor([6.0000e-01, 4.0000e-01, ...e-18], dtype=torch.float64)
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected fro or nuc, got {norm!r}")
    threshold = _checks.number("threshold", threshold, positive=True)
    tol = _checks.number("tol", tol, positive=True)
    flat, z, lead = _sequences(x, query)
    instances, n, tokens, d = flat.shape
    if not isinstance(log_probs, Tensor) or tuple(log_probs.shape) != (*lead, n, tokens):
        raise ValueError(
            f"log_probs: expected shape {(*lead, n, tokens)}, got {_checks.describe(log_probs)}"
        )
    log_s = log_probs.detach().double().reshape(instances, n, tokens)
    if not bool((log_s <= 1e-6).all()):
        raise ValueError("log_probs: expected logarithms of probabilities, at most 0 and not NaN")
    top = log_s.argmax(-1, keepdim=True)
    kept = (log_s >= torch.tensor(threshold, dtype=log_s.dtype).log()).scatter(-1, top, True)
    first = torch.zeros_like(kept).scatter(-1, top, True)
    stay = kept & ~first
    # Against the most probable token; the others of O equal it.
    delta = flat.gather(-2, top[..., None].expand(-1, -1, 1, d)) - flat
    gaps = torch.where(stay, log_s.gather(-1, top) - log_s, 0.0)
    finite = Polyhedron(_rows(delta, z, kept & False, gaps, stay), min(tol, 1e-9))
    apart = (~kept).to(flat.dtype)
    _refuse_hopeless(delta, z, ~kept)
    direction = Polyhedron(_rows(delta, z, ~kept, apart, stay), min(tol, 1e-9))
    solutions = []
    for polyhedron in (finite, direction):
        found = polyhedron.project()
        _refuse_infeasible(found.feasible)
        w = found.weight
        if norm == "nuc":
            w = smallest_nuclear(polyhedron, found, max(tol, 1e-7))
        solutions.append(w.reshape(*lead, d, d))
    fin, away = solutions
    kept = kept.reshape(*lead, n, tokens)
    if trained is None:
        return SeveralTokens(fin, away, kept, None, None, None)
    if not isinstance(trained, Tensor) or trained.shape != fin.shape:
        raise ValueError(
            f"trained: expected shape {tuple(fin.shape)}, got {_checks.describe(trained)}"
        )
    w = trained.detach().double()
    power = away.square().sum((-2, -1))
    ratio = (away * (w - fin)).sum((-2, -1)) / torch.where(power > 0, power, 1.0)
    prediction = fin + ratio[..., None, None] * away
    return SeveralTokens(fin, away, kept, ratio, prediction, alignment(prediction, w))


class TokenSelection(NamedTuple):
    """Per query (B, H, N): the selected token, its probability, the entropy in nats, the number of
    tokens that stay; per head (H,): the share of queries that select one token alone."""

    token: Tensor
    probability: Tensor
    entropy: Tensor
    kept: Tensor
    saturation: Tensor


def selection_report(attention_probs: Tensor, *, threshold: float = 1e-3) -> TokenSelection:
    """How far the attention of a real layer has selected tokens.

    Args:
        attention_probs: (B, H, N, M) probabilities.
        threshold: tokens with at least this probability stay.

    Returns:
        :class:`TokenSelection`, at least float32.

    Raises:
        TypeError, ValueError: other shapes, or rows that are not probabilities.

    Example:
        >>> report = selection_report(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
        >>> report.token.tolist(), report.kept.tolist(), report.saturation.tolist()
        ([[[0, 0]]], [[[1, 2]]], [0.5])
    """
    p = _checks.tensor("attention_probs", attention_probs, ("B", "H", "N", "M"))
    _checks.floating("attention_probs", p)
    threshold = _checks.number("threshold", threshold, positive=True)
    p = p.detach().to(torch.promote_types(p.dtype, torch.float32))
    if p.numel() == 0:
        raise ValueError(f"attention_probs: expected some, got shape {tuple(p.shape)}")
    sums = p.sum(-1)
    if bool((p < 0).any()) or not bool(((sums - 1).abs() < 0.05).all()):
        raise ValueError("attention_probs: expected rows that are probabilities and sum to 1")
    best, token = p.max(-1)
    count = (p >= threshold).sum(-1)
    entropy = torch.special.entr(p).sum(-1)
    return TokenSelection(token, best, entropy, count, (count == 1).float().mean((0, 2)))


def head_weights(query_weight: Tensor, key_weight: Tensor, heads: int) -> Tensor:
    """W of every head of a real layer: attention logits are x^T W z for key tokens x, queries z.

    Args:
        query_weight, key_weight: (H d_head, d) weights of the linear layers.
        heads: H.

    Returns:
        (H, d, d): W_k^T W_q / sqrt(d_head) of each head. Biases and positions are not in it.

    Raises:
        TypeError, ValueError: shapes that do not fit.

    Example:
        >>> head_weights(torch.eye(4), torch.eye(4), 2).shape
        torch.Size([2, 4, 4])
    """
    _checks.positive_int("heads", heads)
    for name, value in (("query_weight", query_weight), ("key_weight", key_weight)):
        _checks.tensor(name, value, ("H d_head", "d"))
    if query_weight.shape != key_weight.shape or query_weight.shape[0] % heads:
        raise ValueError(
            f"query_weight and key_weight: expected one shape, with rows divisible by {heads}, got "
            f"{tuple(query_weight.shape)} and {tuple(key_weight.shape)}"
        )
    q, k = (w.detach().unflatten(0, (heads, -1)) for w in (query_weight, key_weight))
    return k.mT @ q / q.shape[1] ** 0.5


def _norm(w: Tensor, norm: str) -> Tensor:
    return torch.linalg.matrix_norm(w, ord=norm)


def _sequences(x: Tensor, query: Tensor | int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Tokens (I, n, T, d) and queries (I, n, d) in float64, and the leading shape: () or (I,)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: expected a floating tensor, got {_checks.describe(x)}")
    if x.dim() not in (3, 4) or x.numel() == 0:
        raise ValueError(
            f"x: expected tokens (n, T, d) or (I, n, T, d), none of them 0, got {tuple(x.shape)}"
        )
    if not bool(x.isfinite().all()):
        raise ValueError("x: expected finite numbers")
    lead = tuple(x.shape[:-3])
    flat = x.detach().double().reshape(-1, *x.shape[-3:])
    if isinstance(query, Tensor):
        if tuple(query.shape) != (*lead, x.shape[-3], x.shape[-1]):
            raise ValueError(
                f"query: expected shape {(*lead, x.shape[-3], x.shape[-1])}, "
                f"got {tuple(query.shape)}"
            )
        if not bool(query.isfinite().all()):
            raise ValueError("query: expected finite numbers")
        z = query.detach().double().reshape(-1, *query.shape[-2:])
        return flat, z.to(flat.device), lead
    if isinstance(query, bool) or not isinstance(query, int):
        raise TypeError(
            f"query: expected a tensor or the number of a token, got {_checks.describe(query)}"
        )
    if not -x.shape[-2] <= query < x.shape[-2]:
        raise ValueError(f"query: expected a token of {x.shape[-2]}, got {query}")
    return flat, flat[:, :, query], lead


def _selected(selected: Tensor, flat: Tensor, lead: tuple[int, ...]) -> Tensor:
    shape = (*lead, flat.shape[1])
    if not isinstance(selected, Tensor) or selected.is_floating_point():
        raise TypeError(f"selected: expected integers, got {_checks.describe(selected)}")
    if tuple(selected.shape) != shape:
        raise ValueError(f"selected: expected shape {shape}, got {tuple(selected.shape)}")
    alpha = selected.to(flat.device, torch.int64).reshape(flat.shape[:2])
    if not bool(((alpha >= 0) & (alpha < flat.shape[2])).all()):
        raise ValueError(f"selected: expected tokens in [0, {flat.shape[2]})")
    return alpha


def _rows(delta: Tensor, z: Tensor, inequality: Tensor, rhs: Tensor, equality: Tensor) -> Rows:
    """Constraints (I, n T) of differences (I, n, T, d); what is neither kind is empty."""
    live = (inequality | equality)[..., None]
    spread = z[:, :, None].expand_as(delta)
    delta, spread = (torch.where(live, t, 0.0).flatten(1, 2) for t in (delta, spread))
    rhs = torch.where(live[..., 0], rhs, 0.0)
    return Rows(delta, spread, *(t.flatten(1) for t in (rhs, inequality, equality)))


def _where(instance: int, count: int) -> str:
    return "" if count == 1 else f"instance {instance}, "


def _refuse_hopeless(delta: Tensor, z: Tensor, rows: Tensor) -> None:
    """Constraints 0 >= 1: the reasons that can be named."""
    dead = (z == 0).all(-1) & rows.any(-1)
    if bool(dead.any()):
        i, s = dead.nonzero()[0].tolist()
        raise ValueError(
            f"query: expected one that is not 0, {_where(i, z.shape[0])}sequence {s}: every logit "
            "is 0, and nothing separates its tokens"
        )
    twins = (delta == 0).all(-1) & rows
    if bool(twins.any()):
        i, s, t = twins.nonzero()[0].tolist()
        raise ValueError(
            f"x: token {t} equals the selected one, {_where(i, z.shape[0])}sequence {s}: nothing "
            "separates them"
        )


def _refuse_infeasible(feasible: Tensor) -> None:
    if not bool(feasible.all()):
        which = (~feasible).nonzero()[:, 0].tolist()
        place = "" if feasible.numel() == 1 else f" in {len(which)} instances, the first {which[0]}"
        raise ValueError(f"x: no W satisfies all constraints{place}")
