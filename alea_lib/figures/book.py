"""The figure of the first page."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .common import METHODS, draw_plane


def finding(frontier: pd.DataFrame, points: pd.DataFrame, attacked: pd.DataFrame) -> Figure:
    """Left: the methods in the frontier's plane, on clean prompts. Right: CHAIRs under a fresh attack on each model.

    ``frontier`` and ``points`` as for ``frontier_plane``; ``attacked``: method, value, lo, hi, n. Without attacks the
    right side is left out.
    """
    figure, axes = plt.subplots(
        1, 2 if len(attacked) else 1, figsize=(11 if len(attacked) else 6.5, 4.2), squeeze=False
    )
    draw_plane(axes[0, 0], frontier, points)
    axes[0, 0].set_title("Clean prompts: below the line is better than cutting")
    if len(attacked):
        axis = axes[0, 1]
        for y, row in enumerate(attacked.itertuples(index=False)):
            colour, marker = METHODS.get(row.method, ("#CC79A7", "v"))
            error = [[row.value - row.lo], [row.hi - row.value]]
            axis.errorbar(row.value, y, xerr=error, fmt=marker, color=colour, capsize=2, markersize=8)
        axis.set_yticks(range(len(attacked)), attacked["method"])
        axis.set(ylim=(len(attacked) - 0.5, -0.5), xlim=(0, 1), xlabel="CHAIRs: captions with a wrong object")
        axis.set_title("Under a fresh attack on each model")
    return figure
