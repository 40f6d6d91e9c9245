"""One style, and the figures that several chapters draw: intervals, curves, the frontier's plane.

Whatever colour tells apart, marks or dashes tell apart too. Figures are drawn as SVG on white, so that they are sharp
in print and readable on a dark page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..stats import summarise

METHODS = {  # colour and marker of each method, the same on every page
    "base": ("#000000", "o"), "truncation": ("#7f7f7f", "s"), "no-prefix": ("#0072B2", "^"),
    "sft": ("#56B4E9", "v"), "random-prefix": ("#CC79A7", "X"), "alea-official": ("#E69F00", "p"),
    "alea-corrected": ("#D55E00", "D"), "alea-mixed": ("#009E73", "P"),
}  # fmt: skip
MARKERS, DASHES = "osD^PvX*<>", ("-", "--", ":", "-.")
METRIC_LABELS = {
    "chair_s": "CHAIRs (wrong captions)", "chair_i": "CHAIRi (wrong mentions)", "recall": "recall of objects",
    "words": "words", "objects_per_caption": "objects a caption", "pope_accuracy": "POPE accuracy",
    "pope_f1": "POPE F1",
    "attn_all_mean": "image attention, all layers", "attn_last_mean": "image attention, last layer",
    "attn_last_max": "image attention, last layer, max", "frontier_gap": "gap to the truncation frontier",
}  # fmt: skip


def style() -> None:
    """Set the style of all figures; call once at the top of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette="colorblind",
        rc={
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "font.size": 10,
            "axes.titlesize": 11,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "svg.hashsalt": "look-closer",  # the same figure is the same file
        },
    )
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:  # in a notebook
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
        shell.run_line_magic("config", "InlineBackend.print_figure_kwargs = {'metadata': {'Date': None}}")


def intervals(
    table: pd.DataFrame,
    value: str = "value",
    label: str = "label",
    group: str | None = None,
    title: str = "",
    xlabel: str = "",
    zero: bool = False,
    marks: dict[str, float] | None = None,
) -> Figure:
    """Points with their 95 % intervals (columns value, lo, hi, label), one line each; colours by ``group``.

    A column ``n`` is told beside the label of the axis.

    ``marks``: name -> value of dotted lines, e.g. chance.
    """
    groups = _in_order(table[group]) if group else [None]
    names = _in_order(table[label])
    line = max(0.12 * len(groups) + 0.1, 0.34 if len(names) < 20 else 0.26)  # inches a label
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + line * len(names)))
    for g, name in enumerate(groups):
        part = table[table[group] == name] if group else table
        y = np.array([names.index(v) for v in part[label]]) + (g - (len(groups) - 1) / 2) * 0.8 / len(groups)
        colour, marker = METHODS.get(name, (sns.color_palette("colorblind")[g % 10], MARKERS[g % len(MARKERS)]))
        error = np.abs(part[["lo", "hi"]].to_numpy().T - part[value].to_numpy())
        axis.errorbar(part[value], y, xerr=error, fmt=marker, color=colour, label=name, capsize=2, markersize=5, lw=1.2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=xlabel + _how_many(table))
    if zero:
        axis.axvline(0, color="0.4", lw=1, ls="--")
    for name, at in (marks or {}).items():
        axis.axvline(at, color="0.4", lw=1.2, ls=":", label=name)
    if group or marks:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _how_many(table: pd.DataFrame) -> str:
    """What a column ``n`` says: (n = 1000), or the smallest and the largest where rows differ."""
    found = sorted({int(n) for n in table["n"].dropna()}) if "n" in table else []
    return f" (n = {' to '.join(map(str, dict.fromkeys((found[0], found[-1]))))})" if found else ""


def _in_order(values: pd.Series) -> list[str]:
    """The different values: methods in the order of ``METHODS``, others as they come."""
    found = list(dict.fromkeys(values))
    return sorted(found, key=list(METHODS).index) if set(found) <= set(METHODS) else found


def panels(n: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list]:
    """``n`` axes in rows of at most ``columns``; what is left over is empty."""
    columns = min(columns, n)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    for axis in axes.flat[n:]:
        axis.axis("off")
    return figure, list(axes.flat[:n])


