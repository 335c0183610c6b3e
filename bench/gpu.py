"""``python -m transfuse.bench.gpu``: what only a GPU can show, in one run and one record.

Three parts, each of which can be run alone (``--part``), each within its share of ``--seconds``:

* ``contract``: the contract tests of every op with a GPU backend, in every dtype, against the
  float64 oracle, and the other tests that need a GPU (streams, CUDA graphs, recorded plans). One
  pytest process for each op and backend, several at a time.
* ``sanitizer``: small calls of every op under compute-sanitizer, memcheck and racecheck.
* ``timing``: the benchmark's cases on the device with their peers, alone on the machine, by
  Triton and by the CUDA kernels.

A part leaves its findings in the work folder; the record is put together from all parts found there
that were made on this device and commit, and holds them under ``proof`` beside the timings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transfuse import _backend
from transfuse.testing.spec import OpSpec
from transfuse.testing.specs import all_specs

from . import machine, records, report

PARTS = ("contract", "sanitizer", "timing")
# Shares of the time; what a part leaves over goes to the next.
SHARES = {"contract": 0.45, "sanitizer": 0.15, "timing": 0.40}
SECONDS = 450.0
GPU_BACKENDS = ("cuda", "triton")
EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

CONTRACT = Path("tests/ops/test_contract.py")
TOOLS = ("memcheck", "racecheck")
# Ops of the benchmark (modules of this package) by backend, the most telling first, and the share
# of the time that a backend gets; what the first leaves over goes to the second. Attention's cases
# time its CUDA kernel beside Triton's.
TIMED = {
    "cuda": (
        ("token_merging", "diffusion", "adain", "multitensor", "head_curvature", "saliency"),
        0.3,
    ),
    "triton": (
        (
            "attention",
            "token_merging",
            "diffusion",
            "adain",
            "window_attention",
            "patch_gram",
            "nes",
            "kernel_sums",
            "multitensor",
            "head_curvature",
            "simplex",
            "row_codes",
            "saliency",
        ),
        0.7,
    ),
}
_OUTCOME = re.compile(r"^(\S+\.py::\S+) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """A process of a part: what it is about, and its command."""

    name: str
    command: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Finished:
    """How a job ended; ``status`` None: it ran out of time and was stopped."""

    job: Job
    status: int | None
    output: str
    seconds: float


# ---- the jobs ------------------------------------------------------------------------------------


def kernels_of(specs: Sequence[OpSpec] | None = None) -> list[tuple[str, str]]:
    """(op, backend) for every GPU backend of a spec; CUDA C++ first, as it compiles nothing."""
    specs = all_specs() if specs is None else specs
    return [(s.name, b) for b in GPU_BACKENDS for s in specs if b in s.backends]


def _pytest(*arguments: str) -> tuple[str, ...]:
    # One line for each test, as they end: a run that is stopped still has its findings.
    options = ("-o", "addopts=--strict-markers --import-mode=importlib", "-v", "--no-header")
    return (sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *arguments)


def contract_jobs() -> list[Job]:
    """One job for each op and backend, and one for all tests that are marked ``gpu``."""
    jobs = [Job("gpu tests", _pytest("tests/ops", "-m", "gpu"))]
    for op, backend in kernels_of():
        # A parameter set begins with the op: "[adain-cuda" names it and no op that ends so.
        jobs.append(Job(f"{op} {backend}", _pytest(str(CONTRACT), "-k", f"[{op}-{backend}")))
    return jobs


def sanitizer_jobs(tool: str) -> list[Job]:
    """Small calls of every op under each check of the sanitizer."""
    exercise = (sys.executable, "-m", __spec__.name, "--exercise")
    # Out of bounds is seen only where torch does not keep memory in larger blocks of its own.
    variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Job(
            f"{check} {backend}",
            (tool, "--tool", check, "--error-exitcode", "9", *exercise, backend),
            variables,
        )
        for backend in GPU_BACKENDS
        for check in TOOLS
    ]


def timing_job(backend: str, folder: Path, seconds: float) -> Job:
    """The benchmark by one backend. It starts no case in the last quarter of its time, so that the
    one it is at can end: the record is written after the last."""
    ops, _ = TIMED[backend]
    return Job(
        f"benchmark by {backend}",
        (
            sys.executable, "-m", __package__, *ops, "--device", "cuda", "--kernels", backend,
            "--seconds", "1", "--stop-after", f"{0.75 * seconds:.0f}",
            "--json", str(folder / f"timing-{backend}.json"),
        ),
    )  # fmt: skip


# ---- running -------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    seconds: float,
    workers: int,
    done: Callable[[Finished], None] = lambda finished: None,
) -> list[Finished]:
    """Run jobs, some at a time, until all have ended or the time is over; then stop the rest.

    Output goes to files in ``folder``, so that a job that is stopped leaves what it had said.
    """
    end = time.monotonic() + seconds
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    finished: dict[int, Finished] = {}

    def log_of(index: int) -> Path:
        return folder / f"job-{index}.log"

    def close(index: int, status: int | None) -> None:
        job, _, began = running.pop(index)
        output = log_of(index).read_text(encoding="utf-8", errors="replace")
        finished[index] = Finished(job, status, output, time.monotonic() - began)
        done(finished[index])

    try:
        while waiting or running:
            over = time.monotonic() >= end
            while waiting and len(running) < workers and not over:
                index, job = waiting.pop(0)
                with log_of(index).open("wb") as log:
                    process = subprocess.Popen(
                        job.command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(job.variables)},
                        start_new_session=True,
                    )
                running[index] = (job, process, time.monotonic())
            for index in list(running):
                status = running[index][1].poll()
                if status is not None:
                    close(index, status)
                elif over:
                    _stop(running[index][1])
                    close(index, None)
            if over and not running:
                for index, job in waiting:
                    finished[index] = Finished(job, None, "", 0.0)
                    done(finished[index])
                break
            time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            _stop(process)
    return [finished[index] for index in sorted(finished)]


def _stop(process: subprocess.Popen) -> None:
    """End a job and what it started: each job leads a process group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- findings ------------------------------------------------------------------------------------


