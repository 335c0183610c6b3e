"""The machine a record was made on: what it is, and what it can do at most."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import allocator
from .timing import first_line, make_clock

# Processor features that decide which kernels run, ours or torch's. The rest of the list is noise.
RELEVANT_FLAGS = frozenset(
    ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
     "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2")
)  # fmt: skip
# What may change a figure and holds no folder names: records are published.
ENVIRONMENT_PREFIXES = ("MALLOC_", "OMP_", "KMP_", "GOMP_", "MKL_", "TRANSFUSE_")
FOLDERS = re.compile(r"(?:/[^\s:/]+)+/")


def environment(device: torch.device) -> dict[str, object]:
    """Everything about machine and installation that may change a figure, as plain JSON data."""
    return {
        "cpu": _cpu_model(),
        "cpu_flags": sorted(_cpu_flags() & RELEVANT_FLAGS),
        "cpus_usable": _usable_cpus(),
        "threads": torch.get_num_threads(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_bytes": _meminfo("MemTotal"),
        "load_average": _load_average(),
        "os": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_debug": torch.version.debug,
        "transfuse": transfuse_build(),
        "git": git_state(Path(__file__).resolve().parent),
        "device": device_block(device),
        "packages": _versions(("numpy", "triton", "scikit-learn")),
        "variables": {
            name: without_folders(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT_PREFIXES) and name != allocator.RESTARTED
        },
    }


def without_folders(text: str) -> str:
    """A text with absolute paths cut down to their last part.

    Example:
        >>> without_folders("/home/someone/lib.so: undefined symbol")
        'lib.so: undefined symbol'
    """
    return FOLDERS.sub("", text)


def transfuse_build() -> dict[str, object]:
    """Version of transfuse and what its compiled part says about itself."""
    build: dict[str, object] = {"version": _versions(("transfuse",)).get("transfuse")}
    try:
        native = importlib.import_module("transfuse._C")
    except ImportError as error:
        return build | {"compiled": False, "reason": without_folders(first_line(error))}
    build |= {"compiled": True, "isa": isa_level()}
    report = getattr(native, "build_info", None)
    if callable(report):
        build |= {str(key): _plain(value) for key, value in dict(report()).items()}
    return build


def isa_level() -> str | None:
    """The instruction set transfuse's CPU kernels run at here, None when there is no binary."""
    try:
        native = importlib.import_module("transfuse._C")
    except ImportError:
        return None
    name = getattr(native, "isa_in_use", None)
    return str(name()) if callable(name) else None


def git_state(folder: Path) -> dict[str, object] | None:
    """Commit and whether the tree differs from it; None outside a checkout or without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie inside some other project's checkout: that commit is not ours.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def device_block(device: torch.device) -> dict[str, object]:
    """The device the tensors are on."""
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": _nvidia_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo("MemAvailable")
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    used = _read(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and limit.isdigit() and used is not None:
        room = int(limit) - int(used)
        return room if free is None else min(free, room)
    return free


def measure_limits(device: torch.device, *, seconds: float) -> dict[str, object]:
    """What this machine can do at most, measured now in about ``seconds`` seconds.

    Returns:
        ``matmul_gflops`` by dtype (torch, the best of several), ``kernel_gflops`` (transfuse's own
        fused-multiply-add loop, where its binary has one), ``peak_gflops`` by dtype (the highest of
        what that dtype can reach: reduced precision may always be computed as float32),
        ``copy_gbps`` (bytes read plus bytes written per second of a copy larger than the caches).
    """
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
    share = seconds / (len(dtypes) + 2)
    matmul = {_name(d): _matmul_gflops(d, device, share) for d in dtypes}
    kernel = _kernel_gflops(share) if device.type == "cpu" else None
    base = max(matmul["float32"], 0.0 if kernel is None else kernel)
    peaks = {name: max(base, rate) for name, rate in matmul.items()}
    peaks.setdefault("float16", base)
    return {
        "matmul_gflops": matmul,
        "kernel_gflops": kernel,
        "peak_gflops": peaks,
        "copy_gbps": _copy_gbps(device, share),
    }


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time of a call within a time limit, after one call to warm up. Seconds."""
    clock = make_clock(device)
    clock(call)
    best = clock(call)
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        best = min(best, clock(call))
    return best


def _matmul_gflops(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    best = 0.0
    for size in (256, 1024) if device.type == "cpu" else (8192,):
        # A dtype without instructions of its own crawls: the small product has then said enough.
        if best > 0 and 2.0 * size**3 / (best * 1e9) > seconds:
            break
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty(size, size, dtype=dtype, device=device)
        time_of = _best(functools.partial(torch.mm, left, right, out=out), device, seconds / 2)
        best = max(best, 2.0 * size**3 / time_of * 1e-9)
    return best


def _copy_gbps(device: torch.device, seconds: float) -> float:
    source = torch.ones(64 << 20, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.nbytes / _best(lambda: target.copy_(source), device, seconds) * 1e-9


def _kernel_gflops(seconds: float) -> float | None:
    try:
        native = importlib.import_module("transfuse._C")
    except ImportError:
        return None
    measure = getattr(native, "measure_peak_flops", None)
    return None if measure is None else float(measure(torch.get_num_threads(), seconds)) * 1e-9


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: object) -> object:
    """A value as JSON can hold it."""
    if isinstance(value, str):
        return without_folders(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpuinfo(*keys: str) -> str | None:
    text = _read(Path("/proc/cpuinfo"))
    for line in [] if text is None else text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return None


def _cpu_model() -> str:
    found = _cpuinfo("model name", "Model")
    if found is not None:
        return found
    if sys.platform == "darwin":
        try:
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() if platform.processor() else platform.machine()


def _cpu_flags() -> frozenset[str]:
    found = _cpuinfo("flags", "Features")
    return frozenset() if found is None else frozenset(found.split())


def _usable_cpus() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _meminfo(key: str) -> int | None:
    text = _read(Path("/proc/meminfo"))
    for line in [] if text is None else text.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _nvidia_driver() -> str | None:
    text = _read(Path("/proc/driver/nvidia/version"))
    return None if text is None else text.splitlines()[0]
