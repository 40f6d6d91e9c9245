"""Intervals for ratios of per-image sums: bootstrap by image, always paired.

A measure gives ``items``: columns ``image_id, metric, num, den``, one row an image and metric; its value is
``sum(num) / sum(den)``. Some scores are a sum of such ratios (MME's total, AMBER's score): their rows are
named ``metric|part``, and the metric is the sum of its parts' ratios, in the data as in every resample.
Images are resampled, never captions' words or questions, since what one image gives is correlated. The
resamples depend only on the number of images and the seed, so every method that is scored on the same images
meets the same resamples. A metric whose denominators are all zero (for any part) is absent from the results.

Intervals are 95 % by default and each stands alone: where m comparisons are read together, ask for
``level=1 - 0.05 / m`` (Bonferroni). ``method="percentile"`` (default) takes quantiles of the resamples;
``"bca"`` (bias-corrected and accelerated, Efron 1987) shifts them by the resamples' median bias and by the
skewness of the leave-one-image-out values. It is offered for one table and for a paired difference; over
seeds, which are too few to leave one out, the interval is the percentile one. Where BCa is not defined (all
resamples on one side of the value, or no spread) the percentile interval stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist

import numpy as np
import pandas as pd

from alea_lib.tables import DataError

ITEM_COLUMNS = ("image_id", "metric", "num", "den")
SUMMARY_COLUMNS = ("metric", "value", "lo", "hi", "n")
RESAMPLES = 10_000
METHODS = ("percentile", "bca")
PART = "|"  # "mme_total|count": one of the ratios that the metric is the sum of


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
    """Sums of the columns of ``values`` [n, k] in each resample of its rows: [n_resamples, k]."""
    return np.concatenate([w @ values for w in bootstrap_weights(len(values), n_resamples, seed)])


def interval(
    value: float, resampled: np.ndarray, level: float = 0.95, left_out: np.ndarray | None = None
) -> tuple[float, float]:
    """Interval of the finite resampled values, widened if need be to hold the value itself.

    BCa when the values without each image (``left_out``) are given, else percentile.
    """
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return value, value
    plain = (1 - level) / 2, (1 + level) / 2
    lo, hi = np.quantile(finite, plain if left_out is None else bca_level(value, resampled, left_out, level))
    return min(float(lo), value), max(float(hi), value)


def bca_level(value: float, resampled: np.ndarray, left_out: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The two quantiles that BCa takes in place of (1 - level) / 2 and (1 + level) / 2; these where it is undefined.

    ``left_out``: the statistic without each image in turn. Ties with the value count half.
    """
    plain = (1 - level) / 2, (1 + level) / 2
    finite = resampled[np.isfinite(resampled)]
    below = ((finite < value).sum() + (finite == value).sum() / 2) / max(len(finite), 1)
    pull = left_out.mean() - left_out
    spread = (pull**2).sum()
    if not (0 < below < 1 and np.isfinite(spread) and spread > 0 and finite.min() < finite.max()):
        return plain
    normal = NormalDist()
    bias, acceleration = normal.inv_cdf(float(below)), float((pull**3).sum() / (6 * spread**1.5))
    shifted = [bias + normal.inv_cdf(q) for q in plain]
    if any(acceleration * z >= 1 for z in shifted):
        return plain
    lo, hi = (normal.cdf(bias + z / (1 - acceleration * z)) for z in shifted)
    return lo, hi


def summarise(
    items: pd.DataFrame,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    method: str = "percentile",
) -> pd.DataFrame:
    """Value and interval of every metric: metric, value, lo, hi, n (images that have the metric)."""
    table = _Table(items)
    value, resampled = table.ratios(), table.resampled_ratios(n_resamples, seed)
    left_out = _left_out(method, table.left_out_ratios)
    return _summary(table.metrics, value, resampled, table.images, level, left_out)


def paired_difference(
    items_a: pd.DataFrame,
    items_b: pd.DataFrame,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
    method: str = "percentile",
) -> pd.DataFrame:
    """``a`` minus ``b`` for every metric that both have, resampled over the same images.

    Columns as ``summarise``. DataError when the images differ; it names some of them.
    """
    a, b = _common(items_a, items_b)
    difference = a.resampled_ratios(n_resamples, seed) - b.resampled_ratios(n_resamples, seed)
    left_out = _left_out(method, lambda: a.left_out_ratios() - b.left_out_ratios())
    return _summary(a.metrics, a.ratios() - b.ratios(), difference, a.images, level, left_out)


