"""Published methods built on ``transfuse.ops``, one module each.

``list()`` names them, ``get(slug)`` returns a method's main class or function, ``card(slug)`` its
paper data. Names come from a scan of the package's file names, so importing ``transfuse.methods``
loads no method; a method's module is imported when it, or something only its card knows, is
asked for.

Example:
    >>> import transfuse.methods as methods
    >>> "style_injection" in methods.list()
    True
    >>> methods.card("style_injection").venue
    'CVPR'
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from transfuse._registry import KINDS, REGISTRY, MethodCard, near_matches

__all__ = ["KINDS", "MethodCard", "card", "get", "list", "table"]


@cache
def _modules() -> dict[str, str]:
    """Slug -> full module name, from the file names of the domain packages alone."""
    found: dict[str, str] = {}
    for domain in pkgutil.iter_modules(__path__):
        if not domain.ispkg or domain.name.startswith("_"):
            continue
        folders = [f"{folder}/{domain.name}" for folder in __path__]
        for module in pkgutil.iter_modules(folders):
            if module.name.startswith("_"):
                continue
            name = f"{__name__}.{domain.name}.{module.name}"
            if module.name in found:
                raise ValueError(
                    f"two method modules are called {module.name!r}: {found[module.name]}, {name}"
                )
            found[module.name] = name
    return dict(sorted(found.items()))


def _load(slug: str) -> None:
    modules = _modules()
    if slug not in modules:
        raise ValueError(f"unknown method {slug!r}; {near_matches(str(slug), modules)}")
    importlib.import_module(modules[slug])
    if slug not in REGISTRY:
        raise RuntimeError(f"{modules[slug]} does not register a method")


def list(*, kind: str | None = None, op: str | None = None) -> tuple[str, ...]:
    """Slugs of all methods, in alphabetical order.

    Args:
        kind: Keep methods of this kind (one of :data:`KINDS`).
        op: Keep methods that call this op, for example ``"attend"``.

    Returns:
        The slugs. Without a filter no method module is imported; with one, all are.

    Raises:
        ValueError: Unknown kind, or an op that no method uses.
    """
    slugs = tuple(_modules())
    if kind is None and op is None:
        return slugs
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    cards = [card(slug) for slug in slugs]
    used = {name for entry in cards for name in entry.ops}
    if op is not None and op not in used:
        raise ValueError(f"no method uses an op called {op!r}; {near_matches(str(op), used)}")
    return tuple(
        entry.slug
        for entry in cards
        if (kind is None or entry.kind == kind) and (op is None or op in entry.ops)
    )


def get(slug: str):
    """The main class or function of a method.

    Args:
        slug: A name from :func:`list`.

    Returns:
        The object its module registered.

    Raises:
        ValueError: Unknown slug; the message lists near matches.
    """
    _load(slug)
    return REGISTRY.target(slug)


def card(slug: str) -> MethodCard:
    """Paper data, domain, kind and ops of a method (ValueError for an unknown slug)."""
    _load(slug)
    return REGISTRY.card(slug)


def table() -> str:
    """All methods as a Markdown table: method, domain, kind, ops used, paper."""
    rows = ["| method | domain | kind | ops used | paper |", "| --- | --- | --- | --- | --- |"]
    for slug in list():
        entry = card(slug)
        title = entry.title.replace("|", "\\|")
        if entry.paper_url is not None:
            title = f"[{title}]({entry.paper_url})"
        ops = ", ".join(f"`{name}`" for name in entry.ops)
        domain = entry.domain.replace("_", " ")
        rows.append(f"| `{slug}` | {domain} | {entry.kind} | {ops} | {title} ({entry.citation}) |")
    return "\n".join(rows) + "\n"
