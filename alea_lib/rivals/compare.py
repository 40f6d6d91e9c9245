"""Rivals side by side: differences to the base model and to one method, paired by picture, and what follows."""

from __future__ import annotations

import pandas as pd

from ..measures.frontier import frontier_gap
from ..measures.truth import Truth
from ..scoring import Evaluated
from ..stats import paired_difference
from ..verdicts import in_points

MEASURES = ("chair_s", "recall")
COLUMNS = ["method", "metric", "value", "lo", "hi", "n"]
CONTROLS = ("truncation", "stop-early", "careful-prompt")
STUDY = ("alea-mixed", "alea-corrected", "no-prefix")  # the study's own edits are no rivals of themselves


def rival_differences(found: dict[str, Evaluated], base: Evaluated, truth: Truth) -> pd.DataFrame:
    """Method minus base: method, metric (chair_s_diff, recall_diff, frontier_gap), value, lo, hi, n."""
    return _table({m: (f, base) for m, f in found.items()}, base, truth)


def against(found: dict[str, Evaluated], method: str, base: Evaluated, truth: Truth) -> pd.DataFrame:
    """Every other method minus ``method``, in the columns of :func:`rival_differences`; ``frontier_gap`` is how far
    it lies below the truncation frontier of ``method``: positive = better. KeyError for a method that is not there."""
    if method not in found:
        raise KeyError(f"no method {method!r} among those compared: {sorted(found)}")
    others = {m: (f, found[method]) for m, f in found.items() if m != method}
    return _table(others, found[method], truth)


def _table(sides: dict[str, tuple[Evaluated, Evaluated]], reference: Evaluated, truth: Truth) -> pd.DataFrame:
    rows = []
    for method, (own, other) in sides.items():
        change = paired_difference(*(_captions(side.items) for side in (own, other)))
        rows += [{**r, "method": method, "metric": f"{r['metric']}_diff"} for r in change.to_dict("records")]
        gap = frontier_gap(reference.captions, own.captions, truth)
        rows.append({"method": method, "metric": "frontier_gap", **gap})
    return pd.DataFrame(rows, columns=COLUMNS)


def _captions(items: pd.DataFrame) -> pd.DataFrame:
    mine = items[(items["benchmark"] == "chair") & items["metric"].isin(MEASURES)]
    return mine[["image_id", "metric", "num", "den"]]


def rival_finding(compared: pd.DataFrame, versus: pd.DataFrame, method: str) -> str:
    """The best rival (largest gap to the base model's frontier) and the controls beside ``method``, in markdown."""
    gaps = compared[(compared["metric"] == "frontier_gap") & ~compared["method"].str.contains(" + ", regex=False)]
    gaps = gaps.set_index("method")
    lines = [f"`{method}` lies {in_points(gaps.loc[method])} below the base model's truncation frontier."]
    others = gaps[~gaps.index.isin([*STUDY, *CONTROLS])]
    named = [*([others["value"].idxmax()] if len(others) else []), *[c for c in CONTROLS if c in gaps.index]]
    for name in named:
        change = versus[(versus["method"] == name) & (versus["metric"] == "chair_s_diff")].iloc[0]
        what = "control" if name in CONTROLS else "best rival"
        apart = f"CHAIRs minus those of `{method}`: {in_points(change)}"
        lines.append(f"`{name}` ({what}): {in_points(gaps.loc[name])} below it; {apart}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"