def summarise_seeds(
    items_by_seed: Mapping[int, pd.DataFrame],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean over training seeds, with a two-level interval: resampled are seeds and images (the same for all).

    ``n`` counts images. With fewer than about five seeds the interval is too narrow for a statement about
    seeds in general: say how many there were. DataError when the seeds were not scored on the same images.
    """
    tables = [_Table(items_by_seed[key]) for key in sorted(items_by_seed)]
    tables = [t.only(_shared_metrics(tables)) for t in tables]
    resampled = [t.resampled_ratios(n_resamples, seed) for t in tables]
    return _over_seeds(tables, [t.ratios() for t in tables], resampled, seed, level)


def paired_difference_seeds(
    a_by_seed: Mapping[int, pd.DataFrame],
    b_by_seed: Mapping[int, pd.DataFrame],
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Mean over training seeds of ``a`` minus ``b`` of the same seed; intervals as in ``summarise_seeds``."""
    if set(a_by_seed) != set(b_by_seed):
        raise DataError(f"seeds differ: {sorted(a_by_seed)} against {sorted(b_by_seed)}; score both on the same")
    keys = sorted(a_by_seed)
    a, b = [_Table(a_by_seed[key]) for key in keys], [_Table(b_by_seed[key]) for key in keys]
    shared = _shared_metrics([*a, *b])
    a, b = [t.only(shared) for t in a], [t.only(shared) for t in b]
    _same_images([*a, *b])
    values = [x.ratios() - y.ratios() for x, y in zip(a, b, strict=True)]
    resampled = [
        x.resampled_ratios(n_resamples, seed) - y.resampled_ratios(n_resamples, seed) for x, y in zip(a, b, strict=True)
    ]
    return _over_seeds(a, values, resampled, seed, level)


def images_needed(
    difference: float, items_a: pd.DataFrame, items_b: pd.DataFrame, power: float = 0.8, level: float = 0.95
) -> pd.DataFrame:
    """How many images show a true paired difference of that size: metric, sd, images.

    ``sd`` is the standard deviation over images of the difference's linearised contributions (delta
    method), so the standard error at n images is ``sd / sqrt(n)``; ``images`` gives the two-sided test at
    ``1 - level`` the wanted power. ``difference`` is in the metric's unit: 0.02 for two points of CHAIRs.
    """
    if not difference:
        raise DataError("no number of images shows a difference of 0; give the smallest difference that matters")
    a, b = _common(items_a, items_b)
    sd = (a.contributions() - b.contributions()).std(axis=0, ddof=1)
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
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
        return self._divide(*np.split(sums, 2, axis=1))

    def left_out_ratios(self) -> np.ndarray:
        """[images, metrics]: each metric without each image in turn (jackknife)."""
        return self._divide(self.num.sum(axis=0) - self.num, self.den.sum(axis=0) - self.den)

    def _divide(self, num: np.ndarray, den: np.ndarray) -> np.ndarray:
        ratios = np.divide(num, den, out=np.full(num.shape, np.nan), where=den != 0)
        return np.stack([ratios[:, column > 0].sum(axis=1) for column in self.parts.T], axis=1)

    def contributions(self) -> np.ndarray:
        """Influence of each image on each metric; mean 0, and sd / sqrt(n) is the metric's standard error."""
        ratios = self.num.sum(axis=0) / self.den.sum(axis=0)
        return ((self.num - ratios * self.den) / self.den.mean(axis=0)) @ self.parts


def _shared_metrics(tables: list[_Table]) -> list[str]:
    shared = [m for m in tables[0].metrics if all(m in t.metrics for t in tables)]
    if not shared:
        raise DataError("the tables of items have no metric in common")
    return shared


def _same_images(tables: list[_Table]) -> None:
    first = set(tables[0].ids)
    for other in tables[1:]:
        odd = sorted(first.symmetric_difference(other.ids))
        if odd:
            raise DataError(
                f"{len(odd)} images are scored on one side only, e.g. {odd[:3]}; a paired comparison needs"
                " the same images: score both on all of them, or take out the odd ones"
            )


def _common(items_a: pd.DataFrame, items_b: pd.DataFrame) -> tuple[_Table, _Table]:
    tables = [_Table(items_a), _Table(items_b)]
    _same_images(tables)
    shared = _shared_metrics(tables)
    return tables[0].only(shared), tables[1].only(shared)


def _over_seeds(
    tables: list[_Table], values: list[np.ndarray], resampled: list[np.ndarray], seed: int, level: float
) -> pd.DataFrame:
    """Mean over seeds; in each resample the seeds are drawn with replacement too."""
    _same_images(tables)
    stacked = np.stack(resampled, axis=1)
    rng = np.random.default_rng([seed, 1])
    drawn = rng.integers(0, len(tables), size=stacked.shape[:2])
    picked = np.take_along_axis(stacked, drawn[:, :, None], axis=1).mean(axis=1)
    return _summary(tables[0].metrics, np.mean(values, axis=0), picked, tables[0].images, level)


def _left_out(method: str, values: Callable[[], np.ndarray]) -> np.ndarray | None:
    if method not in METHODS:
        raise DataError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    return values() if method == "bca" else None


def _summary(metrics, values, resampled: np.ndarray, images, level: float, left_out=None) -> pd.DataFrame:
    rows = []
    for i, metric in enumerate(metrics):
        pulled = None if left_out is None else left_out[:, i]
        bounds = interval(float(values[i]), resampled[:, i], level, pulled)
        rows.append((metric, float(values[i]), *bounds, int(images[i])))
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
