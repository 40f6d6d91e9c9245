"""LOCATE, the act: settings in, scores and costs out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ..models.vlm import VLM
from . import causal  # noqa: F401  (registers its passes)
from .choose import choose_layers
from .evidence import Evidence
from .registry import TARGETS, known
from .settings import DEFAULT, OFFICIAL, OFFICIAL_LOCATOR, OFFICIAL_PAIRS, OFFICIAL_RULE, LocateSettings


@dataclass(frozen=True)
class Located:
    """``scores``: locator, pair (position in the table of pairs), layer (, head), score; larger = more suspect.

    ``costs``: locator, forwards, backwards (sequences through the whole language model, counted), seconds. A locator is
    charged all that it needs, also what it shares. ``spent``: the same for what was really run, by needs.
    """

    scores: pd.DataFrame
    costs: pd.DataFrame
    spent: pd.DataFrame


def locate_layers(
    vlm: VLM,
    features: torch.Tensor,
    pairs: pd.DataFrame,
    names: list[str] | None = None,
    settings: LocateSettings = DEFAULT,
) -> Located:
    """Scores of layer locators (all if ``names`` is None) on pairs: positive, negative, wrong (, image_id).

    ``features`` [N,P,D]: one image a pair. The model is not touched. KeyError names the known locators; DataError for
    pairs that do not fit; ValueError where a locator needs the image and the settings hide it.
    """
    return _locate("layer", vlm, features, pairs, names, settings)


def locate_heads(vlm: VLM, features, pairs, names=None, settings: LocateSettings = DEFAULT) -> Located:
    """Scores of head locators, see :func:`locate_layers`."""
    return _locate("head", vlm, features, pairs, names, settings)


def _locate(target: str, vlm: VLM, features, pairs, names, settings: LocateSettings) -> Located:
    rows = [known(target, name) for name in (TARGETS[target] if names is None else names)]
    if not settings.image and (blind := [row.name for row in rows if row.image]):
        raise ValueError(f"{', '.join(blind)} look at the image: leave them out, or set image=True")
    evidence = Evidence(vlm, features, pairs, settings)
    evidence.collect(need for row in rows for need in row.needs)
    parts, costs = [], []
    for row in rows:
        started = time.perf_counter()
        parts.append(_table(row.name, np.asarray(row.function(evidence), dtype=float), target))
        own = time.perf_counter() - started
        needed = [evidence.costs[need] for need in row.needs]
        cost = {k: sum(c[k] for c in needed) for k in ("forwards", "backwards", "seconds")}
        costs.append({"locator": row.name, **cost, "seconds": cost["seconds"] + own})
    spent = pd.DataFrame(evidence.spent, columns=["needs", "forwards", "backwards", "seconds"])
    return Located(pd.concat(parts, ignore_index=True), pd.DataFrame(costs), spent)


def _table(name: str, scores: np.ndarray, target: str) -> pd.DataFrame:
    """Tidy form of [N,L] or [N,L,H]."""
    columns = ["pair", "layer", "head"][: scores.ndim]
    index = dict(zip(columns, (i.ravel() for i in np.indices(scores.shape))))
    return pd.DataFrame({"locator": name, **index, "score": scores.ravel()})


def official_layers(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame) -> tuple[Located, list[int]]:
    """What the official code would edit: its settings, its distance, and the union of the best layers of 50 pairs."""
    pairs = pairs.head(OFFICIAL_PAIRS)
    located = locate_layers(vlm, features[: len(pairs)], pairs, [OFFICIAL_LOCATOR], OFFICIAL)
    return located, choose_layers(located.scores, rule=OFFICIAL_RULE)
