"""Quadratic and linear programmes on small simplices in eager torch: the definition, the oracle and
the fallback. All take float64 with one batch axis, and loop over steps, never over problems.

Those that end when all problems are done look at numbers, which torch.compile cannot trace: they
are ops of their own.
"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

FACES_MOST = 8
_TINY = 1e-12
# Unknowns as large as this, where the diagonal of G and the largest |q| are 1, mean that the
# programme is unbounded.
_ENDLESS = 1e12
_BATCH_ENTRIES = 2**22  # of (problem, face, T, T) held at a time


def scaled(matrix: Tensor) -> Tensor:
    """Divided by its largest entry; zeros stay."""
    size = matrix.abs().amax((-2, -1), keepdim=True)
    return matrix / torch.where(size == 0, 1.0, size)


@functools.cache
def _face_table(count: int) -> tuple[tuple[float, ...], ...]:
    return tuple(f for f in itertools.product((0.0, 1.0), repeat=count) if any(f))


def faces(count: int, like: Tensor) -> Tensor:
    """All non-empty sets of ``count`` unknowns, as rows of 0 and 1."""
    return torch.tensor(_face_table(count), dtype=like.dtype, device=like.device)


def _normalised(w: Tensor) -> Tensor:
    w = w.clamp_min(0.0)
    return w / w.sum(-1, keepdim=True)


def min_norm(gramian: Tensor) -> Tensor:
    """(B, T): on every face the stationary point (of smallest norm where there are several); the
    best of those that lie in their face."""
    count = gramian.shape[-1]
    if count > FACES_MOST:
        return min_norm_active_set(gramian)
    parts = max(1, _BATCH_ENTRIES // (2**count * count**2))
    return torch.cat([_min_norm_faces(part) for part in scaled(gramian).split(parts)])


def _min_norm_faces(c: Tensor) -> Tensor:
    count = c.shape[-1]
    member = faces(count, c)
    size = member.sum(-1, keepdim=True)
    centre = member / size
    # Onto the vectors of a face that sum to 0, which are orthogonal to its centre.
    flat = torch.diag_embed(member) - member[:, :, None] * centre[:, None, :]
    broken = ~c.isfinite().all(-1).all(-1)
    c = torch.where(broken[:, None, None], 0.0, 0.5 * (c + c.mT))
    pull = (flat @ (c[:, None] @ centre[..., None]))[..., 0]
    curvature = flat @ c[:, None] @ flat
    # What rounding leaves of a curvature of 0 must not be inverted.
    inverse = torch.linalg.pinv(
        0.5 * (curvature + curvature.mT),
        atol=8 * count * torch.finfo(c.dtype).eps,
        hermitian=True,
    )
    w = torch.cat((centre - (inverse @ pull[..., None])[..., 0], _independent(c, member)), 1)
    member = torch.cat((member, member))
    inside = ((w >= -_TINY) & ((w.abs() <= _TINY) | (member > 0))).all(-1)
    w = _normalised(w)
    slope = (c[:, None] @ w[..., None])[..., 0]
    bound = (c.abs()[:, None] @ w[..., None])[..., 0]
    value = (w * slope).sum(-1, keepdim=True)
    bound = bound + (w * bound).sum(-1, keepdim=True)
    miss = torch.where(bound > 0, (value - slope) / torch.where(bound > 0, bound, 1.0), 0.0)
    miss = torch.where(inside, miss.amax(-1).clamp_min(0.0), torch.inf)
    tied = miss <= miss.amin(-1, keepdim=True) + _TINY
    norm = torch.where(tied, (w * w).sum(-1), torch.inf)
    best = w.gather(1, norm.argmin(-1)[:, None, None].expand(-1, 1, count))[:, 0]
    return torch.where(broken[:, None], torch.nan, best)


def _independent(c: Tensor, member: Tensor) -> Tensor:
    """(B, F, T) points ``C^-1 1`` of the faces whose gradients are independent, exact whatever
    their norms; garbage or NaN for the others."""
    own = c.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(own > 0, own, 1.0).rsqrt()
    both = member[:, :, None] * member[:, None, :]
    system = (c * scale[:, :, None] * scale[:, None, :])[:, None] * both
    system = system + torch.diag_embed(1.0 - member)
    y = torch.linalg.solve_ex(system, (member * scale[:, None])[..., None])[0][..., 0]
    y = y * member * scale[:, None]
    return y / y.sum(-1, keepdim=True)


def min_norm_active_set(gramian: Tensor) -> Tensor:
    """The minimiser of ``y' C y / 2 - sum y`` over y >= 0, or the direction in which it is
    unbounded, divided by its sum."""
    c = scaled(gramian)
    y, ray, residual = _active_set(c, torch.full_like(c[..., 0], -1.0), 10 * c.shape[-1], 0.0)
    w = torch.where((residual == torch.inf)[:, None], ray, y)
    return w / w.sum(-1, keepdim=True)


def nonneg(g: Tensor, q: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """(B, n) minimiser of ``x' G x / 2 + q' x`` over x >= 0, and (B,) residual."""
    x, _, residual = _active_set(g, q, iterations, tolerance)
    return x, residual


def _solve_on(matrix: Tensor, inside: Tensor, right: Tensor) -> Tensor:
    """Solutions of the systems restricted to a set of unknowns; 0 outside."""
    both = inside[:, :, None] & inside[:, None, :]
    system = torch.where(both, matrix, 0.0) + torch.diag_embed((~inside).to(matrix.dtype))
    right = torch.where(inside, right, 0.0)
    return torch.linalg.solve_ex(system, right[..., None])[0][..., 0]


@torch.library.custom_op(
    "transfuse::nonneg_qp_eager",
    mutates_args=(),
    schema="(Tensor g, Tensor q, int iterations, float tolerance) -> (Tensor, Tensor, Tensor)",
)
def _active_set(
    g: Tensor, q: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lawson and Hanson's method in Gram form, all problems at once. One round lets an unknown
    enter where the set of positive ones is solved, and takes one out where its solution is not
    positive. Returns x, a direction where unbounded, and the residual."""
    eps = torch.finfo(torch.float64).eps
    broken = ~(g.isfinite().all(-1).all(-1) & q.isfinite().all(-1))
    g = torch.where(broken[:, None, None], 0.0, 0.5 * (g + g.mT))
    q = torch.where(broken[:, None], 0.0, q)
    own = g.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(own > 0, own, 1.0).rsqrt()
    g, q = g * scale[:, :, None] * scale[:, None, :], q * scale
    size = q.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    q = q / size
    count = q.shape[-1]
    number = torch.arange(count, device=q.device)
    x, ray = torch.zeros_like(q), torch.zeros_like(q)
    inside = torch.zeros_like(q, dtype=torch.bool)
    blocked = inside.clone()
    fresh = torch.full(q.shape[:1], -1, device=q.device)
    done, endless = torch.zeros_like(broken), torch.zeros_like(broken)

    def slope(x: Tensor) -> Tensor:
        return q + (g @ x[..., None])[..., 0]

    for _ in range(2 * iterations):
        aim = _solve_on(g, inside, -q)
        entered = number == fresh[:, None]
        # The slope that let it enter was rounding.
        refused = (entered & (aim <= 0)).any(-1) & ~done
        inside = inside & ~(entered & refused[:, None])
        blocked = blocked | (entered & refused[:, None])
        bad = inside & (aim <= 0)
        partly = bad.any(-1) & ~refused & ~done
        room = torch.where(bad, x / torch.where(bad & (x > 0), x - aim, 1.0), torch.inf)
        leaving = number == room.argmin(-1, keepdim=True)
        moved = x + room.amin(-1, keepdim=True) * (aim - x)
        moved = torch.where(inside & ~leaving, moved.clamp_min(0.0), 0.0)
        x = torch.where(partly[:, None], moved, x)
        inside = inside & ~(partly[:, None] & leaving)
        fresh = torch.full_like(fresh, -1)
        arrived = ~partly & ~done
        reached = arrived & ~refused
        x = torch.where(reached[:, None], aim * inside, x)
        # Of a curvature along x that is rounding alone.
        runs = reached & (x.amax(-1) > _ENDLESS)
        ray = torch.where(runs[:, None], x, ray)
        endless, done, arrived = endless | runs, done | runs, arrived & ~runs
        blocked = blocked & ~reached[:, None]
        # Where the set is solved: the steepest of the others enters.
        fall = torch.where(inside | blocked, -torch.inf, -slope(x))
        steepest = fall.argmax(-1)
        enough = torch.clamp(16.0 * eps * (1.0 + x.sum(-1)), min=tolerance)
        done = done | (arrived & ~(fall.amax(-1) > enough))
        enters = arrived & ~done
        if not bool((partly | enters).any()):
            break
        new = number == steepest[:, None]
        column = g.gather(2, steepest[:, None, None].expand(-1, count, 1))[..., 0]
        along = _solve_on(g, inside, column)
        at_new = (column * new).sum(-1)
        left = at_new - (column * along * inside).sum(-1)
        independent = left > 32.0 * eps * (inside.sum(-1) + 1) * at_new
        enters_freely = enters & independent
        inside = inside | (new & enters_freely[:, None])
        fresh = torch.where(enters_freely, steepest, fresh)
        # Its column depends on the set: along the null direction until one of the set is 0.
        slides = (enters & ~independent)[:, None]
        direction = torch.where(inside, -along, 0.0) + new.to(x.dtype)
        room = torch.where(
            direction < 0, x / torch.where(direction < 0, -direction, 1.0), torch.inf
        )
        step = room.amin(-1, keepdim=True)
        ends = slides & step.isfinite()
        leaving = (number == room.argmin(-1, keepdim=True)) & ends
        runs = slides & ~step.isfinite()
        ray = torch.where(runs, direction, ray)
        endless, done = endless | runs[:, 0], done | runs[:, 0]
        slid = (x + torch.where(ends, step, 0.0) * direction).clamp_min(0.0)
        x = torch.where(ends & ~leaving, slid, torch.where(leaving, 0.0, x))
        inside = (inside & ~leaving) | (new & ends)
    final = slope(x)
    residual = torch.where(x > 0, final.abs(), (-final).clamp_min(0.0)).amax(-1)
    residual = torch.where(endless, torch.inf, residual)
    residual = torch.where(broken, torch.nan, residual)
    x = torch.where(broken[:, None], torch.nan, x * scale * size)
    return x, torch.where(broken[:, None], torch.nan, ray * scale), residual


