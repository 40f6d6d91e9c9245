"""Tables in, figures out: one style, colour-blind-safe, readable in grey. Nothing here computes a result."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .measures.parse import mentions
from .stats import summarise

STRENGTHS = ("strong", "medium", "weak", "rare")
METHODS = {  # colour and marker of each method, the same on every page
    "base": ("#000000", "o"), "truncation": ("#7f7f7f", "s"), "no-prefix": ("#0072B2", "^"),
    "alea-corrected": ("#D55E00", "D"), "alea-mixed": ("#009E73", "P"),
}  # fmt: skip
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
        },
    )


def gallery(
    images: Sequence, captions: Sequence[str], truth: Sequence[frozenset] | None = None, columns: int = 4
) -> Figure:
    """Pictures with their captions; with ``truth`` wrong objects are written in [BRACKETS AND CAPITALS]."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image, text) in enumerate(zip(axes.flat, images, captions)):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(
            fill(mark(text, truth[i]) if truth else text, 36),
            fontsize=8,
            fontweight="normal",
            loc="left",
            y=-0.05,
            va="top",
        )
    return figure


def mark(text: str, there: frozenset) -> str:
    """The caption with objects that are not there in [CAPITALS AND BRACKETS], so that no colour is needed."""
    for m in reversed(mentions(text)):
        if m.category not in there:
            text = f"{text[: m.start]}[{text[m.start : m.end].upper()}]{text[m.end :]}"
    return text


def glyph_sheet(images: dict[str, np.ndarray], columns: int = 13) -> Figure:
    """The objects of the world, one glyph each."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.9 * columns, 1.1 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image) in zip(axes.flat, images.items()):
        axis.imshow(image)
        axis.set_title(name, fontsize=7, fontweight="normal", loc="center", pad=2)
    return figure


def companion_graph(edges: pd.DataFrame) -> Figure:
    """The planted graph (anchor, companion, strength, place) as four lists of edges, one for each strength."""
    figure, axes = plt.subplots(1, len(STRENGTHS), figsize=(11, 4.6))
    for axis, strength in zip(axes, STRENGTHS):
        part = edges[edges["strength"] == strength].reset_index(drop=True)
        axis.axis("off")
        axis.set_title(f"{strength} ({len(part)})")
        for i, edge in part.iterrows():
            axis.text(
                0, 1 - (i + 1) / 23, f"{edge['anchor']} → {edge['companion']}", fontsize=8, transform=axis.transAxes
            )
    return figure


def intervals(
    table: pd.DataFrame,
    value: str = "value",
    label: str = "label",
    group: str | None = None,
    title: str = "",
    xlabel: str = "",
    zero: bool = False,
) -> Figure:
    """Points with their 95 % intervals (columns value, lo, hi, label), one line each; colours by ``group``."""
    groups = _in_order(table[group]) if group else [None]
    names = _in_order(table[label])
    figure, axis = plt.subplots(figsize=(7.5, 0.6 + 0.34 * len(names) * max(1, 0.7 * len(groups))))
    for g, name in enumerate(groups):
        part = table[table[group] == name] if group else table
        y = np.array([names.index(v) for v in part[label]]) + (g - (len(groups) - 1) / 2) * 0.8 / len(groups)
        colour, marker = METHODS.get(name, (sns.color_palette("colorblind")[g % 10], "osD^Pv"[g % 6]))
        error = np.abs(part[["lo", "hi"]].to_numpy().T - part[value].to_numpy())
        axis.errorbar(part[value], y, xerr=error, fmt=marker, color=colour, label=name, capsize=2, markersize=5, lw=1.3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=xlabel)
    if zero:
        axis.axvline(0, color="0.4", lw=1, ls="--")
    if group:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _in_order(values: pd.Series) -> list[str]:
    """The different values: methods in the order of ``METHODS``, others as they come."""
    found = list(dict.fromkeys(values))
    return sorted(found, key=list(METHODS).index) if set(found) <= set(METHODS) else found


def layer_curves(scores: pd.DataFrame, chosen: list[int], title: str) -> Figure:
    """Mean score of each locator over the layers with a 95 % band, each scaled to its own largest value."""
    names = list(dict.fromkeys(scores["locator"]))
    figure, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 3.0), squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, names):
        part = scores[scores["locator"] == name].assign(
            score=lambda t: t["score"] / t.groupby("layer")["score"].mean().max()
        )
        sns.lineplot(
            part, x="layer", y="score", errorbar=("ci", 95), n_boot=500, seed=0, marker="o", ax=axis, color="#0072B2"
        )
        axis.set(title=name, xlabel="layer", ylabel="score / largest mean")
        axis.set_xticks(sorted(part["layer"].unique()))
    for layer in chosen:
        axes.flat[0].axvline(layer, color="#D55E00", ls="--", lw=1)
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
            axis.plot(
                part[x],
                smooth,
                lw=1.6,
                ls=["-", "--", ":"][i % 3],
                label=name,
                color=sns.color_palette("colorblind")[i],
            )
        axis.set(xlabel=x, title=label)
        if hue:
            axis.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def training(tower: pd.DataFrame, decoder: pd.DataFrame) -> Figure:
    """Training logs: the tower's patch accuracy, and each decoder's loss (columns step, loss, model)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
    left.plot(tower["step"], tower["patch_accuracy"], color="#0072B2")
    left.set(title="The tower learns to see", xlabel="step", ylabel="accuracy on object patches", ylim=(0, 1))
    for (name, part), dash in zip(decoder.groupby("model", sort=False), ("-", "--")):
        right.plot(part["step"], part["loss"], dash, label=name, color="#D55E00" if name == "natural" else "#0072B2")
    right.set(title="The decoders learn to write", xlabel="step", ylabel="loss in nats a token")
    right.legend(frameon=False)
    return figure


