"""Judge locators: where the truth is known (implanted models) by how early one names the implant's place, elsewhere by
their agreement with each other and with what acting on a place gains.

A locator gives every place (a layer, or a layer and a head) a score, larger = more suspect. The truth is one place or
several. Nothing here loads torch; see :mod:`alea_lib.zoo.implant_index` for the models.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.files import DataError, write_csv
from ..core.stats import RESAMPLES, interval, resampled_sums

LOCALISATION_KEYS = ("locator", "target", "model", "seed", "strength", "n_pairs")
JUDGED = ("rank", "hit@1", "hit@2", "mrr")
COSTS = ("forwards", "backwards", "seconds")
LOCALISATION_COLUMNS = (*LOCALISATION_KEYS, *JUDGED, "recall@2", *COSTS)  # recall@2: absent with a single true place


def place_columns(scores: pd.DataFrame) -> list[str]:
    """The columns that name a place."""
    return ["layer", "head"] if "head" in scores else ["layer"]


# ---- against the truth -----------------------------------------------------------------------------------------------


def judge(scores: pd.DataFrame, truth: Iterable) -> pd.DataFrame:
    """One row a locator: locator, target, rank, hit@1, hit@2, mrr and recall@2.

    ``scores``: locator, layer[, head], score, one row a place (averaged over pairs). ``truth``: layers, or (layer,
    head) tuples; of several true places the best-ranked counts. ``rank`` is the mean rank on ties (1 = best); a hit
    within k is the probability of one when ties are broken at random; mrr is 1 / rank. ``recall@2``: share of the
    true places among the two highest scores, NaN when there is one place alone. DataError for a score that is not
    finite.
    """
    columns, wanted = place_columns(scores), list(truth)
    if not np.isfinite(scores["score"]).all():
        raise DataError("the scores are not finite: a locator failed, or its pairs are missing")
    rows = []
    for name, table in scores.groupby("locator", sort=False):
        places = table[columns].itertuples(index=False, name=None) if len(columns) > 1 else table["layer"]
        true = np.array([place in wanted for place in places])
        rows.append({"locator": name, "target": columns[-1], **_judged(table["score"].to_numpy(float), true)})
    return pd.DataFrame(rows)


def _judged(score: np.ndarray, true: np.ndarray) -> dict:
    best = score[true].max()
    above, level = int((score > best).sum()), int((score == best).sum())
    among = int((true & (score == best)).sum())
    rank = above + (level + 1) / (among + 1)  # where the first of them comes when equal scores are in random order
    return {
        "rank": rank,
        "hit@1": _hit(above, level, among, 1),
        "hit@2": _hit(above, level, among, 2),
        "mrr": 1 / rank,
        "recall@2": _recall(score, true, 2) if true.sum() > 1 else float("nan"),
    }


def _hit(above: int, level: int, true: int, k: int) -> float:
    """Probability that one of the ``true`` of ``level`` equal scores is among the first k, ``above`` being before."""
    room = min(max(k - above, 0), level)
    return 1 - comb(level - true, room) / comb(level, room)


def _recall(score: np.ndarray, true: np.ndarray, k: int) -> float:
    """Expected share of the true places among the first k; equal scores share the room that is left."""
    found = 0.0
    for value in score[true]:
        above, level = (score > value).sum(), (score == value).sum()
        found += min(max(k - above, 0), level) / level
    return float(found / true.sum())


def chance(places: int, true: int = 1) -> dict[str, float]:
    """What a random order of ``places`` gives: expected rank, hit@1, hit@2, mrr, recall@2 (``true`` places count)."""
    first = np.array([comb(places - r, true - 1) for r in range(1, places - true + 2)], float) / comb(places, true)
    ranks = np.arange(1, len(first) + 1)
    return {
        "rank": float((first * ranks).sum()),
        "hit@1": float(first[0]),
        "hit@2": float(first[:2].sum()),
        "mrr": float((first / ranks).sum()),
        "recall@2": min(2, places) / places if true > 1 else float("nan"),
    }


def aggregate(judged: pd.DataFrame, by: Iterable[str] = ("locator", "target"), seed: int = 0) -> pd.DataFrame:
    """Mean and 95 % interval of JUDGED (and recall@2) over implanted models: by..., metric, value, lo, hi, n (models).

    ``judged``: rows of the localisation table. Models are resampled; several rows of a model (resamples of its pairs)
    go or stay together, and in each drawn model one of its resamples is drawn when there are any.
    """
    by = list(by)
    rows = []
    for key, group in judged.groupby(by, sort=True):
        for metric in (*JUDGED, "recall@2"):
            if metric in group and (known := group.dropna(subset=[metric])).size:
                value, lo, hi = _over_models([g.to_numpy(float) for _, g in known.groupby("model")[metric]], seed)
                n = known["model"].nunique()
                rows.append((*key, metric, value, lo, hi, n))
    return pd.DataFrame(rows, columns=[*by, "metric", "value", "lo", "hi", "n"])


def _over_models(values: list[np.ndarray], seed: int, n_resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean of the models' means; two-level resamples: models, and within each drawn model one of its values."""
    value = float(np.mean([v.mean() for v in values]))
    if all(len(v) == 1 for v in values):
        drawn = resampled_sums(np.concatenate(values)[:, None], n_resamples, seed)[:, 0] / len(values)
    else:
        rng = np.random.default_rng([seed, 6])
        picked = np.stack([rng.choice(v, (n_resamples, len(values))) for v in values], axis=2)
        which = rng.integers(0, len(values), (n_resamples, len(values)))
        drawn = np.take_along_axis(picked, which[:, :, None], axis=2)[:, :, 0].mean(axis=1)
    return value, *interval(value, drawn)


