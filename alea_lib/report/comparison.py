"""Tables that pages show: rows of metrics.csv side by side, the truncation frontier, ranks of locators, baselines, and
the committed tables of long runs."""

from __future__ import annotations

import pandas as pd

from ..core.formatting import in_points, with_interval
from ..core.paths import root
from ..core.tables import DIFFERENCE, read_csv
from ..experiments.baseline_comparison import BASE, COLUMNS, CONTROLS, MEASURES, best_baseline
from .labels import CORE, HEADLINE, METHOD_ORDER

CUT = ",cut"  # in the setting of a row: the base model's captions cut to so many sentences


def studied(metrics: pd.DataFrame) -> str:
    """The model that is edited: that of the first row of another method than base (else of the first row)."""
    edited = metrics[metrics["method"] != "base"]
    return (edited if len(edited) else metrics)["model"].iloc[0]


def one(metrics: pd.DataFrame, metric: str, benchmark: str, method: str, condition: str = "clean") -> pd.Series:
    """The single row of a measure on the test split, plain prompt, over all POPE settings. KeyError unless one."""
    mine = (metrics["model"] == studied(metrics)) & (metrics["method"] == method)
    found = metrics[mine & (metrics["metric"] == metric) & (metrics["benchmark"] == benchmark)]
    found = found[(found["setting"] == "all") if benchmark == "pope" else (found["prompt"] == "plain")]
    found = found[~found["setting"].str.contains(CUT) & (found["condition"] == condition)]
    if len(found) != 1:
        raise KeyError(
            f"metrics.csv has {len(found)} rows of {metric} for {method}, {condition}, expected one: run notebook "
            f"{'06_measure' if condition == 'clean' else '10_robustness'} for it"
        )
    return found.iloc[0]


def rows_of(metrics: pd.DataFrame, wanted: tuple[str, ...], setting: str | None = None) -> pd.DataFrame:
    """The rows of these measures of the studied model, plain prompt, whole captions, clean.

    ``setting``: which of a measure's settings, where it has several; by default the overall one.
    """
    rows = metrics[(metrics["model"] == studied(metrics)) & metrics["metric"].isin(wanted)]
    rows = rows[rows["method"].isin(METHOD_ORDER)]  # baselines are measured on fewer images, on a page of their own
    rows = rows[rows["prompt"].isin(["plain", ""]) & ~rows["setting"].str.contains(CUT) & rows["condition"].eq("clean")]
    overall = rows["setting"].isin(["all", "answer", "reference"]) | rows["benchmark"].eq("chair")
    return rows[overall if setting is None else rows["setting"].eq(setting)]


def side_by_side(metrics: pd.DataFrame, wanted: tuple[str, ...], setting: str | None = None) -> pd.DataFrame:
    """Measure by method, 'value [lo, hi]', of :func:`rows_of`; an empty cell is a measure that a method lacks."""
    rows = rows_of(metrics, wanted, setting)
    table = rows.assign(text=with_interval(rows)).pivot(index="metric", columns="method", values="text")
    columns = [m for m in METHOD_ORDER if m in table.columns]
    return table.reindex(index=[m for m in wanted if m in table.index], columns=columns).fillna("")


def headline(metrics: pd.DataFrame) -> pd.DataFrame:
    """The study's main measures by method, see :func:`side_by_side`."""
    return side_by_side(metrics, HEADLINE)


def frontier_line(metrics: pd.DataFrame) -> pd.DataFrame:
    """The base model's truncation frontier: k, and value, _lo, _hi of chair_s, chair_i, recall, words."""
    rows = metrics[(metrics["model"] == studied(metrics)) & metrics["setting"].str.contains(CUT)]
    return _wide(rows.assign(k=rows["setting"].str.rpartition("cut")[2].astype(int)), "k")


def frontier_points(metrics: pd.DataFrame) -> pd.DataFrame:
    """Each method's point for the frontier's plane: method, and value, _lo, _hi of chair_s and recall."""
    return _of_methods(_wide(rows_of(metrics, ("chair_s", "recall")), "method"), METHOD_ORDER)


