"""Runs of the benchmark's commands, and the memory and inputs of their cases."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from bench_cases import CPU, find, row

from transfuse.bench import allocator, inputs, machine, memory, records
from transfuse.bench.__main__ import main, run_parser, selection
from transfuse.bench.cases import Setup, Unavailable, load_cases


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

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_cases_run_on_their_devices_or_by_name(self, device):
        def chosen(*arguments):
            options = run_parser().parse_args(["attention", "--device", device, *arguments])
            return [case.name for _, case, _ in selection(options)]

        assert ("plain-64-4096" in chosen()) == (device == "cuda")
        assert "plain-a" in chosen()
        assert chosen("--case", "plain-64-4096") == ["plain-64-4096"]

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

        for module in ("_attention_calls", "_attention_uses"):
            monkeypatch.setattr(f"transfuse.bench.{module}.attend", spy)
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
