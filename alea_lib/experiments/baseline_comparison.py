"""Baselines side by side: differences to the base model and to one method, paired by image."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from ..core.stats import paired_difference_seeds
from ..core.tables import DIFFERENCE
from ..edit.methods import METHODS
from ..evaluate.scoring import Evaluated
from ..metrics.frontier import frontier_gap
from ..metrics.truth import Truth

MEASURES = ("chair_s", "recall")
COLUMNS = ["method", "against", "metric", "value", "lo", "hi", "n", "seeds"]
CONTROLS = ("truncation", "stop-early", "careful-prompt")
FINE_TUNING = ("sft", "lora-all")  # of all decoder matrices: baselines
STUDY = tuple(name for name in METHODS if name not in FINE_TUNING)  # edits of this study
BASE = "base"
BySeed = Mapping[int, Evaluated]


def baseline_differences(found: Mapping[str, BySeed], base: Evaluated, truth: Truth) -> pd.DataFrame:
    """Method minus base: method, against ("base"), metric (chair_s_diff, recall_diff, frontier_gap), value, lo, hi, n
    (images), seeds. Means over seeds; intervals resample seeds and images, those of frontier_gap images alone."""
    rows = [_differences(m, seeds, dict.fromkeys(seeds, base), BASE) for m, seeds in found.items()]
    for method, seeds in found.items():
        gap = frontier_gap(base.captions, [one.captions for one in seeds.values()], truth)
        keys = {"method": method, "against": BASE, "metric": "frontier_gap", "seeds": len(seeds)}
        rows.append(pd.DataFrame([{**keys, **gap}]))
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def against(found: Mapping[str, BySeed], method: str) -> pd.DataFrame:
    """Every other method minus ``method`` of the same seed, in the columns of :func:`baseline_differences`, without
    gaps. KeyError for a method that is not there."""
    if method not in found:
        raise KeyError(f"no method {method!r} among those compared: {sorted(found)}")
    rows = [_differences(other, seeds, found[method], method) for other, seeds in found.items() if other != method]
    return pd.concat([pd.DataFrame(columns=COLUMNS), *rows], ignore_index=True)[COLUMNS]


def _differences(name: str, own: BySeed, other: BySeed, against: str) -> pd.DataFrame:
    sides = ({seed: _caption_items(one.items) for seed, one in side.items()} for side in (own, other))
    change = paired_difference_seeds(*sides)
    return change.assign(method=name, against=against, metric=change["metric"] + DIFFERENCE, seeds=len(own))


def _caption_items(items: pd.DataFrame) -> pd.DataFrame:
    wanted = (items["benchmark"] == "chair") & items["metric"].isin(MEASURES)
    return items.loc[wanted, ["image_id", "metric", "num", "den"]]


def best_baseline(rows: pd.DataFrame) -> str | None:
    """The method with the largest ``frontier_gap`` that is no control, no edit of this study and no combination; None
    if there is none. ``rows``: those of :func:`baseline_differences`."""
    gaps = rows[(rows["metric"] == "frontier_gap") & (rows["against"] == BASE)].set_index("method")["value"]
    others = gaps[[m for m in gaps.index if m not in (*STUDY, *CONTROLS) and " + " not in m]]
    return others.idxmax() if len(others) else None


def better_than(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Where others do better than ``method``, as far as a 95 % interval can tell: method, metric, value, lo, hi."""
    versus = rows[rows["against"] == method]
    fewer = (versus["metric"] == "chair_s" + DIFFERENCE) & (versus["hi"] < 0)
    more = (versus["metric"] == "recall" + DIFFERENCE) & (versus["lo"] > 0)
    return versus.loc[fewer | more, ["method", "metric", "value", "lo", "hi"]].reset_index(drop=True)
