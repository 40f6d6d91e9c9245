"""What the pages say of the baselines: the table beside one method, the finding, and committed rows."""

from __future__ import annotations

import pandas as pd

from ..core.formatting import in_points
from ..core.paths import root
from ..core.tables import DIFFERENCE, read_csv
from ..experiments.baseline_comparison import BASE, COLUMNS, CONTROLS, MEASURES, best_baseline, better_than


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


def baseline_finding(rows: pd.DataFrame, method: str) -> str:
    """The best baseline (largest gap to the base model's frontier) and the controls beside ``method``, then where any
    other does better than it, in markdown."""
    lines = []
    for row in baseline_comparison(rows, method).to_dict("records"):
        line = f"`{row['method']}` ({row['what']}) lies {row['gap']} below the base model's truncation frontier"
        apart = f"; CHAIRs minus those of `{method}`: {row['chair_s']}, recall {row['recall']}" if row["recall"] else ""
        lines.append(f"{line}{apart}.")
    better = better_than(rows, method)
    for metric, what in (("chair_s", "fewer wrong captions"), ("recall", "more recall")):
        part = better[better["metric"] == metric + DIFFERENCE]
        names = "; ".join(f"`{row['method']}` ({in_points(row)})" for _, row in part.iterrows())
        lines.append(f"With {what} than `{method}`, interval apart from zero: {names or 'none'}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def published_baselines(run, folder: str) -> pd.DataFrame:
    """The committed rows of data/results/<folder>/rivals.csv, which ``run`` then has read; empty if there are none.
    Columns of :func:`~alea_lib.experiments.baseline_comparison.baseline_differences`, ``model`` and ``source`` (the folder). A long
    comparison may be split into variants, which all hold the study's method: such rows stand once."""
    name = f"data/results/{folder}/rivals.csv"
    if not (root() / name).exists():
        return pd.DataFrame(columns=[*COLUMNS, "model", "source"])
    rows = read_csv(run.uses(name)).drop_duplicates([*COLUMNS[:3], "model"])
    return rows.assign(source=folder)


def baselines_of_study(run, folder: str) -> pd.DataFrame:
    """What the profile's own notebook 07 found, if it has one, then the published rows."""
    live, full = read_csv(run.uses(run.results() / "rivals.csv")), published_baselines(run, folder)
    if "method" not in live:
        return full
    return pd.concat([live.assign(source=run.profile), full], ignore_index=True)[full.columns]