def contract_findings(finished: Finished) -> dict[str, object]:
    """Counts by dtype, and what failed, of one contract job.

    ``complete`` says that pytest came to its end; ``passed`` that it did, that something ran, and
    that nothing failed.
    """
    counts: dict[str, Counter] = {}
    failed = []
    for test, outcome in _OUTCOME.findall(finished.output):
        dtype = next((d for d in ("float32", "float64", "bfloat16", "float16") if d in test), "-")
        counts.setdefault(dtype, Counter())[outcome.lower()] += 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(test)
    total: Counter = sum(counts.values(), Counter())
    complete = finished.status in (0, 1)
    return {
        "name": finished.job.name,
        "complete": complete,
        "passed": complete and not failed and finished.status == 0 and total["passed"] > 0,
        "seconds": round(finished.seconds, 1),
        "by_dtype": {dtype: dict(found) for dtype, found in sorted(counts.items())},
        "failures": failed,
        "note": "" if complete else _ending(finished),
    }


def sanitizer_findings(finished: Finished) -> dict[str, object]:
    """What compute-sanitizer said of one job."""
    summary = [line for line in finished.output.splitlines() if "SUMMARY" in line]
    ran = re.search(r"exercised (\d+) calls", finished.output)
    calls = 0 if ran is None else int(ran[1])
    return {
        "name": finished.job.name,
        "complete": finished.status is not None,
        "passed": finished.status == 0 and calls > 0 and len(summary) > 0,
        "seconds": round(finished.seconds, 1),
        "calls": calls,
        "note": summary[-1].strip("= ") if summary else _ending(finished),
    }


def _ending(finished: Finished) -> str:
    if finished.status is None:
        return "stopped: out of time" if finished.seconds > 0 else "not started: out of time"
    last = [line for line in finished.output.splitlines() if line.strip()]
    return machine.without_folders(f"exit status {finished.status}: {last[-1] if last else ''}")


def find_sanitizer() -> str | None:
    """compute-sanitizer, on PATH or where the toolkit lies."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    for folder in sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True):
        if (folder / "compute-sanitizer").is_file():
            return str(folder / "compute-sanitizer")
    return None


def exercise(backend: str, device: torch.device, specs: Sequence[OpSpec] | None = None) -> int:
    """Call every op on small inputs, with gradients; how many calls. Right results are the
    contract's matter."""
    calls = 0
    for spec in all_specs() if specs is None else specs:
        if backend not in spec.backends:
            continue
        name = spec.name if spec.declared_as is None else spec.declared_as
        for case in spec.cases:
            if "real" in case.tags or "bench" in case.tags or backend in case.refused_by:
                continue
            for dtype in spec.dtypes:
                if name in _backend.declared() and _backend.why_not(name, backend, device, dtype):
                    continue
                args = case.build(dtype, device)
                if spec.underivable is None:
                    for leaf in case.differentiable:
                        args.tensors[leaf] = args.tensors[leaf].detach().requires_grad_()
                results = args.run(spec.op, args.tensors, backend)
                sums = [r.sum() for r in results if r.requires_grad]
                if sums:
                    torch.stack([s.double() for s in sums]).sum().backward()
                calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return calls


