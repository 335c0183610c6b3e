"""Benchmark records: one JSON document per run, checked on reading, replaced whole or not."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SCHEMA = "transfuse.bench"
VERSION = 1

NUMBER = (int, float)
# Fields and types of one result and of one candidate in it. None among the types means null is
# legal.
RESULT_FIELDS: dict[str, tuple[type | None, ...]] = {
    "op": (str,),
    "case": (str,),
    "dtype": (str,),
    "mode": (str,),
    "device": (str,),
    "backend": (str,),
    "threads": (int,),
    "allocator": (str,),
    "status": (str,),
    "reason": (str, None),
    "bar": (*NUMBER, None),
    "bars": (dict,),
    "memory_bar": (*NUMBER, None),
    "candidates": (list,),
}
CANDIDATE_FIELDS: dict[str, tuple[type | None, ...]] = {
    "name": (str,),
    "role": (str,),
    "status": (str,),
    "reason": (str, None),
    "p20": (*NUMBER, None),
    "p50": (*NUMBER, None),
    "p80": (*NUMBER, None),
    "n": (int,),
    "error": (*NUMBER, None),
    "peak_bytes": (int, None),
}
# Present only where the case ran.
FIGURE_FIELDS: dict[str, tuple[type | None, ...]] = {
    "ratio": (*NUMBER, None),
    "best_peer": (str, None),
    "peer_ratios": (dict,),
    "memory_ratio": (*NUMBER, None),
    "floor_seconds": (*NUMBER, None),
    "floor_share": (*NUMBER, None),
    "met": (bool, None),
}
CASE_STATUSES = ("ok", "failed", "unavailable")
CANDIDATE_STATUSES = ("ok", "failed", "unavailable", "skipped")

Key = tuple[str, str, str, str, str, str, int, str]


class RecordError(ValueError):
    """Not a usable record. The message names the file, the field and what was expected."""


def make_record(
    results: Sequence[Mapping[str, object]],
    *,
    environment: Mapping[str, object],
    limits: Mapping[str, object] | None,
    settings: Mapping[str, object],
) -> dict[str, object]:
    """A record of the current schema, dated now."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": dict(environment),
        "limits": None if limits is None else dict(limits),
        "settings": dict(settings),
        "results": [dict(result) for result in results],
    }


def save(record: Mapping[str, object], path: Path) -> None:
    """Write a record so that ``path`` holds either the old file or the whole new one.

    Raises:
        RecordError: the record is malformed, or a number in it is not finite.
        OSError: the folder does not exist or cannot be written.
    """
    validate(record, source="record")
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"record: cannot be written as JSON: {error}") from None
    # In the same folder: a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp made it private; a record is as readable as any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, object]:
    """Read and check a record.

    Raises:
        RecordError: the file is missing, not JSON, of another schema or version, or incomplete.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: not JSON: {error}") from None
    validate(record, source=str(path))
    return record


def validate(record: object, *, source: str) -> None:
    """Check a record's schema.

    Raises:
        RecordError: naming the first field that is wrong.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"{source}: expected an object, got {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise RecordError(f"{source}: schema: expected {SCHEMA!r}, got {record.get('schema')!r}")
    if record.get("version") != VERSION:
        raise RecordError(f"{source}: version: expected {VERSION}, got {record.get('version')!r}")
    _fields(record, source, {"created": (str,), "environment": (dict,), "limits": (dict, None),
                             "settings": (dict,), "results": (list,)})  # fmt: skip
    seen: set[Key] = set()
    for index, result in enumerate(record["results"]):
        where = f"{source}: results[{index}]"
        if not isinstance(result, Mapping):
            raise RecordError(f"{where}: expected an object, got {type(result).__name__}")
        _fields(result, where, RESULT_FIELDS)
        _choice(result, where, CASE_STATUSES)
        if result["status"] == "ok":
            _fields(result, where, FIGURE_FIELDS)
        for number, candidate in enumerate(result["candidates"]):
            _candidate(candidate, f"{where}.candidates[{number}]")
        if key_of(result) in seen:
            raise RecordError(f"{where}: {label(key_of(result))} appears twice")
        seen.add(key_of(result))


def _candidate(candidate: object, where: str) -> None:
    if not isinstance(candidate, Mapping):
        raise RecordError(f"{where}: expected an object, got {type(candidate).__name__}")
    _fields(candidate, where, CANDIDATE_FIELDS)
    _choice(candidate, where, CANDIDATE_STATUSES)
    if candidate["status"] == "ok":
        times = [candidate[name] for name in ("p20", "p50", "p80")]
        if any(time is None for time in times) or candidate["n"] < 1:
            raise RecordError(f"{where}: status is 'ok' but p20, p50, p80 or n is missing")
        if not 0 < times[0] <= times[1] <= times[2]:
            raise RecordError(f"{where}: expected 0 < p20 <= p50 <= p80, got {times}")
    elif candidate["reason"] is None:
        raise RecordError(f"{where}: status {candidate['status']!r} without a reason")