def localisation_rows(judged: pd.DataFrame, **keys) -> pd.DataFrame:
    """Rows of ``localisation.csv`` from ``judge`` and what they share: model, seed, strength, n_pairs and the costs.
    Costs that were not counted are empty."""
    return judged.assign(**keys).reindex(columns=list(LOCALISATION_COLUMNS))


def write_localisation(rows: pd.DataFrame, path: Path) -> None:
    """Write the table, sorted by its key; DataError for a doubled one (resamples of pairs differ in ``seed``)."""
    if rows.duplicated(list(LOCALISATION_KEYS)).any():
        raise DataError(f"a doubled key; one row each of {', '.join(LOCALISATION_KEYS)}")
    write_csv(rows.sort_values(list(LOCALISATION_KEYS), kind="stable"), path)


# ---- beside each other -----------------------------------------------------------------------------------------------


def kendall(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Kendall's tau-b between two tables of scores of the same places (layer[, head], score): 1 = same order, NaN when
    one of them gives every place the same score."""
    both = a.merge(b, on=place_columns(a), suffixes=("_a", "_b"), validate="one_to_one")
    x, y = (np.sign(np.subtract.outer(v, v)) for v in both[["score_a", "score_b"]].to_numpy(float).T)
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size else float("nan")


def agreement(means: pd.DataFrame) -> pd.DataFrame:
    """Kendall's tau between the orders in which locators put the places, [locator, locator].

    ``means``: locator, layer (, head), score. Locators that score all places alike have no order and are left out.
    """
    tables = {name: part.drop(columns="locator") for name, part in means.groupby("locator", sort=False)}
    tables = {name: part for name, part in tables.items() if part["score"].nunique() > 1}
    taus = {a: {b: kendall(x, y) for b, y in tables.items()} for a, x in tables.items()}
    return pd.DataFrame(taus).rename_axis(index="locator", columns="locator")


def tau_with(means: pd.DataFrame, benefit: pd.DataFrame) -> pd.Series:
    """Kendall's tau of each locator's order with the gain of acting on a place, largest first.

    ``benefit``: place (a layer's number), metric, value; the gain is the fall of CHAIRs.
    """
    gain = benefit[benefit["metric"] == "chair_s"]
    gain = pd.DataFrame({"layer": gain["place"].astype(int), "score": -gain["value"]})
    taus = {name: kendall(part, gain) for name, part in means.groupby("locator", sort=False)}
    return pd.Series(taus, name="Kendall's tau with the gain").dropna().sort_values(ascending=False, kind="stable")


def named_places(scores: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Which layer each locator puts first on models with one implanted layer: locator, model, true, named, share.

    ``scores``: model, locator, layer, score; ``index``: name, layers. Ties share the model between the layers.
    """
    true = {row.name: row.layers[0] for row in index.itertuples(index=False) if len(row.layers) == 1}
    scores = scores[scores["model"].isin(true)]
    first = scores[scores.groupby(["model", "locator"])["score"].transform("max") == scores["score"]]
    ties = first.groupby(["model", "locator"])["score"].transform("size")
    found = first.assign(true=first["model"].map(true), named=first["layer"], share=1 / ties)
    return found[["locator", "model", "true", "named", "share"]].reset_index(drop=True)
