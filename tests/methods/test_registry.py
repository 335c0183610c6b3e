"""The method table: lazy discovery, look-ups, duplicates, errors that help."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

import transfuse.methods as methods
import transfuse.ops
from transfuse._registry import KINDS, MethodRegistry

PAPER = {
    "title": "A Title",
    "authors": ("Ada Lovelace", "Charles Babbage"),
    "year": 1843,
    "venue": "TMLR",
    "arxiv": None,
    "repository": None,
}


def test_importing_methods_loads_no_method_and_listing_neither():
    script = (
        "import sys, transfuse, transfuse.methods as methods\n"
        "names = methods.list()\n"
        "loaded = [m for m in sys.modules if m.startswith('transfuse.methods.')]\n"
        "print(len(names), loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split(maxsplit=1) == [str(len(methods.list())), "[]\n"]


def test_every_listed_method_registers_itself_under_its_place():
    assert "style_injection" in methods.list()
    for slug in methods.list():
        card = methods.card(slug)
        assert card.slug == slug
        assert card.entry.split(":")[0] == f"transfuse.methods.{card.domain}.{slug}"
        assert methods.get(slug).__qualname__ == card.entry.split(":")[1]


@pytest.mark.parametrize("slug", methods.list())
def test_cards_are_complete(slug):
    card = methods.card(slug)
    module = sys.modules[card.entry.split(":")[0]]
    assert card.kind in KINDS
    assert 1990 <= card.year <= 2100
    assert card.summary.endswith(".")
    assert card.paper_url is not None
    assert card.paper_url.startswith("https://")
    if card.arxiv is not None:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
        assert card.arxiv in module.__doc__, "the module docstring cites another paper"
    flat = " ".join(module.__doc__.split())
    assert card.title in flat
    assert str(card.year) in flat
    assert all(author.split()[-1] in flat for author in card.authors)
    for op in card.ops:
        assert hasattr(transfuse.ops, op), f"{slug} claims to use {op}, which is not an op"


def test_filters():
    assert "style_injection" in methods.list(kind="patch")
    assert "style_injection" in methods.list(op="attend")
    assert "style_injection" in methods.list(kind="patch", op="adain")
    assert "style_injection" not in methods.list(kind="loss")
    with pytest.raises(ValueError, match="kind must be one of loss, optimizer"):
        methods.list(kind="losses")
    with pytest.raises(ValueError, match="'attnd'; did you mean 'attend'"):
        methods.list(op="attnd")


@pytest.mark.parametrize("look_up", [methods.get, methods.card])
def test_unknown_slug_lists_near_matches(look_up):
    with pytest.raises(ValueError, match="'style_injektion'; did you mean 'style_injection'"):
        look_up("style_injektion")
    with pytest.raises(ValueError, match=r"known: .*style_injection"):
        look_up("qqqq")


def test_duplicates_raise_and_name_both():
    registry = MethodRegistry()
    enter = registry.register(**PAPER, kind="loss", ops=("attend",))

    def first():
        """One."""

    def second():
        """Two."""

    assert enter(first) is first
    with pytest.raises(ValueError, match=r"already registered by .*first; .*second cannot"):
        enter(second)
    slug = first.__module__.split(".")[-1]
    assert registry.target(slug) is first
    assert registry.card(slug).summary == "One."


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "metrics"}, ValueError, "kind must be one of"),
        ({"authors": "Ada"}, TypeError, "authors must be a sequence"),
        ({"ops": "attend"}, TypeError, "ops must be a sequence"),
        ({"ops": ("a", "a")}, ValueError, "ops must name"),
        ({"authors": ()}, ValueError, "at least one author"),
        ({"title": ""}, ValueError, "needs a title"),
    ],
)
def test_registration_checks(change, error, match):
    with pytest.raises(error, match=match):
        MethodRegistry().register(**{**PAPER, "kind": "loss", "ops": ("attend",), **change})


def test_citations():
    card = methods.card("style_injection")
    assert card.citation == "Chung et al., CVPR 2024"
    assert card.paper_url == "https://arxiv.org/abs/2312.09008"
    two = dataclasses.replace(card, authors=("Ada Lovelace", "Charles Babbage"))
    assert two.citation.startswith("Lovelace and Babbage")
    one = dataclasses.replace(card, authors=("Ada Lovelace",), arxiv=None)
    assert one.citation.startswith("Lovelace, ")
    assert one.paper_url == card.repository
