"""Points of smallest norm and linear programmes on small simplices on GPUs, in Triton.

Every face of the simplex (every vertex of a programme) of every problem is tried, side by side: a
lane is one of them, its system a small matrix in a tile (lanes, T, T), eliminated in as many steps
as it has rows. The best lane of a problem is found in the same program. All in float64, as
``_simplex_reference.py`` defines it.
"""

from __future__ import annotations

import functools
import itertools

import torch

from ._attention_plan import Launch, run
from ._triton import tl, triton

FACES_MOST = 8  # unknowns of min_norm_simplex
PARETO_MOST = 6
TINY = tl.constexpr(1e-12)
EPSILON = tl.constexpr(2.0**-52)


# ---- small systems -------------------------------------------------------------------------------


@triton.jit
def _rows(m, at):
    """Row ``at`` (lanes,) of matrices (lanes, T, T)."""
    index = tl.arange(0, m.shape[1])
    return tl.sum(tl.where(index[None, :, None] == at[:, None, None], m, 0.0), axis=1)


@triton.jit
def _entries(v, at):
    """Entry ``at`` (lanes,) of vectors (lanes, T)."""
    index = tl.arange(0, v.shape[1])
    return tl.sum(tl.where(index[None, :] == at[:, None], v, 0.0), axis=1)


@triton.jit
def _columns(m, k):
    """Column ``k`` of matrices (lanes, T, T)."""
    index = tl.arange(0, m.shape[2])
    return tl.sum(tl.where(index[None, None, :] == k, m, 0.0), axis=2)


@triton.jit
def _diagonal(m):
    index = tl.arange(0, m.shape[1])
    return tl.sum(tl.where(index[None, :, None] == index[None, None, :], m, 0.0), axis=2)


@triton.jit
def _times(m, v):
    """Matrices (lanes, T, T) times vectors (lanes, T)."""
    return tl.sum(m * v[:, None, :], axis=2)


