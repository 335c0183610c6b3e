"""The support matrix of the documentation, made by trying.

``python -m transfuse.testing.matrix`` prints it; ``--write FILE`` puts it between the lines
``<!-- matrix:begin -->`` and ``<!-- matrix:end -->`` of a file; ``--check FILE`` fails if what
stands there is not what this machine finds. A row that cannot be tried here (a GPU backend on a
machine without one) is left as it stands in the file.

Every cell is the outcome of checks of ``transfuse.testing.functorch`` on the first ``gradcheck``
case of the op's spec: *yes* (right), *refused* (raises), or the dtypes for which it is right.
Compilation is tried in the first dtype only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transfuse.testing import backends, functorch
from transfuse.testing.spec import OpSpec
from transfuse.testing.specs import all_specs

BEGIN = "<!-- matrix:begin -->"
END = "<!-- matrix:end -->"

# Column -> the checks it stands for.
PROBES = {
    "forward": ("inference mode",),
    "backward": ("backward", "func.grad"),
    "double backward": ("double backward", "jvp of grad", "grad of jvp"),
    "forward mode": ("func.jvp", "forward_ad"),
    "vmap": ("vmap, all tensors", "vmap of grad"),
    "compile": ("compile", "compile, backward"),
}
COLUMNS = ("op", "backend", "dtypes", *(c for c in PROBES if c != "forward"))


@dataclass(frozen=True)
class Row:
    """One op on one backend; ``cells`` is None where it could not be tried, for a ``reason``."""

    op: str
    backend: str
    cells: tuple[str, ...] | None
    reason: str = ""

    def text(self, previous: str | None = None) -> str:
        """The row in Markdown; an untried one as it was before, if it was there."""
        if self.cells is not None:
            return _line((f"`{self.op}`", self.backend, *self.cells))
        if previous is not None:
            return previous
        blank = ("",) * (len(COLUMNS) - 3)
        return _line((f"`{self.op}`", self.backend, f"not tried here: {self.reason}", *blank))


def probe(specs: Sequence[OpSpec]) -> list[Row]:
    """Try every op on every backend it has."""
    return [_row(spec, backend) for spec in specs for backend in spec.backends]


def render(rows: Sequence[Row], previous: str = "") -> str:
    """The table in Markdown; rows that could not be tried are taken from ``previous``."""
    known = _rows_of(previous)
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [row.text(known.get((f"`{row.op}`", row.backend))) for row in rows]
    return "\n".join(lines)


def between(text: str) -> str:
    """What stands between the markers.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"expected the lines {BEGIN} and {END}, in this order")
    return text[start + len(BEGIN) : end].strip("\n")


def replace(text: str, table: str) -> str:
    """The text with another table between the markers."""
    between(text)  # refuses a text without the markers
    head, tail = text.split(BEGIN, 1)
    rest = tail.split(END, 1)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{rest}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m transfuse.testing.matrix", description="Support matrix of all ops."
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE", help="update the table in a file")
    action.add_argument("--check", type=Path, metavar="FILE", help="fail if the table is stale")
    options = parser.parse_args(arguments)
    rows = probe(all_specs())
    path = options.check if options.check is not None else options.write
    if path is None:
        print(render(rows))
        return 0
    text = path.read_text(encoding="utf-8")
    table = render(rows, between(text))
    if options.write is not None:
        path.write_text(replace(text, table), encoding="utf-8")
        return 0
    if between(text) == table:
        return 0
    print(
        f"{path}: the support matrix is stale; run "
        f"`python -m transfuse.testing.matrix --write {path}`. Found here:\n{table}",
        file=sys.stderr,
    )
    return 1


def _row(spec: OpSpec, backend: str) -> Row:
    tried = [d for d in spec.dtypes if backends.unavailable(spec, backend, d) is None]
    if not tried:
        reason = backends.unavailable(spec, backend, spec.dtypes[0])
        return Row(spec.name, backend, None, str(reason))
    supported = [d for d in tried if _outcome(spec, backend, d, "forward") == "yes"]
    cells = [_names(supported)]
    for column in PROBES:
        if column == "forward":
            continue
        asked = supported[:1] if column == "compile" else supported
        cells.append(_merge({d: _outcome(spec, backend, d, column) for d in asked}))
    return Row(spec.name, backend, tuple(cells))


def _outcome(spec: OpSpec, backend: str, dtype: torch.dtype, column: str) -> str:
    """``"yes"``, ``"refused"`` or ``"wrong"`` over the checks of a column."""
    case = spec.case(spec.gradcheck[0])
    found = set()
    for check in functorch.CHECKS:
        if check.name in PROBES[column]:
            outcome = functorch.run(
                check,
                spec,
                case,
                backend=backend,
                dtype=dtype,
                device=backends.device_of(backend),
            )
            found.add(outcome.status)
    if "wrong" in found:
        return "wrong"
    return "refused" if "raises" in found else "yes"


def _merge(outcomes: dict[torch.dtype, str]) -> str:
    kinds = set(outcomes.values())
    if len(kinds) == 1:
        return kinds.pop()
    parts = []
    for kind in ("yes", "refused", "wrong"):
        dtypes = [d for d, own in outcomes.items() if own == kind]
        if dtypes:
            parts.append(f"{kind}: {_names(dtypes)}")
    return "; ".join(parts)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rows_of(table: str) -> dict[tuple[str, str], str]:
    rows = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(COLUMNS):
            rows[cells[0], cells[1]] = line
    return rows


if __name__ == "__main__":
    sys.exit(main())
