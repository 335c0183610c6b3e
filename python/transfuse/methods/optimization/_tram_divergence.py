"""Divergences of two sets of logits, as the radius of a trust region."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfuse import _checks

BANDWIDTHS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# Numbers of each set of logits that are held in working precision at a time.
CHUNK = 2**22

_KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "imq": lambda d, k: k / (k + d),
    "imq2": lambda d, k: (k * k + d).rsqrt(),
    "imq3": lambda d, k: k * k / (k * k + d),
    "rbf": lambda d, k: torch.exp(d * (-0.5 / k)),
}


def _forward(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) of each row."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    # What p rules out (a masked vocabulary) adds nothing, also where q rules it out too.
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_forward": _forward,
    "kl_reverse": lambda p, q: _forward(q, p),
    "kl_symmetric": lambda p, q: _forward(p, q) + _forward(q, p),
    "l2": lambda p, q: torch.linalg.vector_norm(p - q, dim=-1),
}
KINDS = (*_ROWS, *(f"mmd_{name}" for name in _KERNELS))


@torch.no_grad()
def divergence(
    target: Tensor, logits: Tensor, *, kind: str = "kl_forward", official_scale: bool = False
) -> Tensor:
    r"""How far apart a target's and a model's predictions are; no gradient flows through it.

    .. math:: d = \frac{1}{B} \sum_i \mathrm{KL}(p_i \,\|\, q_i)

    Args:
        target: (B, C) or (B, T, V) logits of the target.
        logits: the same shape, of the model.
        kind: ``"kl_forward"`` KL(target || model), ``"kl_reverse"``, ``"kl_symmetric"`` (their
            sum), ``"l2"`` of the logits, or ``"mmd_imq"``, ``"mmd_imq2"``, ``"mmd_imq3"``,
            ``"mmd_rbf"``: squared maximum mean discrepancy of (B, C), kernels summed over seven
            bandwidths.
        official_scale: divide as the released code does: KL by all B C (or B T V) numbers and by B
            once more, the others by B. Default: the mean over the batch (and tokens).

    Returns:
        0-dimensional, at least 0, float32 (float64 for float64), on the device of the logits.

    Raises:
        TypeError, ValueError: shapes that differ, an unknown kind, no rows.

    Notes:
        Rows are taken in chunks, so that no copy of all logits in float32 arises, and added up in
        float64. Logits of -inf have probability 0. Leave out padding before the call.

    Example:
        >>> target, logits = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> divergence(target, logits)
        tensor(0.1201)
    """
    for name, value in (("target", target), ("logits", logits)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name}: expected floating logits, got {_checks.describe(value)}")
    if target.dim() not in (2, 3) or target.shape != logits.shape:
        raise ValueError(
            f"target and logits: expected one shape (B, C) or (B, T, V), got "
            f"{tuple(target.shape)} and {tuple(logits.shape)}"
        )
    if target.numel() == 0:
        raise ValueError(f"logits: expected at least one number, got shape {tuple(logits.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    wide = torch.float64 if torch.float64 in (target.dtype, logits.dtype) else torch.float32
    if kind in _ROWS:
        mean = _mean_over_rows(target, logits, _ROWS[kind], wide)
        share = target.shape[-1] if kind != "l2" else 1
    elif target.dim() != 2:
        raise ValueError(f"logits: expected (B, C) for {kind}, got shape {tuple(logits.shape)}")
    else:
        mean = _mmd(target.to(wide), logits.to(wide), _KERNELS[kind.removeprefix("mmd_")])
        share = 1
    if official_scale:
        mean = mean / (share * target.shape[0])
    # The truth is not negative; a NaN stays one.
    return mean.clamp_min(0.0)


def _mean_over_rows(
    target: Tensor, logits: Tensor, of_rows: Callable[[Tensor, Tensor], Tensor], wide: torch.dtype
) -> Tensor:
    p, q = target.flatten(0, -2), logits.flatten(0, -2)
    step = max(1, CHUNK // p.shape[-1])
    sums = [
        of_rows(a.to(wide), b.to(wide)).sum(dtype=torch.float64)
        for a, b in zip(p.split(step), q.split(step), strict=True)
    ]
    return (torch.stack(sums).sum() / p.shape[0]).to(wide)


def _mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, float], Tensor]) -> Tensor:
    def block(a: Tensor, b: Tensor) -> Tensor:
        # Not by products: near pairs would lose their distance.
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        total = torch.zeros_like(squares)
        for bandwidth in BANDWIDTHS:
            total += kernel(squares, bandwidth)
        return total

    return (block(x, x) + block(y, y) - 2 * block(x, y)).mean()
