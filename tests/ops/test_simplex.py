"""min_norm_simplex, pareto_lp and nonneg_qp: exact arithmetic, optimality, ties, scales."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from transfuse.ops import min_norm_simplex, nonneg_qp, pareto_lp
from transfuse.testing.specs import find_spec

BACKENDS = ("reference", "cpu")


@pytest.fixture(autouse=True)
def _runs(request, device_for):
    if "backend" in getattr(request.node, "callspec", type("", (), {"params": {}})).params:
        backend = request.node.callspec.params["backend"]
        device_for(find_spec("min_norm_simplex"), backend, torch.float64)


def _gramians(*shape, seed=0):
    g = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g @ g.mT


def _value(c, w):
    return (w * (c @ w[..., None])[..., 0]).sum(-1)


def _violation(c, w):
    """How much a task's slope is below the value, relative to the terms of both."""
    slope, size = ((m @ w[..., None])[..., 0] for m in (c, c.abs()))
    value = (w * slope).sum(-1, keepdim=True)
    return ((value - slope) / (size + (w * size).sum(-1, keepdim=True))).amax(-1)


# -- exact arithmetic ---------------------------------------------------------------------------


def _solve(rows, right):
    """Gauss-Jordan over the rationals; None if singular."""
    m = [[*row, r] for row, r in zip(rows, right, strict=True)]
    n = len(m)
    for k in range(n):
        pivot = next((i for i in range(k, n) if m[i][k] != 0), None)
        if pivot is None:
            return None
        m[k], m[pivot] = m[pivot], m[k]
        m[k] = [x / m[k][k] for x in m[k]]
        for i in range(n):
            if i != k:
                m[i] = [x - m[i][k] * y for x, y in zip(m[i], m[k], strict=True)]
    return [row[-1] for row in m]


def _rational_min_norm(c):
    """The best stationary point of any face, and whether it is the only one."""
    count, best = len(c), {}
    for size in range(1, count + 1):
        for face in itertools.combinations(range(count), size):
            rows = [[c[i][j] for j in face] + [Fraction(-1)] for i in face]
            rows.append([Fraction(1)] * size + [Fraction(0)])
            found = _solve(rows, [Fraction(0)] * size + [Fraction(1)])
            if found is not None and min(found[:-1]) >= 0:
                w = [Fraction(0)] * count
                for i, x in zip(face, found, strict=False):
                    w[i] = x
                best.setdefault(found[-1], set()).add(tuple(w))
    least = min(best)
    return least, best[least]


@pytest.mark.parametrize("backend", BACKENDS)
def test_min_norm_is_that_of_rational_arithmetic(backend):
    generator = torch.Generator().manual_seed(1)
    unique = 0
    for trial in range(36):
        count, rank = 2 + trial % 3, 1 + trial % 4
        g = torch.randint(-3, 4, (count, rank), generator=generator)
        # Scales of gradients from 1 to 2^-20, exactly.
        g = (
            g.double()
            * torch.tensor([2.0 ** (-10 * (trial % (i + 1))) for i in range(count)])[:, None]
        )
        exact = [[Fraction(x) for x in row] for row in (g @ g.T).tolist()]
        least, solutions = _rational_min_norm(exact)
        w = min_norm_simplex(g @ g.T, backend=backend)
        own = [Fraction(x) for x in w.tolist()]
        value = sum(own[i] * own[j] * exact[i][j] for i in range(count) for j in range(count))
        scale = max(exact[i][i] for i in range(count))
        assert value - least <= Fraction(1e-14) * (least if least > 0 else scale)
        if len(solutions) == 1:
            unique += 1
            torch.testing.assert_close(
                w, torch.tensor([float(x) for x in next(iter(solutions))], dtype=torch.float64),
                rtol=1e-9, atol=1e-12,
            )  # fmt: skip
    assert unique > 15


# -- min_norm_simplex ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("problems", "count", "rank"), [(2000, 3, 4), (50, 8, 8), (50, 8, 3), (20, 24, 30), (4, 64, 40)]
)
def test_min_norm_is_optimal(backend, problems, count, rank):
    c = _gramians(problems, count, rank)
    w = min_norm_simplex(c, backend=backend)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(problems, dtype=torch.float64))
    assert _violation(c, w).max() < 1e-12


