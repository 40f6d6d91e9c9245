"""Fair tuning: every rival's grid on the same validate pictures by one rule, fixed before the test split is seen."""

from __future__ import annotations

import json

import pandas as pd
from tqdm import tqdm

from ..measures.chair import chair
from ..measures.frontier import frontier_gap
from .ground import Ground
from .registry import Rival

COLUMNS = ["rival", "settings", "chair_s", "recall", "frontier_gap", "n", "chosen"]


def tune(ground: Ground, row: Rival, tolerance: float = 0.03) -> tuple[Rival, pd.DataFrame, dict[str, float]]:
    """The rival fitted with its chosen settings, the record, and the passes of one fit with them.

    Record: rival, settings (what is changed of the defaults, as JSON), chair_s, recall, frontier_gap, n (pictures),
    chosen. The rule is :func:`choose`.
    """
    rows, made = [], []
    for changes in tqdm(row.grid, desc=f"tune {row.name}", disable=len(row.grid) < 2):
        ready, forwards, backwards = ground.fitted(row.changed(**changes))
        made.append((ready, {"forwards": forwards, "backwards": backwards}))
        rows.append((row.name, json.dumps(changes, sort_keys=True), *_scored(ground, ready)))
    record = pd.DataFrame(rows, columns=COLUMNS[:-1])
    best = choose(record, _recall(ground.validate.base, ground), tolerance)
    record["chosen"] = [i == best for i in range(len(record))]
    return made[best][0], record, made[best][1]


def choose(record: pd.DataFrame, base_recall: float, tolerance: float = 0.03) -> int:
    """Which row: the best ``frontier_gap`` among those whose recall is at most ``tolerance`` under the base model's; if
    there is none, the highest recall. The first of equals."""
    near = record[record["recall"] >= base_recall - tolerance - 1e-9]
    return int(near["frontier_gap"].idxmax() if len(near) else record["recall"].idxmax())


def _scored(ground: Ground, ready: Rival) -> tuple[float, float, float, int]:
    shown = ground.validate
    told = ground.captions(ready, shown)
    summary = chair(told, shown.truth).items.groupby("metric")[["num", "den"]].sum()
    ratio = summary["num"] / summary["den"]
    gap = frontier_gap(shown.base, told, shown.truth, n_resamples=2)["value"]  # the interval is not read
    return float(ratio["chair_s"]), float(ratio["recall"]), gap, len(told)


def _recall(captions: pd.DataFrame, ground: Ground) -> float:
    sums = chair(captions, ground.validate.truth).items.groupby("metric")[["num", "den"]].sum().loc["recall"]
    return float(sums["num"] / sums["den"])