# ---- the parts -----------------------------------------------------------------------------------


def _say(finished: Finished, passed: object) -> None:
    state = "ok" if passed else "stopped" if finished.status is None else "FAILED"
    print(f"  {finished.job.name:<40} {state:<8} {finished.seconds:6.1f} s", flush=True)


def run_contract(folder: Path, seconds: float) -> dict[str, object]:
    """The tests, several processes at a time."""
    workers = max(1, min(10, (os.cpu_count() or 1) - 2))
    jobs = contract_jobs()

    def done(finished: Finished) -> None:
        _say(finished, contract_findings(finished)["passed"])

    ended = run_jobs(jobs, folder, seconds=seconds, workers=workers, done=done)
    return {"jobs": [contract_findings(finished) for finished in ended]}


def run_sanitizer(folder: Path, seconds: float) -> dict[str, object]:
    """Small calls under compute-sanitizer, where there is one."""
    tool = find_sanitizer()
    if tool is None:
        return {"jobs": [], "note": "compute-sanitizer was not found"}

    def done(finished: Finished) -> None:
        _say(finished, sanitizer_findings(finished)["passed"])

    ended = run_jobs(sanitizer_jobs(tool), folder, seconds=seconds, workers=4, done=done)
    return {"jobs": [sanitizer_findings(finished) for finished in ended]}


def run_timing(folder: Path, seconds: float) -> dict[str, object]:
    """The benchmark by one backend after the other, each stopped at its part of the time."""
    found, parts, left = [], [], 1.0
    end = time.monotonic() + seconds
    for backend, (_, share) in TIMED.items():
        own = max(1.0, end - time.monotonic()) * share / left
        left -= share
        job = timing_job(backend, folder, own)
        path = Path(job.command[-1])
        path.unlink(missing_ok=True)
        (finished,) = run_jobs([job], folder, seconds=own, workers=1)
        written = path.is_file()
        good = written and finished.status == 0
        _say(finished, good)
        note = "" if good else _ending(finished)
        found.append({"name": job.name, "complete": written, "passed": good,
                      "seconds": round(finished.seconds, 1), "note": note})  # fmt: skip
        if written:
            parts.append(records.load(path))
    return {"jobs": found, "records": parts}


RUN = {"contract": run_contract, "sanitizer": run_sanitizer, "timing": run_timing}


# ---- the record ----------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A device's name as a file's: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def assemble(
    parts: Mapping[str, Mapping[str, object]], environment: Mapping[str, object]
) -> dict[str, object]:
    """One record of the parts: timings as its results, everything else as its proof.

    Raises:
        RecordError: the parts make no valid record.
    """
    timings: list[Mapping[str, object]] = list(parts.get("timing", {}).get("records", []))
    results = {records.key_of(r): r for timing in timings for r in timing["results"]}
    record = records.make_record(
        list(results.values()),
        environment=timings[0]["environment"] if timings else environment,
        limits=timings[0]["limits"] if timings else None,
        settings={"parts": sorted(parts), "seconds_per_case": 1.0, "quick": False},
    )
    record["proof"] = {
        name: {key: value for key, value in part.items() if key != "records"}
        for name, part in parts.items()
    }
    records.validate(record, source="record of this run")
    return record


def summary(record: Mapping[str, object]) -> str:
    """A few lines for people: each job of each part, then the timings."""
    lines = []
    for name, part in record["proof"].items():
        jobs = part["jobs"]
        good = sum(job["passed"] for job in jobs)
        lines.append(f"{name}: {good} of {len(jobs)} passed" + _note(part))
        for job in jobs:
            counts: Counter = sum(map(Counter, job.get("by_dtype", {}).values()), Counter())
            tests = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
            state = "passed" if job["passed"] else "FAILED" if job["complete"] else "incomplete"
            lines.append(f"  {job['name']:<40} {state:<10} {tests}{_note(job)}")
            lines += [f"    {test}" for test in job.get("failures", [])[:5]]
    if record["results"]:
        lines += ["", report.summary_table(record)]
    return "\n".join(lines)


