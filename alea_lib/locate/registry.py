"""The table of all locators. To add one, write it in ``layers.py`` or ``heads.py`` (the page "Add your locator")."""

from __future__ import annotations

import pandas as pd

from . import heads as _heads  # noqa: F401  (registers its locators)
from . import layers as _layers  # noqa: F401
from .evidence import HEAD_LOCATORS, LAYER_LOCATORS, TARGETS, Locator  # noqa: F401


def known(target: str, name: str) -> Locator:
    """The row of a locator. KeyError names the ones there are."""
    if name not in TARGETS[target]:
        raise KeyError(f"unknown locator {name!r} of {target}s; there are {sorted(TARGETS[target])}")
    return TARGETS[target][name]


def locators(layers: int = 32, heads: int = 32) -> pd.DataFrame:
    """All locators: target, locator, formula, source, symmetry, and the passes a pair for a model of this size."""
    rows = [
        (row.target, row.name, row.formula, row.source, row.symmetry, *row.passes(layers, heads))
        for row in [*LAYER_LOCATORS.values(), *HEAD_LOCATORS.values()]
    ]
    columns = ["target", "locator", "formula", "source", "symmetry", "forwards", "backwards"]
    return pd.DataFrame(rows, columns=columns)
