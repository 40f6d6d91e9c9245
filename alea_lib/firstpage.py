"""The finding in three sentences and one figure, from metrics.csv: what the first page of the book says."""

from __future__ import annotations

import pandas as pd

from .phrases import in_points, percent
from .verdicts import adversary, one

CORE = ("base", "truncation", "no-prefix", "alea-corrected", "alea-mixed")
SAID = {"holds": "is shown to help", "not shown": "is not shown to help", "does not hold": "makes it worse"}


def core(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the methods that the first page is about: base model, scissors, edits and their control."""
    kept = table[table["method"].isin(CORE)]
    return kept.sort_values("method", key=lambda m: m.map(CORE.index), ignore_index=True)


def attacked(metrics: pd.DataFrame) -> pd.DataFrame:
    """CHAIRs under a fresh attack: method, value, lo, hi, n; empty where no attack was run."""
    rows = metrics[(metrics["metric"] == "chair_s") & (metrics["condition"] == "attacked")]
    return core(rows[["method", "value", "lo", "hi", "n"]])


def summary(metrics: pd.DataFrame) -> str:
    """Three sentences in markdown: what the edit does, what of it is the adversary's, what happens under attack.

    ``alea-corrected`` is the paper's idea and ``no-prefix`` its control; KeyError (from ``one``) names a missing row.
    """
    base, edit, plain = (one(metrics, "chair_s", "chair", m) for m in ("base", "alea-corrected", "no-prefix"))
    lost = one(metrics, "recall_diff", "chair", "alea-corrected")
    told = [
        f"Of {int(base['n'])} test pictures the unedited model names an absent object in {percent(base)}; after the "
        f"adversarial edit (`alea-corrected`) it does so in {percent(edit)}, and recall changes by "
        f"{in_points(lost)}.",
        f"Plain supervised editing of the same matrices (`no-prefix`) reaches {percent(plain)}: on clean prompts the "
        f"adversary {SAID[adversary(metrics, 'alea-corrected')[5]]}.",
    ]
    hit = attacked(metrics).set_index("method")
    if {"no-prefix", "alea-corrected"} <= set(hit.index):
        judged = adversary(metrics, "alea-corrected", "chair_s", "attacked")[5]
        told.append(
            f"Under a fresh attack on each model ({int(hit['n'].max())} pictures) plain editing stands at "
            f"{percent(hit.loc['no-prefix'])} and the adversarial edit at {percent(hit.loc['alea-corrected'])}: "
            f"there the adversary {SAID[judged]}."
        )
    return "\n\n".join(told) + "\n"
