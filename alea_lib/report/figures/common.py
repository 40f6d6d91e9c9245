"""One style, and the figures that several chapters draw: intervals, curves, counts.

Whatever colour tells apart, marks or dashes tell apart too. Figures are drawn as SVG on white, so that they are sharp
in print and readable on a dark page.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..labels import METHODS

MARKERS, DASHES = "osD^PvX*<>", ("-", "--", ":", "-.")
STYLE = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.size": 10,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "svg.hashsalt": "look-closer",  # the same figure is the same file
}


def style() -> None:
    """Set the style of all figures; call once at the top of a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=STYLE)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:  # in a notebook
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['svg']")
        shell.run_line_magic("config", "InlineBackend.print_figure_kwargs = {'metadata': {'Date': None}}")


def appearance(name: object, i: int, markers: str = MARKERS) -> dict[str, Any]:
    """Colour and marker (``fmt``) of a method; of anything else those that come ``i``-th."""
    colour, marker = METHODS.get(str(name), (sns.color_palette("colorblind")[i % 10], markers[i % len(markers)]))
    return {"color": colour, "fmt": marker}


def panels(n: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list[Axes]]:
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


def intervals(
    table: pd.DataFrame,
    group: str | None = None,
    title: str = "",
    xlabel: str = "",
    zero: bool = False,
    marks: dict[str, float] | None = None,
) -> Figure:
    """Points with their 95 % intervals (columns value, lo, hi, label), one line each; colours by ``group``.

    The axis names the range of a column ``n``. ``marks``: name -> value of dotted lines, e.g. chance.
    """
    groups = _in_order(table[group]) if group else [None]
    names = _in_order(table["label"])
    line = max(0.12 * len(groups) + 0.1, 0.34 if len(names) < 20 else 0.26)  # inches a label
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + line * len(names)))
    for g, name in enumerate(groups):
        part = table[table[group] == name] if group else table
        y = np.array([names.index(v) for v in part["label"]]) + (g - (len(groups) - 1) / 2) * 0.8 / len(groups)
        error = np.abs(part[["lo", "hi"]].to_numpy().T - part["value"].to_numpy())
        axis.errorbar(part["value"], y, xerr=error, label=name, capsize=2, markersize=5, lw=1.2, **appearance(name, g))
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


def curves(
    table: pd.DataFrame, x: str, columns: dict[str, str], title: str, window: int = 1, hue: str | None = None
) -> Figure:
    """Training curves: one panel a column of the table (column -> label), moving mean over ``window`` rows."""
    figure, axes = panels(len(columns), len(columns), 3.7, 2.9)
    for axis, (column, label) in zip(axes, columns.items()):
        for i, (name, part) in enumerate(table.groupby(hue, sort=False) if hue else [(None, table)]):
            smooth = part[column].rolling(window, min_periods=1).mean()
            every = max(1, len(part) // 8)
            axis.plot(part[x], smooth, lw=1.6, label=name, markersize=4, markevery=every, **_line(i))
        axis.set(xlabel=x, title=label)
        if hue:
            axis.legend(frameon=False)
    return headed(figure, title)


def _line(i: int) -> dict[str, Any]:
    """Marker, dash and colour of the ``i``-th line."""
    colour = sns.color_palette("colorblind")[i]
    return {"marker": MARKERS[i % len(MARKERS)], "ls": DASHES[i % len(DASHES)], "color": colour}


def widths(table: pd.DataFrame, title: str) -> Figure:
    """Half the width of the interval against the number of images (columns n, what, half_width), logarithmic."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    for i, (what, part) in enumerate(table.groupby("what", sort=False)):
        axis.plot(part["n"], 100 * part["half_width"], lw=1.4, label=what, **_line(i))
    axis.axhline(2, color="0.4", ls=":", lw=1)
    axis.set(title=title, xlabel="test images", ylabel="half interval in points", xscale="log", yscale="log")
    for set_ticks, ticks in ((axis.set_xticks, sorted(table["n"].unique())), (axis.set_yticks, [1, 2, 5, 10])):
        set_ticks(ticks, [str(n) for n in ticks])
    axis.legend(frameon=False)
    return figure


def counts(series: pd.Series, title: str, xlabel: str) -> Figure:
    """Horizontal bars of counts, largest first."""
    figure, axis = plt.subplots(figsize=(6.5, 0.5 + 0.26 * len(series)))
    axis.barh(series.index.astype(str), series.to_numpy(), color="#0072B2")
    axis.invert_yaxis()
    axis.set(title=title, xlabel=xlabel)
    return figure