def attacked(metrics: pd.DataFrame) -> pd.DataFrame:
    """CHAIRs under a fresh attack: method, value, lo, hi, n; empty where no attack was run."""
    rows = metrics[(metrics["metric"] == "chair_s") & (metrics["condition"] == "attacked")]
    return core(rows[["method", "value", "lo", "hi", "n"]])


def core(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the methods that the first page is about: base model, truncation, edits and their control."""
    return _of_methods(table, CORE)


def _of_methods(table: pd.DataFrame, methods: tuple[str, ...]) -> pd.DataFrame:
    found = table[table["method"].isin(methods)]
    return found.sort_values("method", key=lambda m: m.map(methods.index), ignore_index=True)


def _wide(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    wide = rows.pivot(index=by, columns="metric", values=["value", "lo", "hi"])
    wide.columns = [metric if part == "value" else f"{metric}_{part}" for part, metric in wide.columns]
    return wide.astype(float).reset_index()


def league(judged: pd.DataFrame) -> pd.DataFrame:
    """Locators from the best mean reciprocal rank down: target, locator, models, 'value [lo, hi]' of each measure.

    ``judged``: what ``aggregate`` gives: locator, target, metric, value, lo, hi, n.
    """
    keys = ["target", "locator"]
    table = judged.assign(text=with_interval(judged, ".2f")).pivot(index=keys, columns="metric", values="text")
    best = judged[judged["metric"] == "mrr"].set_index(keys)
    order = best.sort_values("value", ascending=False, kind="stable").index
    return table.reindex(order)[["hit@1", "hit@2", "mrr"]].assign(models=best["n"]).reset_index()


def baseline_comparison(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """The best baseline and the controls beside ``method``: method, what, then ``gap``, ``chair_s`` and ``recall``, the
    last two minus those of ``method``, as text in points with 95 % intervals; n, seeds."""
    at = rows.set_index(["method", "against", "metric"])
    out = []
    for name in [method, best_baseline(rows), *CONTROLS]:
        if (name, BASE, "frontier_gap") not in at.index:
            continue
        gap = at.loc[(name, BASE, "frontier_gap")]
        what = "this study" if name == method else "control" if name in CONTROLS else "best baseline"
        row = {"method": name, "what": what, "gap": in_points(gap)}
        for metric in MEASURES:
            row[metric] = "" if name == method else in_points(at.loc[(name, method, metric + DIFFERENCE)])
        out.append({**row, "n": gap["n"], "seeds": gap["seeds"]})
    return pd.DataFrame(out, columns=["method", "what", "gap", *MEASURES, "n", "seeds"])


# ---- committed tables of long runs


def _published(run, folder: str, file: str, columns: list[str]) -> pd.DataFrame:
    """Rows of data/results/<folder>/<file>, which ``run`` then has read, with the folder as ``source``: call it before
    the run's id is used. Empty with these columns if there is no such file."""
    name = f"data/results/{folder}/{file}"
    if not (root() / name).exists():
        return pd.DataFrame(columns=[*columns, "source"])
    return read_csv(run.uses(name)).assign(source=folder)


def published_ablations(run, folder: str) -> pd.DataFrame:
    """The committed rows of the ablations; column ``source`` is the folder in data/results."""
    return _published(run, folder, "ablations.csv", ["factor", "against"]).fillna({"against": ""})


def beside_published(published: pd.DataFrame, rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """The published rows, and of ``rows`` (of this ``source``) the factors that they lack."""
    live = rows[~rows["factor"].isin(published["factor"])].assign(source=source)
    return pd.concat([published, live], ignore_index=True) if len(published) else live


def published_baselines(run, folder: str) -> pd.DataFrame:
    """The committed rows of the baselines: columns of :func:`alea_lib.experiments.baseline_differences`, ``model`` and
    ``source`` (the folder). A long comparison may be split into variants, which all hold the study's method: such rows
    stand once."""
    return _published(run, folder, "rivals.csv", [*COLUMNS, "model"]).drop_duplicates([*COLUMNS[:3], "model"])


def baselines_of_study(run, folder: str) -> pd.DataFrame:
    """What the profile's own notebook 07 found, if it has one, then the published rows."""
    live, full = read_csv(run.uses(run.results() / "rivals.csv")), published_baselines(run, folder)
    if "method" not in live:
        return full
    return pd.concat([live.assign(source=run.profile), full], ignore_index=True)[full.columns]