@triton.jit
def _not_zero(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _solved(m, b, PIVOT: tl.constexpr):
    """Solutions of m x = b by Gauss-Jordan elimination, with row exchanges if PIVOT, and whether no
    pivot was 0; without exchanges for matrices that are positive definite."""
    index = tl.arange(0, m.shape[1])
    regular = tl.zeros([m.shape[0]], tl.int32) == 0
    for k in range(m.shape[1]):
        own = tl.zeros([m.shape[0]], tl.int32) + k
        if PIVOT:
            size = tl.where(index[None, :] >= k, tl.abs(_columns(m, k)), -1.0)
            pivot = tl.argmax(size, axis=1)
            here, there = index[None, :] == k, index[None, :] == pivot[:, None]
            row, other = _rows(m, own), _rows(m, pivot)
            m = tl.where(there[:, :, None], row[:, None, :], m)
            m = tl.where(here[:, :, None], other[:, None, :], m)
            entry, another = _entries(b, own), _entries(b, pivot)
            b = tl.where(there, entry[:, None], b)
            b = tl.where(here, another[:, None], b)
        row = _rows(m, own)
        lead = _entries(row, own)
        regular = regular & (lead != 0)
        factor = _columns(m, k) / _not_zero(lead)[:, None]
        factor = tl.where(index[None, :] == k, 0.0, factor)
        m = m - factor[:, :, None] * row[:, None, :]
        b = b - factor * _entries(b, own)[:, None]
    return b / _not_zero(_diagonal(m)), regular


@triton.jit
def _factor(m, least):
    """L (lanes, T, T) with L L^T = m, positive semidefinite, by pivots above ``least``; its last
    columns are 0 where the rank is smaller."""
    index = tl.arange(0, m.shape[1])
    result = tl.zeros_like(m)
    for k in range(m.shape[1]):
        left = _diagonal(m)
        most, pivot = tl.max(left, axis=1), tl.argmax(left, axis=1)
        going = most > least
        at = index[None, :] == pivot[:, None]
        root = tl.sqrt(tl.where(going, most, 1.0))
        v = tl.where(going[:, None], _rows(m, pivot) / root[:, None], 0.0)
        result = tl.where(index[None, None, :] == k, v[:, :, None], result)
        m = m - v[:, :, None] * v[:, None, :]
        m = tl.where(at[:, :, None] | at[:, None, :], 0.0, m)
    return result


@triton.jit
def _shortest(m, b, least):
    """The solution of smallest norm of m x = b, m positive semidefinite and b in its range: with m
    = L L^T it is L (L^T L)^-2 L^T b."""
    index = tl.arange(0, m.shape[1])
    factor = _factor(m, least)
    gram = tl.zeros_like(m)
    for i in range(m.shape[1]):
        row = _rows(factor, tl.zeros([m.shape[0]], tl.int32) + i)
        gram += row[:, :, None] * row[:, None, :]
    same = index[None, :, None] == index[None, None, :]
    gram = tl.where(same & (_diagonal(gram)[:, :, None] == 0), 1.0, gram)
    y = tl.sum(factor * b[:, :, None], axis=1)
    y, _ = _solved(gram, y, False)
    y, _ = _solved(gram, y, False)
    return _times(factor, y)


# ---- the point of smallest norm ------------------------------------------------------------------


@triton.jit
def _normalised(w):
    w = tl.maximum(w, 0.0)
    return w / _not_zero(tl.sum(w, axis=1))[:, None]


@triton.jit
def _judged(c, w, member, real):
    """Weights on the simplex; how far they are from optimal, inf if they are not in their face;
    their squared norm."""
    stray = (w < -TINY) | ((tl.abs(w) > TINY) & (member == 0)) | (w - w != 0)
    inside = tl.sum(stray.to(tl.int32), axis=1) == 0
    w = _normalised(tl.where(inside[:, None], w, 0.0))
    slope, bound = _times(c, w), _times(tl.abs(c), w)
    value = tl.sum(w * slope, axis=1)[:, None]
    bound += tl.sum(w * bound, axis=1)[:, None]
    miss = tl.where(real & (bound > 0), (value - slope) / _not_zero(bound), 0.0)
    miss = tl.maximum(tl.max(miss, axis=1), 0.0)
    return w, tl.where(inside, miss, float("inf")), tl.sum(w * w, axis=1)


@triton.jit
def _stationary(c, member):
    """Of all stationary points of a face the one of smallest norm."""
    size = tl.maximum(tl.sum(member, axis=1), 1.0)[:, None]
    centre = member / size
    # Onto the vectors of the face that sum to 0.
    mean = _times(c, centre)
    whole = tl.sum(mean * centre, axis=1)[:, None]
    flat = c - mean[:, :, None] - mean[:, None, :] + whole[:, :, None]
    flat = flat * member[:, :, None] * member[:, None, :]
    pull = member * (mean - whole)
    return centre - _shortest(flat, pull, 8.0 * EPSILON * c.shape[1])


@triton.jit
def _independent(c, member):
    """C^-1 1 of a face whose gradients are independent, exact whatever their norms."""
    index = tl.arange(0, c.shape[1])
    own = _diagonal(c)
    scale = member / tl.sqrt(tl.where(own > 0, own, 1.0))
    same = index[None, :, None] == index[None, None, :]
    system = c * scale[:, :, None] * scale[:, None, :]
    system += tl.where(same, 1.0 - member[:, :, None], 0.0)
    y, _ = _solved(system, scale, False)
    y = y * scale
    return y / _not_zero(tl.sum(y, axis=1))[:, None]


@triton.jit
def _candidates(c, face, real):
    """Both points of each lane's face, judged; the empty face has none."""
    index = tl.arange(0, c.shape[1])
    member = ((face[:, None] >> index[None, :]) & 1).to(tl.float64)
    one, miss_one, norm_one = _judged(c, _stationary(c, member), member, real)
    two, miss_two, norm_two = _judged(c, _independent(c, member), member, real)
    miss_one = tl.where(face == 0, float("inf"), miss_one)
    miss_two = tl.where(face == 0, float("inf"), miss_two)
    return one, miss_one, norm_one, two, miss_two, norm_two


@triton.jit
def _least(x, PROBLEMS: tl.constexpr, LANES: tl.constexpr):
    """The least of a problem's lanes, (problems,)."""
    return tl.min(tl.reshape(x, [PROBLEMS, LANES]), axis=1)


@triton.jit
def _spread(x, PROBLEMS: tl.constexpr, LANES: tl.constexpr):
    """(problems,) to all lanes of each."""
    return tl.reshape(tl.broadcast_to(x[:, None], [PROBLEMS, LANES]), [PROBLEMS * LANES])


@triton.jit
def _taken(w, order, best, kept, PROBLEMS: tl.constexpr, LANES: tl.constexpr):
    """The least ``order`` so far, and the weights that have it: those of ``w`` where it is less
    than ``best``, the first of equal ones, else ``kept`` (problems, T)."""
    rows = tl.reshape(order, [PROBLEMS, LANES])
    least, at = tl.min(rows, axis=1), tl.argmin(rows, axis=1)
    lane = tl.arange(0, LANES)
    mine = tl.reshape(w, [PROBLEMS, LANES, w.shape[1]])
    mine = tl.sum(tl.where(lane[None, :, None] == at[:, None, None], mine, 0.0), axis=1)
    better = least < best
    return tl.where(better, least, best), tl.where(better[:, None], mine, kept)


@triton.jit
def _matrices(c, problem, live, n, T: tl.constexpr):
    """The matrix of each lane (lanes, T, T), and whether it is finite: 0 where it is not."""
    index = tl.arange(0, T)
    inside = (index[:, None] < n) & (index[None, :] < n)
    at = c + problem.to(tl.int64)[:, None, None] * n * n + index[None, :, None] * n
    m = tl.load(at + index[None, None, :], mask=live[:, None, None] & inside[None, :, :], other=0.0)
    strange = tl.sum(tl.sum((m - m != 0).to(tl.int32), axis=2), axis=1)
    return tl.where((strange == 0)[:, None, None], m, 0.0), strange == 0


@triton.jit
def _min_norm_kernel(
    c, out, problems, n,
    T: tl.constexpr, PROBLEMS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Weights (B, n) of PROBLEMS problems, of whose PARTS * LANES faces LANES are tried at a time:
    first for the least distance from optimal, then for the smallest norm that has it."""
    lane = tl.arange(0, PROBLEMS * LANES)
    problem = tl.program_id(0) * PROBLEMS + lane // LANES
    index = tl.arange(0, T)
    real = index[None, :] < n
    m, finite = _matrices(c, problem, problem < problems, n, T)
    size = tl.max(tl.max(tl.abs(m), axis=2), axis=1)[:, None, None]
    m = m / _not_zero(size)
    m = 0.5 * (m + tl.permute(m, (0, 2, 1)))
    least = tl.full([PROBLEMS], float("inf"), tl.float64)
    best = tl.full([PROBLEMS], float("inf"), tl.float64)
    kept = tl.zeros([PROBLEMS, T], tl.float64)
    if PARTS == 1:
        one, miss_one, norm_one, two, miss_two, norm_two = _candidates(m, lane % LANES, real)
        least = _least(tl.minimum(miss_one, miss_two), PROBLEMS, LANES)
        most = _spread(least, PROBLEMS, LANES) + TINY
        order = tl.where(miss_one <= most, norm_one, float("inf"))
        best, kept = _taken(one, order, best, kept, PROBLEMS, LANES)
        order = tl.where(miss_two <= most, norm_two, float("inf"))
        best, kept = _taken(two, order, best, kept, PROBLEMS, LANES)
    else:
        for step in range(2 * PARTS):
            face = (step % PARTS) * LANES + lane % LANES
            one, miss_one, norm_one, two, miss_two, norm_two = _candidates(m, face, real)
            if step < PARTS:
                least = tl.minimum(least, _least(tl.minimum(miss_one, miss_two), PROBLEMS, LANES))
            else:
                most = _spread(least, PROBLEMS, LANES) + TINY
                order = tl.where(miss_one <= most, norm_one, float("inf"))
                best, kept = _taken(one, order, best, kept, PROBLEMS, LANES)
                order = tl.where(miss_two <= most, norm_two, float("inf"))
                best, kept = _taken(two, order, best, kept, PROBLEMS, LANES)
    whole = _least(finite.to(tl.int32), PROBLEMS, LANES)
    kept = tl.where(whole[:, None] > 0, kept, float("nan"))
    row = tl.program_id(0) * PROBLEMS + tl.arange(0, PROBLEMS)
    to = out + row.to(tl.int64)[:, None] * n + index[None, :]
    tl.store(to, kept, mask=(row < problems)[:, None] & real)


# ---- linear programmes of Pareto descent ---------------------------------------------------------


@triton.jit
def _constraints(c, a, problem, live, number, top, n, GUIDE: tl.constexpr, T: tl.constexpr):
    """Rows ``number`` (lanes, K) of the constraints row . w >= 0, with largest entry 1 (0 where
    there is none): n unit vectors, n rows of descent, and (not GUIDE) one of the guiding loss.
    ``top`` (lanes,): the largest entry of a."""
    index = tl.arange(0, T)
    along = index[None, None, :] < n
    own = problem.to(tl.int64)
    row = tl.where(number < n, 0, tl.where(number < 2 * n, number - n, 0))
    descends = (number >= n) & (number < 2 * n)
    at = c + (own[:, None] * n + row)[:, :, None] * n + index[None, None, :]
    mask = (live[:, None] & descends)[:, :, None] & along
    entries = tl.load(at, mask=mask, other=0.0)
    if GUIDE:
        mine = tl.load(a + own[:, None] * n + row, mask=live[:, None] & descends, other=0.0)
        guided = (top[:, None] > 0) & (mine < top[:, None])
        entries = entries - tl.where(guided, mine, 0.0)[:, :, None]
        entries = tl.where((guided & (mine > 0))[:, :, None], 0.0, entries)
    else:
        last = number == 2 * n
        at = a + own[:, None, None] * n + index[None, None, :]
        mask = (live[:, None] & last)[:, :, None] & along
        guide = tl.load(at, mask=mask, other=0.0) - tl.minimum(top, 0.0)[:, None, None]
        entries = tl.where(last[:, :, None], guide, entries)
    unit = (number < n)[:, :, None] & (number[:, :, None] == index[None, None, :])
    entries = tl.where(unit, 1.0, tl.where(along, entries, 0.0))
    return entries / _not_zero(tl.max(tl.abs(entries), axis=2))[:, :, None]


@triton.jit
def _vertices(
    c, a, choices, problem, live, vertex, top, n, rows, vertices,
    GUIDE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The vertex of each lane, and whether there is one that meets all constraints."""
    index = tl.arange(0, T)
    chosen = (vertex < vertices)[:, None] & (index[None, :] < n - 1)
    at = choices + vertex[:, None] * (n - 1) + index[None, :]
    number = tl.load(at, mask=chosen, other=0)
    system = _constraints(c, a, problem, live, number, top, n, GUIDE, T)
    # Weights sum to 1; unknowns that are only room are 0.
    down, across = index[None, :, None], index[None, None, :]
    others = ((down == n - 1) & (across < n)) | ((down >= n) & (down == across))
    system = tl.where(down < n - 1, system, others.to(tl.float64))
    right = (index[None, :] == n - 1).to(tl.float64) + tl.zeros([vertex.shape[0], T], tl.float64)
    w, regular = _solved(system, right, True)
    stray = (w < -TINY) | (w - w != 0)
    met = regular & (tl.sum(stray.to(tl.int32), axis=1) == 0) & (vertex < vertices)
    w = _normalised(tl.where(met[:, None], w, 0.0))
    for r in range(n, rows):
        own = tl.zeros([vertex.shape[0], 1], tl.int32) + r
        row = _constraints(c, a, problem, live, own, top, n, GUIDE, T)
        met = met & (tl.sum(tl.sum(row * w[:, None, :], axis=2), axis=1) >= -TINY)
    return w, met


@triton.jit
def _pareto_kernel(
    c, a, choices, out, status, problems, n, rows, vertices,
    GUIDE: tl.constexpr,
    T: tl.constexpr, PROBLEMS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Weights (B, n) and status (B,), LANES vertices at a time: first for the largest value, then
    for the smallest norm that has it, then for the first vertex that has both."""
    lane = tl.arange(0, PROBLEMS * LANES)
    problem = tl.program_id(0) * PROBLEMS + lane // LANES
    live = problem < problems
    index = tl.arange(0, T)
    real = index[None, :] < n
    m, finite = _matrices(c, problem, live, n, T)
    at = a + problem.to(tl.int64)[:, None] * n + index[None, :]
    guide = tl.load(at, mask=live[:, None] & real, other=0.0)
    finite = finite & (tl.sum((guide - guide != 0).to(tl.int32), axis=1) == 0)
    top = tl.max(tl.where(real, guide, -float("inf")), axis=1)
    objective = guide if GUIDE else tl.sum(m, axis=1)
    objective = objective / _not_zero(tl.max(tl.abs(objective), axis=1))[:, None]
    cost = tl.full([PROBLEMS], float("inf"), tl.float64)
    shortest = tl.full([PROBLEMS], float("inf"), tl.float64)
    first = tl.full([PROBLEMS], float("inf"), tl.float64)
    kept = 1.0 / (tl.zeros([PROBLEMS, T], tl.float64) + n)
    for step in range(3 * PARTS):
        vertex = (step % PARTS) * LANES + lane % LANES
        w, met = _vertices(c, a, choices, problem, live, vertex, top, n, rows, vertices, GUIDE, T)
        own = tl.where(met, -tl.sum(w * objective, axis=1), float("inf"))
        if step < PARTS:
            cost = tl.minimum(cost, _least(own, PROBLEMS, LANES))
        else:
            tied = met & (own <= _spread(cost, PROBLEMS, LANES) + TINY)
            norm = tl.where(tied, tl.sum(w * w, axis=1), float("inf"))
            if step < 2 * PARTS:
                shortest = tl.minimum(shortest, _least(norm, PROBLEMS, LANES))
            else:
                tied = tied & (norm <= _spread(shortest, PROBLEMS, LANES) + TINY)
                order = tl.where(tied, vertex.to(tl.float64), float("inf"))
                first, kept = _taken(w, order, first, kept, PROBLEMS, LANES)
    whole = _least(finite.to(tl.int32), PROBLEMS, LANES) > 0
    kept = tl.where(whole[:, None], kept, float("nan"))
    row = tl.program_id(0) * PROBLEMS + tl.arange(0, PROBLEMS)
    to = out + row.to(tl.int64)[:, None] * n + index[None, :]
    tl.store(to, kept, mask=(row < problems)[:, None] & real)
    found = tl.where(whole, tl.where(cost == float("inf"), 1, 0), 2)
    tl.store(status + row, found.to(tl.int64), mask=row < problems)


# ---- launches ------------------------------------------------------------------------------------


def _lanes(n: int, count: int) -> dict[str, int]:
    """Sizes of tiles for ``count`` points of a problem of n unknowns."""
    width = max(2, triton.next_power_of_2(n))
    lanes = 32 if width <= 4 else 16  # as many as registers hold several matrices of
    own = min(lanes, triton.next_power_of_2(count))
    return {"T": width, "PROBLEMS": lanes // own, "LANES": own, "PARTS": triton.cdiv(count, own)}


def plan_min_norm(c: torch.Tensor) -> tuple[torch.Tensor, Launch]:
    """Weights (B, n), and the launch that fills them."""
    problems, n = c.shape[:2]
    out = c.new_empty((problems, n))
    blocks = _lanes(n, 2**n)
    arguments = {"c": c, "out": out, "problems": problems, "n": n, **blocks}
    grid = (triton.cdiv(problems, blocks["PROBLEMS"]),)
    return out, Launch(_min_norm_kernel, grid, arguments, {"num_warps": 8, "num_stages": 1})


@functools.cache
def _choices(rows: int, count: int, device: torch.device) -> torch.Tensor:
    """All sets of ``count`` of so many rows, in lexicographic order; there are few such."""
    table = list(itertools.combinations(range(rows), count))
    return torch.tensor(table, dtype=torch.int32).reshape(len(table), count).to(device)


def plan_pareto(
    c: torch.Tensor, a: torch.Tensor, guide: bool
) -> tuple[torch.Tensor, torch.Tensor, Launch]:
    """Weights (B, n), status (B,), and the launch that fills them."""
    problems, n = a.shape
    rows = 2 * n if guide else 2 * n + 1
    choices = _choices(rows, n - 1, c.device)
    out, status = c.new_empty((problems, n)), c.new_empty((problems,), dtype=torch.int64)
    blocks = _lanes(n, choices.shape[0])
    arguments = {
        "c": c,
        "a": a,
        "choices": choices,
        "out": out,
        "status": status,
        "problems": problems,
        "n": n,
        "rows": rows,
        "vertices": choices.shape[0],
        "GUIDE": guide,
        **blocks,
    }
    grid = (triton.cdiv(problems, blocks["PROBLEMS"]),)
    options = {"num_warps": 8 if blocks["T"] > 4 else 4, "num_stages": 1}
    return out, status, Launch(_pareto_kernel, grid, arguments, options)


def _check(name: str, c: torch.Tensor, most: int) -> None:
    if c.dtype != torch.float64 or not c.is_contiguous():
        raise TypeError(f"{name}: the triton backend takes contiguous float64, got {c.dtype}")
    if c.shape[1] > most:
        raise ValueError(f"{name}: the triton backend takes up to {most} rows, got {c.shape[1]}")
    if c.shape[0] >= 2**31 - 64:
        raise ValueError(f"{name}: the triton backend takes fewer than 2^31 problems")


def min_norm_simplex(c: torch.Tensor) -> torch.Tensor:
    """Weights (B, n) of matrices (B, n, n), as the C++ op ``transfuse::min_norm_simplex``."""
    _check("min_norm_simplex", c, FACES_MOST)
    out, launch = plan_min_norm(c)
    run([launch], c.device)
    return out


def pareto_lp(c: torch.Tensor, a: torch.Tensor, guide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, n) and status (B,), as the C++ op ``transfuse::pareto_lp``."""
    _check("pareto_lp", c, PARETO_MOST)
    out, status, launch = plan_pareto(c, a, guide)
    run([launch], c.device)
    return out, status
