"""Curvature of a linear softmax or binary head written out: specification, oracle and fallback.

A domain has n samples x (rows of ``features``, with a 1 behind it where the head has a bias, so D
= d + 1 columns; else D = d). Its loss is the mean cross-entropy of logits z = x W^T, p = softmax z;
with one output (C = 1) the mean binary cross-entropy of one logit, p = sigmoid z. Then

    gradient   (1/n) sum (p - y) x^T                             (C, D)
    product    (1/n) sum t x^T,  t = p * (u - p.u),  u = V x     (C, D) for V (C, D)
    diagonal   (1/n) sum p * (1 - p) (x * x)^T                   (C, D)
    trace      (1/n) sum_n (sum_c p_c (1 - p_c)) |x|^2

and one output is no exception: t = p (1 - p) u there, too. Everything is plain torch, so that
autograd differentiates it to any order, forward and reverse. Nothing of size N x C x D is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.ops._head_call import Head, Segments


def probabilities(head: Head) -> tuple[Tensor, Tensor]:
    """p and 1 - p, each (N, C), both with all their digits."""
    logits = torch.nn.functional.linear(head.features, head.weight, head.bias)
    if head.classes == 1:
        return logits.sigmoid(), (-logits).sigmoid()
    # 1 - p of the largest class would lose its digits when p is near 1: the sum of the others.
    top = logits.detach().argmax(-1, keepdim=True)
    powers = (logits - logits.detach().gather(-1, top)).exp()
    others = powers.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    peak = powers.gather(-1, top)
    total = peak + others
    rest = (total - powers).scatter(-1, top, others)
    return powers / total, rest / total


def mean_outer(left: Tensor, features: Tensor, bias: bool, segments: Segments) -> Tensor:
    """Means of ``left_n x_n^T`` over each domain: (N, A) and (N, d) -> (E, A, D)."""
    if segments.even:
        split = (segments.domains, segments.lengths[0])
        rows = (left * (1.0 / split[1])).unflatten(0, split).transpose(1, 2)
        result = rows @ features.unflatten(0, split)
        sums = rows.sum(-1, keepdim=True) if bias else None
    else:
        parts = [rows * (1.0 / rows.shape[0]) for rows in left.split(segments.lengths)]
        stretches = features.split(segments.lengths)
        result = torch.stack([p.mT @ x for p, x in zip(parts, stretches, strict=True)])
        sums = torch.stack([p.sum(0) for p in parts])[..., None] if bias else None
    return result if sums is None else torch.cat((result, sums), -1)


def outputs(features: Tensor, vectors: Tensor, bias: bool) -> Tensor:
    """``V x`` for every sample and one set of vectors: (N, d) and (A, D) -> (N, A)."""
    if bias:
        return torch.nn.functional.linear(features, vectors[:, :-1], vectors[:, -1])
    return torch.nn.functional.linear(features, vectors)


def outputs_per_domain(features: Tensor, vectors: Tensor, bias: bool, segments: Segments) -> Tensor:
    """``V_e x`` with the vectors of each sample's domain: (N, d) and (E, A, D) -> (N, A)."""
    if segments.even:
        stretches = features.unflatten(0, (segments.domains, segments.lengths[0]))
        if bias:
            result = stretches @ vectors[..., :-1].mT + vectors[..., None, :, -1]
        else:
            result = stretches @ vectors.mT
        return result.flatten(0, 1)
    stretches = features.split(segments.lengths)
    return torch.cat(
        [outputs(x, v, bias) for x, v in zip(stretches, vectors.unbind(0), strict=True)]
    )


def mean_rows(values: Tensor, segments: Segments) -> Tensor:
    """Means of (N,) over each domain: (E,)."""
    if segments.even:
        return values.unflatten(0, (segments.domains, segments.lengths[0])).mean(-1)
    return torch.stack([part.mean() for part in values.split(segments.lengths)])


def gradient(head: Head, targets: Tensor) -> Tensor:
    """(E, C, D)."""
    p, _ = probabilities(head)
    return mean_outer(p - targets, head.features, head.bias is not None, head.segments)


def diagonal(head: Head) -> Tensor:
    """(E, C, D)."""
    p, rest = probabilities(head)
    squares = head.features * head.features
    return mean_outer(p * rest, squares, head.bias is not None, head.segments)


def trace(head: Head) -> Tensor:
    """(E,)."""
    p, rest = probabilities(head)
    length = (head.features * head.features).sum(-1) + (head.bias is not None)
    return mean_rows((p * rest).sum(-1) * length, head.segments)


def product(head: Head, vectors: Tensor) -> Tensor:
    """H_e V: (E, R, C, D) for vectors (R, C, D), shared, or (E, R, C, D)."""
    p, _ = probabilities(head)
    return _product(head, p, vectors)


def hgp(head: Head, targets: Tensor) -> Tensor:
    """H_e g_e, (E, C, D)."""
    p, _ = probabilities(head)
    slope = mean_outer(p - targets, head.features, head.bias is not None, head.segments)
    return _product(head, p, slope[:, None])[:, 0]


def _product(head: Head, p: Tensor, vectors: Tensor) -> Tensor:
    bias, (runs, classes) = head.bias is not None, vectors.shape[-3:-1]
    flat = vectors.flatten(-3, -2)
    if vectors.dim() == 3:
        u = outputs(head.features, flat, bias)
    else:
        u = outputs_per_domain(head.features, flat, bias, head.segments)
    u, p = u.unflatten(-1, (runs, classes)), p[:, None]
    t = p * (u - (p * u).sum(-1, keepdim=True))
    result = mean_outer(t.flatten(1), head.features, bias, head.segments)
    return result.unflatten(1, (runs, classes))


def squared_distance(head: Head) -> Tensor:
    """``|H_e - H_f|_F^2`` for all pairs of domains, (E, E), from the N x N inner products.

    <A (x) xx^T, B (x) yy^T> = <A, B> (x.y)^2 with A = diag p - pp^T, and <A, B> is the sum of
    products of diagonals, p (1-p) q (1-q), and of the other entries, (p.q)^2 - p^2 . q^2.
    """
    p, rest = probabilities(head)
    spread, squares = p * rest, p * p
    inner = head.features @ head.features.mT
    if head.bias is not None:
        inner = inner + 1.0
    diagonals = torch.cat((spread, squares), 1) @ torch.cat((spread, -squares), 1).mT
    classes = diagonals + (p @ p.mT).square()
    return distances(pair_means(inner.square() * classes, head.segments))


def pair_means(pairs: Tensor, segments: Segments) -> Tensor:
    """Means of (N, N) over all pairs of domains, (E, E)."""
    if segments.even:
        size = (segments.domains, segments.lengths[0])
        return pairs.unflatten(1, size).mean(2).unflatten(0, size).mean(1)
    rows = [part.mean(0) for part in pairs.split(segments.lengths)]
    columns = torch.stack(rows).split(segments.lengths, dim=1)
    return torch.stack([part.mean(1) for part in columns], dim=1)


def distances(products: Tensor) -> Tensor:
    """Squared distances from inner products; exactly 0 on the diagonal, never below 0."""
    own = products.diagonal()
    return (own[:, None] + own[None, :] - products - products.mT).clamp(min=0.0)
