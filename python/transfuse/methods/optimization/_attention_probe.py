"""One attention layer trained to the end: model, stable gradient, normalised descent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse import _checks

HEADS = ("linear", "relu", "quadratic")
LOSSES = {
    # l(m) and l'(m) of the margin m = Y f.
    "logistic": (lambda m: F.softplus(-m), lambda m: -torch.sigmoid(-m)),
    "exponential": (lambda m: torch.exp(-m), lambda m: -torch.exp(-m)),
    "linear": (lambda m: -m, lambda m: -torch.ones_like(m)),
}
# Added to the loss times |K|^2 + |Q|^2 in the official experiments.
OFFICIAL_RIDGE = 2.220446049250313e-16


class AttentionProbe(nn.Module):
    r"""One layer of attention with one query, and a head on its output.

    .. math:: s = \mathrm{softmax}(X W z), \quad u = X^T s, \quad f = v^T u

    Args:
        d: width of tokens.
        m: width of K and Q (d, m) with W = K Q^T; None: W itself (d, d).
        v: (d,) the head, fixed; (I, d) for I independent instances, which are trained side by side.
            Of ``"relu"``: (h,) or (I, h).
        head: ``"linear"`` v^T u, ``"relu"`` v^T relu(V u), or ``"quadratic"`` v^T u - lam |u|^2.
        values: V (h, d) or (I, h, d) of ``"relu"``.
        lam: of ``"quadratic"``.
        generator: for the first K and Q, uniform in +-1/sqrt(d); W begins at 0.

    Raises:
        TypeError, ValueError: sizes that do not fit, an unknown head.

    Notes:
        float64 throughout. W is the matrix of the formula: the weight of a linear layer on tokens,
        as in the official code, is its transpose. ``load`` takes either.

    Example:
        >>> probe = AttentionProbe(4, v=torch.ones(4))
        >>> probe(torch.ones(2, 3, 4), torch.zeros(2, 4))
        tensor([4., 4.], dtype=torch.float64, grad_fn=<SumBackward1>)
    """

    v: Tensor
    values: Tensor | None
    weight: nn.Parameter
    key: nn.Parameter
    query: nn.Parameter

    def __init__(
        self,
        d: int,
        m: int | None = None,
        *,
        v: Tensor,
        head: str = "linear",
        values: Tensor | None = None,
        lam: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.d = _checks.positive_int("d", d)
        self.m = None if m is None else _checks.positive_int("m", m)
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        if (values is not None) != (head == "relu"):
            raise ValueError(f"values: expected V for relu and None for others, got head {head!r}")
        self.head, self.lam = head, _checks.number("lam", lam)
        if not isinstance(v, Tensor) or v.dim() not in (1, 2):
            raise ValueError(f"v: expected shape (d,) or (I, d), got {_checks.describe(v)}")
        width = d if values is None else values.shape[-2]
        if v.shape[-1] != width or (values is not None and values.shape[-1] != d):
            raise ValueError(
                f"v: expected {width} numbers (and V of {d} columns), got {tuple(v.shape)}"
            )
        if values is not None and values.shape[:-2] != v.shape[:-1]:
            raise ValueError(f"values: expected the instances of v, got {tuple(values.shape)}")
        self.register_buffer("v", v.detach().double())
        self.register_buffer("values", None if values is None else values.detach().double())
        batch = v.shape[:-1]
        if m is None:
            self.weight = nn.Parameter(torch.zeros(*batch, d, d, dtype=torch.float64))
            return
        for name in ("key", "query"):
            # Drawn where the generator lives, so that a seed means the same on every device.
            device = None if generator is None else generator.device
            start = torch.rand(
                (*batch, d, m), generator=generator, dtype=torch.float64, device=device
            )
            self.register_parameter(name, nn.Parameter((2 * start - 1).to(v.device) / math.sqrt(d)))

    @property
    def w(self) -> Tensor:
        """W (d, d) or (I, d, d), without gradient."""
        if self.m is None:
            return self.weight.detach()
        return (self.key @ self.query.mT).detach()

    @torch.no_grad()
    def load(
        self,
        weight: Tensor | None = None,
        *,
        key: Tensor | None = None,
        query: Tensor | None = None,
        linear: bool = False,
    ) -> AttentionProbe:
        """Set W, or K and Q.

        Args:
            weight, key, query: what the probe has, in its shapes.
            linear: they are weights of linear layers, the transposes.

        Raises:
            ValueError: other tensors than the probe has, or other shapes.
        """
        tensors = {"weight": weight, "key": key, "query": query}
        given = {name: value for name, value in tensors.items() if value is not None}
        wanted = {"weight"} if self.m is None else {"key", "query"}
        if set(given) != wanted:
            raise ValueError(f"load: expected exactly {' and '.join(sorted(wanted))}")
        for name in wanted:
            value = given[name].mT if linear else given[name]
            mine = getattr(self, name)
            if value.shape != mine.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(mine.shape)}, got {tuple(value.shape)}"
                )
            mine.copy_(value)
        return self

    def log_attention(self, x: Tensor, z: Tensor) -> Tensor:
        """log s (..., n, T): finite where s itself would be 0."""
        return self.logits(x, z).log_softmax(-1)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """X W z (..., n, T)."""
        if self.m is None:
            right = z @ self.weight.mT
        else:
            right = (z @ self.query) @ self.key.mT
        return (x @ right[..., None])[..., 0]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """f (..., n) of tokens (..., n, T, d) and queries (..., n, d)."""
        x, z = x.double(), z.double()
        s = self.log_attention(x, z).exp()
        return self.score((s[..., None, :] @ x)[..., 0, :])

    def score(self, u: Tensor) -> Tensor:
        """The head on attended tokens (..., n, d)."""
        if self.values is not None:
            u = (u @ self.values.mT).relu()
        found = (u * self.v[..., None, :]).sum(-1)
        return found - self.lam * u.square().sum(-1) if self.head == "quadratic" else found

    def slope(self, u: Tensor) -> Tensor:
        """Gradient (..., n, d) of the head with respect to u."""
        if self.values is not None:
            alive = (u @ self.values.mT > 0).to(u.dtype) * self.v[..., None, :]
            return alive @ self.values
        return self.v[..., None, :] - 2 * self.lam * u

    def extra_repr(self) -> str:
        """Sizes and head."""
        return f"d={self.d}, m={self.m}, head={self.head}"


class StableGradient(NamedTuple):
    """dL/dW (..., d, d) divided by exp(log_scale) (...), and the margins Y f (..., n)."""

    gradient: Tensor
    log_scale: Tensor
    margins: Tensor


@torch.no_grad()
def stable_gradient(
    model: AttentionProbe, x: Tensor, z: Tensor, y: Tensor, loss: str = "logistic"
) -> StableGradient:
    r"""The gradient with respect to W, with all its digits however saturated the softmax is.

    .. math:: G = \frac{1}{n} \sum_i l'(Y_i f_i) Y_i \sum_{t \ne a_i}
              s_{it} (h_i^T (x_{it} - u_i)) (x_{it} - x_{i a_i}) z_i^T

    with a the token of the largest s and h the gradient of the head. s enters by its logarithm,
    rescaled by the largest there is outside a, so that nothing is lost where s is 1e-300, and
    differences to u are added up from such terms instead of subtracted.
    """
    log_s = model.log_attention(x, z)
    best = log_s.argmax(-1, keepdim=True)
    others = log_s.scatter(-1, best, -torch.inf)
    log_scale = others.amax((-2, -1))
    log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
    top = x.gather(-2, best[..., None].expand(*best.shape, x.shape[-1]))
    away = x - top
    # u - x_a, small where the softmax is saturated.
    shift = (others.exp()[..., None, :] @ away)[..., 0, :]
    u = top[..., 0, :] + shift
    margins = y * model.score(u)
    outer = LOSSES[loss][1](margins) * y / x.shape[-3]
    h = model.slope(u)
    gain = ((away - shift[..., None, :]) @ h[..., None])[..., 0]
    relative = (others - log_scale[..., None, None]).exp()
    token = ((outer[..., None] * relative * gain)[..., None, :] @ away)[..., 0, :]
    return StableGradient(token.mT @ z, log_scale, margins)


class Descent(NamedTuple):
    """What :func:`normalized_gd` saw: losses (S, ...) before each step, W (k, ..., d, d) after the
    steps asked for, and the number of these steps."""

    losses: Tensor
    weights: Tensor
    recorded: tuple[int, ...]


@torch.no_grad()
def normalized_gd(
    model: AttentionProbe,
    x: Tensor,
    z: Tensor,
    y: Tensor,
    *,
    steps: int,
    eta: float = 0.1,
    loss: str = "logistic",
    gradient: str = "stable",
    ridge: float | None = None,
    record: Sequence[int] = (),
) -> Descent:
    r"""Normalised gradient descent on W, or on K and Q each by itself; the model is changed.

    .. math:: W \leftarrow W - \eta \, G / \lVert G \rVert_F

    Args:
        model: the probe; its instances are independent of each other.
        x: tokens (n, T, d), or (I, n, T, d).
        z: queries (n, d) or (I, n, d).
        y: labels (n,) or (I, n), -1 or 1.
        steps: number of steps.
        eta: length of each.
        loss: ``"logistic"``, ``"exponential"`` or ``"linear"`` (-Y f); the mean over n.
        gradient: ``"stable"``, see :func:`stable_gradient`, or ``"naive"``, as autograd in float64
            gives it, which is rounding noise once the softmax is saturated.
        ridge: added to the loss times |K|^2 + |Q|^2; None: 0, and 2.2e-16 for ``"naive"``.
        record: numbers of steps after which W is kept.

    Returns:
        :class:`Descent`.

    Raises:
        TypeError, ValueError: shapes that do not fit, options out of range.

    Notes:
        O(I n T d + I n d^2) operations a step, as a handful of batched products. The direction
        converges like 1 / steps. A gradient of exactly 0 (one token, or scores all equal) moves
        nothing.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> probe = AttentionProbe(2, v=torch.tensor([1.0, 0.0]))
        >>> ran = normalized_gd(probe, x, torch.ones(1, 2), torch.ones(1), steps=50)
        >>> bool(ran.losses[-1] < ran.losses[0])
        True
    """
    x, z, y = check_sequences(model, x, z, y)
    _checks.positive_int("steps", steps)
    eta = _checks.number("eta", eta, positive=True)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if gradient not in ("stable", "naive"):
        raise ValueError(f"gradient: expected stable or naive, got {gradient!r}")
    if ridge is None:
        ridge = OFFICIAL_RIDGE if gradient == "naive" and model.m is not None else 0.0
    ridge = _checks.number("ridge", ridge)
    wanted = tuple(_checks.positive_int("record", step) for step in record)
    if any(step > steps for step in wanted):
        raise ValueError(f"record: expected steps of at most {steps}, got {wanted}")
    losses, kept = [], {}
    for step in range(1, steps + 1):
        if gradient == "stable":
            found = stable_gradient(model, x, z, y, loss)
            g, log_scale, margins = found
        else:
            g, margins = _naive(model, x, z, y, loss)
            log_scale = torch.zeros_like(margins[..., 0])
        losses.append(LOSSES[loss][0](margins).mean(-1))
        if model.m is None:
            moves = [(model.weight, g)]
        else:
            moves = [(model.key, g @ model.query), (model.query, g.mT @ model.key)]
            if ridge != 0.0:
                share = 2 * ridge * (-log_scale).clamp_max(600.0).exp()[..., None, None]
                moves = [(p, move + share * p) for p, move in moves]
        for p, move in moves:
            size = torch.linalg.matrix_norm(move, keepdim=True)
            p.sub_(eta * move / torch.where(size > 0, size, 1.0))
        if step in wanted:
            kept[step] = model.w.clone()
    weights = torch.stack([kept[step] for step in wanted]) if wanted else model.w.new_zeros((0,))
    return Descent(torch.stack(losses), weights, wanted)


def _naive(model: AttentionProbe, x: Tensor, z: Tensor, y: Tensor, loss: str):
    with torch.enable_grad():
        w = model.w.clone().requires_grad_()
        s = ((x @ (z @ w.mT)[..., None])[..., 0]).softmax(-1)
        margins = y * model.score((s[..., None, :] @ x)[..., 0, :])
        total = LOSSES[loss][0](margins).mean(-1).sum()
        (g,) = torch.autograd.grad(total, w)
    return g, margins.detach()


def check_sequences(
    model: AttentionProbe, x: Tensor, z: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments as float64, their shapes checked against the probe."""
    batch = tuple(model.v.shape[:-1])
    for name, value in (("x", x), ("z", z), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {_checks.describe(value)}")
    if x.dim() != len(batch) + 3 or x.shape[-1] != model.d or tuple(x.shape[: len(batch)]) != batch:
        want = ", ".join([*(str(n) for n in batch), "n", "T", str(model.d)])
        raise ValueError(f"x: expected shape ({want}), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
    for name, value, shape in (
        ("z", z, (*x.shape[:-2], model.d)),
        ("y", y, tuple(x.shape[:-2])),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    return x.double(), z.double(), y.double()
