"""``python -m transfuse.bench``: run benchmarks, compare records."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import allocator, machine, records, report
from .cases import DTYPES, OP_MODULES, Case, Target, load_cases, select_targets
from .harness import Settings, run_case
from .peers import all_peers
from .timing import QUICK, Budget

# --quick stops starting work here, so that the last case and the report still end within 60 s.
QUICK_SECONDS = 42.0
LIMIT_SECONDS, QUICK_LIMIT_SECONDS = 6.0, 1.5

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _factor(text: str) -> float:
    value = float(text)
    if not 1.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a factor above 1, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def run_parser() -> argparse.ArgumentParser:
    """Options of a benchmark run."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench",
        description="Time transfuse's ops against what their users would write today.",
        allow_abbrev=False,
        epilog="To compare two records: python -m transfuse.bench compare OLD.json NEW.json; "
        "records as a Markdown table: python -m transfuse.bench table RECORD.json ...",
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help=f"{', '.join(OP_MODULES)} (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="show cases and peers, run nothing")
    parser.add_argument("--quick", action="store_true", help="small selection, under a minute")
    parser.add_argument("--case", nargs="+", metavar="NAME", default=[], help="only these cases")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=[])
    parser.add_argument("--mode", choices=("forward", "backward", "full"))
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="only these peers (see --list)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--kernels", choices=("cpu", "triton", "cuda"),
        help="transfuse's backend (default: cpu; triton on a CUDA device)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, metavar="N", help="for every candidate")
    parser.add_argument("--seconds", type=_seconds, help="timing budget per case")
    parser.add_argument(
        "--stop-after", type=_seconds, metavar="SECONDS", help="start no further case after these"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure peak memory of every candidate"
    )
    parser.add_argument(
        "--allocator", choices=("warm", "default", "both"), default="warm",
        help="warm: freed memory stays in the process for every candidate (default); "
        "both: a second run with the system's settings beside it",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the record here")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="write a picture here")
    parser.add_argument(
        "--baseline", type=Path, metavar="OLD.json", help="compare with this record"
    )
    parser.add_argument("--fail-over", type=_factor, default=1.10, metavar="FACTOR",
                        help="with --baseline: fail when a median grew by more (1.10)")  # fmt: skip
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """Options of a comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench compare",
        description="Compare transfuse's medians in two records; exit 1 on a regression.",
    )
    parser.add_argument("old", type=Path, metavar="A.json")
    parser.add_argument("new", type=Path, metavar="B.json")
    parser.add_argument("--fail-over", type=_factor, default=1.10, metavar="FACTOR")
    return parser


def table_parser() -> argparse.ArgumentParser:
    """Arguments of a table of records."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.bench table",
        description="Print records as one Markdown table: each case against its best peer.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD.json")
    return parser


