"""``python -m transfuse.methods``: list the methods, print or maintain their table in a document.

The table lives between the lines ``<!-- methods:begin -->`` and ``<!-- methods:end -->``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transfuse import methods

BEGIN = "<!-- methods:begin -->"
END = "<!-- methods:end -->"


def replace_table(text: str, table: str) -> str:
    """Return ``text`` with the block between the two markers replaced by ``table``.

    Raises:
        ValueError: The markers are not there exactly once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the lines {BEGIN} and {END} once each, in this order")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m transfuse.methods", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the table (Markdown)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", metavar="FILE", type=Path, help="fail if FILE's table is stale")
    action.add_argument("--write", metavar="FILE", type=Path, help="bring FILE's table up to date")
    args = parser.parse_args(argv)

    document = args.write if args.check is None else args.check
    if document is None:
        if args.table:
            print(methods.table(), end="")
        else:
            print("\n".join(methods.list()))
        return 0
    try:
        text = document.read_text(encoding="utf-8")
        wanted = replace_table(text, methods.table())
    except (OSError, ValueError) as error:
        print(f"{document}: {error}", file=sys.stderr)
        return 2
    if text == wanted:
        return 0
    if args.check is not None:
        print(
            f"{document}: the method table is stale; "
            f"run: python -m transfuse.methods --table --write {document}",
            file=sys.stderr,
        )
        return 1
    document.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
