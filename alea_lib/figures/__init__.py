"""Tables in, figures out: one style, colour-blind-safe, readable in grey. Nothing here computes a result."""

from .book import finding
from .common import (
    METHODS,
    METRIC_LABELS,
    cost_plane,
    counts,
    curves,
    frontier_plane,
    intervals,
    points,
    stack,
    style,
    widths,
)
from .evidence import word_maps
from .pictures import companion_graph, gallery, glyph_sheet, mark, training
from .places import agreement_map, confusion, cost_quality, head_maps, layer_curves

__all__ = [
    "METHODS", "METRIC_LABELS", "agreement_map", "companion_graph", "confusion", "cost_plane", "cost_quality", "counts",
    "curves", "finding", "frontier_plane", "gallery", "glyph_sheet", "head_maps", "intervals", "layer_curves", "mark",
    "points", "stack", "style", "training", "widths", "word_maps",
]  # fmt: skip
