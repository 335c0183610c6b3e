"""The table of methods: what each one is, where it was published, which ops it calls.

A method module registers its main class or function once::

    @register(title=..., authors=..., year=..., venue=..., arxiv=..., repository=..., kind=...,
              ops=...)

The slug and the domain are the names of the module and of the package that holds it, so they
cannot disagree with the file's place. Nothing here imports a method module.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

KINDS = (
    "loss",
    "optimizer",
    "patch",
    "merger",
    "aggregator",
    "metric",
    "layer",
    "saliency",
    "guidance",
    "sampler",
    "procedure",
)

T = TypeVar("T", bound=Callable[..., object])


@dataclass(frozen=True, kw_only=True)
class MethodCard:
    """The facts about one method.

    Args:
        slug: Name of the module, for example ``"style_injection"``.
        domain: Name of the package that holds the module, for example ``"diffusion_control"``.
        kind: One of :data:`KINDS`.
        ops: Names in ``transfuse.ops`` that the method calls; empty for one of torch operations.
        title: Title of the paper.
        authors: Authors in the paper's order.
        year: Year of publication.
        venue: Conference or journal, for example ``"CVPR"``.
        arxiv: arXiv identifier without version, or None.
        repository: Address of the official code, or None.
        entry: The registered class or function as ``module:name``.
        summary: First line of the entry's docstring.
    """

    slug: str
    domain: str
    kind: str
    ops: tuple[str, ...]
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    arxiv: str | None
    repository: str | None
    entry: str
    summary: str

    @property
    def paper_url(self) -> str | None:
        """Address of the paper: arXiv if it is there, else the repository, else None."""
        if self.arxiv is not None:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return self.repository

    @property
    def citation(self) -> str:
        """Short citation, for example ``"Chung et al., CVPR 2024"``."""
        family = [name.split()[-1] for name in self.authors]
        if len(family) == 1:
            who = family[0]
        elif len(family) == 2:
            who = f"{family[0]} and {family[1]}"
        else:
            who = f"{family[0]} et al."
        return f"{who}, {self.venue} {self.year}"


@dataclass(frozen=True)
class _Entry:
    card: MethodCard
    target: Callable[..., object]


class MethodRegistry:
    """Slug -> (card, registered object). One instance serves the package; tests make their own."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def register(
        self,
        *,
        title: str,
        authors: Iterable[str],
        year: int,
        venue: str,
        arxiv: str | None,
        repository: str | None,
        kind: str,
        ops: Iterable[str],
    ) -> Callable[[T], T]:
        """Return the decorator that enters a class or function into the table.

        Raises:
            ValueError: Unknown kind, missing paper data, or a slug that is taken.
            TypeError: ``authors`` or ``ops`` given as one string.
        """
        for name, group in (("authors", authors), ("ops", ops)):
            if isinstance(group, str):
                raise TypeError(f"{name} must be a sequence of strings, got the string {group!r}")
        authors, ops = tuple(authors), tuple(ops)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if not title or not venue or not authors or not all(authors):
            raise ValueError("a method needs a title, a venue and at least one author")
        if len(set(ops)) != len(ops):
            raise ValueError(f"ops must name each op used once, got {ops}")

        def enter(target: T) -> T:
            parts = target.__module__.split(".")
            slug, domain = parts[-1], parts[-2] if len(parts) > 1 else ""
            entry = f"{target.__module__}:{target.__qualname__}"
            if slug in self._entries:
                raise ValueError(
                    f"method {slug!r} is already registered by "
                    f"{self._entries[slug].card.entry}; {entry} cannot take the same name"
                )
            doc = target.__doc__
            card = MethodCard(
                slug=slug,
                domain=domain,
                kind=kind,
                ops=ops,
                title=title,
                authors=authors,
                year=year,
                venue=venue,
                arxiv=arxiv,
                repository=repository,
                entry=entry,
                summary="" if doc is None else doc.strip().splitlines()[0],
            )
            self._entries[slug] = _Entry(card, target)
            return target

        return enter

    def card(self, slug: str) -> MethodCard:
        """The card of a registered slug (KeyError when absent)."""
        return self._entries[slug].card

    def target(self, slug: str) -> Callable[..., object]:
        """The registered class or function of a slug (KeyError when absent)."""
        return self._entries[slug].target

    def __contains__(self, slug: object) -> bool:
        return slug in self._entries


REGISTRY = MethodRegistry()
register = REGISTRY.register


def near_matches(name: str, known: Iterable[str]) -> str:
    """Text for an error about an unknown name: the closest known names, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "known: " + (", ".join(known) if known else "none")
