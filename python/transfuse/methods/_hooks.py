"""What patches made of forward hooks share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from transfuse._registry import near_matches


class HookHandle:
    """Hooks (or anything with ``remove``) that are taken off together.

    ``with handle: ...`` removes on leaving, also after an exception. Removal restores the model
    exactly; several handles may be removed in any order.

    Args:
        layers: Names of the patched layers.
        parts: What is removed.
    """

    def __init__(self, layers: tuple[str, ...], parts: list[Any]) -> None:
        self.layers = layers
        self._parts = parts

    @property
    def installed(self) -> bool:
        """Whether the hooks are still in the model."""
        return bool(self._parts)

    def remove(self) -> None:
        """Take every hook off; a second call does nothing."""
        for part in self._parts:
            part.remove()
        self._parts = []

    def __enter__(self) -> HookHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "installed" if self.installed else "removed"
        return f"{type(self).__name__}({len(self.layers)} layers, {state})"


class Replaced:
    """A method of one module instance, replaced until removed.

    Args:
        module: The module.
        name: The method's name; the instance must not have its own already.
        function: What is called instead.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._module, self._name = module, name
        functools.update_wrapper(function, getattr(module, name))
        setattr(module, name, function)

    def remove(self) -> None:
        """Give the instance its class's method back."""
        delattr(self._module, self._name)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor:
    """The first argument of a call, by position or by name."""
    return args[0] if args else kwargs[name]


def with_first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another first argument."""
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, name: value}


def choose_names(found: Iterable[str], layers: Sequence[int | str] | None, kind: str) -> list[str]:
    """The names that are asked for, in the order of ``found``.

    Args:
        found: All names there are.
        layers: Names of them, or of modules whose parts are all meant; None: all.
        kind: What the names stand for, in messages.

    Raises:
        ValueError: A name that matches none.
        TypeError: One string, or an entry that is no name.
    """
    found = list(found)
    if layers is None:
        return found
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}")
    chosen: set[str] = set()
    for entry in layers:
        if not isinstance(entry, str):
            raise TypeError(f"layers: expected names of a {kind}, got {entry!r}")
        matches = {name for name in found if name == entry or name.startswith(entry + ".")}
        if not matches:
            raise ValueError(f"layers: no {kind} matches {entry!r}; {near_matches(entry, found)}")
        chosen |= matches
    return [name for name in found if name in chosen]
