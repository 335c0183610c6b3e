"""The examples of every docstring, and the Python blocks of README.md, run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import transfuse
import transfuse.ops

README = Path(__file__).resolve().parents[1] / "README.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _modules() -> list[str]:
    """Names only: a module that cannot be imported here is one failing (or skipped) test."""
    found = ["transfuse"]
    folders = [(transfuse.__path__, "transfuse.")]
    while folders:
        path, prefix = folders.pop()
        for module in pkgutil.iter_modules(path, prefix):
            name = module.name.removeprefix(prefix)
            if name == "__main__" or Path(module.module_finder.path, f"{name}.so").exists():
                continue
            found.append(module.name)
            if module.ispkg:
                folders.append(([str(Path(module.module_finder.path, name))], f"{module.name}."))
    return sorted(name for name in found if not name.endswith("._C"))


@pytest.mark.parametrize("name", _modules())
def test_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "transfuse[" not in str(error):  # the one message that names an extra
            raise
        pytest.skip(str(error))
    result = doctest.testmod(module, optionflags=FLAGS)
    assert result.failed == 0


@pytest.mark.parametrize(
    "name", [n for n in transfuse.ops.__all__ if inspect.isfunction(getattr(transfuse.ops, n))]
)
def test_public_ops_are_documented(name):
    text = inspect.getdoc(getattr(transfuse.ops, name))
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name} has no {section}"


def _blocks() -> list[tuple[int, str]]:
    """(line, code) of the Python blocks of README.md."""
    if not README.is_file():
        return []
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)), match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.skipif(not README.is_file(), reason="not in a source tree")
def test_readme():
    """All blocks in order, each going on where the one before stopped."""
    blocks = _blocks()
    assert blocks
    names = {"__name__": "readme"}
    for line, code in blocks:
        # Leading newlines, so that a traceback names the line of README.md.
        exec(compile("\n" * line + code, str(README), "exec"), names)
