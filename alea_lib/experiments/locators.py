"""The trial of the locators: implanted models, where the truth is known, and how each locator ranks the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ..core.files import DataError
from ..datasets.write import Split
from ..locate.run import Located, locate_heads, locate_layers
from ..locate.settings import DEFAULT, OFFICIAL, OFFICIAL_LOCATOR, OFFICIAL_PAIRS
from ..metrics.truth import Truth
from ..models.vlm import VLM
from ..pairs.activation import ActivateSettings, activate
from ..zoo.implant_index import implanted, implants
from .localisation import TARGETS, judge, localisation_rows

STATES = ("raw-l2", "relative-l2", "cosine")  # distances of states, which the views below look at differently
VIEWS = {"object": replace(DEFAULT, pooling="object"), "no-image": replace(DEFAULT, image=False)}


@dataclass(frozen=True)
class TrialSettings:
    """One trial. Each implanted model captions ``n_images`` and the first ``n_pairs`` usable pairs are looked at."""

    target: str = "layer"
    locators: tuple[str, ...] | None = None  # None: all of the registry
    views: tuple[str, ...] = ()  # among VIEWS: layer distances again, named "<locator>, <view>"
    n_images: int = 200
    n_pairs: int = 40
    resamples: int = 10  # of the pairs, beside the pairs as they are
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """``rows`` of localisation.csv, where seed 0 are the pairs as they are and 1, 2, ... resamples of them; ``scores``:
    model, locator, layer (, head), score, the mean over pairs."""

    rows: pd.DataFrame
    scores: pd.DataFrame


def locator_trial(
    clean: VLM, names: list[str], split: Split, features: torch.Tensor, truth: Truth, settings: TrialSettings
) -> Trial:
    """Every locator on the implanted models of these names, each with its decoy; the clean model is left bit-equal.

    ``features`` [N,P,D] of the split's images (at least ``n_images``). The locators are given pairs in the model's own
    words, labelled by the truth, and nothing else. KeyError or DataError for unknown names before any model is run.
    """
    index = implants().set_index("name")
    if unknown := [n for n in names if n not in index.index]:
        raise KeyError(f"no implants {unknown[:3]}; the names stand in alea_lib.implants()")
    few = split.take(settings.n_images)
    rows, scores = [], []
    for number, name in enumerate(tqdm(names, desc=f"trial {settings.target}s")):
        row = index.loc[name]
        with implanted(clean, name):
            pairs, located = _located(clean, few, features[: len(few.ids)], truth, settings, number)
        places = true_places(row, settings.target)
        keys = {"model": name, "strength": row["strength"], "n_pairs": len(pairs)}
        means = mean_scores(located.scores, settings.target)
        judged = judge(means, places).merge(located.costs, on="locator")
        rows.append(localisation_rows(judged.drop(columns="places"), seed=0, **keys))
        rows += _resampled(located.scores, places, settings, keys, number)
        scores.append(means.assign(model=name))
    return Trial(pd.concat(rows, ignore_index=True), pd.concat(scores, ignore_index=True))


def true_places(row: pd.Series, target: str) -> list:
    """Layers, or (layer, head) of a row of the implants' index. DataError for heads of a down-projection."""
    if target == "layer":
        return list(row["layers"])
    if not row["heads"]:
        raise DataError(f"{row.name}: an implant in a down-projection has no true head; try the layer locators")
    return [(layer, head) for layer in row["layers"] for head in row["heads"]]


def mean_scores(scores: pd.DataFrame, target: str) -> pd.DataFrame:
    """Scores averaged over pairs: locator, layer (, head), score."""
    return scores.groupby(["locator", *TARGETS[target]], sort=False, as_index=False)["score"].mean()


def _located(
    vlm: VLM, few: Split, features, truth: Truth, s: TrialSettings, number: int
) -> tuple[pd.DataFrame, Located]:
    """The model's own pairs, and on them all locators, views and the official choice; ``number`` counts the models and
    gives each other random controls."""
    files, supported = [f.name for f in few.files], [truth[i] for i in few.ids]
    made = activate(vlm, features, few.ids, files, supported, ActivateSettings(label_source="truth"))
    pairs = made.head(s.n_pairs).reset_index(drop=True)
    rows = {image_id: row for row, image_id in enumerate(few.ids)}
    features = features[torch.tensor([rows[i] for i in pairs["image_id"]])]
    names, settings = list(s.locators) if s.locators else None, replace(DEFAULT, seed=s.seed + number)
    if s.target == "head":
        return pairs, locate_heads(vlm, features, pairs, names, settings)
    found = [locate_layers(vlm, features, pairs, names, settings)]
    for view in s.views:
        located = locate_layers(vlm, features, pairs, list(STATES), VIEWS[view])
        named = (t.assign(locator=t["locator"] + f", {view}") for t in (located.scores, located.costs))
        found.append(Located(*named, located.spent))
    found.append(_official(vlm, features, pairs))
    joined = (pd.concat([getattr(f, t) for f in found], ignore_index=True) for t in ("scores", "costs", "spent"))
    return pairs, Located(*joined)


def _official(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame) -> Located:
    """The official setting as a ranking: each of the first 50 pairs votes for its own best layer, as its union does."""
    pairs = pairs.head(OFFICIAL_PAIRS)
    found = locate_layers(vlm, features[: len(pairs)], pairs, [OFFICIAL_LOCATOR], OFFICIAL)
    best = found.scores.groupby("pair")["score"].transform("max") == found.scores["score"]
    votes = found.scores.assign(locator="official", score=best.astype(float))
    return Located(votes, found.costs.assign(locator="official"), found.spent)


def _resampled(scores: pd.DataFrame, places: list, s: TrialSettings, keys: dict, number: int) -> list[pd.DataFrame]:
    """Rows for resamples of the pairs with replacement; what a locator costs stands in the first row alone."""
    wide = scores.pivot(index="pair", columns=["locator", *TARGETS[s.target]], values="score")
    rows = []
    for r in range(1, s.resamples + 1):
        drawn = np.random.default_rng([s.seed, 13, number, r]).integers(0, len(wide), len(wide))
        mean = wide.iloc[drawn].mean().rename("score").reset_index()
        rows.append(localisation_rows(judge(mean.dropna(), places).drop(columns="places"), seed=r, **keys))
    return rows