def test_min_norm_of_256_gradients():
    c = _gramians(1, 256, 300)
    assert _violation(c, min_norm_simplex(c)).max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1.0, 2.0]] * 4, [0.25] * 4),
        ([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0.5, 0.5, 0.0]),
        ([[1.0, 0.0], [-1.0, 0.0]], [0.5, 0.5]),
        ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.25] * 4),
        ([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [5.0, 0.0]], [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ([[1.0, 0.0], [-2.0, 0.0], [-2.0, 0.0]], [2 / 3, 1 / 6, 1 / 6]),
        ([[3.0, 4.0]], [1.0]),
    ],
)
def test_ties_share_the_weight(backend, rows, weights):
    g = torch.tensor(rows, dtype=torch.float64)
    w = min_norm_simplex(g @ g.T, backend=backend)
    torch.testing.assert_close(w, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-12)


def test_ties_of_many_gradients_have_the_smallest_norm(device_for):
    """Against a quadratic programme that is told the point: min |w|^2 with G^T w = x."""
    device_for(find_spec("min_norm_simplex"), "cpu", torch.float64)
    scipy = pytest.importorskip("scipy.optimize")
    torch.testing.assert_close(
        min_norm_simplex(torch.ones(20, 20), backend="cpu"), torch.full((20,), 0.05)
    )
    generator = torch.Generator().manual_seed(3)
    for count, rank in ((5, 2), (8, 4), (12, 5)):
        for _ in range(20):
            g = torch.randn(count, rank, generator=generator, dtype=torch.float64)
            w = min_norm_simplex(g @ g.T, backend="cpu")
            # Weight 1e6 on the equalities leaves an error of about 1e-12.
            rows = torch.cat((1e6 * g.T, torch.full((1, count), 1e6), torch.eye(count)))
            right = torch.cat((1e6 * (g.T @ w), torch.tensor([1e6]), torch.zeros(count))).double()
            best = torch.from_numpy(scipy.nnls(rows.numpy(), right.numpy())[0])
            torch.testing.assert_close(w, best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_do_not_matter(backend):
    c = _gramians(30, 3, 4)
    w = min_norm_simplex(c, backend=backend)
    for scale in (2.0**-200, 2.0**200):
        torch.testing.assert_close(min_norm_simplex(scale * c, backend=backend), w, rtol=0, atol=0)
    # Gradients of orders of magnitude: orthogonal ones have weights as 1 / |g|^2.
    sizes = torch.tensor([1e-6, 1.0, 4.0], dtype=torch.float64)
    w = min_norm_simplex(torch.diag(sizes), backend=backend)
    torch.testing.assert_close(w, sizes.reciprocal() / sizes.reciprocal().sum(), rtol=1e-9, atol=0)


def test_frank_wolfe_approaches_the_exact_solution():
    c = torch.cat((_gramians(50, 5, 7), torch.zeros(1, 5, 5), torch.ones(1, 5, 5)))
    w = min_norm_simplex(c, solver="frank_wolfe")
    exact = min_norm_simplex(c)
    assert (_value(c, w) - _value(c, exact) <= 1e-9 * _value(c, exact) + 1e-15).all()
    few = min_norm_simplex(c, solver="frank_wolfe", iterations=3)
    assert (_value(c, few) - _value(c, exact)).max() > 1e-4
    large = _gramians(2, 300, 900)
    w = min_norm_simplex(large, solver="frank_wolfe", tolerance=1e-5)
    assert _violation(large, w).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_dtypes(backend):
    c = _gramians(2, 5, 3, 4)
    whole = min_norm_simplex(c, backend=backend)
    assert whole.shape == (2, 5, 3)
    assert torch.equal(min_norm_simplex(c[1, 2], backend=backend), whole[1, 2])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounded = c.to(dtype)
        w = min_norm_simplex(rounded, backend=backend)
        assert w.dtype == torch.float32
        exact = min_norm_simplex(rounded.double(), backend=backend)
        torch.testing.assert_close(w, exact.float(), rtol=0, atol=0)
    assert min_norm_simplex(torch.ones(0, 4, 2, 2), backend=backend).shape == (0, 4, 2)
    strided = torch.empty(3, 3, 10, dtype=torch.float64).permute(2, 0, 1)
    strided.copy_(c.flatten(0, 1))
    assert torch.equal(min_norm_simplex(strided, backend=backend), whole.flatten(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_problem_that_is_not_finite_stays_alone(backend):
    c = _gramians(4, 3, 5)
    before = min_norm_simplex(c, backend=backend)
    c[1, 0, 2] = torch.nan
    c[3] = torch.inf
    w = min_norm_simplex(c, backend=backend)
    assert torch.equal(w.isnan().any(-1), torch.tensor([False, True, False, True]))
    assert torch.equal(w[[0, 2]], before[[0, 2]])
    all_nan = min_norm_simplex(torch.full((3, 3), torch.nan), backend=backend)
    assert all_nan.isnan().all()


# -- nonneg_qp ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("problems", "n", "rank"), [(500, 1, 1), (500, 3, 4), (100, 8, 3), (20, 40, 60), (5, 100, 30)]
)
def test_quadratic_programmes_are_solved(backend, problems, n, rank):
    generator = torch.Generator().manual_seed(n)
    g = _gramians(problems, n, rank, seed=n + 1)
    # In the range of G: bounded also where it is singular.
    q = (g @ torch.randn(problems, n, 1, generator=generator, dtype=torch.float64))[..., 0]
    x, residual = nonneg_qp(g, q, backend=backend)
    slope = (g @ x[..., None])[..., 0] + q
    size = q.abs().amax(-1, keepdim=True)
    assert (x >= 0).all()
    assert (slope / size).min() > -1e-11
    assert (torch.where(x > 0, slope, 0.0) / size).abs().max() < 1e-11
    assert residual.max() < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbounded_singular_and_unsolved_programmes_say_so(backend):
    opposed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert nonneg_qp(opposed, torch.tensor([-1.0, -2.0]), backend=backend).residual == torch.inf
    flat = torch.zeros(2, 2)
    assert nonneg_qp(flat, torch.tensor([1.0, -2.0]), backend=backend).residual == torch.inf
    x, residual = nonneg_qp(flat, torch.tensor([1.0, 0.0]), backend=backend)
    assert torch.equal(x, torch.zeros(2))
    assert residual == 0
    ones = torch.ones(2, 2)
    x, residual = nonneg_qp(ones, torch.tensor([-1.0, -2.0]), backend=backend)
    torch.testing.assert_close(x, torch.tensor([0.0, 2.0]))
    assert residual < 1e-6
    g, q = _gramians(1, 30, 40), -torch.ones(1, 30, dtype=torch.float64)
    solved = nonneg_qp(g, q, backend=backend)
    assert (solved.x > 0).sum() > 5
    assert solved.residual < 1e-10
    assert nonneg_qp(g, q, iterations=2, backend=backend).residual > 1e-3
    assert nonneg_qp(torch.nan * g, q, backend=backend).residual.isnan().all()


def test_quadratic_programmes_agree_with_scipy():
    scipy = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(5)
    for n in (2, 6, 20):
        a = torch.randn(n + 3, n, generator=generator, dtype=torch.float64)
        b = torch.randn(n + 3, generator=generator, dtype=torch.float64)
        x = nonneg_qp(a.T @ a, -a.T @ b).x
        expected = torch.from_numpy(scipy.nnls(a.numpy(), b.numpy())[0])
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)


# -- pareto_lp ----------------------------------------------------------------------------------


def _constraints(c, a, mode):
    """The programme as the card of the method states it: rows, bounds, objective (all numpy)."""
    rows, bounds = [], []
    for j in range(len(a)):
        if mode == "descent" or not (a > 0).any() or a[j] == a.max():
            rows.append(c[j])
            bounds.append(0.0)
        elif a[j] <= 0:
            rows.append(c[j])
            bounds.append(a[j])
    if mode == "descent":
        rows.append(a)
        bounds.append(min(a.max(), 0.0))
    return rows, bounds, (a if mode == "guide" else c.sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["guide", "descent"])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_linear_programmes_agree_with_scipy(backend, mode, count):
    scipy = pytest.importorskip("scipy.optimize")
    np = pytest.importorskip("numpy")
    generator = torch.Generator().manual_seed(count)
    g = torch.randn(30, count, count + 1, generator=generator, dtype=torch.float64)
    guide = torch.randn(30, count + 1, 1, generator=generator, dtype=torch.float64)
    c, a = g @ g.mT, (g @ guide)[..., 0]
    weights, status = pareto_lp(c, a, mode=mode, backend=backend)
    infeasible = 0
    for i in range(30):
        own, along = c[i].numpy(), a[i].numpy()
        rows, bounds, objective = _constraints(own, along, mode)
        best = scipy.linprog(
            -objective, A_ub=-np.array(rows), b_ub=-np.array(bounds), A_eq=np.ones((1, count)),
            b_eq=[1.0], bounds=(0, None),
        )  # fmt: skip
        assert int(status[i]) == (0 if best.status == 0 else 1)
        if best.status != 0:
            infeasible += 1
            torch.testing.assert_close(weights[i], torch.full_like(weights[i], 1 / count))
            continue
        w = weights[i].numpy()
        assert abs(objective @ w + best.fun) < 1e-9 * np.abs(objective).max()
        assert (np.array(rows) @ w >= np.array(bounds) - 1e-9 * np.abs(own).max()).all()
        assert w.min() >= 0
        assert abs(w.sum() - 1) < 1e-12
    assert infeasible < 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_programmes_of_any_scale(backend):
    g = torch.randn(50, 3, 6, dtype=torch.float64)
    a = (g @ torch.randn(50, 6, 1, dtype=torch.float64))[..., 0]
    for mode in ("guide", "descent"):
        plain = pareto_lp(g @ g.mT, a, mode=mode, backend=backend)
        # Losses in other units: C by s^2 and a by s t, where t is the unit of the guiding loss.
        for s in (2.0**-60, 2.0**60):
            scaled = pareto_lp(s * s * (g @ g.mT), s * s * a, mode=mode, backend=backend)
            torch.testing.assert_close(scaled.weights, plain.weights, rtol=0, atol=0)
            assert torch.equal(scaled.status, plain.status)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_statuses_of_linear_programmes(backend):
    eye, zero = torch.eye(3), torch.zeros(3)
    for mode in ("guide", "descent"):
        # Nothing to gain: of the tied vertices one is returned, the same for every call.
        weights, status = pareto_lp(eye, zero, mode=mode, backend=backend)
        assert torch.equal(weights, pareto_lp(eye, zero, mode=mode, backend="reference").weights)
        assert status == 0
        assert pareto_lp(torch.zeros(3, 3), zero, mode=mode, backend=backend).status == 0
    # All maximisers of a are j*: neither may be harmed.
    g = torch.tensor([[1.0, 0.0], [-0.9, 0.5], [0.3, 1.0]])
    weights, _ = pareto_lp(g @ g.T, torch.tensor([1.0, 1.0, 0.5]), mode="guide", backend=backend)
    assert ((g @ g.T) @ weights)[:2].min() >= -1e-6
    # Every gradient is against the guide, and the least bad one harms another loss.
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.01]])
    found = pareto_lp(g @ g.T, torch.tensor([-1.0, -2.0]), mode="descent", backend=backend)
    assert found.status == 1
    assert torch.equal(found.weights, torch.tensor([0.5, 0.5]))
    found = pareto_lp(eye, torch.tensor([0.0, torch.nan, 0.0]), mode="guide", backend=backend)
    assert found.status == 2
    assert found.weights.isnan().all()


