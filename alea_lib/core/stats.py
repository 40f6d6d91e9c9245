"""Intervals for ratios of per-image sums: bootstrap by image, always paired.

A measure gives ``items``: columns ``image_id, metric, num, den``, one row an image and metric; its value is
``sum(num) / sum(den)``. Some scores are a sum of such ratios (MME's total, AMBER's score): their rows are
named ``metric|part``, and the metric is the sum of its parts' ratios, in the data as in every resample.
Images are resampled, never captions' words or questions, since what one image gives is correlated. The
resamples depend only on the number of images and the seed, so every method that is scored on the same images
meets the same resamples. A metric whose denominators are all zero (for any part) is absent from the results.

Intervals are 95 % quantiles of the resamples (percentile intervals), each for itself (no correction for several).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np
import pandas as pd

from .files import DataError

ITEM_COLUMNS = ("image_id", "metric", "num", "den")
SUMMARY_COLUMNS = ("metric", "value", "lo", "hi", "n")
RESAMPLES = 10_000
LEVEL = 0.95
POWER = 0.8
PART = "|"  # "mme_total|count": one of the ratios that the metric is the sum of


def ratio_items(image_ids, ratios: Mapping[str, tuple]) -> pd.DataFrame:
    """Rows of items, one an image and metric. ``ratios``: metric to (num, den), each an array or one number."""
    parts = []
    for metric, pair in ratios.items():
        num, den = (np.broadcast_to(np.asarray(numbers, float), len(image_ids)) for numbers in pair)
        parts.append(pd.DataFrame({"image_id": np.asarray(image_ids), "metric": metric, "num": num, "den": den}))
    return pd.concat(parts, ignore_index=True)


def sum_by_image(items: pd.DataFrame) -> pd.DataFrame:
    """Items with one row an image and metric, metrics and images in the order in which they come."""
    return items.groupby(["metric", "image_id"], sort=False, as_index=False).sum()[list(ITEM_COLUMNS)]


def bootstrap_weights(n: int, n_resamples: int = RESAMPLES, seed: int = 0, chunk: int = 250) -> Iterator[np.ndarray]:
    """Chunks of the count matrix [n_resamples, n]: how often each of ``n`` images is drawn in each resample.

    Every row sums to ``n``. Stacked, the chunks are the same whatever ``chunk`` (rows in memory at a time).
    """
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        drawn = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def resampled_sums(values: np.ndarray, n_resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums over the rows of ``values`` [n, ...] in each resample of them: [n_resamples, ...]."""
    flat = values.reshape(len(values), -1)
    sums = np.concatenate([w @ flat for w in bootstrap_weights(len(flat), n_resamples, seed)])
    return sums.reshape(n_resamples, *values.shape[1:])


def interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the finite resampled values, widened if need be to hold the value itself."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return value, value
    lo, hi = np.quantile(finite, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return min(float(lo), value), max(float(hi), value)


def summarise(items: pd.DataFrame, n_resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Value and interval of every metric: metric, value, lo, hi, n (images that have the metric)."""
    return _estimate([items], [], n_resamples, seed)


def paired_difference(
    items_a: pd.DataFrame, items_b: pd.DataFrame, n_resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """``a`` minus ``b`` for every metric that both have, resampled over the same images.

    Columns as ``summarise``. DataError when the images differ; it names some of them.
    """
    return _estimate([items_a], [items_b], n_resamples, seed)


def summarise_seeds(
    items_by_seed: Mapping[int, pd.DataFrame], n_resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Mean over training seeds, with a two-level interval: resampled are seeds and images (the same for all).

    ``n`` counts images. With fewer than about five seeds the interval is too narrow for a statement about
    seeds in general: say how many there were. DataError when the seeds were not scored on the same images.
    """
    return _estimate([items_by_seed[key] for key in sorted(items_by_seed)], [], n_resamples, seed)


def paired_difference_seeds(
    a_by_seed: Mapping[int, pd.DataFrame],
    b_by_seed: Mapping[int, pd.DataFrame],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean over training seeds of ``a`` minus ``b`` of the same seed; intervals as in ``summarise_seeds``."""
    if set(a_by_seed) != set(b_by_seed):
        raise DataError(f"seeds differ: {sorted(a_by_seed)} against {sorted(b_by_seed)}; score both on the same")
    a, b = ([side[key] for key in sorted(a_by_seed)] for side in (a_by_seed, b_by_seed))
    return _estimate(a, b, n_resamples, seed)


def _estimate(a: list[pd.DataFrame], b: list[pd.DataFrame], n_resamples: int, seed: int) -> pd.DataFrame:
    """Mean over seeds of ``a``, minus ``b`` of the same seed if given; in each resample seeds are drawn too."""
    tables = _comparable([*a, *b])
    values = np.stack([t.ratios() for t in tables])  # [tables, metrics]
    resampled = np.stack(
        [t.resampled_ratios(n_resamples, seed) for t in tables], axis=1
    )  # [resamples, tables, metrics]
    if b:
        values = values[: len(a)] - values[len(a) :]
        resampled = resampled[:, : len(a)] - resampled[:, len(a) :]
    drawn = np.random.default_rng([seed, 1]).integers(0, len(a), size=resampled.shape[:2])
    means = np.take_along_axis(resampled, drawn[:, :, None], axis=1).mean(axis=1)
    rows = [
        (metric, float(value), *interval(float(value), column), int(n))
        for metric, value, column, n in zip(tables[0].metrics, values.mean(axis=0), means.T, tables[0].images)
    ]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def images_needed(difference: float, items_a: pd.DataFrame, items_b: pd.DataFrame) -> pd.DataFrame:
    """How many images show a true paired difference of that size: metric, sd, images.

    ``sd`` is the standard deviation over images of the difference's linearised contributions (delta
    method), so the standard error at n images is ``sd / sqrt(n)``; ``images`` gives the two-sided test at
    5 % a power of 80 %. ``difference`` is in the metric's unit: 0.02 for two points of CHAIRs.
    """
    if not difference:
        raise DataError("no number of images shows a difference of 0; give the smallest difference that matters")
    a, b = _comparable([items_a, items_b])
    sd = (a.contributions() - b.contributions()).std(axis=0, ddof=1)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
    images = np.maximum(np.ceil((z * sd / difference) ** 2), 2).astype(int)
    return pd.DataFrame({"metric": a.metrics, "sd": sd, "images": images})


class _Table:
    """Items as matrices: ``num`` and ``den`` [images, ratios], images in the order of their ids.

    ``parts`` [ratios, metrics] has a one where the ratio is a part of the metric.
    """

    def __init__(self, items: pd.DataFrame):
        missing = [c for c in ITEM_COLUMNS if c not in items.columns]
        if missing or items.empty:
            what = f"lacks the columns {missing}" if missing else "is empty"
            raise DataError(f"a table of items {what}; needed is one row an image and metric: {ITEM_COLUMNS}")
        if not np.isfinite(items[["num", "den"]].to_numpy(float)).all():
            raise DataError("num and den of the items must be finite; leave undefined rows out")
        image, self.ids = pd.factorize(items["image_id"], sort=True)
        ratio, names = pd.factorize(items["metric"])
        shape = (len(self.ids), len(names))
        cell = image * len(names) + ratio
        size = shape[0] * shape[1]
        self.num = np.bincount(cell, items["num"].to_numpy(float), size).reshape(shape)
        self.den = np.bincount(cell, items["den"].to_numpy(float), size).reshape(shape)
        self.there = np.bincount(cell, minlength=size).reshape(shape) > 0
        owner, self.metrics = pd.factorize(np.array([name.split(PART)[0] for name in names], dtype=object))
        self.metrics = list(self.metrics)
        self.parts = (owner[:, None] == np.arange(len(self.metrics))).astype(float)
        empty = self.parts[self.den.sum(axis=0) == 0].any(axis=0)
        self.only([m for m, undefined in zip(self.metrics, empty, strict=True) if not undefined])

    def only(self, metrics: list[str]) -> _Table:
        """The same table with these metrics, in this order."""
        parts = self.parts[:, [self.metrics.index(m) for m in metrics]]
        used = parts.any(axis=1)
        self.num, self.den, self.there = self.num[:, used], self.den[:, used], self.there[:, used]
        self.parts, self.metrics = parts[used], list(metrics)
        return self

    @property
    def images(self) -> np.ndarray:
        """Images that have any part of each metric."""
        return (self.there @ self.parts > 0).sum(axis=0)

    def ratios(self) -> np.ndarray:
        return (self.num.sum(axis=0) / self.den.sum(axis=0)) @ self.parts

    def resampled_ratios(self, n_resamples: int, seed: int) -> np.ndarray:
        """[n_resamples, metrics]; NaN where a resample has no denominator."""
        sums = resampled_sums(np.concatenate([self.num, self.den], axis=1), n_resamples, seed)
        num, den = np.split(sums, 2, axis=1)
        ratios = np.divide(num, den, out=np.full(num.shape, np.nan), where=den != 0)
        return np.stack([ratios[:, column > 0].sum(axis=1) for column in self.parts.T], axis=1)

    def contributions(self) -> np.ndarray:
        """Influence of each image on each metric; mean 0, and sd / sqrt(n) is the metric's standard error."""
        ratios = self.num.sum(axis=0) / self.den.sum(axis=0)
        return ((self.num - ratios * self.den) / self.den.mean(axis=0)) @ self.parts


def _comparable(tables_of_items: list[pd.DataFrame]) -> list[_Table]:
    """Tables of the metrics that all have, in the first one's order; DataError when their images differ."""
    tables = [_Table(items) for items in tables_of_items]
    for other in tables[1:]:
        odd = sorted(set(tables[0].ids).symmetric_difference(other.ids))
        if odd:
            raise DataError(
                f"{len(odd)} images are scored on one side only, e.g. {odd[:3]}; a paired comparison needs"
                " the same images: score both on all of them, or take out the odd ones"
            )
    shared = [m for m in tables[0].metrics if all(m in t.metrics for t in tables)]
    if not shared:
        raise DataError("the tables of items have no metric in common")
    return [t.only(shared) for t in tables]