@_active_set.register_fake
def _(g, q, iterations, tolerance):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[:1])


@torch.library.custom_op(
    "transfuse::frank_wolfe_eager",
    mutates_args=(),
    schema="(Tensor gramian, int iterations, float tolerance) -> Tensor",
)
def frank_wolfe(gramian: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Pairwise Frank-Wolfe with exact line search: weight moves from the worst task that has some
    to the best one, until the gap is small in all problems."""
    c = scaled(gramian)
    count = c.shape[-1]
    number = torch.arange(count, device=c.device)
    w = torch.full_like(c[..., 0], 1.0 / count)
    for i in range(iterations):
        slope = (c @ w[..., None])[..., 0]
        value = (w * slope).sum(-1)
        gap = value - slope.amin(-1)
        going = gap > tolerance * torch.clamp(value, min=torch.finfo(c.dtype).eps)
        # Looking at the gap waits for the device.
        if i % 32 == 0 and not bool(going.any()):
            break
        to = slope.argmin(-1, keepdim=True)
        away = torch.where(w > 0, slope, -torch.inf).argmax(-1, keepdim=True)
        rows = c.gather(1, torch.stack((to, away), 1).expand(-1, 2, count))
        ends = rows.gather(2, torch.cat((to, away), -1)[:, None].expand(-1, 2, 2))
        curvature = ends[:, 0, 0] + ends[:, 1, 1] - 2.0 * ends[:, 0, 1]
        fall = (slope.gather(1, away) - slope.gather(1, to))[:, 0]
        most = w.gather(1, away)[:, 0]
        step = torch.where(curvature > 0, fall / torch.where(curvature > 0, curvature, 1.0), most)
        step = torch.where(going, torch.minimum(step, most), 0.0)[:, None]
        w = w + step * ((number == to).to(w.dtype) - (number == away).to(w.dtype))
    return _normalised(w)


@frank_wolfe.register_fake
def _(gramian, iterations, tolerance):
    return gramian.new_empty(gramian.shape[:2])


@functools.cache
def _row_choices(rows: int, count: int) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.combinations(range(rows), count))


def pareto_rows(c: Tensor, a: Tensor, guide: bool) -> tuple[Tensor, Tensor]:
    """Rows h of the constraints h . w >= 0 with largest entry 1 (zero where there is none), and the
    objective. A constraint r . w >= b is the row r - b, since w sums to 1."""
    most = a.amax(-1, keepdim=True)
    bound = torch.zeros_like(a)
    wanted = torch.ones_like(a, dtype=torch.bool)
    if guide:
        guided = (most > 0) & (a < most)
        bound = torch.where(guided, a, bound)
        wanted = ~guided | (a <= 0)
    descent = torch.where(wanted[..., None], c - bound[..., None], 0.0)
    unit = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device).expand_as(c)
    parts = [unit, descent]
    if not guide:
        parts.append((a - most.clamp_max(0.0))[:, None])
    rows = torch.cat(parts, 1)
    size = rows.abs().amax(-1, keepdim=True)
    return rows / torch.where(size == 0, 1.0, size), a if guide else c.sum(-2)


def pareto(c: Tensor, a: Tensor, guide: bool) -> tuple[Tensor, Tensor]:
    """(B, T) optimal vertex and (B,) status, by trying every vertex."""
    count = c.shape[-1]
    broken = ~(c.isfinite().all(-1).all(-1) & a.isfinite().all(-1))
    c = torch.where(broken[:, None, None], 0.0, c)
    a = torch.where(broken[:, None], 0.0, a)
    rows, objective = pareto_rows(c, a, guide)
    size = objective.abs().amax(-1, keepdim=True)
    objective = objective / torch.where(size == 0, 1.0, size)
    choices = torch.tensor(
        _row_choices(rows.shape[1], count - 1), dtype=torch.int64, device=c.device
    )
    choices = choices.reshape(-1 if count > 1 else 1, count - 1)
    parts = max(1, _BATCH_ENTRIES // (choices.shape[0] * count**2))
    best = [
        _best_vertex(r, o, choices)
        for r, o in zip(rows.split(parts), objective.split(parts), strict=True)
    ]
    w = torch.cat([part[0] for part in best])
    found = torch.cat([part[1] for part in best])
    w = torch.where(found[:, None], w, 1.0 / count)
    w = torch.where(broken[:, None], torch.nan, w)
    status = torch.where(found, 0, 1)
    return w, torch.where(broken, 2, status)


def _best_vertex(rows: Tensor, objective: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    count = rows.shape[-1]
    chosen = rows[:, choices.reshape(-1)].reshape(rows.shape[0], *choices.shape, count)
    system = torch.cat(
        (chosen, torch.ones_like(rows[:, :1, None].expand(-1, len(choices), 1, -1))), 2
    )
    right = torch.zeros_like(system[..., :1])
    right[..., -1, :] = 1.0
    w = torch.linalg.solve_ex(system, right)[0][..., 0]
    inside = (w >= -_TINY).all(-1)
    w = _normalised(torch.where(inside[..., None], w, 1.0))
    feasible = inside & (w @ rows.mT >= -_TINY).all(-1)
    value = torch.where(feasible, (w * objective[:, None]).sum(-1), -torch.inf)
    tied = feasible & (value >= value.amax(-1, keepdim=True) - _TINY)
    norm = torch.where(tied, (w * w).sum(-1), torch.inf)
    # Norms that differ by rounding are ties too: the first vertex has it.
    first = (norm <= norm.amin(-1, keepdim=True) + _TINY).to(torch.int8).argmax(-1)
    return w.gather(1, first[:, None, None].expand(-1, 1, count))[:, 0], feasible.any(-1)
