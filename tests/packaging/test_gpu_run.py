"""``bench/gpu.sh``, as far as it can be tried without a GPU: selections, limits, records."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from transfuse.bench import gpu, machine, records
from transfuse.testing.specs import all_specs, find_spec

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

REPORT = """
tests/ops/test_contract.py::test_value[adain-cuda-float32-small] PASSED [ 25%]
tests/ops/test_contract.py::test_value[adain-cuda-bfloat16-small] FAILED [ 50%]
tests/ops/test_contract.py::test_strides[adain-cuda-float32-small] SKIPPED (no) [ 75%]
tests/ops/test_contract.py::test_opcheck[adain-cuda] PASSED [100%]
"""


def job(*code: str) -> gpu.Job:
    return gpu.Job("a job", (sys.executable, "-c", *code))


def finished(output: str, status: int | None) -> gpu.Finished:
    return gpu.Finished(gpu.Job("a job", ()), status, output, 1.0)


# -- without a GPU ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_one_message(tmp_path, capsys):
    assert gpu.main(["--results", str(tmp_path)]) == gpu.EXIT_USAGE
    said = capsys.readouterr().err
    assert "this needs an NVIDIA GPU" in said
    assert "Nothing was measured" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_refuses_before_it_builds():
    script = ROOT / "bench" / "gpu.sh"
    if not script.is_file():
        pytest.skip("not in a checkout")
    before = (ROOT / "build" / "gpu").exists()
    command = ["bash", str(script)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "sees no CUDA device" in result.stderr
    assert (ROOT / "build" / "gpu").exists() == before


@pytest.mark.parametrize(
    "arguments", [["--part", "nothing"], ["--exercise", "cpu"], ["--seconds", "soon"], ["more"]]
)
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf"])
def test_a_time_limit_must_be_one(seconds, capsys):
    assert gpu.main(["--seconds", seconds]) == gpu.EXIT_USAGE
    assert "--seconds" in capsys.readouterr().err


def test_every_gpu_backend_has_a_job(capsys):
    assert gpu.main(["--list", "--part", "contract", "timing"]) == 0
    listed = capsys.readouterr().out
    for spec in all_specs():
        for backend in ("triton", "cuda"):
            assert (f"contract: {spec.name} {backend}:" in listed) == (backend in spec.backends)
    assert "sanitizer:" not in listed
    assert "--kernels cuda" in listed
    # No name may be selected along with another.
    names = [f"[{op}-{backend}" for op, backend in gpu.kernels_of()]
    assert len(names) > 10
    assert not [(a, b) for a in names for b in names if a != b and a in b]


def test_a_selection_takes_the_tests_of_its_op_alone(tmp_path):
    """The expression of a job, on a small file with parameter sets named as in the contract. (That
    collects for ten seconds; a job of the real run that selects nothing has not passed.)"""
    jobs = gpu.contract_jobs()[1:]
    assert len(jobs) == len(gpu.kernels_of())
    small = tmp_path / "test_small.py"
    ids = ["adain-cuda-float32", "adain-triton-float32", "my_adain-cuda-float32"]
    small.write_text(
        "import pytest\n\n"
        f"@pytest.mark.parametrize('x', range({len(ids)}), ids={ids!r})\n"
        "def test_value(x):\n    pass\n"
    )
    command = list(next(job for job in jobs if job.name == "adain cuda").command)
    command[command.index(str(gpu.CONTRACT))] = str(small)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    found = gpu.contract_findings(gpu.Finished(jobs[0], result.returncode, result.stdout, 1.0))
    assert found["by_dtype"] == {"float32": {"passed": 1}}, result.stdout
    assert found["passed"]


# -- jobs ------------------------------------------------------------------------------------------


def test_jobs_run_together_and_end_in_order(tmp_path):
    began = time.monotonic()
    jobs = [
        job("import time; time.sleep(1); print('slow')"),
        job("print('fast'); raise SystemExit(3)"),
    ]
    slow, fast = gpu.run_jobs(jobs, tmp_path, seconds=60, workers=2)
    assert (slow.status, slow.output.strip()) == (0, "slow")
    assert (fast.status, fast.output.strip()) == (3, "fast")
    assert time.monotonic() - began < 30


def test_what_takes_too_long_is_stopped_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).write_text('')"
    code = (
        "import subprocess, sys, time; print('begun', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    began = time.monotonic()
    stopped, never = gpu.run_jobs([job(code), job("print(1)")], tmp_path, seconds=1.5, workers=1)
    assert time.monotonic() - began < 20
    assert stopped.status is None
    assert stopped.output.strip() == "begun"
    assert never.status is None
    assert gpu.contract_findings(never)["note"] == "not started: out of time"
    time.sleep(3)
    assert not mark.exists()


# -- findings --------------------------------------------------------------------------------------


def test_findings_of_a_test_run():
    found = gpu.contract_findings(finished(REPORT, 1))
    assert found["by_dtype"] == {
        "-": {"passed": 1},
        "bfloat16": {"failed": 1},
        "float32": {"passed": 1, "skipped": 1},
    }
    assert found["failures"] == [
        "tests/ops/test_contract.py::test_value[adain-cuda-bfloat16-small]"
    ]
    assert found["complete"]
    assert not found["passed"]


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (REPORT.replace("FAILED", "PASSED"), None),  # stopped
        (REPORT.replace("FAILED", "PASSED"), 2),  # interrupted
        (REPORT.replace("FAILED", "SKIPPED").replace("PASSED", "SKIPPED"), 0),  # nothing ran
        ("", 5),  # nothing found
    ],
)
def test_what_did_not_run_has_not_passed(output, status):
    assert not gpu.contract_findings(finished(output, status))["passed"]
    assert gpu.contract_findings(finished(REPORT.replace("FAILED", "PASSED"), 0))["passed"]


def test_findings_of_a_sanitizer():
    output = "exercised 12 calls of cuda\n========= ERROR SUMMARY: 0 errors\n"
    found = gpu.sanitizer_findings(finished(output, 0))
    assert found["passed"]
    assert found["note"] == "ERROR SUMMARY: 0 errors"
    assert not gpu.sanitizer_findings(finished(output, 9))["passed"]
    assert not gpu.sanitizer_findings(finished(output.replace("12", "0"), 0))["passed"]
    assert not gpu.sanitizer_findings(finished("exercised 12 calls of cuda", 0))["passed"]


def test_exercise_calls_every_small_case():
    spec = find_spec("noise_mix")
    small = [c for c in spec.cases if not c.tags & {"real", "bench"}]
    calls = gpu.exercise("cpu", CPU, [spec])
    assert calls in (0, len(small) * len(spec.dtypes))
    assert gpu.exercise("reference", CPU, [spec]) == len(small) * len(spec.dtypes)
    assert gpu.exercise("cuda", CPU, [spec]) == 0


# -- the record ------------------------------------------------------------------------------------


def timing(backend: str, p50: float) -> dict[str, object]:
    times = {"p20": p50, "p50": p50, "p80": p50, "n": 3, "error": 0.0, "peak_bytes": None}
    ours = {"name": "transfuse", "role": "transfuse", "status": "ok", "reason": None, **times}
    result = {
        "op": "adain", "case": "a", "title": "t", "dtype": "float32", "mode": "forward",
        "device": "cuda", "backend": backend, "threads": 1, "allocator": "warm", "status": "ok",
        "reason": None, "bar": None, "bars": {}, "memory_bar": None, "candidates": [ours],
        "ratio": None, "best_peer": None, "peer_ratios": {}, "memory_ratio": None,
        "floor_seconds": None, "floor_share": None, "met": None,
    }  # fmt: skip
    return records.make_record(
        [result], environment=machine.environment(CPU), limits=None, settings={}
    )


def test_a_record_of_parts(tmp_path):
    good = gpu.contract_findings(finished(REPORT.replace("FAILED", "PASSED"), 0))
    parts = {
        "contract": {"jobs": [good]},
        "timing": {
            "jobs": [{"name": "adain cuda", "complete": True, "passed": True, "note": ""}],
            "records": [timing("cuda", 1e-3), timing("triton", 2e-3), timing("cuda", 3e-3)],
        },
    }
    record = gpu.assemble(parts, machine.environment(CPU))
    path = tmp_path / "record.json"
    records.save(record, path)
    loaded = records.load(path)
    assert loaded["proof"]["contract"]["jobs"] == [good]
    assert "records" not in loaded["proof"]["timing"]
    found = {r["backend"]: r["candidates"][0]["p50"] for r in loaded["results"]}
    assert found == {"cuda": 3e-3, "triton": 2e-3}
    assert gpu.passed(loaded)
    text = gpu.summary(loaded)
    assert "contract: 1 of 1 passed" in text
    assert "3 passed, 1 skipped" in text
    bad = gpu.contract_findings(finished(REPORT, 1))
    record["proof"]["contract"]["jobs"].append(bad)
    assert not gpu.passed(record)
    assert "test_value[adain-cuda-bfloat16-small]" in gpu.summary(record)
    record["proof"] = {"sanitizer": {"jobs": [], "note": "compute-sanitizer was not found"}}
    assert not gpu.passed(record)


def test_only_parts_of_this_device_and_commit_are_collected(tmp_path):
    stamp = {"device": "GPU 1", "commit": "abc"}
    for part, own in (("contract", stamp), ("timing", stamp | {"commit": "old"})):
        entry = json.dumps({"stamp": own, "findings": {"jobs": []}})
        (tmp_path / f"part-{part}.json").write_text(entry)
    assert gpu.collect(tmp_path, stamp) == {"contract": {"jobs": []}}
    (tmp_path / "part-contract.json").write_text("{")
    with pytest.raises(records.RecordError, match="cannot be read"):
        gpu.collect(tmp_path, stamp)


def test_names_of_files():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
