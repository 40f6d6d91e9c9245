"""One row a locator. To add one: write a function of :class:`Evidence` in ``layers.py`` or ``heads.py``, register it,
and add its test of a known answer (the page "Add your locator").

@layer_locator("my-distance", needs=("states",), cost=2, symmetry="even", formula="...", source="...")
def my_distance(e):
    return e["states"]["geometry"][:, 1:, 0]  # [N, L], larger = more suspect
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

SYMMETRIES = ("even", "odd", "none")
Cost = int | Callable[[int, int], float]


@dataclass(frozen=True)
class Locator:
    """``function(evidence)`` gives [N,L] (target ``layer``) or [N,L,H] (``head``), larger = more suspect.

    ``symmetry``: what swapping the two answers of each pair (and what is wrong in them) does to the scores: nothing
    (``even``), turn their sign (``odd``), neither. ``needs``: what is collected for it; ``image``: it is meaningless
    without one. ``cost``, ``backward``: forward and backward passes a pair with the standard settings, numbers or
    functions of the numbers of layers and heads.
    """

    name: str
    target: str
    function: Callable
    formula: str
    source: str
    symmetry: str
    needs: tuple[str, ...] = ()
    image: bool = False
    cost: Cost = 0
    backward: Cost = 0

    def passes(self, layers: int, heads: int) -> tuple[float, float]:
        """Forward and backward passes a pair that the row claims for a model of this size."""
        return tuple(float(c(layers, heads) if callable(c) else c) for c in (self.cost, self.backward))


LAYER_LOCATORS: dict[str, Locator] = {}
HEAD_LOCATORS: dict[str, Locator] = {}
TARGETS = {"layer": LAYER_LOCATORS, "head": HEAD_LOCATORS}


def _register(target: str, name: str, **facts) -> Callable[[Callable], Callable]:
    """Decorator that registers a function; ``facts``: the other fields of its row."""

    def add(function: Callable) -> Callable:
        row = Locator(name, target, function, **facts)
        if row.symmetry not in SYMMETRIES or name in TARGETS[target]:
            raise ValueError(f"{target} locator {name!r}: a new name, and a symmetry among {SYMMETRIES}")
        TARGETS[target][name] = row
        return function

    return add


layer_locator, head_locator = partial(_register, "layer"), partial(_register, "head")


def known(target: str, name: str) -> Locator:
    """The row of a locator. KeyError names the ones there are."""
    if name not in TARGETS[target]:
        raise KeyError(f"unknown locator {name!r} of {target}s; there are {sorted(TARGETS[target])}")
    return TARGETS[target][name]


def locators(layers: int = 32, heads: int = 32) -> pd.DataFrame:
    """All locators as a table: target, locator, formula, source, symmetry, and the passes a pair for a model of this
    size."""
    rows = [
        (row.target, row.name, row.formula, row.source, row.symmetry, *row.passes(layers, heads))
        for row in [*LAYER_LOCATORS.values(), *HEAD_LOCATORS.values()]
    ]
    columns = ["target", "locator", "formula", "source", "symmetry", "forwards", "backwards"]
    return pd.DataFrame(rows, columns=columns)


def all_passes(target: str, layers: int, heads: int) -> tuple[float, float]:
    """Forward and backward passes a pair of all locators of a target together, each charged all that it needs."""
    each = [row.passes(layers, heads) for row in TARGETS[target].values()]
    return sum(forwards for forwards, _ in each), sum(backwards for _, backwards in each)
