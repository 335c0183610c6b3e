"""Runs one case: oracle, gate, interleaved timing, memory, ratios. Returns plain JSON data."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import allocator, machine, memory
from .cases import DTYPES, Case, Expression, Setup, Target, Unavailable, Workload, load_cases
from .gate import Gate, bind, oracle, yardstick
from .peers import Peer, all_peers
from .timing import Budget, Samples, first_line, interleave, make_clock

OURS = "transfuse"
# The bars of the speed table were set for this instruction set and number of threads.
BAR_ISA, BAR_THREADS = "avx512_bf16", 2
# What compiling takes on two slow cores, the first expression of a process (which also loads the
# compiler) and any later one; --quick starts none with less time left.
FIRST_COMPILE_SECONDS, NEXT_COMPILE_SECONDS = 25.0, 12.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run is made.

    ``peers`` None means those of the case. ``stop_at`` is a reading of ``time.monotonic`` after
    which nothing more is started. ``memory`` measures the peak of every case, not only of those
    that ask. ``kernels`` names the backend that ours is forced to; None is the device's first.
    """

    device: torch.device
    budget: Budget
    quick: bool = False
    memory: bool = False
    peers: tuple[str, ...] | None = None
    stop_at: float | None = None
    kernels: str | None = None
    seed: int = 0
    limits: Mapping[str, object] | None = None
    registry: Mapping[str, Peer] = field(default_factory=all_peers)

    def seconds_left(self) -> float:
        return float("inf") if self.stop_at is None else self.stop_at - time.monotonic()


@dataclass
class Row:
    """One candidate on its way through a case."""

    name: str
    title: str
    role: str
    status: str = "ok"
    reason: str | None = None
    draw: bool = False  # of random numbers of its own
    call: Callable[[], tuple[torch.Tensor, ...]] | None = None
    error: float | None = None
    tolerance: float | None = None
    prepare_seconds: float | None = None
    samples: Samples | None = None
    peak_bytes: int | None = None

    def drop(self, status: str, reason: str) -> None:
        self.status, self.reason, self.call = status, reason, None