def _fields(
    value: Mapping[str, object], where: str, fields: Mapping[str, tuple[type | None, ...]]
) -> None:
    for name, types in fields.items():
        if name not in value:
            raise RecordError(f"{where}: field {name!r} is missing")
        item = value[name]
        if item is None and None in types:
            continue
        # bool is an int to Python but not to a reader of the file.
        right = isinstance(item, tuple(t for t in types if t is not None))
        if not right or (isinstance(item, bool) and bool not in types):
            expected = " or ".join("null" if t is None else t.__name__ for t in types)
            raise RecordError(f"{where}.{name}: expected {expected}, got {type(item).__name__}")


def _choice(value: Mapping[str, object], where: str, choices: Sequence[str]) -> None:
    if value["status"] not in choices:
        raise RecordError(
            f"{where}.status: expected one of {', '.join(choices)}, got {value['status']!r}"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def key_of(result: Mapping[str, object]) -> Key:
    """What makes two results figures of the same thing."""
    names = ("op", "case", "dtype", "mode", "device", "backend", "threads", "allocator")
    return tuple(result[name] for name in names)


def label(key: Key) -> str:
    """A key for people."""
    op, case, dtype, mode, device, backend, threads, allocator = key
    where = device if backend == device else f"{backend} on {device}"
    return f"{op}/{case} {dtype} {mode} ({where}, {threads} threads, {allocator} allocator)"


@dataclass(frozen=True)
class Change:
    """transfuse's median in two records: ``ratio`` new / old, ``status`` of CHANGE_STATUSES."""

    key: Key
    status: str
    old: float | None
    new: float | None
    ratio: float | None
    note: str = ""


CHANGE_STATUSES = ("same", "faster", "slower", "lost", "not run", "new")


def compare(
    old: Mapping[str, object], new: Mapping[str, object], *, fail_over: float
) -> list[Change]:
    """What changed for transfuse between two records.

    A case is "slower" when its median grew by more than the factor ``fail_over``, "lost" when it
    was timed before and now failed or could not run. Both are regressions. A case the new record
    does not contain is "not run" and no regression: a run may be asked for part of the cases.

    Raises:
        ValueError: ``fail_over`` is not a factor above 1.
    """
    # The negation refuses NaN as well.
    if not fail_over > 1.0 or fail_over == float("inf"):
        raise ValueError(f"fail_over: expected a finite factor above 1, got {fail_over}")
    before = {key_of(result): result for result in old["results"]}
    after = {key_of(result): result for result in new["results"]}
    changes = []
    for key, result in before.items():
        was, _ = _own_median(result)
        if key not in after:
            changes.append(Change(key, "not run", was, None, None))
            continue
        now, reason = _own_median(after[key])
        if was is None:
            status = "same" if now is None else "new"
            changes.append(Change(key, status, was, now, None))
        elif now is None:
            changes.append(Change(key, "lost", was, None, None, reason))
        else:
            ratio = now / was
            status = (
                "slower" if ratio > fail_over else "faster" if ratio < 1 / fail_over else "same"
            )
            changes.append(Change(key, status, was, now, ratio))
    for key, result in after.items():
        if key not in before:
            changes.append(Change(key, "new", None, _own_median(result)[0], None))
    return changes


def regressions(changes: Sequence[Change]) -> list[Change]:
    """The changes that should fail a build."""
    return [change for change in changes if change.status in ("slower", "lost")]


def environment_differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Differences between two environments that make times incomparable, for people."""
    names = (
        "cpu",
        "cpu_flags",
        "cpus_usable",
        "governor",
        "torch",
        "torch_cpu_capability",
        "device",
    )
    return [
        f"{name}: {old['environment'].get(name)} -> {new['environment'].get(name)}"
        for name in names
        if old["environment"].get(name) != new["environment"].get(name)
    ]


def _own_median(result: Mapping[str, object]) -> tuple[float | None, str]:
    """transfuse's median, or None and why there is none."""
    if result["status"] != "ok":
        return None, str(result["reason"])
    for candidate in result["candidates"]:
        if candidate["role"] == "transfuse":
            return candidate["p50"], str(candidate["reason"])
    return None, "no transfuse candidate"