def headed(figure: Figure, title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def curves(
    table: pd.DataFrame, x: str, columns: dict[str, str], title: str, window: int = 1, hue: str | None = None
) -> Figure:
    """Training curves: one panel a column of the table (column -> label), moving mean over ``window`` rows."""
    figure, axes = plt.subplots(1, len(columns), figsize=(3.7 * len(columns), 2.9), squeeze=False)
    for axis, (column, label) in zip(axes.flat, columns.items()):
        for i, (name, part) in enumerate(table.groupby(hue, sort=False) if hue else [(None, table)]):
            smooth = part[column].rolling(window, min_periods=1).mean()
            look = {
                "ls": DASHES[i % 4],
                "marker": MARKERS[i % len(MARKERS)],
                "color": sns.color_palette("colorblind")[i],
            }
            axis.plot(part[x], smooth, lw=1.6, label=name, markersize=4, markevery=max(1, len(part) // 8), **look)
        axis.set(xlabel=x, title=label)
        if hue:
            axis.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def frontier_plane(frontier: pd.DataFrame, points: pd.DataFrame, title: str) -> Figure:
    """CHAIRs against recall: the base model's truncation frontier with its band, and methods with their intervals.

    ``points``: method, chair_s, chair_s_lo, chair_s_hi, recall, recall_lo, recall_hi. Below the line is better.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4))
    draw_plane(axis, frontier, points)
    axis.set_title(title)
    return figure


def draw_plane(axis, frontier: pd.DataFrame, points: pd.DataFrame) -> None:
    """The frontier's plane on axes that are there."""
    line = frontier.sort_values("recall")
    axis.plot(line["recall"], line["chair_s"], color="0.35", lw=1.5, zorder=1, label="base, cut to its first sentences")
    axis.fill_between(line["recall"], line["chair_s_lo"], line["chair_s_hi"], color="0.6", alpha=0.3, zorder=0)
    for i, p in points.iterrows():
        colour, marker = METHODS.get(p["method"], (sns.color_palette("colorblind")[i % 10], "v<>dXh"[i % 6]))
        axis.errorbar(
            p["recall"],
            p["chair_s"],
            fmt=marker,
            color=colour,
            capsize=2,
            markersize=8,
            label=p["method"],
            zorder=3,
            xerr=[[p["recall"] - p["recall_lo"]], [p["recall_hi"] - p["recall"]]],
            yerr=[[p["chair_s"] - p["chair_s_lo"]], [p["chair_s_hi"] - p["chair_s"]]],
        )
    axis.set(xlabel="recall of objects", ylabel="CHAIRs: captions with a wrong object")
    axis.set_xlim(left=max(0, points["recall"].min() - 0.25))
    axis.legend(frameon=False, loc="upper left")


def cost_plane(table: pd.DataFrame, title: str) -> Figure:
    """Gap to the frontier (value, lo, hi) against relative cost (relative, lo_cost, hi_cost), one marker a method."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, row in enumerate(table.to_dict("records")):
        colour, marker = METHODS.get(row["method"], (sns.color_palette("colorblind")[i % 10], "osD^Pv"[i % 6]))
        x, y = row["relative"], row["value"]
        across, up = [[x - row["lo_cost"]], [row["hi_cost"] - x]], [[y - row["lo"]], [row["hi"] - y]]
        axis.errorbar(x, y, xerr=across, yerr=up, fmt=marker, color=colour, capsize=2, label=row["method"])
    axis.axhline(0, color="0.4", lw=1, ls="--")
    axis.set(title=title, xlabel="seconds a token, relative to the base model", ylabel="gap in CHAIRs")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def stack(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables with a column ``label``, one below the other, as ``intervals`` wants them."""
    return pd.concat(parts, ignore_index=True)


def widths(table: pd.DataFrame, title: str) -> Figure:
    """Half the width of the interval against the number of images (columns n, what, half_width), logarithmic."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    for i, (what, part) in enumerate(table.groupby("what", sort=False)):
        colour = sns.color_palette("colorblind")[i]
        look = {"marker": MARKERS[i % len(MARKERS)], "ls": DASHES[i % 4], "color": colour}
        axis.plot(part["n"], 100 * part["half_width"], lw=1.4, label=what, **look)
    axis.axhline(2, color="0.4", ls=":", lw=1)
    axis.set(title=title, xlabel="test images", ylabel="half interval in points", xscale="log", yscale="log")
    axis.set_xticks(sorted(table["n"].unique()), sorted(table["n"].unique()))
    axis.set_yticks([1, 2, 5, 10], [1, 2, 5, 10])
    axis.legend(frameon=False)
    return figure


def points(items: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Method -> items, as the points of ``frontier_plane``."""
    rows = []
    for method, table in items.items():
        summary = summarise(table[table["metric"].isin(["chair_s", "recall"])]).set_index("metric")
        row = {"method": method}
        for metric in ("chair_s", "recall"):
            row |= {
                metric: summary.loc[metric, "value"],
                f"{metric}_lo": summary.loc[metric, "lo"],
                f"{metric}_hi": summary.loc[metric, "hi"],
            }
        rows.append(row)
    return pd.DataFrame(rows).drop_duplicates("method")


def counts(series: pd.Series, title: str, xlabel: str) -> Figure:
    """Horizontal bars of counts, largest first."""
    figure, axis = plt.subplots(figsize=(6.5, 0.5 + 0.26 * len(series)))
    axis.barh(series.index.astype(str), series.to_numpy(), color="#0072B2")
    axis.invert_yaxis()
    axis.set(title=title, xlabel=xlabel)
    return figure
