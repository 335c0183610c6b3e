"""Estimators of traces, diagonals, eigenvalues and spectra on matrices that are known."""

from __future__ import annotations

import math

import pytest
import torch

from transfuse.ops import (
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    lanczos,
    lanczos_eigenpairs,
    power_iteration,
    spectral_density,
    xtrace,
)

DTYPE = torch.float64


def symmetric(values: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    size = values.shape[0]
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=DTYPE, generator=generator))
    result = (basis * values) @ basis.mT
    return (result + result.mT) / 2


def indefinite(size: int = 60) -> torch.Tensor:
    values = torch.linspace(-0.5, 0.5, size, dtype=DTYPE)
    values[:4] = torch.tensor([8.0, -6.0, 4.0, 3.0], dtype=DTYPE)
    return symmetric(values)


class Counting:
    """A matrix as an operator with nothing but a shape and products."""

    def __init__(self, matrix):
        self.matrix, self.shape, self.columns = matrix, matrix.shape, []

    dtype = DTYPE

    def __matmul__(self, vectors):
        self.columns.append(1 if vectors.dim() == 1 else vectors.shape[1])
        return self.matrix @ vectors


class TestProbes:
    def test_a_probe_is_the_same_in_any_chunk(self, monkeypatch):
        from transfuse.ops import trace_estimators

        matrix = indefinite()
        whole = Counting(matrix)
        expected = hutchinson_trace(whole, 23, seed=5)
        monkeypatch.setattr(trace_estimators, "_CHUNK_BYTES", 2 * 60 * 8 * 4)
        chunked = Counting(matrix)
        assert hutchinson_trace(chunked, 23, seed=5) == pytest.approx(expected, rel=1e-12)
        assert (whole.columns, chunked.columns) == ([23], [4, 4, 4, 4, 4, 3])
        assert hutchinson_trace(matrix, 23, seed=6).mean != expected.mean

    @pytest.mark.parametrize("distribution", ["rademacher", "normal"])
    def test_moments(self, distribution):
        from transfuse.ops._probes import make_probes

        z = make_probes(
            400,
            1003,
            start=7,
            seed=3,
            distribution=distribution,
            dtype=DTYPE,
            device=torch.device("cpu"),
        )
        count = z.numel()
        assert abs(z.mean()) < 5 / math.sqrt(count)
        assert abs(z.square().mean() - 1) <= 5 * math.sqrt(2 / count)
        # Neither neighbours nor probes are correlated.
        assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / math.sqrt(count)
        assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(count)
        if distribution == "rademacher":
            assert z.abs().eq(1).all()

    def test_no_global_generator_is_read(self):
        before = torch.random.get_rng_state()
        hutchinson_trace(indefinite(), 5, distribution="normal")
        lanczos(indefinite(), 3)
        assert torch.equal(torch.random.get_rng_state(), before)


class TestHutchinson:
    @pytest.mark.parametrize("distribution", ["rademacher", "normal"])
    def test_mean_and_variance_are_those_of_the_formula(self, distribution):
        matrix, probes = indefinite(), 4000
        squares = matrix.square().sum()
        off = squares - matrix.diagonal().square().sum()
        variance = 2 * (off if distribution == "rademacher" else squares)
        estimate = hutchinson_trace(matrix, probes, distribution=distribution, seed=1)
        # Four standard errors of the mean; the sample deviation itself is known to about 3 %.
        assert abs(estimate.mean - matrix.trace()) < 4 * math.sqrt(variance / probes)
        assert estimate.stderr == pytest.approx(math.sqrt(variance / probes), rel=0.1)

    def test_coverage_of_the_standard_error(self):
        matrix = indefinite()
        trace = float(matrix.trace())
        runs = [hutchinson_trace(matrix, 40, seed=seed) for seed in range(300)]
        covered = sum(abs(run.mean - trace) <= 2 * run.stderr for run in runs) / 300
        assert 0.90 <= covered <= 0.99  # 0.947 for Student's t with 39 degrees of freedom

    def test_stops_at_the_standard_error(self):
        matrix = symmetric(torch.linspace(1, 2, 60, dtype=DTYPE))
        estimate = hutchinson_trace(matrix, 10000, tol=0.003)
        assert 10 <= estimate.probes < 2000
        assert estimate.stderr <= 0.003 * estimate.mean
        assert hutchinson_trace(matrix, 30, tol=1e-9).probes == 30
        assert hutchinson_trace(matrix, 1).stderr == math.inf

    def test_diagonal(self):
        matrix, probes = indefinite(), 3000
        estimate = hutchinson_diagonal(matrix, probes, seed=2)
        exact = matrix.diagonal()
        variance = matrix.square().sum(1) - exact.square()
        deviations = (estimate.mean - exact) / (variance / probes).sqrt()
        assert deviations.abs().max() < 4.5
        assert 0.6 < deviations.square().mean() < 1.5
        torch.testing.assert_close(
            estimate.stderr, (variance / probes).sqrt(), rtol=0.15, atol=1e-12
        )
        stopped = hutchinson_diagonal(matrix, 5000, tol=0.2)
        assert stopped.probes < 5000
        assert stopped.stderr.norm() <= 0.2 * stopped.mean.norm()

    def test_operators_with_cheap_quadratic_forms_are_asked_for_them(self):
        class Forms(Counting):
            def quadratic_forms(self, vectors):
                return (vectors * (self.matrix @ vectors)).sum(0)

        operator = Forms(indefinite())
        estimate = hutchinson_trace(operator, 30)
        assert operator.columns == []
        assert estimate == pytest.approx(hutchinson_trace(operator.matrix, 30), rel=1e-12)