def find_case(op: str, name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: there is none.
    """
    for case in load_cases((op,))[op]:
        if case.name == name:
            return case
    raise ValueError(f"op {op!r} has no benchmark case {name!r}")


def prepare_call(
    case: Case,
    *,
    dtype: torch.dtype,
    mode: str,
    candidate: str,
    device: torch.device,
    seed: int = 0,
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One candidate of a case as a call without arguments, for measurements outside a run."""
    workload = case.make(Setup(dtype=dtype, mode=mode, device=device, seed=seed))
    own = {OURS: workload.ours} | workload.variants
    if candidate in own:
        expression = own[candidate]
    else:
        expression = all_peers()[candidate].expression(workload, device=device, mode=mode)
    return bind(expression, workload.tensors, mode=mode, differentiable=workload.differentiable)


def run_case(op: str, case: Case, target: Target, settings: Settings) -> dict[str, object]:
    """Benchmark one (case, dtype, mode).

    Returns:
        One entry of a record's ``results`` (:mod:`transfuse.bench.records`). A case that cannot run
        here is an entry with ``status`` "unavailable" and the reason; nothing a candidate does
        raises.
    """
    setup = Setup(
        dtype=DTYPES[target.dtype],
        mode=target.mode,
        device=settings.device,
        seed=settings.seed,
        kernels=settings.kernels,
    )
    entry: dict[str, object] = {
        "op": op,
        "case": case.name,
        "title": case.title,
        "dtype": target.dtype,
        "mode": target.mode,
        "device": settings.device.type,
        "backend": setup.backend,
        "threads": torch.get_num_threads(),
        "allocator": allocator.state_now(),
        "status": "ok",
        "reason": None,
        "bar": target.bar,
        "bars": dict(target.bars),
        "memory_bar": target.memory_bar,
        "candidates": [],
    }
    with warnings.catch_warnings():
        # Eager FlexAttention and inductor advise on every use; their rows say what they are.
        warnings.simplefilter("ignore")
        try:
            workload = case.make(setup)
            gate = _gate(workload, setup)
        except Exception as error:
            plain = isinstance(error, Unavailable)
            return entry | {
                "status": "unavailable" if plain else "failed",
                "reason": str(error) if plain else first_line(error),
            }
        rows = _collect(case, workload, setup, settings)
        for row in rows:
            if row.status == "ok":
                peer = settings.registry.get(row.name) if row.role == "peer" else None
                slack = 0.0 if peer is None else workload.estimates.get(peer.kind, 0.0)
                _admit(row, gate, slack)
        _time(rows, settings)
        del gate
        if case.memory or settings.memory:
            _measure_memory(rows, op, case, target, settings)
    entry |= _describe(workload)
    entry["candidates"] = [_row_data(row, workload) for row in rows]
    entry |= _figures(rows, workload, target, settings)
    return entry


def _gate(workload: Workload, setup: Setup) -> Gate:
    truth = oracle(workload, mode=setup.mode)
    eager = yardstick(workload, mode=setup.mode)
    return Gate(truth, eager, mode=setup.mode, inputs=workload.tensors)


def _collect(case: Case, workload: Workload, setup: Setup, settings: Settings) -> list[Row]:
    """One row per candidate, with its call where it has one."""

    def bound(expression: Expression) -> Callable[[], tuple[torch.Tensor, ...]]:
        return bind(
            expression,
            workload.tensors,
            mode=setup.mode,
            differentiable=workload.differentiable,
        )

    rows = []
    own = {OURS: workload.ours} | ({} if settings.quick else workload.variants)
    for name, expression in own.items():
        row = Row(name, "transfuse" if name == OURS else "transfuse, another way", _role(name))
        # Binding itself runs the forward in backward mode, so it waits for the gate's try block.
        row.call = _deferred(lambda e=expression: bound(e))
        rows.append(row)
    names = settings.peers
    if names is None:
        names = case.quick_peers if settings.quick else case.peers
    for name in names:
        peer = settings.registry[name]
        row = Row(name, peer.title, "peer", draw=peer.kind in workload.draws)
        rows.append(row)
        why_not = _why_not(peer, workload, setup, settings)
        if why_not is not None:
            row.drop(*why_not)
            continue
        try:
            expression = peer.expression(workload, device=settings.device, mode=setup.mode)
        except Unavailable as error:
            row.drop("unavailable", str(error))
            continue
        row.call = _deferred(lambda e=expression: bound(e))
    return rows


def _role(name: str) -> str:
    return "transfuse" if name == OURS else "variant"


def _deferred(
    make: Callable[[], Callable[[], tuple[torch.Tensor, ...]]],
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that is bound when it first runs."""
    made: list[Callable[[], tuple[torch.Tensor, ...]]] = []

    def run() -> tuple[torch.Tensor, ...]:
        if not made:
            made.append(make())
        return made[0]()

    return run


def _why_not(
    peer: Peer, workload: Workload, setup: Setup, settings: Settings
) -> tuple[str, str] | None:
    """Status and reason for leaving a peer out before it is started, None to start it."""
    if peer.name in workload.skips:
        return "skipped", workload.skips[peer.name]
    left = settings.seconds_left()
    loaded = "torch._inductor.compile_fx" in sys.modules
    if peer.compiles and left < (NEXT_COMPILE_SECONDS if loaded else FIRST_COMPILE_SECONDS):
        return "skipped", f"compiling would not end in the {max(left, 0):.0f} s that are left"
    # Gradients keep more maps alive than a forward does.
    needs = workload.needs_bytes.get(peer.kind, 0) * (1 if setup.mode in ("forward", "hvp") else 2)
    room = machine.available_memory(settings.device)
    if room is not None and needs > 0.9 * room:
        return "skipped", f"needs about {needs / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free"
    return None


def _admit(row: Row, gate: Gate, slack: float) -> None:
    """First call of a candidate: through the gate, or out."""
    start = time.monotonic()
    try:
        outputs = row.call()
    except Exception as error:
        memory_gone = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if memory_gone or "can't allocate memory" in str(error):
            row.drop("failed", "out of memory")
        elif isinstance(error, Unavailable):
            row.drop("unavailable", str(error))
        else:
            row.drop("failed", first_line(error))
        return
    row.prepare_seconds = time.monotonic() - start
    verdict = gate.judge_draw(outputs) if row.draw else gate.judge(outputs, slack=slack)
    row.error, row.tolerance = verdict.error, verdict.tolerance
    if not verdict.passed:
        row.drop("failed", verdict.reason)


def _time(rows: Sequence[Row], settings: Settings) -> None:
    ready = {row.name: row for row in rows if row.status == "ok"}
    gc.collect()
    samples, notes = interleave(
        {name: row.call for name, row in ready.items()},
        budget=settings.budget,
        clock=make_clock(settings.device),
        stop_at=settings.stop_at,
    )
    for name, row in ready.items():
        row.reason = notes.get(name)
        row.samples = samples.get(name)
        if row.samples is None:
            row.drop("failed", f"failed while timed: {notes[name]}")


def _measure_memory(
    rows: Sequence[Row], op: str, case: Case, target: Target, settings: Settings
) -> None:
    # Each child builds the case anew; what this process holds would only make that harder.
    for row in rows:
        row.call = None
    gc.collect()
    for row in rows:
        if row.status != "ok":
            continue
        try:
            row.peak_bytes = memory.measure_in_child(
                op=op,
                case=case.name,
                dtype=target.dtype,
                mode=target.mode,
                candidate=row.name,
                device=settings.device.type,
                threads=torch.get_num_threads(),
            )
        except Unavailable as error:
            row.reason = str(error) if row.reason is None else f"{row.reason}; {error}"


def _describe(workload: Workload) -> dict[str, object]:
    return {
        "inputs": workload.inputs,
        "shape": workload.shape,
        "flops": workload.flops,
        "bytes": workload.bytes,
        "floor_note": workload.floor_note,
        "yardstick": "reference" if workload.yardstick is None else workload.yardstick,
    }


def _row_data(row: Row, workload: Workload) -> dict[str, object]:
    data: dict[str, object] = {
        "name": row.name,
        "title": row.title,
        "role": row.role,
        "status": row.status,
        "reason": row.reason,
        # JSON has no infinity: an error without a number (wrong shape) is its reason alone.
        "error": row.error if row.error is not None and row.error < float("inf") else None,
        "tolerance": row.tolerance,
        "prepare_seconds": row.prepare_seconds,
        "peak_bytes": row.peak_bytes,
        "p20": None,
        "p50": None,
        "p80": None,
        "n": 0,
        "gflops": None,
        "gbps": None,
    }
    if row.samples is not None:
        p50 = row.samples.p50
        data |= {
            "p20": row.samples.p20,
            "p50": p50,
            "p80": row.samples.p80,
            "n": row.samples.n,
            "gflops": workload.flops / p50 * 1e-9,
            "gbps": workload.bytes / p50 * 1e-9,
        }
    return data


def floor_seconds(
    workload: Workload, dtype: str, limits: Mapping[str, object] | None
) -> float | None:
    """The least time this arithmetic can take on a machine with these limits."""
    if limits is None:
        return None
    peaks = limits["peak_gflops"]
    if dtype not in peaks:
        return None
    return max(workload.flops / (peaks[dtype] * 1e9), workload.bytes / (limits["copy_gbps"] * 1e9))


def bars_apply(device: torch.device) -> bool:
    """Whether this is the kind of machine that the bars of the speed table were set for."""
    return (
        device.type == "cpu"
        and machine.isa_level() == BAR_ISA
        and torch.get_num_threads() == BAR_THREADS
    )


def _figures(
    rows: Sequence[Row], workload: Workload, target: Target, settings: Settings
) -> dict[str, object]:
    """Ratios to the peers and to the floor, and whether the bars are met."""
    ours = next(row for row in rows if row.name == OURS)
    timed = [row for row in rows if row.role == "peer" and row.samples is not None]
    best = min(timed, key=lambda row: row.samples.p50, default=None)
    smallest = min(
        (row.peak_bytes for row in rows if row.role == "peer" and row.peak_bytes is not None),
        default=None,
    )
    floor = floor_seconds(workload, target.dtype, settings.limits)
    figures: dict[str, object] = {
        "floor_seconds": floor,
        "ratio": None,
        "best_peer": None if best is None else best.name,
        "peer_ratios": {},
        "memory_ratio": None,
        "floor_share": None,
        "bars_apply": bars_apply(settings.device),
    }
    if ours.samples is not None:
        p50 = ours.samples.p50
        figures["peer_ratios"] = {row.name: row.samples.p50 / p50 for row in timed}
        figures["ratio"] = None if best is None else best.samples.p50 / p50
        figures["floor_share"] = None if floor is None else floor / p50
    if ours.peak_bytes is not None and smallest is not None:
        # A page is the least the kernel can report.
        figures["memory_ratio"] = smallest / max(ours.peak_bytes, 4096)
    figures["met"] = _met(figures, target)
    return figures


def _met(figures: Mapping[str, object], target: Target) -> bool | None:
    """All bars that could be measured are met; None when there is none, or one has no figure."""
    pairs = [
        (figures["ratio"], target.bar),
        (figures["memory_ratio"], target.memory_bar),
        *((figures["peer_ratios"].get(name), bar) for name, bar in target.bars.items()),
    ]
    wanted = [(value, bar) for value, bar in pairs if bar is not None]
    if any(value is not None and value < bar for value, bar in wanted):
        return False
    if not wanted or any(value is None for value, _ in wanted):
        return None
    return True
