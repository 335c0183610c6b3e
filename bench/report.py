"""Records for people: tables in the terminal, a plot in a file."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cases import Case, Unavailable
from .peers import Peer, require
from .records import Change, label

# Left edge of the plot, as a multiple of transfuse's time; a floor below it is not worth the room.
LEFT_EDGE = 0.1
# A file has no width; a terminal narrower than this wraps lines, which loses nothing.
FILE_WIDTH, LEAST_WIDTH = 400, 120


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, rich: bool = True
) -> str:
    """A table as text; drawn by ``rich`` where it is installed, aligned plain text elsewhere.

    The first column is left-aligned, like the last; numbers between them are right-aligned.
    """
    if rich:
        try:
            return _rich_table(title, columns, rows)
        except ImportError:
            pass
    return _plain_table(title, columns, rows)


def _left(index: int, count: int) -> bool:
    return index in (0, count - 1)


def _rich_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        drawn.add_column(
            column,
            justify="left" if _left(index, len(columns)) else "right",
            no_wrap=index != len(columns) - 1,
        )
    for row in rows:
        # Names and reasons may hold brackets, which rich would read as markup.
        drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
    terminal = sys.stdout.isatty()
    width = max(shutil.get_terminal_size().columns, LEAST_WIDTH) if terminal else FILE_WIDTH
    target = io.StringIO()
    Console(file=target, force_terminal=terminal, width=width).print(drawn)
    # rich pads every line to the table's width.
    lines = [line.rstrip() for line in target.getvalue().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [
        max(len(column), *(len(row[index]) for row in rows)) if rows else len(column)
        for index, column in enumerate(columns)
    ]
    count = len(columns)

    def line(cells: Sequence[str]) -> str:
        placed = (
            cell.ljust(widths[i]) if _left(i, count) else cell.rjust(widths[i])
            for i, cell in enumerate(cells)
        )
        return "  ".join(placed).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, line(columns), rule, *map(line, rows)]) + "\n"


def case_table(result: Mapping[str, object]) -> str:
    """Every candidate of one case."""
    name = f"{result['op']}/{result['case']} {result['dtype']} {result['mode']}: {result['title']}"
    if result["status"] != "ok":
        return f"{name}\n  {result['status']}: {result['reason']}\n"
    ours = next((c for c in result["candidates"] if c["role"] == "transfuse"), None)
    base = None if ours is None else ours["p50"]
    rows = []
    for candidate in result["candidates"]:
        p50 = candidate["p50"]
        note = "" if candidate["reason"] is None else candidate["reason"]
        if candidate["status"] != "ok":
            note = f"{candidate['status']}: {note}"
        rows.append([
            candidate["name"],
            _milliseconds(p50),
            _milliseconds(candidate["p20"]),
            _milliseconds(candidate["p80"]),
            str(candidate["n"]) if candidate["n"] else "-",
            "-" if p50 is None or base is None else f"{p50 / base:.2f} x",
            _number(candidate["gflops"]),
            _number(candidate["gbps"]),
            "-" if candidate["error"] is None else f"{candidate['error']:.1e}",
            _mebibytes(candidate["peak_bytes"]),
            note,
        ])  # fmt: skip
    columns = ("candidate", "p50 ms", "p20", "p80", "n", "time/ours", "GFLOP/s", "GB/s", "error",
               "peak MiB", "note")  # fmt: skip
    return table(name, columns, rows) + f"  inputs: {result['inputs']}; {_shape(result['shape'])}\n"


def summary_table(record: Mapping[str, object]) -> str:
    """One line per case: transfuse against the best peer, the bar and the floor."""
    rows = []
    for result in record["results"]:
        name = f"{result['op']}/{result['case']}"
        start = [name, result["dtype"], result["mode"], result["allocator"]]
        if result["status"] != "ok":
            rows.append([*start, *["-"] * 6, f"{result['status']}: {result['reason']}"])
            continue
        ours = next(c for c in result["candidates"] if c["role"] == "transfuse")
        memory = result["memory_ratio"]
        best = result["best_peer"]
        peer_time = next((c["p50"] for c in result["candidates"] if c["name"] == best), None)
        notes = [
            "" if best is None else f"best peer: {best}",
            "" if ours["status"] == "ok" else f"{ours['status']}: {ours['reason']}",
            _peer_bars(result),
            "" if memory is None else f"peak memory: smallest peer / ours = {memory:.1f}",
        ]
        rows.append([
            *start,
            _milliseconds(ours["p50"]),
            _milliseconds(peer_time),
            "-" if result["ratio"] is None else f"{result['ratio']:.2f} x",
            _bar(result["bar"], result["bars"], result["memory_bar"]),
            _verdict(result),
            "-" if result["floor_share"] is None else f"{100 * result['floor_share']:.0f} %",
            "; ".join(note for note in notes if note),
        ])  # fmt: skip
    columns = ("case", "dtype", "mode", "allocator", "ours ms", "best ms", "ratio", "bar", "met",
               "of floor", "note")  # fmt: skip
    return table("transfuse against the best peer", columns, rows) + _footnote(record)


def markdown_table(named: Mapping[str, Mapping[str, object]]) -> str:
    """Records by path as one Markdown table: what README shows of them."""
    lines = [
        "| case | dtype | mode | transfuse | best peer | ratio | of floor | record |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path, record in named.items():
        name = Path(path).stem
        for result in record["results"]:
            if result["status"] != "ok" or result["ratio"] is None:
                continue
            ours = next(c for c in result["candidates"] if c["role"] == "transfuse")
            best = next(c for c in result["candidates"] if c["name"] == result["best_peer"])
            share = result["floor_share"]
            floor = "-" if share is None else f"{100 * share:.0f} %"
            lines.append(
                f"| {result['title']} | {result['dtype']} | {result['mode']} "
                f"| {_milliseconds(ours['p50'])} ms "
                f"| {_milliseconds(best['p50'])} ms, {best['name']} | {result['ratio']:.2f} x "
                f"| {floor} | [{name}]({path}) |"
            )
    return "\n".join(lines)


def _footnote(record: Mapping[str, object]) -> str:
    environment, limits = record["environment"], record["limits"]
    lines = [
        f"  {environment['cpu']}, {environment['threads']} threads, torch {environment['torch']} "
        f"({environment['torch_cpu_capability']})"
    ]
    if limits is not None:
        peaks = ", ".join(f"{k} {v:.0f}" for k, v in limits["peak_gflops"].items())
        lines.append(f"  measured limits: {peaks} GFLOP/s, copy {limits['copy_gbps']:.0f} GB/s")
    results = [result for result in record["results"] if result["status"] == "ok"]
    if any(result["floor_share"] is not None and result["floor_share"] > 1 for result in results):
        lines.append(
            "  a share above 100 %: other work disturbed the measurement of the limits (or the "
            "inputs fit the caches); the floor says nothing here"
        )
    if any(result["met"] is not None and not result["bars_apply"] for result in results):
        lines.append(
            "  bars were set for 2 threads with AVX-512 and bf16 instructions; in parentheses: "
            "this run is not such a machine"
        )
    return "\n".join(lines) + "\n"


def _presence(peer: Peer) -> str:
    if peer.package is None:
        return "yes"
    try:
        require(peer.package)
    except Unavailable as error:
        return str(error)
    return "yes"


def _bar(bar: float | None, bars: Mapping[str, float], memory_bar: float | None) -> str:
    parts = [] if bar is None else [f"{bar:g} x"]
    if bars:
        parts.append(f"{len(bars)} peers")
    if memory_bar is not None:
        parts.append(f"memory {memory_bar:g} x")
    return ", ".join(parts) if parts else "-"


def _peer_bars(result: Mapping[str, object]) -> str:
    """Bars against single peers: what was reached and what was asked."""
    ratios = result["peer_ratios"]
    return "; ".join(
        f"{name} {f'{ratios[name]:.2f}' if name in ratios else '-'} of {bar:g} x"
        for name, bar in result["bars"].items()
    )


def _verdict(result: Mapping[str, object]) -> str:
    if result["met"] is None:
        return "-"
    word = "yes" if result["met"] else "no"
    return word if result["bars_apply"] else f"({word})"


def change_table(changes: Sequence[Change], *, fail_over: float) -> str:
    """Two records side by side."""
    rows = [
        [
            label(change.key),
            _milliseconds(change.old),
            _milliseconds(change.new),
            "-" if change.ratio is None else f"{change.ratio:.2f} x",
            change.status if not change.note else f"{change.status}: {change.note}",
        ]
        for change in changes
    ]
    columns = ("case", "old ms", "new ms", "new/old", "status")
    return table(f"transfuse, old against new (fails over {fail_over:g} x)", columns, rows)


def list_table(cases: Mapping[str, Sequence[Case]], peers: Mapping[str, Peer]) -> str:
    """What can be run."""
    rows = [
        [
            f"{op}/{case.name}",
            target.dtype,
            target.mode,
            _bar(target.bar, target.bars, target.memory_bar),
            str(target.quick) if target.quick > 0 else "",
            case.title + (" (only when named)" if case.hidden else ""),
        ]
        for op, members in cases.items()
        for case in members
        for target in case.targets
    ]
    columns = ("case", "dtype", "mode", "bar", "quick", "what")
    listing = table("cases", columns, rows)
    peer_rows = [
        [peer.name, "torch" if peer.package is None else peer.package, _presence(peer), peer.title]
        for peer in peers.values()
    ]
    return listing + "\n" + table("peers", ("peer", "package", "here", "what"), peer_rows)


def save_plot(record: Mapping[str, object], path: Path) -> str:
    """Write a PNG: each candidate's median as a multiple of transfuse's, bars and floor marked.

    Returns:
        One line saying what was written, or which extra is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: it needs matplotlib, pip install 'transfuse[plot]'"
    drawn = [
        result for result in record["results"] if result["status"] == "ok" and result["peer_ratios"]
    ]
    if not drawn:
        return "no plot: no case was timed against a peer"
    bars = sum(1 + len(result["peer_ratios"]) for result in drawn)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * bars + 0.3 * len(drawn)))
    position, ticks = 0.0, []
    names = sorted({name for result in drawn for name in result["peer_ratios"]})
    palette = pyplot.get_cmap("tab10")
    colours = {name: palette((index + 1) % 10) for index, name in enumerate(names)}
    for result in drawn:
        entries = [("transfuse", 1.0), *sorted(result["peer_ratios"].items(), key=lambda x: x[1])]
        top = position - 0.5
        for name, ratio in entries:
            axes.barh(position, ratio, height=0.9, color=colours.get(name, palette(0)))
            axes.text(ratio * 1.02, position, f"{name} {ratio:.2f}", va="center", fontsize=7)
            position += 1
        bottom = position - 0.5
        ticks.append(((top + bottom) / 2, _tick(result)))
        if result["floor_share"] is not None:
            axes.vlines(result["floor_share"], top, bottom, color="black", linestyle=":", lw=1.2)
        if result["bar"] is not None:
            axes.vlines(result["bar"], top, bottom, color="crimson", linestyle="--", lw=1.2)
        position += 0.8
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    widest = max(max(result["peer_ratios"].values()) for result in drawn)
    axes.set_xlim(LEFT_EDGE, 2.0 * max(widest, 1.0))
    axes.set_xlabel("median time / transfuse's   (dotted: floor, dashed: bar for the best peer)")
    environment = record["environment"]
    axes.set_title(
        f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
    return f"plot written: {path}"


def _tick(result: Mapping[str, object]) -> str:
    second = f"{result['dtype']} {result['mode']} ({result['allocator']})"
    return f"{result['op']}/{result['case']}\n{second}"


def _shape(shape: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
