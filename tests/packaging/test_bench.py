"""The benchmark's own machinery: how it times, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_cases import CPU, SHORT, TARGET, double, find, make_case, make_record, row, run, settings

from transfuse.bench import harness, inputs, peers, records, report
from transfuse.bench.cases import Setup, Target, load_cases, select_targets
from transfuse.bench.gate import Gate, bind, oracle
from transfuse.bench.timing import Budget, interleave, percentile, summarise


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return run(make_case())


class TestTiming:
    @pytest.mark.parametrize("count", [1, 2, 5, 10, 11])
    def test_percentiles_agree_with_numpy(self, count):
        values = np.random.default_rng(count).random(count).tolist()
        for fraction in (0.0, 0.2, 0.5, 0.8, 1.0):
            assert percentile(values, fraction) == pytest.approx(np.quantile(values, fraction))
        samples = summarise(values)
        assert samples.n == count
        assert samples.p50 == pytest.approx(np.median(values))

    @pytest.mark.parametrize(("values", "fraction"), [([], 0.5), ([1.0], 1.5), ([1.0], -0.1)])
    def test_percentile_refuses(self, values, fraction):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, fraction)

    def test_candidates_take_turns_in_rotating_order(self):
        order = []
        calls = {name: lambda n=name: order.append(n) for name in "abc"}
        budget = Budget(seconds=0.0, min_repeats=3, warmups=1, slow_factor=1e9)
        samples, notes = interleave(calls, budget=budget)
        assert order == list("abc") + list("abc") + list("bca") + list("cab")
        assert {s.n for s in samples.values()} == {3}
        assert notes == {}

    def test_slow_candidates_are_timed_less_and_say_so(self):
        seconds = {"fast": 1.0, "slow": 50.0, "endless": 1000.0}
        clock = iter(range(10**6))
        samples, notes = interleave(
            {name: (lambda n=name: n) for name in seconds},
            budget=Budget(seconds=20.0, min_repeats=5, call_limit=100.0, slow_repeats=2),
            clock=lambda call: seconds[call()],
            now=lambda: float(next(clock)),
        )
        assert samples["fast"].n > samples["slow"].n == 2
        assert samples["endless"].n == 1
        assert "slower" in notes["slow"]
        assert "timed once" in notes["endless"]

    def test_a_candidate_that_fails_while_timed_does_not_stop_the_others(self):
        calls_left = [2]

        def breaks() -> None:
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise RuntimeError("out of luck\nsecond line")

        samples, notes = interleave({"good": lambda: None, "bad": breaks}, budget=SHORT)
        assert set(samples) == {"good"}
        assert notes["bad"] == "RuntimeError: out of luck"


class TestGate:
    def test_a_right_candidate_is_timed(self, result):
        assert result["status"] == "ok"
        assert row(result, "transfuse")["n"] >= 2
        assert result["best_peer"] == "eager"
        assert result["ratio"] == pytest.approx(
            row(result, "eager")["p50"] / row(result, "transfuse")["p50"]
        )

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (lambda t: t["x"] * 2.001, "wrong: output 0, error"),
            (lambda t: t["x"] * float("nan"), "wrong: output 0, error inf"),
            (lambda t: (t["x"] * 2)[:1], "shape"),
            (lambda t: (t["x"] * 2).double(), "dtype"),
            (lambda t: (t["x"] * 2, t["x"]), "2 outputs, expected 1"),
        ],
    )
    def test_a_wrong_candidate_is_refused_and_never_timed(self, wrong, reason):
        calls = []

        def counted(t):
            calls.append(1)
            return wrong(t)

        result = run(make_case(ours=counted))
        ours = row(result, "transfuse")
        assert ours["status"] == "failed"
        assert reason in ours["reason"]
        assert ours["p50"] is None
        assert len(calls) == 1
        assert result["ratio"] is None
        records.validate(make_record(result), source="record")

    def test_a_wrong_peer_is_no_best_peer(self):
        lazy = lambda t: t["x"]  # noqa: E731
        case = make_case(
            expressions={"eager": double, "explicit": lazy}, names=("eager", "explicit")
        )
        result = run(case)
        assert row(result, "explicit")["status"] == "failed"
        assert result["best_peer"] == "eager"

    def test_a_candidate_that_raises_or_runs_out_of_memory_is_a_row(self):
        def raises(t):
            raise ValueError("bad shape\nmore")

        def exhausts(t):
            raise MemoryError

        case = make_case(
            expressions={"eager": double, "explicit": raises, "flex": exhausts},
            names=("eager", "explicit", "flex"),
        )
        result = run(case)
        assert row(result, "explicit")["reason"] == "ValueError: bad shape"
        assert row(result, "flex")["reason"] == "out of memory"

    def test_a_broken_yardstick_judges_nothing(self):
        # Far too coarse in the inputs' own dtype, right in float64.
        def coarse(t):
            return double(t) if t["x"].dtype == torch.float64 else (t["x"] * 2).round()

        result = run(make_case(reference=coarse))
        assert result["status"] == "failed"
        assert "nothing can be judged" in result["reason"]
        assert result["candidates"] == []

    @pytest.mark.parametrize("mode", ["backward", "full"])
    def test_gradients_are_judged_too(self, mode):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * 3

        target = Target(dtype="float32", mode=mode)
        assert row(run(make_case(), target), "transfuse")["status"] == "ok"
        result = run(make_case(ours=lambda t: Wrong.apply(t["x"])), target)
        assert "wrong" in row(result, "transfuse")["reason"]

    @pytest.mark.parametrize("mode", ["forward", "full"])
    def test_the_oracle_by_heads_is_the_oracle(self, mode):
        workload = find("attention", "tiny").make(Setup(dtype=torch.float32, mode=mode, device=CPU))
        whole = bind(
            workload.reference,
            {name: tensor.double() for name, tensor in workload.tensors.items()},
            mode=mode,
            differentiable=workload.differentiable,
        )()
        assert workload.heads == 2
        for by_head, expected in zip(oracle(workload, mode=mode), whole, strict=True):
            torch.testing.assert_close(by_head, expected, rtol=1e-12, atol=1e-12)

    def test_a_hessian_product_is_judged_as_one_vector(self):
        truth = (torch.tensor([1e3], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64))
        eager = (torch.tensor([1e3]), torch.tensor([0.0]))
        off = (torch.tensor([1e3]), torch.tensor([1e-4]))
        assert Gate(truth, eager, mode="hvp", inputs={}).judge(off).passed
        far = (torch.tensor([1e3]), torch.tensor([1.0]))
        assert not Gate(truth, eager, mode="hvp", inputs={}).judge(far).passed


class TestPeers:
    def test_a_missing_package_is_a_row_with_its_reason(self):
        missing = peers.Peer(
            name="absent",
            kind="eager",
            title="an absent package",
            prepare=lambda expression, device, mode: expression,
            package="a_package_nobody_has",
        )
        registry = peers.all_peers() | {"absent": missing}
        result = run(make_case(names=("eager", "absent")), registry=registry)
        absent = row(result, "absent")
        assert absent["status"] == "unavailable"
        assert absent["reason"] == "not installed: a_package_nobody_has"
        assert "not installed: a_package_nobody_has" in report.case_table(result)

    def test_every_peer_a_case_names_exists(self):
        known = peers.all_peers()
        for members in load_cases().values():
            for case in members:
                assert set(case.peers) | set(case.quick_peers) <= set(known), case.name

    def test_what_would_not_fit_is_not_started(self):
        calls = []

        def counted(t):
            calls.append(1)
            return double(t)

        case = make_case(
            expressions={"eager": double, "explicit": counted},
            names=("eager", "explicit"),
            needs_bytes={"explicit": 1 << 60},
        )
        result = run(case)
        assert row(result, "explicit")["status"] == "skipped"
        assert "GiB" in row(result, "explicit")["reason"]
        assert calls == []

    def test_nothing_is_compiled_without_the_time_for_it(self):
        result = run(make_case(names=("eager", "eager-compile")), stop_at=0.0)
        assert row(result, "eager-compile")["status"] == "skipped"
        assert row(result, "eager")["n"] == 1

    def test_a_case_without_its_inputs_is_an_entry_with_the_reason(self, monkeypatch):
        monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
        inputs.photo.cache_clear()
        result = harness.run_case(
            "attention", find("attention", "style-injection-photo-32"), TARGET, settings()
        )
        inputs.photo.cache_clear()
        assert result["status"] == "unavailable"
        assert "pip install 'transfuse[bench]'" in result["reason"]
        records.validate(make_record(result), source="record")
        assert "unavailable" in report.summary_table(make_record(result))


class TestFigures:
    @pytest.mark.parametrize(
        ("bar", "bars", "met"),
        [(None, {}, None), (1e-9, {}, True), (1e9, {}, False), (1e-9, {"eager": 1e9}, False),
         (1e-9, {"never-run": 2.0}, None), (None, {"eager": 1e-9}, True)],
    )  # fmt: skip
    def test_bars(self, bar, bars, met):
        assert run(make_case(), Target(dtype="float32", bar=bar, bars=bars))["met"] is met

    def test_the_floor_is_the_larger_of_arithmetic_and_traffic(self):
        workload = make_case().make(Setup(dtype=torch.float32, mode="forward", device=CPU))
        limits = {"peak_gflops": {"float32": 1e-9}, "copy_gbps": 1e-9}
        assert harness.floor_seconds(workload, "float32", limits) == pytest.approx(240)
        limits["copy_gbps"] = 1.0
        assert harness.floor_seconds(workload, "float32", limits) == pytest.approx(30)
        assert harness.floor_seconds(workload, "float64", limits) is None
        assert harness.floor_seconds(workload, "float32", None) is None

    def test_bars_of_the_issue_are_present(self):
        bars = {
            (case.name, target.dtype, target.mode): target.bar
            for case in load_cases(("attention",))["attention"]
            for target in case.targets
            if target.bar is not None and "cpu" in case.devices
        }
        assert len(bars) == 16
        assert bars["plain-b", "bfloat16", "forward"] == 1.7
        assert bars["plain-c", "float32", "full"] == 1.0

    def test_selection(self):
        case = find("attention", "plain-c")
        assert len(select_targets(case, dtypes=(), mode=None, quick=False)) == 4
        assert select_targets(case, dtypes=(), mode=None, quick=True) == ()
        (only,) = select_targets(case, dtypes=("bfloat16",), mode="full", quick=False)
        assert only.bar == 1.3
        (extra,) = select_targets(case, dtypes=("float16",), mode="backward", quick=False)
        assert extra == Target(dtype="float16", mode="backward")
        assert (
            select_targets(find("attention", "hvp-vit"), dtypes=(), mode="full", quick=False) == ()
        )


def test_draws_of_their_own_are_judged_by_their_spread():
    """Another draw of the same numbers passes where the oracle's own numbers differ throughout."""

    def noise(seed: int, scale: float = 1.0):
        def call(t):
            generator = torch.Generator().manual_seed(seed)
            x = t["x"]
            return scale * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

        return call

    expressions = {"eager": noise(1)}
    options = {"ours": noise(0), "reference": noise(0)}
    result = run(make_case(expressions=expressions, draws=frozenset({"eager"}), **options))
    assert row(result, "eager")["status"] == "ok"
    assert row(run(make_case(expressions=expressions, **options)), "eager")["status"] == "failed"
    for wrong in (noise(1, 3.0), lambda t: noise(1)(t) + 3.0, lambda t: noise(1)(t)[:1]):
        case = make_case(expressions={"eager": wrong}, draws=frozenset({"eager"}), **options)
        found = row(run(case), "eager")
        assert found["status"] == "failed"
        assert found["reason"].startswith("wrong: ")
