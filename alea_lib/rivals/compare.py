"""Rivals side by side: differences to the base model and to one method, paired by picture, and what follows."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..measures.frontier import frontier_gap
from ..measures.truth import Truth
from ..phrases import in_points
from ..scoring import Evaluated
from ..stats import paired_difference_seeds
from ..tables import DIFFERENCE, read_csv
from .alea import WHAT

MEASURES = ("chair_s", "recall")
COLUMNS = ["method", "against", "metric", "value", "lo", "hi", "n", "seeds"]
CONTROLS = ("truncation", "stop-early", "careful-prompt")
STUDY = tuple(WHAT)  # the study's own edits are no rivals of themselves
BASE = "base"
Found = Mapping[str, Mapping[int, Evaluated]]  # method -> seed -> what it said


def rival_differences(found: Found, base: Evaluated, truth: Truth) -> pd.DataFrame:
    """Method minus base: method, against ("base"), metric (chair_s_diff, recall_diff, frontier_gap), value, lo, hi, n
    (pictures), seeds. Means over seeds; intervals resample seeds and pictures, those of frontier_gap pictures alone."""
    rows = [_changes(m, seeds, dict.fromkeys(seeds, base), BASE) for m, seeds in found.items()]
    for method, seeds in found.items():
        gap = frontier_gap(base.captions, [one.captions for one in seeds.values()], truth)
        keys = {"method": method, "against": BASE, "metric": "frontier_gap", "seeds": len(seeds)}
        rows.append(pd.DataFrame([{**keys, **gap}]))
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def against(found: Found, method: str) -> pd.DataFrame:
    """Every other method minus ``method`` of the same seed, in the columns of :func:`rival_differences`, without gaps.
    KeyError for a method that is not there."""
    if method not in found:
        raise KeyError(f"no method {method!r} among those compared: {sorted(found)}")
    rows = [_changes(other, seeds, found[method], method) for other, seeds in found.items() if other != method]
    return pd.concat([pd.DataFrame(columns=COLUMNS), *rows], ignore_index=True)[COLUMNS]


def _changes(name: str, own: Mapping[int, Evaluated], other: Mapping[int, Evaluated], against: str) -> pd.DataFrame:
    change = paired_difference_seeds(*({s: _captions(f.items) for s, f in side.items()} for side in (own, other)))
    return change.assign(method=name, against=against, metric=change["metric"] + DIFFERENCE, seeds=len(own))


def _captions(items: pd.DataFrame) -> pd.DataFrame:
    mine = items[(items["benchmark"] == "chair") & items["metric"].isin(MEASURES)]
    return mine[["image_id", "metric", "num", "den"]]


def best_rival(rows: pd.DataFrame) -> str | None:
    """The method with the largest ``frontier_gap`` that is no control, no edit of this study and no combination; None
    if there is none. ``rows``: those of :func:`rival_differences`."""
    gaps = rows[(rows["metric"] == "frontier_gap") & (rows["against"] == BASE)].set_index("method")["value"]
    others = gaps[[m for m in gaps.index if m not in (*STUDY, *CONTROLS) and " + " not in m]]
    return others.idxmax() if len(others) else None


def rival_beside(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """The best rival and the controls beside ``method``: method, what, then ``gap``, ``chair_s`` and ``recall``, the
    last two minus those of ``method``, as text in points with 95 % intervals; n, seeds."""
    at = rows.set_index(["method", "against", "metric"])
    out = []
    for name in [method, best_rival(rows), *CONTROLS]:
        if (name, BASE, "frontier_gap") not in at.index:
            continue
        gap = at.loc[(name, BASE, "frontier_gap")]
        what = "this study" if name == method else "control" if name in CONTROLS else "best rival"
        differs = {
            m: in_points(at.loc[(name, method, m + DIFFERENCE)]) if name != method else "" for m in MEASURES
        }  # fmt: skip
        out.append(
            {"method": name, "what": what, "gap": in_points(gap), **differs, "n": gap["n"], "seeds": gap["seeds"]}
        )
    return pd.DataFrame(out, columns=["method", "what", "gap", *MEASURES, "n", "seeds"])


def better_than(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Where others do better than ``method``, as far as a 95 % interval can tell: method, metric, value, lo, hi."""
    versus = rows[rows["against"] == method]
    fewer = (versus["metric"] == "chair_s" + DIFFERENCE) & (versus["hi"] < 0)
    more = (versus["metric"] == "recall" + DIFFERENCE) & (versus["lo"] > 0)
    return versus.loc[fewer | more, ["method", "metric", "value", "lo", "hi"]].reset_index(drop=True)


def rival_finding(rows: pd.DataFrame, method: str) -> str:
    """The best rival (largest gap to the base model's frontier) and the controls beside ``method``, then where any
    other does better than it, in markdown."""
    lines = []
    for row in rival_beside(rows, method).to_dict("records"):
        line = f"`{row['method']}` ({row['what']}) lies {row['gap']} below the base model's truncation frontier"
        apart = f"; CHAIRs minus those of `{method}`: {row['chair_s']}, recall {row['recall']}" if row["recall"] else ""
        lines.append(f"{line}{apart}.")
    better = better_than(rows, method).set_index("metric")
    for metric, what in (("chair_s", "fewer wrong captions"), ("recall", "more recall")):
        part = better[better.index == metric + DIFFERENCE]
        names = "; ".join(f"`{r['method']}` ({in_points(r)})" for _, r in part.iterrows())
        lines.append(f"With {what} than `{method}`, interval apart from zero: {names or 'none'}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def published_rivals(run, folder: str) -> pd.DataFrame:
    """The committed rows of data/results/<folder>/rivals.csv, which ``run`` then has read; empty if there are none.
    Columns of :func:`rival_differences`, ``model`` and ``source`` (the folder). A long comparison may be split into
    variants, which all hold the study's method: such rows stand once."""
    from ..runs.places import root

    name = f"data/results/{folder}/rivals.csv"
    if not (root() / name).exists():
        return pd.DataFrame(columns=[*COLUMNS, "model", "source"])
    rows = read_csv(run.uses(name)).drop_duplicates([*COLUMNS[:3], "model"])
    return rows.assign(source=folder)


def rivals_of_study(run, folder: str) -> pd.DataFrame:
    """What the profile's own notebook 07 found, if it has one, then the published rows."""
    live, full = read_csv(run.uses(run.results() / "rivals.csv")), published_rivals(run, folder)
    if "method" not in live:
        return full
    return pd.concat([live.assign(source=run.profile), full], ignore_index=True)[full.columns]
