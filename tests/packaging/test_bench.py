"""The benchmark's own machinery: what it refuses, what it writes, when it fails a build."""

from __future__ import annotations

import contextlib
import copy
import json

import numpy as np
import pytest
import torch

from transfuse.bench import allocator, harness, inputs, machine, memory, peers, records, report
from transfuse.bench.__main__ import main
from transfuse.bench.cases import (
    GRAD,
    Case,
    Setup,
    Target,
    Unavailable,
    Workload,
    load_cases,
    select_targets,
)
from transfuse.bench.gate import Gate, bind, oracle
from transfuse.bench.timing import Budget, interleave, percentile, summarise

CPU = torch.device("cpu")
SHORT = Budget(seconds=0.01, min_repeats=2, max_repeats=4, warmups=1)
TARGET = Target(dtype="float32")


def double(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["x"] * 2


def make_case(ours=double, expressions=None, *, names=("eager",), reference=double, **more) -> Case:
    """A case whose right answer is 2 x, on a small tensor."""
    expressions = {"eager": double} if expressions is None else expressions

    def make(setup: Setup) -> Workload:
        x = torch.randn(2, 3, 5, generator=setup.generator()).to(setup.dtype)
        return Workload(
            tensors={"x": x, GRAD: torch.ones_like(x)},
            ours=ours,
            reference=reference,
            expressions=expressions,
            yardstick=None,
            differentiable=("x",),
            flops=30,
            bytes=240,
            floor_note="none",
            inputs="normal",
            shape={"x": [2, 3, 5]},
            **more,
        )

    return Case(
        name="doubling",
        title="twice",
        make=make,
        targets=(TARGET,),
        peers=names,
        modes=("forward", "backward", "full"),
    )


def settings(**changes) -> harness.Settings:
    return harness.Settings(**({"device": CPU, "budget": SHORT} | changes))


def run(case: Case, target: Target = TARGET, **changes) -> dict[str, object]:
    return harness.run_case("test", case, target, settings(**changes))


def row(result: dict[str, object], name: str) -> dict[str, object]:
    return next(c for c in result["candidates"] if c["name"] == name)


def make_record(*results: dict[str, object]) -> dict[str, object]:
    environment = machine.environment(CPU)
    return records.make_record(results, environment=environment, limits=None, settings={})


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
            if target.bar is not None
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


class TestRecords:
    def test_round_trip(self, result, tmp_path):
        record = make_record(result)
        path = tmp_path / "record.json"
        records.save(record, path)
        assert records.load(path) == json.loads(json.dumps(record))
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda r: r.pop("results"), "'results' is missing"),
            (lambda r: r.update(schema="other"), "schema"),
            (lambda r: r.update(version=2), "version: expected 1, got 2"),
            (lambda r: r.update(environment=[]), "environment: expected dict, got list"),
            (lambda r: r["results"].append(5), r"results\[1\]: expected an object"),
            (lambda r: r["results"].append(copy.deepcopy(r["results"][0])), "appears twice"),
            (lambda r: r["results"][0].pop("dtype"), r"results\[0\]: field 'dtype' is missing"),
            (lambda r: r["results"][0].update(threads=True), "threads: expected int, got bool"),
            (lambda r: r["results"][0].update(status="fine"), "status: expected one of"),
            (lambda r: r["results"][0]["candidates"][0].update(p50=None), "p20, p50, p80"),
            (lambda r: r["results"][0]["candidates"][0].update(p20=9e9), "p20 <= p50"),
            (lambda r: r["results"][0]["candidates"][0].update(p50="1"), "p50: expected"),
            (
                lambda r: r["results"][0]["candidates"][0].update(status="failed"),
                "without a reason",
            ),
        ],
    )
    def test_malformed_records_are_refused(self, result, tmp_path, damage, message):
        record = copy.deepcopy(make_record(result))
        damage(record)
        path = tmp_path / "bad.json"
        path.write_text(json.dumps(record))
        with pytest.raises(records.RecordError, match=message):
            records.load(path)
        path.unlink()
        with pytest.raises(records.RecordError, match=message):
            records.save(record, path)
        assert not path.exists()

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
    def test_files_that_are_no_records(self, tmp_path, text):
        path = tmp_path / "bad.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(records.RecordError, match=r"bad\.json"):
            records.load(path)
        with pytest.raises(records.RecordError, match="cannot be read"):
            records.load(tmp_path / "absent.json")

    def test_a_failed_write_leaves_the_old_file(self, result, tmp_path, monkeypatch):
        path = tmp_path / "record.json"
        records.save(make_record(result), path)
        before = path.read_bytes()

        def no_space(handle):
            raise OSError("No space left on device")

        monkeypatch.setattr(records.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            records.save(make_record(), path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["record.json"]

    def test_numbers_must_be_finite(self, result, tmp_path):
        record = copy.deepcopy(make_record(result))
        record["results"][0]["ratio"] = float("nan")
        with pytest.raises(records.RecordError, match="JSON"):
            records.save(record, tmp_path / "record.json")
        assert list(tmp_path.iterdir()) == []


def scaled(record: dict[str, object], factor: float) -> dict[str, object]:
    changed = copy.deepcopy(record)
    for candidate in changed["results"][0]["candidates"]:
        for name in ("p20", "p50", "p80"):
            candidate[name] *= factor
    return changed


def failed(record: dict[str, object]) -> dict[str, object]:
    changed = copy.deepcopy(record)
    changed["results"][0]["candidates"][0].update(status="failed", reason="wrong", p50=None)
    return changed


class TestCompare:
    @pytest.fixture
    def old(self, result):
        return make_record(result)

    @pytest.mark.parametrize(
        ("change", "factor", "status", "code"),
        [
            (lambda r: scaled(r, 1.0), "1.10", "same", 0),
            (lambda r: scaled(r, 1.05), "1.10", "same", 0),
            (lambda r: scaled(r, 1.2), "1.10", "slower", 1),
            (lambda r: scaled(r, 1.2), "1.5", "same", 0),
            (lambda r: scaled(r, 0.5), "1.10", "faster", 0),
            (failed, "1.10", "lost", 1),
            (lambda r: r | {"results": []}, "1.10", "not run", 0),
        ],
    )
    def test_exit_codes(self, old, tmp_path, capsys, change, factor, status, code):
        records.save(old, tmp_path / "old.json")
        records.save(change(old), tmp_path / "new.json")
        arguments = ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]
        assert main([*arguments, "--fail-over", factor]) == code
        assert status in capsys.readouterr().out

    def test_a_bad_file_is_one_line_and_exit_2(self, tmp_path, capsys):
        (tmp_path / "bad.json").write_text("{")
        assert main(["compare", str(tmp_path / "bad.json"), str(tmp_path / "bad.json")]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_table_shows_each_case_with_its_best_peer(self, old, tmp_path, capsys):
        path = tmp_path / "machine.json"
        records.save(old, path)
        assert main(["table", str(path)]) == 0
        *_, row = capsys.readouterr().out.splitlines()
        result = old["results"][0]
        assert row.startswith(f"| {result['title']} | {result['dtype']} | {result['mode']} |")
        assert f", {result['best_peer']} | {result['ratio']:.2f} x |" in row
        assert row.endswith(f"[machine]({path}) |")

    @pytest.mark.parametrize("factor", ["1.0", "0.5", "nan", "inf", "x"])
    def test_a_bad_factor_is_refused(self, factor):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", "a.json", "b.json", "--fail-over", factor])
        assert exit_info.value.code == 2

    def test_another_machine_is_named(self, old, tmp_path, capsys):
        other = copy.deepcopy(old)
        other["environment"]["cpu"] = "another processor"
        records.save(old, tmp_path / "old.json")
        records.save(other, tmp_path / "new.json")
        assert main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 0
        assert "another processor" in capsys.readouterr().out


class TestAllocator:
    def test_environment(self):
        warm = allocator.variables_for("warm", {"A": "1"}, 2)
        assert allocator.state(warm) == "warm"
        assert warm["OMP_NUM_THREADS"] == "2"
        assert warm["A"] == "1"
        assert allocator.state(allocator.variables_for("default", warm, None)) == "default"
        assert allocator.state({"MALLOC_TRIM_THRESHOLD_": "1"}) == "custom"

    def test_a_restarted_process_never_restarts(self, monkeypatch):
        def never(*arguments):
            raise RuntimeError("restarted")

        monkeypatch.setattr(allocator.os, "execve", never)
        monkeypatch.setattr(allocator, "supported", lambda: True)
        for name in allocator.SETTINGS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(allocator.RESTARTED, raising=False)
        with pytest.raises(RuntimeError, match="restarted"):
            allocator.restart_if_needed("warm", [], None)
        monkeypatch.setenv(allocator.RESTARTED, "1")
        allocator.restart_if_needed("warm", [], None)


class TestMemory:
    def test_peak_is_of_the_call_alone(self):
        size = 64 << 20
        ballast = torch.ones(size, dtype=torch.uint8)  # in use before: must not count

        def call() -> torch.Tensor:
            temporary = torch.ones(size, dtype=torch.uint8)
            return temporary[:1].clone()

        peak = memory.peak_of_call(call, CPU)
        assert size * 0.9 < peak < size * 1.5
        del ballast

    def test_a_child_that_fails_says_why(self):
        with pytest.raises(Unavailable, match="no benchmark case 'absent'"):
            memory.measure_in_child(
                op="attention",
                case="absent",
                dtype="float32",
                mode="forward",
                candidate="transfuse",
                device="cpu",
                threads=1,
            )


class TestInputs:
    def test_photographs_give_correlated_tokens(self):
        pytest.importorskip("sklearn")
        pytest.importorskip("PIL")
        query, key, value = inputs.photo_heads(
            "china",
            size=(6, 5),
            heads=2,
            width=4,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32,
            device=CPU,
        )
        assert query.shape == key.shape == value.shape == (1, 2, 30, 4)
        again = inputs.photo_tokens("china", size=(6, 5))
        assert torch.equal(again, inputs.photo_tokens("china", size=(6, 5)))
        assert not torch.equal(again, inputs.photo_tokens("flower", size=(6, 5)))
        dense = inputs.photo_tokens("china", size=(64, 64)).view(64, 64, -1)
        near = torch.cosine_similarity(dense[:, 1:], dense[:, :-1], dim=-1).mean()
        far = torch.cosine_similarity(dense[:, 32:], dense[:, :-32], dim=-1).mean()
        assert near > far + 0.2


def find(op: str, name: str) -> Case:
    return harness.find_case(op, name)


class TestReport:
    def test_plain_text_without_rich(self):
        rows = [("a", "1.0", "x"), ("bb", "10.0", "")]
        text = report.table("title", ("name", "ms", "note"), rows, rich=False)
        assert text.splitlines()[0] == "title"
        assert text.splitlines()[3:] == ["a      1.0  x", "bb    10.0"]

    def test_an_impossible_share_of_the_floor_is_called_out(self, result):
        record = copy.deepcopy(make_record(result))
        record["results"][0]["floor_share"] = 16.0
        assert "disturbed" in report.summary_table(record)
        assert "disturbed" not in report.summary_table(make_record(result))

    def test_brackets_survive(self):
        assert "[1, 2] [bold]" in report.table("t", ("a", "b"), [("x", "[1, 2] [bold]")])

    def test_plot(self, result, tmp_path):
        pytest.importorskip("matplotlib")
        path = tmp_path / "plot.png"
        assert "written" in report.save_plot(make_record(result), path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert "no plot" in report.save_plot(make_record(), path)


class TestMain:
    def test_every_case_of_every_op_is_well_formed(self):
        for op, members in load_cases().items():
            names = [case.name for case in members]
            assert len(set(names)) == len(names), op
            for case in members:
                targets = [(target.dtype, target.mode) for target in case.targets]
                assert len(set(targets)) == len(targets), case.name
                assert {mode for _, mode in targets} <= set(case.modes), case.name
                assert bool(case.quick_peers) == any(t.quick > 0 for t in case.targets), case.name

    def test_list(self, capsys):
        assert main(["--list"]) == 0
        out = capsys.readouterr().out
        for name in ("plain-a", "hvp-vit", "adain-latent", "natten", "tomesd"):
            assert name in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nonsense"], "unknown op 'nonsense'"),
            (["--case", "nonsense"], "unknown case 'nonsense'"),
            (["--peers", "nonsense"], "unknown peer 'nonsense'"),
            (["attention", "--case", "hvp-vit", "--mode", "full"], "nothing to run"),
            (["--case", "tiny", "--json", "absent/folder/x.json"], "folder does not exist"),
            (["--case", "tiny", "--baseline", "absent.json"], "cannot be read"),
        ],
    )
    def test_bad_requests_exit_2_before_anything_runs(self, arguments, message, capsys):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("op", "mode"),
        [
            (op, mode)
            for op, cases in load_cases().items()
            for case in cases
            if case.name == "tiny"
            for mode in case.modes
        ],
    )
    def test_a_tiny_run_from_end_to_end(self, op, mode, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(machine, "measure_limits", fake_limits)
        path = tmp_path / "record.json"
        arguments = [op, "--case", "tiny", "--mode", mode, "--quick", "--json", str(path)]
        assert main([*arguments, "--seconds", "0.05", "--plot", str(tmp_path / "plot.png")]) == 0
        record = records.load(path)
        (entry,) = record["results"]
        assert (entry["op"], entry["case"], entry["mode"]) == (op, "tiny", mode)
        assert row(entry, "transfuse")["status"] == "ok"
        assert entry["ratio"] > 0
        assert entry["floor_share"] > 0
        assert record["environment"]["torch"] == torch.__version__
        out = capsys.readouterr().out
        if op == "attention":
            assert "natten" in out
        # Against itself, generously: machines that run tests are busy.
        again = ["--baseline", str(path), "--fail-over", "1000"]
        assert main([*arguments[:-2], "--seconds", "0.05", *again]) == 0

    def test_every_op_has_a_tiny_case(self):
        for op, cases in load_cases().items():
            assert "tiny" in [case.name for case in cases], op

    def test_second_derivatives(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "measure_limits", fake_limits)
        path = tmp_path / "record.json"
        arguments = ["attention", "--case", "tiny-hvp", "--quick", "--json", str(path)]
        assert main([*arguments, "--seconds", "0.05"]) == 0
        (entry,) = records.load(path)["results"]
        assert row(entry, "transfuse")["status"] == "ok"

    def test_a_wrong_op_fails_the_run(self, monkeypatch, capsys):
        monkeypatch.setattr(machine, "measure_limits", fake_limits)
        monkeypatch.setattr(
            "transfuse.bench.adain.adain", lambda content, style, dims, eps, backend: content
        )
        assert main(["adain", "--case", "tiny", "--quick", "--seconds", "0.05"]) == 1
        assert "wrong" in capsys.readouterr().out

    def test_limits_are_measured(self):
        limits = machine.measure_limits(CPU, seconds=0.05)
        assert limits["copy_gbps"] > 0
        assert limits["peak_gflops"]["float32"] >= limits["matmul_gflops"]["float32"] > 0

    def test_records_carry_no_folder_names(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "measure_limits", fake_limits)
        monkeypatch.setenv("TRANSFUSE_TEST", f"a:{tmp_path}/file")
        path = tmp_path / "record.json"
        arguments = ["attention", "--case", "tiny", "--quick", "--seconds", "0.05"]
        main([*arguments, "--peers", "natten", "--json", str(path)])
        record = records.load(path)
        assert record["environment"]["variables"]["TRANSFUSE_TEST"] == "a:file"
        assert record["settings"]["arguments"][-1] == "record.json"
        assert str(tmp_path) not in path.read_text()

    def test_transfuse_is_never_timed_through_a_fallback(self, monkeypatch):
        seen = []

        def spy(query, sources, *, blend=None, scale=None, backend=None):
            seen.append(backend)
            return query

        monkeypatch.setattr("transfuse.bench.attention.attend", spy)
        for name in ("plain-v", "style-injection-photo-32", "adapter", "tiny-hvp"):
            mode = "hvp" if name.endswith("hvp") else "forward"
            setup = Setup(dtype=torch.float32, mode=mode, device=CPU)
            workload = find("attention", name).make(setup)
            with contextlib.suppress(RuntimeError):
                workload.ours(workload.tensors)
        assert seen == ["cpu"] * 4


def fake_limits(device: torch.device, *, seconds: float) -> dict[str, object]:
    return {"peak_gflops": {"float32": 100.0}, "copy_gbps": 10.0, "matmul_gflops": {},
            "kernel_gflops": None}  # fmt: skip


def test_a_step_of_a_unet_with_and_without_patches(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from transfuse.bench import unet_step

    path = tmp_path / "step.json"
    arguments = ["--width", "160", "--side", "16", "--repeats", "1", "--json", str(path)]
    assert unet_step.main(arguments) == 0
    record = json.loads(path.read_text())
    assert set(record["results"]) == {"none", *unet_step.patches()}
    assert record["results"]["none"]["speed_up"] == 1.0
    assert "hi_diffusion" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        unet_step.main(["--width", "40"])


def test_curvature_of_a_short_sequence(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    from transfuse.bench import curvature

    monkeypatch.setitem(curvature.MODELS, "vit", lambda: curvature._vit(1, 5))
    monkeypatch.setitem(curvature.TASKS, "trace", 12)
    monkeypatch.setitem(curvature.TASKS, "top", 2)
    monkeypatch.setattr(curvature, "PROBES", 12)
    path = tmp_path / "curvature.json"
    arguments = ["--model", "vit", "--candidate", "torch.func", "autograd", "--json", str(path)]
    assert curvature.main(arguments) == 0
    (entry,) = json.loads(path.read_text())["results"]
    assert max(entry["product_errors"].values()) < 1e-5
    assert set(entry["tasks"]["top"]) == {"transfuse", "torch.func", "autograd"}
    assert "ours is faster" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        curvature.main(["--repeats", "0"])


def test_a_wrong_product_stops_the_curvature_benchmark(monkeypatch):
    from transfuse.bench import curvature

    monkeypatch.setattr(
        "transfuse.bench.curvature._ours_attention", lambda query, key, value: query
    )
    problem = curvature._vit(1, 5)
    with pytest.raises(RuntimeError, match="transfuse: the product is off by"):
        curvature.check_products(problem, ["transfuse"])


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
