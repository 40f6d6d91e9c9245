"""The trial of the locators: on implanted models, where the truth is known, how each locator ranks the truth; where
nothing was implanted, what editing a place or switching it off gains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ..core.stats import paired_difference
from ..datasets.world import Split
from ..edit.fit import fit_edit
from ..edit.settings import preset
from ..evaluate.answers import captions
from ..locate.run import locate_heads, locate_layers
from ..locate.settings import DEFAULT, OFFICIAL, OFFICIAL_LOCATOR, OFFICIAL_PAIRS
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.delta import applied
from ..models.hooks import replaced_heads
from ..models.vlm import VLM
from ..pairs.activation import ActivateSettings, activate
from ..zoo.implant_index import implanted, implants
from .localisation import judge, localisation_rows, place_columns

METRICS = ("chair_s", "chair_i", "recall")  # of acting on a place
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
    words, labelled by the truth, and nothing else.
    """
    index = implants().set_index("name")
    few = split.take(settings.n_images)
    rows, scores = [], []
    for number, name in enumerate(tqdm(names, desc=f"trial {settings.target}s")):
        row = index.loc[name]
        with implanted(clean, name):
            pairs = _pairs(clean, few, features[: len(few.ids)], truth, settings.n_pairs)
            found, costs = _located(clean, few, features, pairs, settings, number)
        places = list(row["layers"])
        if settings.target == "head":
            places = [(layer, head) for layer in places for head in row["heads"]]
        keys = {"model": name, "strength": row["strength"], "n_pairs": len(pairs)}
        means = mean_scores(found, settings.target)
        rows.append(localisation_rows(judge(means, places).merge(costs, on="locator"), seed=0, **keys))
        rows += _resampled(found, places, settings, keys, number)
        scores.append(means.assign(model=name))
    return Trial(pd.concat(rows, ignore_index=True), pd.concat(scores, ignore_index=True))


def mean_scores(scores: pd.DataFrame, target: str) -> pd.DataFrame:
    """Scores averaged over pairs: locator, layer (, head), score."""
    columns = ["locator", "layer", "head"] if target == "head" else ["locator", "layer"]
    return scores.groupby(columns, sort=False, as_index=False)["score"].mean()


def _pairs(vlm: VLM, few: Split, features: torch.Tensor, truth: Truth, n: int) -> pd.DataFrame:
    """The model's own first ``n`` pairs."""
    files, supported = [f.name for f in few.files], [truth[i] for i in few.ids]
    made = activate(vlm, features, few.ids, files, supported, ActivateSettings(label_source="truth"))
    return made.head(n).reset_index(drop=True)


def _located(
    vlm: VLM, few: Split, features: torch.Tensor, pairs: pd.DataFrame, s: TrialSettings, number: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores and costs of all locators, views and the official choice on the pairs; ``number`` counts the models and
    gives each other random controls."""
    features = features[torch.tensor([few.ids.index(i) for i in pairs["image_id"]])]
    names, settings = list(s.locators) if s.locators else None, replace(DEFAULT, seed=s.seed + number)
    if s.target == "head":
        located = locate_heads(vlm, features, pairs, names, settings)
        return located.scores, located.costs
    located = locate_layers(vlm, features, pairs, names, settings)
    found = [(located.scores, located.costs)]
    for view in s.views:
        located = locate_layers(vlm, features, pairs, list(STATES), VIEWS[view])
        found.append(tuple(t.assign(locator=t["locator"] + f", {view}") for t in (located.scores, located.costs)))
    # the official setting as a ranking: each of the first pairs votes for its own best layer, as its union does
    pairs = pairs.head(OFFICIAL_PAIRS)
    located = locate_layers(vlm, features[: len(pairs)], pairs, [OFFICIAL_LOCATOR], OFFICIAL)
    best = located.scores.groupby("pair")["score"].transform("max") == located.scores["score"]
    votes = located.scores.assign(score=best.astype(float))
    found.append(tuple(t.assign(locator="official") for t in (votes, located.costs)))
    scores, costs = (pd.concat(tables, ignore_index=True) for tables in zip(*found))
    return scores, costs


def _resampled(scores: pd.DataFrame, places: list, s: TrialSettings, keys: dict, number: int) -> list[pd.DataFrame]:
    """Rows for resamples of the pairs with replacement; what a locator costs stands in the first row alone."""
    wide = scores.pivot(index="pair", columns=["locator", *place_columns(scores)], values="score")
    rows = []
    for r in range(1, s.resamples + 1):
        drawn = np.random.default_rng([s.seed, 13, number, r]).integers(0, len(wide), len(wide))
        mean = wide.iloc[drawn].mean().rename("score").reset_index()
        rows.append(localisation_rows(judge(mean.dropna(), places), seed=r, **keys))
    return rows


# ---- acting on a place -----------------------------------------------------------------------------------------------


def edit_benefit(
    vlm: VLM,
    features: torch.Tensor,
    positives: list[str],
    places: list[tuple[int, ...]],
    split: Split,
    truth: Truth,
    max_new_tokens: int,
    **changes,
) -> pd.DataFrame:
    """Edit each set of layers alone, all with the same plain supervised edit, and caption the split.

    ``features`` [N,P,D] and ``positives`` [N]: the pairs' images and grounded answers; ``changes``: of the preset
    ``no-prefix``. Returns place, metric, value, lo, hi, n: edited minus unedited model, paired by image.
    """
    changed = {}
    for layers in places:
        settings = preset("no-prefix", layers=layers, **changes)
        changed["+".join(map(str, layers))] = applied(vlm, fit_edit(vlm, features, positives, None, settings)[0])
    return _differences(vlm, changed, split, truth, max_new_tokens)


def knockout_benefit(
    vlm: VLM, places: dict[str, list[tuple[int, int]]], split: Split, truth: Truth, max_new_tokens: int
) -> pd.DataFrame:
    """Switch sets of heads (layer, head) off while the model writes: their outputs before ``o_proj`` become zero.

    Returns place (the set's name), metric, value, lo, hi, n: without the heads minus the whole model, paired by image.
    """
    return _differences(
        vlm, {name: without(vlm, heads) for name, heads in places.items()}, split, truth, max_new_tokens
    )


def without(vlm: VLM, heads: list[tuple[int, int]]) -> AbstractContextManager:
    """The model with these heads switched off, inside the block."""
    off: dict[int, list[int]] = {}
    for layer, head in heads:
        off.setdefault(layer, []).append(head)

    def zeroed(layer: int, o: torch.Tensor) -> torch.Tensor:
        return o.index_fill(2, torch.tensor(off[layer], device=o.device), 0)

    return replaced_heads(vlm, zeroed, list(off))


def _differences(
    vlm: VLM, changed: Mapping[str, AbstractContextManager], split: Split, truth: Truth, budget: int
) -> pd.DataFrame:
    features = vlm.features(split.files)
    plain = chair(captions(vlm, split, features, max_new_tokens=budget), truth).items
    rows = []
    for name, change in tqdm(changed.items(), desc="places"):
        with change:
            written = captions(vlm, split, features, max_new_tokens=budget)
        found = paired_difference(chair(written, truth).items, plain)
        rows.append(found[found["metric"].isin(METRICS)].assign(place=name))
    return pd.concat(rows, ignore_index=True)[["place", "metric", "value", "lo", "hi", "n"]]
