"""The specs of all ops: one module per op family, each with a tuple ``SPECS``.

Every module here whose name does not start with an underscore is one; a new family adds a file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from transfuse.testing.spec import OpSpec


@functools.cache
def all_specs() -> tuple[OpSpec, ...]:
    """Every spec of every family, families in alphabetical order.

    Raises:
        ValueError: two specs have one name.
    """
    families = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_")
    found: list[OpSpec] = []
    for family in families:
        found.extend(importlib.import_module(f"{__name__}.{family}").SPECS)
    names = [spec.name for spec in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"specs: names must be unique, got {twice} twice")
    return tuple(found)


def find_spec(name: str) -> OpSpec:
    """The spec of a name.

    Raises:
        KeyError: there is none.
    """
    for spec in all_specs():
        if spec.name == name:
            return spec
    raise KeyError(f"no spec named {name!r}; specs: {[spec.name for spec in all_specs()]}")