def main(arguments: Sequence[str] | None = None, *, restart: bool = False) -> int:
    """Run the command line.

    Args:
        arguments: without the program name; None reads ``sys.argv``.
        restart: allow this process to be replaced by one with the right allocator settings.

    Returns:
        0; 1 for a regression, or a transfuse candidate that is wrong or fails; 2 for bad input.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["compare"]:
            options = compare_parser().parse_args(arguments[1:])
            return _compare(options.old, records.load(options.new), options.fail_over)
        if arguments[:1] == ["table"]:
            paths = table_parser().parse_args(arguments[1:]).records
            print(report.markdown_table({str(path): records.load(path) for path in paths}))
            return EXIT_OK
        options = run_parser().parse_args(arguments)
        if restart and not options.list:
            wanted = "default" if options.allocator == "default" else "warm"
            allocator.restart_if_needed(wanted, arguments, options.threads)
        return _run(options, arguments)
    except (records.RecordError, ImportError) as error:
        # ImportError: the package's own message names the missing binary and how to build it.
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _compare(old: Path, new: dict[str, object], fail_over: float) -> int:
    before = records.load(old)
    changes = records.compare(before, new, fail_over=fail_over)
    print(report.change_table(changes, fail_over=fail_over))
    for difference in records.environment_differences(before, new):
        print(f"not the same environment: {difference}")
    worse = records.regressions(changes)
    for change in worse:
        print(f"regression: {records.label(change.key)}: {change.status}", file=sys.stderr)
    return EXIT_FAILED if worse else EXIT_OK


def selection(options: argparse.Namespace) -> list[tuple[str, Case, Target]]:
    """What to run, in order.

    Raises:
        RecordError: a name that does not exist, or nothing left to run.
    """
    unknown = [op for op in options.ops if op not in OP_MODULES]
    if unknown:
        raise records.RecordError(f"unknown op {unknown[0]!r}: expected {', '.join(OP_MODULES)}")
    cases = load_cases(tuple(options.ops) if options.ops else OP_MODULES)
    names = {case.name for members in cases.values() for case in members}
    for name in options.case:
        if name not in names:
            raise records.RecordError(f"unknown case {name!r}: see --list")
    for name in options.peers if options.peers is not None else []:
        if name not in all_peers():
            raise records.RecordError(f"unknown peer {name!r}: see --list")
    device = torch.device(options.device).type
    chosen = [
        (op, case, target)
        for op, members in cases.items()
        for case in members
        if (
            case.name in options.case
            if options.case
            else not case.hidden and device in case.devices
        )
        for target in select_targets(
            case,
            dtypes=tuple(options.dtype),
            mode=options.mode,
            # A case asked for by name runs whole; --quick then only shortens its timing.
            quick=options.quick and not options.case,
        )
        if not options.quick or options.case or any(t.quick > 0 for t in case.targets)
    ]
    if options.quick:
        chosen.sort(key=lambda item: item[2].quick)
    if not chosen:
        raise records.RecordError("nothing to run: no case has this dtype and mode, see --list")
    return chosen


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    started = time.monotonic()
    if options.list:
        wanted = tuple(options.ops) if options.ops else OP_MODULES
        unknown = [op for op in wanted if op not in OP_MODULES]
        if unknown:
            raise records.RecordError(
                f"unknown op {unknown[0]!r}: expected {', '.join(OP_MODULES)}"
            )
        print(report.list_table(load_cases(wanted), all_peers()))
        return EXIT_OK
    chosen = selection(options)
    for path in (options.json, options.plot):
        # Found out now rather than after the last case.
        if path is not None and not path.resolve().parent.is_dir():
            raise records.RecordError(f"{path}: the folder does not exist")
    if options.baseline is not None:
        records.load(options.baseline)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise records.RecordError("--device cuda: this torch sees no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment = machine.environment(device)
    limits = machine.measure_limits(
        device, seconds=QUICK_LIMIT_SECONDS if options.quick else LIMIT_SECONDS
    )
    budget = QUICK if options.quick else Budget()
    if options.seconds is not None:
        budget = Budget(
            seconds=options.seconds,
            min_repeats=budget.min_repeats,
            warmups=budget.warmups,
            call_limit=budget.call_limit,
        )
    settings = Settings(
        device=device,
        budget=budget,
        quick=options.quick,
        memory=options.memory,
        peers=None if options.peers is None else tuple(options.peers),
        stop_at=_stop_at(options, started),
        kernels=options.kernels,
        limits=limits,
    )
    results, left_out = [], []
    for op, case, target in chosen:
        if settings.seconds_left() <= 0:
            left_out.append(f"{op}/{case.name} {target.dtype}")
            continue
        result = run_case(op, case, target, settings)
        results.append(result)
        print(report.case_table(result), flush=True)
    if left_out:
        print(f"no time left in this run for: {', '.join(left_out)}\n")
    record = records.make_record(
        results,
        environment=environment,
        limits=limits,
        settings={
            "arguments": [machine.without_folders(argument) for argument in arguments],
            "quick": options.quick,
            "seed": settings.seed,
            "seconds_per_case": budget.seconds,
            "load_average_after": machine.environment(device)["load_average"],
        },
    )
    if options.allocator == "both" and allocator.supported():
        record["results"] += _default_results(options, arguments)
    return _finish(record, options)


def _stop_at(options: argparse.Namespace, started: float) -> float | None:
    """Reading of ``time.monotonic`` after which no case starts; None: never."""
    limits = [QUICK_SECONDS] if options.quick else []
    if options.stop_after is not None:
        limits.append(options.stop_after)
    return started + min(limits) if limits else None


def _default_results(
    options: argparse.Namespace, arguments: Sequence[str]
) -> list[dict[str, object]]:
    """The same run again in a process with the system's allocator settings.

    Raises:
        RecordError: the second process left no record.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "default.json"
        # Later options win, so the caller's stay as they are; its outputs are ours to write.
        command = [sys.executable, "-m", __package__, *_without_outputs(arguments)]
        command += ["--allocator", "default", "--json", str(path)]
        print("the same with the system's allocator settings:\n", flush=True)
        variables = allocator.variables_for("default", os.environ, options.threads)
        subprocess.run(command, env=variables, check=False)
        return records.load(path)["results"]


def _without_outputs(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in ("--plot", "--baseline", "--fail-over"):
            skip = True
        elif not argument.startswith(("--plot=", "--baseline=", "--fail-over=")):
            kept.append(argument)
    return kept


def _finish(record: dict[str, object], options: argparse.Namespace) -> int:
    """Report, write, compare; the exit status."""
    print(report.summary_table(record))
    if options.json is not None:
        records.save(record, options.json)
        print(f"record written: {options.json}")
    if options.plot is not None:
        print(report.save_plot(record, options.plot))
    status = EXIT_OK
    for result in record["results"]:
        wrong = result["status"] == "failed" or any(
            c["role"] == "transfuse" and c["status"] == "failed" for c in result["candidates"]
        )
        if wrong:
            print(f"failed: {records.label(records.key_of(result))}", file=sys.stderr)
            status = EXIT_FAILED
    if options.baseline is not None:
        status = max(status, _compare(options.baseline, record, options.fail_over))
    return status


if __name__ == "__main__":
    sys.exit(main(restart=True))
