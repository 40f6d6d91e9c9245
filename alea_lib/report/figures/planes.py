"""Two measures against each other: the truncation frontier's plane, gap against cost, the figure of the first page."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...core.stats import summarise
from .common import appearance

OTHERS = "<>dh*8"  # marks of what is not in METHODS and stands beside it


def frontier_plane(frontier: pd.DataFrame, points: pd.DataFrame, title: str) -> Figure:
    """CHAIRs against recall: the base model's truncation frontier with its band, and methods with their intervals.

    ``points``: method, chair_s, chair_s_lo, chair_s_hi, recall, recall_lo, recall_hi. Below the line is better.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4))
    _draw_plane(axis, frontier, points)
    axis.set_title(title)
    return figure


def _draw_plane(axis: Axes, frontier: pd.DataFrame, points: pd.DataFrame) -> None:
    line = frontier.sort_values("recall")
    axis.plot(line["recall"], line["chair_s"], color="0.35", lw=1.5, zorder=1, label="base, cut to its first sentences")
    axis.fill_between(line["recall"], line["chair_s_lo"], line["chair_s_hi"], color="0.6", alpha=0.3, zorder=0)
    for i, p in enumerate(points.to_dict("records")):
        x, y = ([p[f"{metric}{end}"] for end in ("", "_lo", "_hi")] for metric in ("recall", "chair_s"))
        _cross(axis, p["method"], i, x, y, markersize=8, zorder=3)
    axis.set(xlabel="recall of objects", ylabel="CHAIRs: captions with a wrong object")
    axis.set_xlim(left=max(0, points["recall"].min() - 0.25))
    axis.legend(frameon=False, loc="upper left")


def _cross(axis: Axes, method: str, i: int, x: list[float], y: list[float], **options) -> None:
    """A method's point with both intervals; ``x``, ``y``: value, lo, hi."""
    errors = {f"{name}err": [[v - lo], [hi - v]] for name, (v, lo, hi) in (("x", x), ("y", y))}
    axis.errorbar(x[0], y[0], label=method, capsize=2, **appearance(method, i, OTHERS), **errors, **options)


def cost_plane(table: pd.DataFrame, title: str) -> Figure:
    """Gap to the frontier (value, lo, hi) against relative cost (relative, lo_cost, hi_cost), one marker a method."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, row in enumerate(table.to_dict("records")):
        x, y = ([row[k] for k in keys] for keys in (("relative", "lo_cost", "hi_cost"), ("value", "lo", "hi")))
        _cross(axis, row["method"], i, x, y)
    axis.axhline(0, color="0.4", lw=1, ls="--")
    axis.set(title=title, xlabel="seconds a token, relative to the base model", ylabel="gap in CHAIRs")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def points(items: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Method -> items, as the points of :func:`frontier_plane`."""
    rows = []
    for method, table in items.items():
        summary = summarise(table[table["metric"].isin(["chair_s", "recall"])]).set_index("metric")
        row = {"method": method}
        for metric in ("chair_s", "recall"):
            row |= {f"{metric}{end}": summary.loc[metric, end.strip("_") or "value"] for end in ("", "_lo", "_hi")}
        rows.append(row)
    return pd.DataFrame(rows)


def finding(frontier: pd.DataFrame, points: pd.DataFrame, attacked: pd.DataFrame) -> Figure:
    """Left: the methods in the frontier's plane, on clean prompts. Right: CHAIRs under a fresh attack on each model.

    ``frontier`` and ``points`` as for :func:`frontier_plane`; ``attacked``: method, value, lo, hi, n.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    _draw_plane(left, frontier, points)
    left.set_title("Clean prompts: below the line is better than truncation")
    for y, row in enumerate(attacked.itertuples(index=False)):
        error = [[row.value - row.lo], [row.hi - row.value]]
        right.errorbar(row.value, y, xerr=error, capsize=2, markersize=8, **appearance(row.method, y))
    right.set_yticks(range(len(attacked)), attacked["method"])
    right.set(ylim=(len(attacked) - 0.5, -0.5), xlim=(0, 1), xlabel="CHAIRs: captions with a wrong object")
    right.set_title("Under a fresh attack on each model")
    return figure
