"""Images of the world with their captions and the maps of words, and how the world's models were trained."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from ...metrics.parse import mentions
from .common import headed, panels

STRENGTHS = ("strong", "medium", "weak", "rare")
MAPS = {"attention": ("attention", "Greys"), "effect": ("effect (nats)", "RdBu")}  # label and colours


def gallery(
    images: Sequence, captions: Sequence[str], truth: Sequence[frozenset] | None = None, columns: int = 4
) -> Figure:
    """Images with their captions; with ``truth`` wrong objects are written in [BRACKETS AND CAPITALS]."""
    figure, axes = panels(len(images), columns, 2.9, 3.7)
    for i, (axis, image, text) in enumerate(zip(axes, images, captions)):
        axis.axis("off")
        axis.imshow(image, interpolation="nearest")
        text = fill(mark(text, truth[i]) if truth else text, 36)
        axis.set_title(text, fontsize=8, fontweight="normal", loc="left", y=-0.05, va="top")
    return figure


def mark(text: str, there: frozenset) -> str:
    """The caption with objects that are not there in [CAPITALS AND BRACKETS], so that no colour is needed."""
    for m in reversed(mentions(text)):
        if m.category not in there:
            text = f"{text[: m.start]}[{text[m.start : m.end].upper()}]{text[m.end :]}"
    return text


def word_maps(images: Sequence[Image.Image], words: pd.DataFrame, title: str = "") -> Figure:
    """For each word a column: its map of attention and below its map of effect, drawn over the grey image.

    ``images``: one a word. ``words``: label, attention, effect, as of
    :func:`alea_lib.evaluate.patches.patch_maps`; one scale a row.
    """
    n = len(words)
    figure, axes = panels(2 * n, n, 2.3, 2.5)
    for row, (kind, (label, colours)) in enumerate(MAPS.items()):
        top = max(max(np.abs(m).max() for m in words[kind]), 1e-9)
        for axis, image, word in zip(axes[row * n :], images, words.to_dict("records")):
            drawn = _over(axis, image, word[kind], colours, -top if kind == "effect" else 0, top)
            axis.set_title(word["label"] if row == 0 else "", fontsize=9, fontweight="normal", loc="left")
        figure.colorbar(drawn, ax=axes[row * n : (row + 1) * n], label=label, shrink=0.8)
    return headed(figure, title) if title else figure


def _over(axis: Axes, image: Image.Image, values: Sequence[float], colours: str, low: float, high: float) -> AxesImage:
    """One map in half-transparent squares over its image without colour."""
    grey, side = np.asarray(image.convert("L")), round(len(values) ** 0.5)
    extent = (0, grey.shape[1], grey.shape[0], 0)
    axis.imshow(grey, cmap="gray", extent=extent)
    axis.axis("off")
    cells = np.reshape(values, (side, side))
    return axis.imshow(cells, cmap=colours, vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation="nearest")


def glyph_sheet(images: dict[str, np.ndarray], columns: int = 13) -> Figure:
    """The objects of the world, one glyph each."""
    figure, axes = panels(len(images), columns, 0.9, 1.1)
    for axis, (name, image) in zip(axes, images.items()):
        axis.axis("off")
        axis.imshow(image)
        axis.set_title(name, fontsize=7, fontweight="normal", loc="center", pad=2)
    return figure


def companion_graph(edges: pd.DataFrame) -> Figure:
    """The planted graph (anchor, companion, strength, place) as four lists of edges, one for each strength."""
    figure, axes = plt.subplots(1, len(STRENGTHS), figsize=(11, 4.6))
    for axis, strength in zip(axes, STRENGTHS):
        part = edges[edges["strength"] == strength]
        axis.axis("off")
        axis.set_title(f"{strength} ({len(part)})")
        for i, edge in enumerate(part.itertuples()):
            height = 1 - (i + 1) / 23
            axis.text(0, height, f"{edge.anchor} → {edge.companion}", fontsize=8, transform=axis.transAxes)
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