# -- autograd and transforms --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_constants(backend):
    c = _gramians(3, 3, 5).requires_grad_()
    a = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert not min_norm_simplex(c, backend=backend).requires_grad
    assert not pareto_lp(c, a, mode="guide", backend=backend).weights.requires_grad
    assert not nonneg_qp(c, a, backend=backend).x.requires_grad
    direction = torch.func.grad(lambda c: (min_norm_simplex(c, backend=backend) * 2).sum())
    assert torch.equal(direction(c.detach()), torch.zeros_like(c))
    _, tangent = torch.func.jvp(
        lambda c: min_norm_simplex(c, backend=backend), (c.detach(),), (torch.ones_like(c),)
    )
    assert torch.equal(tangent, torch.zeros(3, 3, dtype=torch.float64))


def test_vmap_is_a_batch():
    c, a = _gramians(4, 2, 3, 5), torch.randn(4, 2, 3, dtype=torch.float64)
    assert torch.equal(torch.func.vmap(min_norm_simplex)(c), min_norm_simplex(c))
    assert torch.equal(
        torch.func.vmap(nonneg_qp, (1, 1))(c, a).x, nonneg_qp(c, a).x.transpose(0, 1)
    )
    wolfe = torch.func.vmap(lambda c: min_norm_simplex(c, solver="frank_wolfe"))(c)
    torch.testing.assert_close(wolfe, min_norm_simplex(c), rtol=0, atol=1e-4)
    found = torch.func.vmap(lambda c, a: pareto_lp(c, a, mode="descent"))(c, a)
    plain = pareto_lp(c, a, mode="descent")
    assert torch.equal(found.weights, plain.weights)
    assert torch.equal(found.status, plain.status)


def test_raw_ops_check_what_kernels_rely_on(device_for):
    device_for(find_spec("min_norm_simplex"), "cpu", torch.float64)
    ops, c = torch.ops.transfuse, torch.eye(3, dtype=torch.float64)[None]
    for call in (
        lambda: ops.min_norm_simplex(c.float()),
        lambda: ops.min_norm_simplex(c[0]),
        lambda: ops.min_norm_simplex(torch.zeros(1, 257, 257, dtype=torch.float64)),
        lambda: ops.min_norm_simplex(c.expand(2, 3, 3)),
        lambda: ops.nonneg_qp(c, c[0], 10, 1e-9),
        lambda: ops.pareto_lp(torch.zeros(1, 7, 7, dtype=torch.float64), c[0, :1], True),
    ):
        with pytest.raises(RuntimeError):
            call()
