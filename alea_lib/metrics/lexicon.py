"""The 80 COCO categories and the words that name them (data: ``lexicon.yaml`` beside this file)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

LEXICON_FILE = Path(__file__).with_name("lexicon.yaml")
SCOPES = ("every", "strict")  # which families read a table of phrases: all of them, or `strict` alone


@dataclass(frozen=True)
class Category:
    """One COCO category. ``words`` are singular, lower-case, of one or two words; ``name`` is one of them."""

    id: int
    name: str
    supercategory: str
    words: tuple[str, ...]
    plural: str


@dataclass(frozen=True)
class Lexicon:
    """All categories in COCO's order, with the look-ups that parsers and worlds need.

    ``phrases``: scope to {(first, second): category or None}, two words read as one; None = no object.
    ``verbs``: words that are verbs as well as objects.
    """

    categories: tuple[Category, ...]
    phrases: dict[str, dict[tuple[str, str], str | None]]
    verbs: frozenset[str]

    @functools.cached_property
    def word_to_category(self) -> dict[str, str]:
        """Every word to the name of its category."""
        return {word: c.name for c in self.categories for word in c.words}

    @functools.cached_property
    def category_ids(self) -> dict[str, int]:
        """Name to COCO's id."""
        return {c.name: c.id for c in self.categories}

    @property
    def names(self) -> tuple[str, ...]:
        """The category names in COCO's order."""
        return tuple(self.category_ids)

    def plural(self, name: str) -> str:
        """The plural of a category's name: ``knife`` -> ``knives``, ``person`` -> ``people``."""
        return next(c.plural for c in self.categories if c.name == name)


@functools.cache
def load_lexicon() -> Lexicon:
    """The lexicon, read once a process."""
    data = yaml.safe_load(LEXICON_FILE.read_text(encoding="utf-8"))
    categories = tuple(
        Category(c["id"], c["name"], c["supercategory"], tuple(c["words"]), c.get("plural") or c["name"] + "s")
        for c in data["categories"]
    )
    return Lexicon(categories, _phrases(categories, data), frozenset(data["verbs"]))


def _phrases(categories: tuple[Category, ...], data: dict) -> dict[str, dict[tuple[str, str], str | None]]:
    """Tables of two-word phrases by scope; ``strict`` holds only what it adds to ``every``."""
    singles = {c.name: [w for w in c.words if " " not in w] for c in categories}
    tables: dict[str, dict[tuple[str, str], str | None]] = {scope: {} for scope in SCOPES}
    for c in categories:
        tables["every"].update({_pair(w): c.name for w in c.words if " " in w})
    for scope in SCOPES:
        for modifier, names in data["modifiers"].get(scope, {}).items():
            tables[scope].update({(modifier, w): name for name in names for w in singles[name]})
        tables[scope].update({_pair(phrase): None for phrase in data["not_objects"].get(scope, [])})
        tables[scope].update({_pair(p): name for p, name in data["heads"].get(scope, {}).items()})
    return tables


def _pair(phrase: str) -> tuple[str, str]:
    first, second = phrase.split(" ")
    return first, second
