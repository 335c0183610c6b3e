"""``python -m transfuse.info``: what is installed, what was loaded, and why not; for bug reports.

Example:
    >>> from transfuse import info
    >>> info.collect()["cpu"]["threads"] >= 1
    True
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from transfuse import __version__, _native

ENVIRONMENT = (
    "TRANSFUSE_CPU_ISA",
    "TRANSFUSE_TRITON_CONFIG",
    "TRANSFUSE_TRITON_PRECISION",
    "TRANSFUSE_GOLDEN",
    "TRANSFUSE_REQUIRE_NATIVE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)
# The processor features that a kernel level may need, by their names in /proc/cpuinfo.
_FEATURES = (
    *("avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "asimd", "bf16", "sve"),
)


def collect() -> dict[str, dict]:
    """All facts as nested dictionaries of plain values, ready for ``json.dumps``.

    Returns:
        Sections ``versions``, ``cpu``, ``isa``, ``libraries``, ``gpu``, ``ops``, ``methods``,
        ``optional`` and ``environment``. A fact that cannot be had is None or a sentence saying
        why; nothing raises.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "isa": _isa(),
        "libraries": _libraries(),
        "gpu": _gpu(),
        "ops": _ops(),
        "methods": _methods(),
        "optional": _optional(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def render(facts: dict[str, dict]) -> str:
    """The facts as indented text, one section per paragraph."""
    lines = []
    for section, entries in facts.items():
        lines.append(section)
        lines += [f"  {name:<28}{_text(value)}".rstrip() for name, value in entries.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.info",
        description="What of transfuse is installed and loaded, and why not. Paste it in reports.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print(render(facts))
    return 0


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) if value else "-"
    return str(value)


def _versions() -> dict[str, str | None]:
    return {
        "transfuse": __version__,
        "location": str(Path(__file__).parent),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": platform.platform(),
    }


def _cpu() -> dict[str, object]:
    model, flags = platform.processor(), set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return {
        "model": model if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [name for name in _FEATURES if name in flags],
        "torch level": torch.backends.cpu.get_cpu_capability(),
    }


def _isa() -> dict[str, object]:
    """Levels of the kernels: compiled into the binary, run by this processor, in use."""
    try:
        module = importlib.import_module("transfuse._C")
        levels = module.isa_report()
    except (ImportError, AttributeError) as error:
        return {"in use": f"none: {error}"}
    try:
        in_use = module.isa_in_use()
    except RuntimeError as error:
        in_use = f"none: {error}"
    return {
        "in use": in_use,
        "compiled": [level["name"] for level in levels if level["compiled"]],
        "supported": [level["name"] for level in levels if level["supported"]],
    }


def _libraries() -> dict[str, object]:
    state = _native.status()
    facts: dict[str, object] = {
        "CPU ops": f"loaded from {state.path}" if state.loaded else f"not loaded: {state.reason}"
    }
    try:
        build = importlib.import_module("transfuse._C").build_info()
    except (ImportError, AttributeError) as error:
        facts["transfuse._C"] = f"not loaded: {error}"
    else:
        facts["transfuse._C"] = "loaded"
        facts |= {f"built {name}": value for name, value in build.items()}
    cuda = Path(__file__).with_name("_cuda.so")
    facts["CUDA ops"] = "built" if cuda.is_file() else "not built"
    return facts


def _gpu() -> dict[str, object]:
    available = torch.cuda.is_available()
    triton = _version("triton")
    if triton is None:
        state = "not installed (extra transfuse[triton])"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        state = f"{triton}, interpreting"
    elif available:
        state = triton
    else:
        state = f"{triton}, no CUDA device: kernels run only under TRITON_INTERPRET=1"
    return {
        "CUDA of torch": torch.version.cuda,
        "CUDA devices": [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count() if available else 0)
        ],
        "Triton": state,
    }


def _ops() -> dict[str, object]:
    try:
        importlib.import_module("transfuse.ops")  # declares the ops
        from transfuse import _backend
    except (ImportError, RuntimeError) as error:
        return {"count": 0, "why": str(error)}
    declared = {name: list(entry.backends) for name, entry in _backend.declared().items()}
    return {"count": len(declared), **declared}


def _methods() -> dict[str, object]:
    try:
        from transfuse import methods
    except ImportError as error:
        return {"count": 0, "why": str(error)}
    slugs = methods.list()
    return {"count": len(slugs), "names": list(slugs)}


def _optional() -> dict[str, str]:
    """Packages of the extras: version, or the extra that installs it."""
    try:
        requirements = importlib.metadata.requires("transfuse")
    except importlib.metadata.PackageNotFoundError:
        requirements = None
    extras: dict[str, str] = {}
    for requirement in requirements if requirements is not None else []:
        package = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if package is not None and extra is not None and package[0] != "transfuse":
            extras.setdefault(package[0], extra[1])
    facts = {}
    for name, wanted_by in sorted(extras.items()):
        version = _version(name)
        hint = f"not installed (extra transfuse[{wanted_by}])"
        facts[name] = hint if version is None else version
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