class TestLowRank:
    def test_exact_where_the_matrix_has_the_rank_of_the_sketch(self):
        matrix = symmetric(torch.tensor([5.0, -3.0, 2.0] + [0.0] * 37, dtype=DTYPE))
        assert hutchpp_trace(matrix, 12).mean == pytest.approx(4.0, abs=1e-10)
        assert xtrace(matrix, 8).mean == pytest.approx(4.0, abs=1e-10)
        zero = torch.zeros(9, 9)
        assert hutchpp_trace(zero, 9).mean == xtrace(zero, 10).mean == 0
        # No more columns than the matrix has.
        assert hutchpp_trace(matrix, 999).mean == pytest.approx(4.0, abs=1e-10)
        assert xtrace(matrix, 999).mean == pytest.approx(4.0, abs=1e-10)

    def test_better_than_hutchinson_for_decaying_spectra(self):
        values = torch.arange(1, 81, dtype=DTYPE) ** -2.0
        matrix, trace = symmetric(values), float(values.sum())

        def deviation(estimate) -> float:
            errors = [estimate(seed).mean - trace for seed in range(60)]
            return math.sqrt(sum(e * e for e in errors) / len(errors))

        plain = deviation(lambda seed: hutchinson_trace(matrix, 30, seed=seed))
        assert deviation(lambda seed: hutchpp_trace(matrix, 30, seed=seed)) < plain / 5
        assert deviation(lambda seed: xtrace(matrix, 30, seed=seed)) < plain / 10

    def test_unbiased_and_errors_of_the_right_size(self):
        matrix = indefinite()
        trace = float(matrix.trace())
        for estimator, products in ((hutchpp_trace, 45), (xtrace, 40)):
            runs = [estimator(matrix, products, seed=seed) for seed in range(200)]
            means = torch.tensor([run.mean for run in runs])
            assert abs(means.mean() - trace) < 4 * means.std() / math.sqrt(200)
            claimed = sum(run.stderr for run in runs) / 200
            assert 0.6 < claimed / float(means.std()) < 1.6

    def test_leave_one_out_is_what_its_definition_says(self):
        from transfuse.ops._probes import make_probes

        matrix, count = indefinite(20), 5
        probes = make_probes(
            count,
            20,
            start=0,
            seed=9,
            distribution="normal",
            dtype=DTYPE,
            device=torch.device("cpu"),
        )
        ones = []
        for i in range(count):
            others = torch.cat([probes[:i], probes[i + 1 :]])
            basis, _ = torch.linalg.qr((others @ matrix).mT)
            rest = probes[i] - basis @ (basis.mT @ probes[i])
            form = (rest @ matrix @ rest) * (20 - count + 1) / rest.square().sum()
            ones.append(float((basis.mT @ matrix @ basis).trace() + form))
        assert xtrace(matrix, 2 * count, seed=9).mean == pytest.approx(sum(ones) / count, rel=1e-9)

    @pytest.mark.parametrize("estimator", [hutchpp_trace, xtrace, lanczos, lanczos_eigenpairs])
    def test_a_basis_that_does_not_fit_is_refused_before_any_product(self, estimator):
        operator = Counting(indefinite())
        size = dict(steps=30) if "lanczos" in estimator.__name__ else dict(matvecs=60)
        with pytest.raises(MemoryError, match=r"\d+ vectors of 60 numbers.* \d+ bytes"):
            estimator(operator, memory=1000, **size)
        assert operator.columns == []