def _note(found: Mapping[str, object]) -> str:
    return f"  ({found['note']})" if found.get("note") else ""


def passed(record: Mapping[str, object]) -> bool:
    """Whether every job of every part ended well, and no part was empty."""
    proof = record["proof"].values()
    return all(len(part["jobs"]) > 0 and all(j["passed"] for j in part["jobs"]) for part in proof)


def _stamp(environment: Mapping[str, object]) -> dict[str, object]:
    """What findings must share to be one record."""
    git = environment["git"]
    return {
        "device": environment["device"].get("name"),
        "commit": None if git is None else git["commit"],
    }


def collect(folder: Path, stamp: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The parts in a folder that were made on this device and commit."""
    found = {}
    for part in PARTS:
        path = folder / f"part-{part}.json"
        if not path.is_file():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise records.RecordError(f"{path}: cannot be read: {error}") from None
        if entry.get("stamp") == dict(stamp):
            found[part] = entry["findings"]
    return found


# ---- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Options of a run."""
    made = argparse.ArgumentParser(
        prog="python -m transfuse.bench.gpu",
        description="Prove and time the GPU kernels on this machine's GPU; run in a checkout.",
        allow_abbrev=False,
    )
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                      help=f"{', '.join(PARTS)} (default: all)")  # fmt: skip
    made.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (450)")
    made.add_argument("--work", type=Path, default=Path("build/gpu/findings"), metavar="FOLDER")
    made.add_argument("--results", type=Path, default=Path("bench/results"), metavar="FOLDER")
    made.add_argument("--list", action="store_true", help="show the commands, run nothing")
    made.add_argument(
        "--exercise", choices=GPU_BACKENDS, help="only call every op, for a sanitizer"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where something failed or did not end; 2 for bad input, or without a GPU.
    """
    options = parser().parse_args(arguments)
    if not 10.0 <= options.seconds < float("inf"):
        print(f"error: --seconds: expected at least 10, got {options.seconds}", file=sys.stderr)
        return EXIT_USAGE
    if options.list:
        tool = find_sanitizer()
        jobs = {
            "contract": contract_jobs(),
            "sanitizer": sanitizer_jobs("compute-sanitizer" if tool is None else tool),
            "timing": [
                timing_job(backend, options.work, SHARES["timing"] * options.seconds * share)
                for backend, (_, share) in TIMED.items()
            ],
        }
        for part in options.part:
            for job in jobs[part]:
                print(f"{part}: {job.name}: {' '.join(job.command)}")
        return EXIT_OK
    if not torch.cuda.is_available():
        print(
            "error: this needs an NVIDIA GPU and a torch built for CUDA; "
            f"torch {torch.__version__} here sees none. Nothing was measured.",
            file=sys.stderr,
        )
        return EXIT_USAGE
    device = torch.device("cuda")
    if options.exercise is not None:
        print(f"exercised {exercise(options.exercise, device)} calls of {options.exercise}")
        return EXIT_OK
    if not CONTRACT.is_file() or not options.results.is_dir():
        print(f"error: run this in a checkout: {CONTRACT} is not here", file=sys.stderr)
        return EXIT_USAGE
    try:
        return _run(options, device)
    except records.RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED


def _run(options: argparse.Namespace, device: torch.device) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    environment = machine.environment(device)
    stamp = _stamp(environment)
    end = time.monotonic() + options.seconds
    shares = {part: SHARES[part] for part in PARTS if part in options.part}
    for part in shares:
        left = sum(
            share for name, share in shares.items() if PARTS.index(name) >= PARTS.index(part)
        )
        seconds = max(1.0, end - time.monotonic()) * shares[part] / left
        print(f"{part}: at most {seconds:.0f} s", flush=True)
        findings = RUN[part](options.work, seconds)
        entry = json.dumps({"stamp": stamp, "findings": findings})
        (options.work / f"part-{part}.json").write_text(entry, encoding="utf-8")
    record = assemble(collect(options.work, stamp), environment)
    path = options.results / f"{slug(str(stamp['device']))}.json"
    records.save(record, path)
    print(f"\n{summary(record)}\n\nrecord written: {path}")
    return EXIT_OK if passed(record) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
