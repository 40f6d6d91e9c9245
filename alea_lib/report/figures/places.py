"""Layers and heads: curves, heat maps, and locators against the truth."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .common import headed, panels

CELLS = {"annot": True, "fmt": ".1f", "annot_kws": {"size": 7}, "cbar": False}  # of a heat map with its values


def layer_curves(scores: pd.DataFrame, chosen: list[int], title: str) -> Figure:
    """Mean score of each locator over the layers with a 95 % band, each scaled to its own largest absolute mean."""
    names = list(dict.fromkeys(scores["locator"]))
    figure, axes = panels(len(names), 4, 2.7, 2.2, sharex=True)
    for axis, name in zip(axes, names):
        part = scores[scores["locator"] == name]
        largest = part.groupby("layer")["score"].mean().abs().max() or 1
        part = part.assign(score=part["score"] / largest)
        band = {"errorbar": ("ci", 95), "n_boot": 300, "seed": 0}
        sns.lineplot(part, x="layer", y="score", marker="o", ax=axis, color="#0072B2", **band)
        axis.set(xlabel="layer", ylabel="")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(sorted(part["layer"].unique()))
    for layer in chosen:
        axes[0].axvline(layer, color="#D55E00", ls="--", lw=1)
    return headed(figure, title)


def head_maps(maps: dict[str, np.ndarray], title: str, columns: int = 2) -> Figure:
    """Heat maps of layers (rows) by heads (columns), one a value, each with its own scale and its values written in.

    A map without any number stays empty and says so.
    """
    size = 4.6 if columns < 3 else 3.1
    figure, axes = panels(len(maps), columns, size, 0.75 * size)
    for axis, (label, values) in zip(axes, maps.items()):
        axis.set_title(label, fontweight="normal", fontsize=10)
        values = np.asarray(values, dtype=float)
        if not np.isfinite(values).any():
            axis.set(xticks=[], yticks=[])
            axis.text(0.5, 0.5, "not defined here", ha="center", transform=axis.transAxes)
            continue
        small = values.size <= 80 and columns < 3
        sns.heatmap(values, cmap="cividis", annot=small, fmt=".2f", annot_kws={"size": 7}, ax=axis, cbar=not small)
        axis.set(xlabel="head", ylabel="layer")
    return headed(figure, title)


def agreement_map(taus: pd.DataFrame, title: str) -> Figure:
    """Kendall's tau between locators, values written in; those that agree stand side by side.

    The order is that of the angles between the first two eigenvectors (Friendly 2002), cut at the widest gap.
    """
    table = taus.fillna(0.0)
    vectors = np.linalg.eigh(table.to_numpy())[1][:, -2:]
    angles = np.arctan2(vectors[:, 0], vectors[:, 1])
    order = np.argsort(angles, kind="stable")
    gaps = np.diff(np.append(angles[order], angles[order[0]] + 2 * np.pi))
    order = np.roll(order, -int(gaps.argmax()) - 1)
    figure, axis = plt.subplots(figsize=(0.5 * len(table) + 2, 0.45 * len(table) + 1.4))
    sns.heatmap(table.iloc[order, order], cmap="vlag", vmin=-1, vmax=1, ax=axis, **CELLS)
    axis.set(xlabel="", ylabel="")
    axis.tick_params(labelsize=8)
    return headed(figure, title)


def confusion(named: pd.DataFrame, locators: Sequence[str], title: str) -> Figure:
    """For each locator: share of the models with an implant in a layer (row) for which it names a layer (column)."""
    layers = sorted({*named["true"], *named["named"]})
    shown = [name for name in locators if (named["locator"] == name).any()]
    figure, axes = panels(len(shown), 3, 3.1, 2.7)
    for axis, name in zip(axes, shown):
        mine = named[named["locator"] == name]
        table = mine.pivot_table(index="true", columns="named", values="share", aggfunc="sum")
        table = table.reindex(index=layers, columns=layers).fillna(0.0)
        table = table.div(table.sum(axis=1).where(lambda n: n > 0, 1), axis=0)
        sns.heatmap(table, cmap="cividis", vmin=0, vmax=1, ax=axis, **CELLS)
        axis.set(xlabel="named", ylabel="implanted")
        axis.set_title(name, fontsize=10)
    return headed(figure, title)


def spread(heights: np.ndarray, apart: float) -> np.ndarray:
    """Heights moved as little as a pass from the lowest up needs, so that no two are closer than ``apart``."""
    order, placed = np.argsort(heights, kind="stable"), np.array(heights, dtype=float)
    for below, above in zip(order[:-1], order[1:]):
        placed[above] = max(placed[above], placed[below] + apart)
    return placed - (placed.mean() - np.mean(heights))


def cost_quality(table: pd.DataFrame, cost: str, quality: str, title: str, xlabel: str, ylabel: str) -> Figure:
    """Locators as labelled points (columns locator, target, cost, quality): cheap is left (logarithmic), good is up."""
    figure, axes = plt.subplots(1, table["target"].nunique(), figsize=(10, 4), squeeze=False, sharey=True)
    for axis, (target, part) in zip(axes.flat, table.groupby("target", sort=False)):
        axis.scatter(part[cost], part[quality], color="#0072B2", zorder=3)
        line = {"arrowstyle": "-", "lw": 0.5, "color": "0.6", "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        place = np.log1p(part[cost]).sort_values()
        cluster = (place.diff() > 0.5).cumsum()  # what costs about the same: labels one below the other
        for _, group in part.groupby(cluster):
            heights = spread(group[quality].to_numpy(), 0.048)
            for (_, row), height in zip(group.iterrows(), heights):
                label = {"xytext": (10, height), "textcoords": ("offset points", "data"), "va": "center"}
                axis.annotate(row["locator"], (row[cost], row[quality]), fontsize=8, arrowprops=line, **label)
        axis.set(xscale="symlog", ylabel=ylabel, ylim=(-0.03, 1.08), xlim=(-0.3, 5 * part[cost].max()))
        axis.set_title(f"{target} locators", fontsize=10)
    figure.supxlabel(xlabel, fontsize=11)
    return headed(figure, title)
