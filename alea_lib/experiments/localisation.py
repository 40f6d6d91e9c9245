"""Judge locators where the truth is known: on implanted models, how early does a locator name the implant's place?

A locator gives every place (a layer, or a layer and a head) a score, larger = more suspect. The truth is one place or
several. Nothing here loads torch; see :mod:`alea_lib.zoo.implant_index` for the models.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import comb

import numpy as np
import pandas as pd

from ..core.files import DataError, write_csv
from ..core.stats import RESAMPLES, interval, resampled_sums
from ..core.tables import read_csv

TARGETS = {"layer": ["layer"], "head": ["layer", "head"]}  # columns that name a place
LOCALISATION_KEYS = ("locator", "target", "model", "seed", "strength", "n_pairs")
JUDGED = ("rank", "hit@1", "hit@2", "mrr")
COSTS = ("forwards", "backwards", "seconds")
LOCALISATION_COLUMNS = (*LOCALISATION_KEYS, *JUDGED, "recall@2", *COSTS)  # recall@2: absent with a single true place
STRENGTHS = ("weak", "middle", "strong")


def judge(scores: pd.DataFrame, truth: Iterable, target: str | None = None) -> pd.DataFrame:
    """One row a locator: locator, target, places, rank, hit@1, hit@2, mrr and recall@2.

    ``scores``: locator, layer[, head], score, one row a place (averaged over pairs). ``truth``: layers, or (layer,
    head) tuples; of several true places the best-ranked counts. ``rank`` is the mean rank on ties (1 = best); a hit
    within k is the probability of one when ties are broken at random; mrr is 1 / rank. ``recall@2``: share of the
    true places among the two highest scores, NaN when there is one place alone. DataError for a place that is
    scored twice, never, or not finite.
    """
    target = target or ("head" if "head" in scores.columns else "layer")
    columns = TARGETS[target]
    _check_scores(scores, ["locator", *columns, "score"])
    wanted = {_place(t, columns) for t in truth}
    rows = []
    for name, table in scores.groupby("locator", sort=False):
        places = list(table[columns].itertuples(index=False, name=None))
        if len(set(places)) < len(places):
            raise DataError(f"{name}: a place is scored twice; average the scores over pairs first")
        if not wanted or (missing := sorted(wanted - set(places))):
            raise DataError(f"{name}: no score for the true place {missing if wanted else '(none given)'}")
        true = np.array([p in wanted for p in places])
        rows.append({"locator": name, "target": target, "places": len(places), **_judged(table["score"], true)})
    return pd.DataFrame(rows)


def _check_scores(scores: pd.DataFrame, columns: list[str]) -> None:
    if missing := [c for c in columns if c not in scores.columns]:
        raise DataError(f"the table of scores lacks {missing}; needed are {columns}, one row a place")
    if scores.empty or not np.isfinite(scores["score"].to_numpy(float)).all():
        raise DataError("the scores are empty or not finite: a locator failed, or its pairs are missing")


def _place(place, columns: list[str]) -> tuple:
    place = tuple(int(x) for x in place) if isinstance(place, (tuple, list)) else (int(place),)
    if len(place) != len(columns):
        raise DataError(f"the true place {place} must name {' and '.join(columns)}")
    return place


def _judged(score: pd.Series, true: np.ndarray) -> dict:
    score = score.to_numpy(float)
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


def kendall(a: pd.DataFrame, b: pd.DataFrame) -> float:
    """Kendall's tau-b between two tables of scores of the same places (layer[, head], score): 1 = same order.

    NaN when one of them gives every place the same score. DataError when the places differ.
    """
    columns = TARGETS["head" if "head" in a.columns else "layer"]
    for table in (a, b):
        _check_scores(table, [*columns, "score"])
        if table.duplicated(columns).any():
            raise DataError("a place is scored twice: compare one locator, one model and one resample at a time")
    both = a.merge(b, on=columns, how="outer", suffixes=("_a", "_b"))
    if both[["score_a", "score_b"]].isna().any(axis=None):
        raise DataError("the two tables score different places; compare the same model and target")
    x, y = (np.sign(np.subtract.outer(v, v)) for v in both[["score_a", "score_b"]].to_numpy(float).T)
    size = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / size) if size else float("nan")


def localisation_rows(judged: pd.DataFrame, **keys) -> pd.DataFrame:
    """Rows of ``localisation.csv`` from ``judge`` and what they share: model, seed, strength, n_pairs and the costs.

    Costs that were not counted are empty. DataError for an unknown column or a row that breaks the schema.
    """
    if unknown := sorted(set(keys) - set(LOCALISATION_COLUMNS)):
        raise DataError(f"unknown column {unknown}; the table has {', '.join(LOCALISATION_COLUMNS)}")
    return check_localisation(judged.assign(**keys).reindex(columns=list(LOCALISATION_COLUMNS)))


def check_localisation(rows: pd.DataFrame) -> pd.DataFrame:
    """The table itself if it keeps the schema; DataError if not. The keys are unique but for resamples of pairs,
    which differ in ``seed``."""
    if list(rows.columns) != list(LOCALISATION_COLUMNS):
        raise DataError(f"the columns are {list(rows.columns)}; needed are {list(LOCALISATION_COLUMNS)}")
    if rows.empty:
        raise DataError("the localisation table is empty")
    for column, known in (("target", tuple(TARGETS)), ("strength", STRENGTHS)):
        if odd := sorted(set(rows[column]) - set(known)):
            raise DataError(f"{column} is {odd}; it must be one of {', '.join(known)}")
    if rows[list(LOCALISATION_KEYS)].isna().any(axis=None) or rows.duplicated(list(LOCALISATION_KEYS)).any():
        raise DataError(f"an empty or doubled key; one row each of {', '.join(LOCALISATION_KEYS)}")
    values = rows[list(JUDGED)].to_numpy(float)
    shares = rows[["hit@1", "hit@2", "mrr", "recall@2"]].to_numpy(float)
    if not np.isfinite(values).all() or (rows["rank"] < 1).any() or ((shares < 0) | (shares > 1)).any():
        raise DataError("rank must be 1 or more, hit@1, hit@2, mrr and recall@2 between 0 and 1")
    return rows


def write_localisation(rows: pd.DataFrame, path) -> None:
    """Check the table, sort it by its key and write it."""
    write_csv(check_localisation(rows).sort_values(list(LOCALISATION_KEYS), kind="stable"), path)


def read_localisation(path) -> pd.DataFrame:
    """Read and check a localisation table."""
    rows = read_csv(path)
    numbers = rows.columns.intersection([*JUDGED, "recall@2", *COSTS])  # a column of empty cells is read as text
    return check_localisation(rows.assign(**{c: pd.to_numeric(rows[c], errors="coerce") for c in numbers}))
