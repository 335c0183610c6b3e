"""When RAU-Net's two devices act: the table of steps, and which step of a run a timestep is."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transfuse import _checks

MODELS = ("sd15", "sd21", "sdxl", "sdxl_turbo")
# Share of the steps, from the first one: (strided, pooled).
_SD, _SD_EXTREME = (0.4, 0.0), (0.7, 0.3)
_SDXL_EXTREME, _TURBO = (0.3, 0.7), (0.0, 0.5)
_SDXL_POOLED, _SDXL_POOLED_CONTROLNET = 0.4, 0.5
_AGGRESSIVE = 8 / 50


@dataclass(frozen=True)
class RAUSchedule:
    """Steps in which each device acts.

    Args:
        strided: Steps of the resolution-aware downsampler, which halves once more.
        pooled: Steps of the pooled block.
    """

    strided: range
    pooled: range

    def __post_init__(self) -> None:
        for name in ("strided", "pooled"):
            if not isinstance(getattr(self, name), range):
                raise TypeError(f"{name}: expected a range of steps, got {getattr(self, name)!r}")


def rau_schedule(
    model: str,
    latent: tuple[int, int],
    steps: int,
    *,
    aggressive: bool = True,
    controlnet: bool = False,
) -> RAUSchedule:
    """The official table of steps.

    Bounds are ``int(steps * ratio)`` with the ratios

    ==========================================  =================  ====================
    model, latent (H, W)                        strided            pooled
    ==========================================  =================  ====================
    sd15, sd21; H < 256 or W < 256              [0, 0.4)           never
    sd15, sd21; larger                          [0, 0.7)           [0, 0.3)
    sdxl; H < 512 or W < 512, aggressive        [0, 8/50)          [8/50, 0.4)
    sdxl; H < 512 or W < 512, not aggressive    never              [0, 0.4)
    sdxl; larger                                [0, 0.3)           [0, 0.7)
    sdxl_turbo                                  never              [0, 0.5)
    ==========================================  =================  ====================

    Args:
        model: ``"sd15"``, ``"sd21"``, ``"sdxl"`` or ``"sdxl_turbo"``.
        latent: Height and width of the latent.
        steps: Sampling steps of the run.
        aggressive: Of SDXL below 512; the official code turns it off for inpainting and Playground
            models.
        controlnet: A ControlNet is in use: 0.5 instead of 0.4 for SDXL below 512.

    Returns:
        :class:`RAUSchedule`.

    Raises:
        TypeError, ValueError: An argument that does not fit.

    Reference:
        The paper has one threshold, and a second one at extreme resolution; the aggressive split of
        SDXL is in the official code only, and its default.

    Example:
        >>> rau_schedule("sdxl", (256, 256), 50)
        RAUSchedule(strided=range(0, 8), pooled=range(8, 20))
    """
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    if len(latent) != 2:
        raise ValueError(f"latent: expected (height, width), got {latent!r}")
    for side in latent:
        _checks.positive_int("latent", side)
    _checks.positive_int("steps", steps)
    smaller = min(latent)
    if model == "sdxl" and smaller < 512:
        share = _SDXL_POOLED_CONTROLNET if controlnet else _SDXL_POOLED
        start = int(_AGGRESSIVE * steps) if aggressive else 0
        return RAUSchedule(range(start), range(start, int(steps * share)))
    if model == "sdxl_turbo":
        shares = _TURBO
    elif model == "sdxl":
        shares = _SDXL_EXTREME
    else:
        shares = _SD if smaller < 256 else _SD_EXTREME
    strided, pooled = (range(int(steps * share)) for share in shares)
    return RAUSchedule(strided, pooled)


def time_value(given: object) -> float:
    """The one timestep of a batch.

    Raises:
        ValueError: Different timesteps in one batch.
    """
    if isinstance(given, Tensor):
        values = given.detach().flatten().tolist()
        if len(set(values)) != 1:
            raise ValueError(f"timestep: expected one for the whole batch, got {values}")
        return float(values[0])
    return _checks.number("timestep", given)


class RunSteps:
    """Step number of a timestep, looked up in the run's timesteps instead of counted by calls.

    So a step evaluated twice, an interrupted run and skipped calls do not shift the schedule.
    """

    def __init__(self) -> None:
        self._source: Any = None
        self._read: tuple[object, object] | None = None  # what _times was last made from
        self._times: list[float] = []  # ascending

    def set(self, timesteps: Tensor | Sequence[float]) -> None:
        """Take the timesteps of the run that follows.

        Raises:
            ValueError, TypeError: Empty, or not a list of numbers.
        """
        self._times = _ascending(timesteps)
        self._source = self._read = None

    def follow(self, source: Any) -> None:
        """Read them from a scheduler, or from the present scheduler of a pipeline, at each call.

        Raises:
            TypeError: Neither.
        """
        if not hasattr(getattr(source, "scheduler", source), "timesteps"):
            raise TypeError(
                "follow: expected a pipeline with a scheduler, or a scheduler with timesteps, "
                f"got {type(source).__name__}"
            )
        self._source, self._read = source, None

    def at(self, time: float) -> tuple[int, int]:
        """Step number of a timestep, from 0, and the number of steps.

        A timestep between two of the run belongs to the step that began before it.

        Raises:
            RuntimeError: No run is known.
            ValueError: The timestep comes before the run's first.
        """
        self._refresh()
        if not self._times:
            raise RuntimeError(
                "RAU-Net acts in some steps of a run and does not know the run: call "
                "follow(pipeline) or set_timesteps(timesteps) first, or choose raunet=False"
            )
        total = len(self._times)
        step = total - 1 - bisect.bisect_left(self._times, time)
        first = self._times[-1]
        # The slack is for timesteps that were rounded to half precision on the way here.
        if step < 0 and time > first + 2**-8 * abs(first):
            raise ValueError(
                f"timestep {time:g} lies before the first of the run, {first:g}: give the "
                "run's own timesteps to set_timesteps"
            )
        return max(step, 0), total

    def _refresh(self) -> None:
        if self._source is None:
            return
        scheduler = getattr(self._source, "scheduler", self._source)
        # Image-to-image pipelines start within the list, and say where.
        now = (scheduler.timesteps, getattr(scheduler, "begin_index", None))
        if self._read is not None and self._read[0] is now[0] and self._read[1] == now[1]:
            return
        start = 0 if now[1] is None else now[1]
        self._times, self._read = _ascending(now[0][start:]), now


def _ascending(timesteps: Tensor | Sequence[float]) -> list[float]:
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    values = [_checks.number("timesteps", value) for value in values]
    if not values:
        raise ValueError("timesteps: expected at least one")
    return sorted(values)
