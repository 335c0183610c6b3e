"""Compiles the CUDA sources for sm_80 and sm_90 without a GPU, and says what every kernel uses.

Sources named ``*_hopper`` are for sm_90a alone.

``python csrc/cuda/compile_check.py`` prints registers, stack, spills and shared memory of each
kernel, as ptxas reports them, and fails on a warning, on an error, and on a kernel that spills
registers without being named in ``MAY_SPILL``. It needs nvcc on PATH, and torch for its headers; it
imports nothing of transfuse.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARCHITECTURES = (80, 90)
HOPPER = ("90a",)
# Kernels that are not worth the registers: name, and why.
MAY_SPILL: dict[str, str] = {}
# Kernels whose warpgroups exchange registers have to start with what they reckon with.
REGISTERS_AT_START = {"attention_kernel": 168}
# What ptxas says in passing: products one after the other, registers that are not exchanged.
_LOSS = re.compile(r"^ptxas info.*(?:Potential Performance Loss|setmaxnreg).*$", re.MULTILINE)

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class Usage(NamedTuple):
    """What one kernel uses on one architecture; sizes in bytes."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int


def command(source: Path, torch: Path, output: Path) -> list[str]:
    """The compiler call for one source; all its architectures are one call."""
    names = HOPPER if source.stem.endswith("_hopper") else ARCHITECTURES
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [
        "nvcc", "-c", "-std=c++20", "-O3", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", *codes,
        "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter",
        f"-I{ROOT / 'csrc' / 'include'}", "-isystem", str(torch / "include"),
        "-o", str(output), str(source),
    ]  # fmt: skip


def parse(report: str, names: dict[str, str]) -> list[Usage]:
    """The kernels of a ptxas report; ``names`` maps mangled names to readable ones.

    Raises:
        ValueError: a kernel whose figures are not there: the report's form has changed.
    """
    found = []
    for part in re.split(r"(?=Compiling entry function)", report)[1:]:
        entry, spills, used = _ENTRY.search(part), _SPILLS.search(part), _USED.search(part)
        if entry is None or spills is None or used is None:
            raise ValueError(f"ptxas reports in another form: {part.splitlines()[0]}")
        shared = _SHARED.search(part)
        found.append(
            Usage(
                kernel=names.get(entry[1], entry[1]),
                architecture=int(entry[2]),
                registers=int(used[1]),
                stack=int(spills[1]),
                spills=int(spills[2]) + int(spills[3]),
                shared=0 if shared is None else int(shared[1]),
            )
        )
    return found


def readable(report: str) -> dict[str, str]:
    """Short names of the kernels in a report: without namespaces and arguments."""
    mangled = sorted({entry[0] for entry in _ENTRY.findall(report)})
    if not mangled or shutil.which("c++filt") is None:
        return {}
    lines = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {own: short(line) for own, line in zip(mangled, lines, strict=True)}


def short(name: str) -> str:
    """``void transfuse::(anonymous namespace)::k<float, 2>(...)`` -> ``k<float, 2>``."""
    name = name.removeprefix("void ")
    name = re.sub(r"\w+::\(anonymous namespace\)::|\w+::_GLOBAL__N__\w+::|transfuse::", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return re.sub(r"\((?:int|bool)\)", "", name[:at])
    return name


def table(usages: Sequence[Usage]) -> str:
    """One line for each kernel, the figures of the architectures side by side."""
    rows: dict[str, dict[int, Usage]] = defaultdict(dict)
    for usage in usages:
        rows[usage.kernel][usage.architecture] = usage
    width = max((len(kernel) for kernel in rows), default=0)
    columns = "".join(f"  {'sm_' + str(n) + ' regs/stack/spill/shared':>32}" for n in ARCHITECTURES)
    lines = [f"{'kernel':<{width}}{columns}"]
    for kernel in sorted(rows):
        cells = []
        for number in ARCHITECTURES:
            usage = rows[kernel].get(number)
            cells.append(
                "-"
                if usage is None
                else f"{usage.registers} / {usage.stack} / {usage.spills} / {usage.shared}"
            )
        lines.append(f"{kernel:<{width}}" + "".join(f"  {cell:>32}" for cell in cells))
    return "\n".join(lines)


def spilling(usages: Sequence[Usage]) -> list[Usage]:
    """Kernels that spill and are not allowed to."""
    return [u for u in usages if u.spills > 0 and u.kernel.split("<")[0] not in MAY_SPILL]


def unexpected(usages: Sequence[Usage]) -> list[Usage]:
    """Kernels that start with another number of registers than they reckon with."""
    return [
        u
        for u in usages
        if u.registers != REGISTERS_AT_START.get(u.kernel.split("<")[0], u.registers)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge: 0 if all is well, 1 if not, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sources", nargs="*", type=Path, help="(default: all of csrc/cuda)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cuda", metavar="FOLDER")
    options = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("cuda-check: skipped, no nvcc on PATH")
        return 0
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        print("cuda-check: torch is not installed; its headers are needed", file=sys.stderr)
        return 2
    sources = (
        options.sources
        if options.sources
        else sorted(path for path in HERE.iterdir() if path.suffix in (".cu", ".cpp"))
    )
    options.output.mkdir(parents=True, exist_ok=True)
    usages: list[Usage] = []
    failed = False
    for source in sources:
        began = time.monotonic()
        call = command(source, Path(spec.origin).parent, options.output / f"{source.name}.o")
        result = subprocess.run(call, capture_output=True, text=True, check=False)
        report = result.stdout + result.stderr
        print(f"nvcc {source.name}: {time.monotonic() - began:.1f} s", flush=True)
        if result.returncode != 0:
            failed = True
            lines = [line for line in report.splitlines() if not line.startswith("ptxas info")]
            print("\n".join(lines), file=sys.stderr)
            continue
        for loss in _LOSS.findall(report):
            failed = True
            print(f"cuda-check: {source.name}: {loss}", file=sys.stderr)
        usages += parse(report, readable(report))
    print(table(usages))
    for usage in spilling(usages):
        failed = True
        print(
            f"cuda-check: {usage.kernel} spills {usage.spills} bytes on sm_{usage.architecture}",
            file=sys.stderr,
        )
    for usage in unexpected(usages):
        failed = True
        print(f"cuda-check: {usage.kernel} uses {usage.registers} registers", file=sys.stderr)
    for kernel, reason in MAY_SPILL.items():
        print(f"may spill: {kernel}: {reason}")
    state = "FAILED" if failed else "compiled"
    print(f"cuda-check: {state} {len(sources)} sources, {len(usages)} kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