class TestEigenvalues:
    @pytest.mark.parametrize("solver", [power_iteration, lanczos_eigenpairs])
    def test_leading_pairs(self, solver):
        matrix = indefinite()
        limit = dict(steps=60) if solver is lanczos_eigenpairs else dict(iterations=2000)
        for which, expected in (("magnitude", [8.0, -6.0, 4.0]), ("algebraic", [8.0, 4.0, 3.0])):
            pairs = solver(matrix, 3, which=which, tol=1e-10, **limit)
            assert pairs.values.tolist() == pytest.approx(expected, rel=1e-6)
            assert pairs.converged.all()
            gaps = matrix @ pairs.vectors - pairs.vectors * pairs.values
            assert gaps.norm(dim=0).max() < 1e-3
            torch.testing.assert_close(pairs.vectors.norm(dim=0), torch.ones(3, dtype=DTYPE))

    def test_small_eigenvalues_are_not_low_by_an_epsilon(self):
        matrix = 1e-7 * indefinite()
        assert power_iteration(matrix, tol=1e-12, iterations=500).values[0] == pytest.approx(
            8e-7, rel=1e-9
        )

    def test_largest_of_a_negative_definite_matrix(self):
        matrix = symmetric(torch.linspace(-9, -2, 30, dtype=DTYPE))
        assert power_iteration(matrix).values[0] == pytest.approx(-9, rel=0.05)
        for solver, limit in ((power_iteration, "iterations"), (lanczos_eigenpairs, "steps")):
            pairs = solver(matrix, which="algebraic", tol=1e-8, **{limit: 1000})
            assert pairs.values[0] == pytest.approx(-2, rel=1e-3)

    def test_limits_are_reported(self):
        pairs = power_iteration(indefinite(), 2, tol=1e-14, iterations=3)
        assert not pairs.converged.any()
        assert pairs.matvecs == 6
        pairs = lanczos_eigenpairs(indefinite(), 2, tol=1e-14, steps=4)
        assert not pairs.converged.all()
        assert pairs.matvecs == 4

    def test_degenerate_matrices(self):
        for solver in (power_iteration, lanczos_eigenpairs):
            assert solver(torch.zeros(5, 5), 3).values.tolist() == [0, 0, 0]
            assert solver(torch.eye(4), 4).values.tolist() == pytest.approx([1] * 4, rel=1e-5)
            assert solver(torch.ones(1, 1) * -3).values.tolist() == pytest.approx([-3.0])
            # A vector of signs may lie in the null space here.
            assert solver(torch.ones(4, 4)).values.tolist() == pytest.approx([4.0], rel=1e-5)

    def test_start(self):
        matrix = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=DTYPE))
        start = torch.tensor([0.0, 1.0, 0.0], dtype=DTYPE)
        assert power_iteration(matrix, start=start).values[0] == 2
        for solver in (power_iteration, lanczos, lanczos_eigenpairs):
            with pytest.raises(
                ValueError, match="start: expected a finite vector that is not zero"
            ):
                solver(matrix, start=torch.zeros(3, dtype=DTYPE))
            with pytest.raises(ValueError, match="start: expected 3 in dimension 0"):
                solver(matrix, start=torch.zeros(4, dtype=DTYPE))
        with pytest.raises(ValueError, match="one that the operator maps to zero"):
            power_iteration(matrix, start=start.roll(1))


