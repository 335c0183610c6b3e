"""A pytest plugin for runs under Triton's interpreter: the same results in a fraction of the time.

What is left out changes no result:

- The interpreter replaces the functions of ``triton.language`` by its own at every launch and at
  every call of a device function inside a kernel. Here that is done once per process.
- It computes whether integer operations overflow, then drops the answer (it would be read in its
  debug mode). Here that is not computed.

``TRITON_INTERPRET=1 pytest -p transfuse.testing.interpreter tests/ops/test_triton_mix.py``
"""

from __future__ import annotations

import dataclasses
from typing import Any


class _Kept:
    """The scope of replacements that stay."""

    def restore(self) -> None:
        pass


def hasten() -> None:
    """Change the interpreter for good: for a process that is there for it alone."""
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    seen: set[int] = set()

    def replace_once(fn: Any) -> _Kept:
        # What is replaced depends on the names by which the function's module knows the language.
        if id(fn.__globals__) not in seen:
            replace(fn)
            seen.add(id(fn.__globals__))
        return _Kept()

    interpreter._patch_lang = replace_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


pytest_configure = hasten
