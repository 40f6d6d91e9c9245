"""Pictures of the world with their captions, and how its models were trained."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..measures.parse import mentions

STRENGTHS = ("strong", "medium", "weak", "rare")


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