class TestLanczos:
    def test_float32_stays_orthogonal_and_without_ghosts(self):
        values = torch.linspace(0, 1, 300, dtype=DTYPE) ** 8
        values[-1] = 100.0  # converges first, and would come back as a ghost
        matrix = symmetric(values).float()
        result = lanczos(matrix, 120)
        gram = result.basis.mT @ result.basis
        assert (gram - torch.eye(120)).abs().max() < 1e-5
        t = torch.diag(result.alpha) + torch.diag(result.beta, 1) + torch.diag(result.beta, -1)
        ritz = torch.linalg.eigvalsh(t)
        assert ritz[-1] == pytest.approx(100, rel=1e-5)
        assert ritz[-2] < 1.001
        assert result.alpha.dtype == DTYPE

    def test_ends_in_an_invariant_space(self):
        matrix = symmetric(torch.tensor([1.0, 1.0, 1.0, 5.0, 5.0, 9.0], dtype=DTYPE))
        result = lanczos(matrix, 6)
        assert result.alpha.shape == (3,)
        assert result.remainder == 0
        assert result.beta.shape == (2,)

    def test_quadrature_integrates_polynomials_of_its_start_exactly(self):
        matrix, steps = indefinite(), 6
        density = spectral_density(matrix, 3, steps=steps, distribution="normal", seed=4)
        from transfuse.ops._probes import make_probes

        starts = make_probes(
            3, 60, start=0, seed=4, distribution="normal", dtype=DTYPE, device=torch.device("cpu")
        )
        assert density.weights.sum(1).tolist() == pytest.approx([1.0] * 3)
        for degree in range(2 * steps):
            powers = torch.linalg.matrix_power(matrix, degree)
            expected = ((starts @ powers) * starts).sum(1) / starts.square().sum(1)
            got = (density.weights * density.nodes**degree).sum(1)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)

    def test_density(self):
        matrix = symmetric(torch.tensor([0.0] * 30 + [10.0] * 10, dtype=DTYPE))
        density = spectral_density(matrix, 40, steps=10, sigma=0.2)
        step = density.grid[1] - density.grid[0]
        assert density.density.sum() * step == pytest.approx(1, abs=1e-3)
        upper = density.density[density.grid > 5].sum() * step
        assert upper == pytest.approx(0.25, abs=0.05)
        grid = torch.linspace(-1, 11, 7)
        again = spectral_density(matrix, 40, steps=10, sigma=0.2, grid=grid)
        assert torch.equal(again.grid, grid.double())
        assert again.density.shape == (7,)
        one = spectral_density(torch.ones(1, 1), 2)
        assert one.nodes.tolist() == [[1.0], [1.0]]
        assert one.density.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        hutchinson_trace,
        hutchinson_diagonal,
        hutchpp_trace,
        xtrace,
        power_iteration,
        lanczos,
        lanczos_eigenpairs,
        spectral_density,
    ],
)
class TestArguments:
    def test_operators(self, call):
        with pytest.raises(TypeError, match="operator: expected something with shape and @"):
            call("matrix")
        with pytest.raises(ValueError, match=r"operator: expected a square matrix.*\(3, 4\)"):
            call(torch.ones(3, 4))
        with pytest.raises(ValueError, match="operator: expected at least one row"):
            call(torch.ones(0, 0))
        with pytest.raises(TypeError, match="operator: expected a floating torch dtype"):
            call(torch.ones(3, 3, dtype=torch.long))

    def test_counts_and_seeds(self, call):
        for value in (0, -1):
            with pytest.raises(ValueError, match=": expected"):
                call(torch.eye(4), value)
        with pytest.raises(TypeError, match=r"expected an integer, got 1\.5"):
            call(torch.eye(4), 1.5)
        with pytest.raises(TypeError, match="seed: expected an integer"):
            call(torch.eye(4), seed=0.5)

    def test_progress_ends_where_it_said(self, call):
        seen = []
        call(torch.diag(torch.arange(1.0, 9.0)), progress=lambda *step: seen.append(step))
        assert {name for name, _, _ in seen} == {call.__name__}
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)

    def test_reproducible(self, call):
        def flat(result):
            parts = result if isinstance(result, tuple) else (result,)
            return [torch.as_tensor(part, dtype=DTYPE) for part in parts]

        matrix = indefinite(12)
        for first, second in zip(flat(call(matrix)), flat(call(matrix)), strict=True):
            assert torch.equal(first, second)


def test_options_by_name():
    matrix = indefinite(12)
    for call in (hutchinson_trace, hutchinson_diagonal, hutchpp_trace, spectral_density):
        for value in ("gaussian", None):
            with pytest.raises(ValueError, match="distribution: expected"):
                call(matrix, distribution=value)
    for call in (power_iteration, lanczos_eigenpairs):
        for value in ("largest", None):
            with pytest.raises(ValueError, match="which: expected"):
                call(matrix, which=value)
        with pytest.raises(ValueError, match="tol: expected a number greater than 0"):
            call(matrix, tol=0.0)
        with pytest.raises(ValueError, match="k: expected at most 12, got 13"):
            call(matrix, 13)
