"""Rivals and edits side by side: every method beside the base model, and the best rival beside the edits."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..measures.frontier import frontier_gap
from ..measures.truth import Truth
from ..scoring import Evaluated
from ..stats import paired_difference, summarise

METRICS = ("chair_s", "chair_i", "recall", "words")
COLUMNS = ["method", "kind", "metric", "against", "value", "lo", "hi", "n"]
LOST = 0.03  # recall that a method may lose and still count


def compare_rivals(base: Evaluated, found: dict[str, Evaluated], kinds: dict[str, str], truth: Truth) -> pd.DataFrame:
    """All methods on the same pictures: their values, and what they change against the base model, paired by picture.

    Columns COLUMNS; ``against`` is "" for values (``frontier_gap`` among them, which is against the base model's
    truncation by its nature), or "base". ``kinds``: what each method is (a rival's kind, "edit", "edit + decoding").
    """
    items = {"base": _captions(base), **{name: _captions(each) for name, each in found.items()}}
    rows = []
    for name, own in items.items():
        rows.append(summarise(own).assign(method=name, against=""))
        if name != "base":
            rows.append(paired_difference(own, items["base"]).assign(method=name, against="base"))
            gap = {"metric": "frontier_gap", **frontier_gap(base.captions, found[name].captions, truth)}
            rows.append(pd.DataFrame([gap]).assign(method=name, against=""))
    table = pd.concat(rows, ignore_index=True)
    table = table[table["metric"].isin([*METRICS, "frontier_gap"])]
    return table.assign(kind=table["method"].map({"base": "base", **kinds}))[COLUMNS].reset_index(drop=True)


def best_rival(table: pd.DataFrame, among: Iterable[str]) -> str:
    """The method with the best ``frontier_gap`` among those whose recall is at most LOST under the base model's; the
    highest recall where there is none. ValueError when ``among`` is empty."""
    own = table[table["method"].isin(list(among))]
    if own.empty:
        raise ValueError("no rival to choose from: name some in RIVALS")
    recall = own[(own["metric"] == "recall") & (own["against"] == "base")].set_index("method")["value"]
    gap = own[own["metric"] == "frontier_gap"].set_index("method")["value"]
    near = recall.index[recall >= -LOST - 1e-9]
    return str(gap[near].idxmax() if len(near) else recall.idxmax())


def beside(best: str, others: Iterable[str], found: dict[str, Evaluated]) -> pd.DataFrame:
    """The other methods minus the best rival, paired by picture: method, against, metric, value, lo, hi, n."""
    own = _captions(found[best])
    parts = [paired_difference(_captions(found[m]), own).assign(method=m, against=best) for m in others if m != best]
    table = pd.concat(parts, ignore_index=True)
    return table[table["metric"].isin(METRICS)].reset_index(drop=True)


def rivals_finding(table: pd.DataFrame, best: str, differences: pd.DataFrame, edit: str) -> str:
    """The best rival and the truncation control beside the edit, as a list in markdown."""

    def value(method: str, metric: str, against: str = "") -> str:
        row = table[(table["method"] == method) & (table["metric"] == metric) & (table["against"] == against)].iloc[0]
        if metric == "frontier_gap" or against:
            return f"{100 * row['value']:+.1f} points ({100 * row['lo']:+.1f} to {100 * row['hi']:+.1f})"
        return f"{row['value']:.1%} ({row['lo']:.1%} to {row['hi']:.1%})"

    lines = [
        f"`{method}`: {value(method, 'chair_s')} of the captions name an absent object, recall changes by "
        f"{value(method, 'recall', 'base')}, {value(method, 'frontier_gap')} below the truncation frontier."
        for method in dict.fromkeys([edit, best, "truncation"])
        if (table["method"] == method).any()
    ]
    row = differences[(differences["method"] == edit) & (differences["metric"] == "chair_s")]
    if len(row):
        row = row.iloc[0]
        said = "fewer" if row["hi"] < 0 else "more" if row["lo"] > 0 else "not shown to differ"
        lines.append(
            f"`{edit}` against the best rival, `{best}`, paired by picture: {100 * row['value']:+.1f} points of such "
            f"captions ({100 * row['lo']:+.1f} to {100 * row['hi']:+.1f}): {said}."
        )
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _captions(found: Evaluated) -> pd.DataFrame:
    """The items of the captions' scorer."""
    return found.items[found.items["benchmark"] == "chair"].drop(columns=["benchmark", "scorer", "setting"])