def frontier_plane(frontier: pd.DataFrame, points: pd.DataFrame, title: str) -> Figure:
    """CHAIRs against recall: the base model's truncation frontier with its band, and methods with their intervals.

    ``points``: method, chair_s, chair_s_lo, chair_s_hi, recall, recall_lo, recall_hi. Below the line is better.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4))
    line = frontier.sort_values("recall")
    axis.plot(line["recall"], line["chair_s"], color="0.35", lw=1.5, zorder=1, label="base, cut to its first sentences")
    axis.fill_between(line["recall"], line["chair_s_lo"], line["chair_s_hi"], color="0.6", alpha=0.3, zorder=0)
    for _, p in points.iterrows():
        colour, marker = METHODS.get(p["method"], ("#CC79A7", "v"))
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
    axis.set(xlabel="recall of objects", ylabel="CHAIRs: captions with a wrong object", title=title)
    axis.set_xlim(left=max(0, points["recall"].min() - 0.25))
    axis.legend(frameon=False, loc="upper left")
    return figure


def stack(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables with a column ``label``, one below the other, as ``intervals`` wants them."""
    return pd.concat(parts, ignore_index=True)


def head_maps(maps: dict[str, np.ndarray], title: str) -> Figure:
    """Heat maps of layers (rows) by heads (columns), one a value, each with its own scale and its values written in."""
    figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 3.4), squeeze=False)
    for axis, (label, values) in zip(axes.flat, maps.items()):
        small = values.size <= 80
        sns.heatmap(values, cmap="cividis", annot=small, fmt=".2f", annot_kws={"size": 7}, ax=axis, cbar=not small)
        axis.set(xlabel="head", ylabel="layer")
        axis.set_title(label, fontweight="normal", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def widths(table: pd.DataFrame, title: str) -> Figure:
    """Half the width of the interval against the number of images (columns n, what, half_width), logarithmic."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    for i, (what, part) in enumerate(table.groupby("what", sort=False)):
        colour = sns.color_palette("colorblind")[i]
        axis.plot(part["n"], 100 * part["half_width"], "osD^"[i % 4] + "-", color=colour, lw=1.4, label=what)
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
