"""Clocks, percentiles and the round-robin that times several candidates in one process."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long one case may be timed. Seconds.

    A candidate whose single call takes longer than ``call_limit`` is timed once; one that is
    ``slow_factor`` times slower than the fastest is timed ``slow_repeats`` times, so that it cannot
    eat the time of the candidates that decide the ratio.
    """

    seconds: float = 10.0
    min_repeats: int = 5
    max_repeats: int = 1000
    warmups: int = 2
    call_limit: float = 30.0
    slow_factor: float = 10.0
    slow_repeats: int = 3


QUICK = Budget(
    seconds=1.0, min_repeats=3, max_repeats=200, warmups=1, call_limit=1.5, slow_repeats=1
)


@dataclass(frozen=True)
class Samples:
    """Timing of one candidate. Seconds."""

    p20: float
    p50: float
    p80: float
    n: int


def percentile(values: Sequence[float], fraction: float) -> float:
    """The ``fraction`` quantile by linear interpolation between order statistics.

    Example:
        >>> percentile([4.0, 1.0, 3.0, 2.0], 0.5)
        2.5
    """
    if not values:
        raise ValueError("percentile: expected at least one value, got none")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"percentile: fraction must be in [0, 1], got {fraction}")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarise(seconds: Sequence[float]) -> Samples:
    """p20, p50, p80 and count of measured times."""
    return Samples(
        percentile(seconds, 0.2), percentile(seconds, 0.5), percentile(seconds, 0.8), len(seconds)
    )


def cpu_clock(call: Call) -> float:
    """Wall time of one call on the CPU."""
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    # The result dies after the clock stops: freeing it costs every candidate the same.
    del result
    return stop - start


class CudaClock:
    """Device time of one call between two events, the second-level cache emptied before it."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 64 << 20)
        self._flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Call) -> float:
        self._flush.zero_()
        self._start.record()
        result = call()
        self._stop.record()
        self._stop.synchronize()
        del result
        return self._start.elapsed_time(self._stop) * 1e-3


def make_clock(device: torch.device) -> Clock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else cpu_clock


def interleave(
    calls: Mapping[str, Call],
    *,
    budget: Budget,
    clock: Clock = cpu_clock,
    now: Callable[[], float] = time.monotonic,
    stop_at: float | None = None,
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Time all calls in turns, so that a change of the machine's state hits every candidate alike.

    Args:
        calls: candidates by name. All have already passed the correctness gate.
        budget: time and repeat limits; ``budget.seconds`` is for the whole case.
        clock: measures one call, seconds.
        now: the clock that the limits are kept by.
        stop_at: reading of ``now`` after which no further round starts. The first always does.

    Returns:
        Samples by name, and by name why a candidate was timed less often than the others or failed.
    """
    notes: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            elapsed = math.inf
            for _ in range(budget.warmups):
                elapsed = clock(call)
                if elapsed > budget.call_limit:
                    break
            if elapsed > budget.call_limit and math.isfinite(elapsed):
                notes[name] = f"timed once: a call takes longer than {budget.call_limit:g} s"
            times[name] = [elapsed] if name in notes else []
        except Exception as error:
            notes[name] = first_line(error)

    active = [name for name in times if name not in notes]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started, rounds = now(), 0
        while active and rounds < budget.max_repeats:
            # Rotating the order means no candidate always runs behind the same one's cache
            # contents.
            shift = rounds % len(active)
            for name in active[shift:] + active[:shift]:
                try:
                    times[name].append(clock(calls[name]))
                except Exception as error:
                    notes[name] = first_line(error)
                    del times[name]
            active = [name for name in active if name in times]
            rounds += 1
            if stop_at is not None and now() >= stop_at:
                break
            if rounds >= budget.min_repeats and now() - started >= budget.seconds:
                break
            if rounds >= budget.slow_repeats:
                active, slow = _split_slow(active, times, budget.slow_factor)
                for name in slow:
                    times_slower = f"{budget.slow_factor:g} x slower than the fastest"
                    notes[name] = f"timed {len(times[name])} times: over {times_slower}"
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in times.items()}, notes


def _split_slow(
    active: list[str], times: Mapping[str, list[float]], factor: float
) -> tuple[list[str], list[str]]:
    if not active:
        return [], []
    medians = {name: percentile(times[name], 0.5) for name in active}
    limit = factor * min(medians.values())
    return (
        [name for name in active if medians[name] <= limit],
        [name for name in active if medians[name] > limit],
    )


def first_line(error: BaseException, *, width: int = 200) -> str:
    """An error as one line for a table."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {line}"[:width]
