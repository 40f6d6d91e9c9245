"""Maps of words over their pictures: what a model looks at, and what it needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .common import headed, panels

KINDS = {"attention": ("attention", "Greys"), "effect": ("effect (nats)", "RdBu")}


def word_maps(pictures: Sequence, words: pd.DataFrame, title: str = "") -> Figure:
    """For each word a column: its map of attention and below its map of effect, drawn over the grey picture.

    ``pictures``: one a word. ``words``: label, attention, effect, as of :func:`alea_lib.patch_maps`; one scale a row.
    """
    n = len(words)
    figure, axes = panels(2 * n, n, 2.3, 2.5)
    for row, (kind, (label, colours)) in enumerate(KINDS.items()):
        top = max(max(np.abs(m).max() for m in words[kind]), 1e-9)
        for axis, picture, word in zip(axes[row * n :], pictures, words.to_dict("records")):
            drawn = _over(axis, picture, word[kind], colours, -top if kind == "effect" else 0, top)
            axis.set_title(word["label"] if row == 0 else "", fontsize=9, fontweight="normal", loc="left")
        figure.colorbar(drawn, ax=axes[row * n : (row + 1) * n], label=label, shrink=0.8)
    return headed(figure, title) if title else figure


def _over(axis: Axes, picture, values: Sequence[float], colours: str, low: float, high: float):
    """One map in half-transparent squares over its picture without colour."""
    grey, side = np.asarray(picture.convert("L")), round(len(values) ** 0.5)
    extent = (0, grey.shape[1], grey.shape[0], 0)
    axis.imshow(grey, cmap="gray", extent=extent)
    axis.axis("off")
    cells = np.reshape(values, (side, side))
    return axis.imshow(cells, cmap=colours, vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation="nearest")
