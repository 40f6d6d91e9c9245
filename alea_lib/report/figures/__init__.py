"""Tables in, figures out: one style, colour-blind-safe, readable in grey. Nothing here computes a result."""

from ..labels import METHODS, METRIC_LABELS
from .common import counts, curves, intervals, style, widths
from .images import companion_graph, gallery, glyph_sheet, mark, training, word_maps
from .places import agreement_map, confusion, cost_quality, head_maps, layer_curves
from .planes import cost_plane, finding, frontier_plane, points

__all__ = [
    "METHODS", "METRIC_LABELS", "agreement_map", "companion_graph", "confusion", "cost_plane", "cost_quality", "counts",
    "curves", "finding", "frontier_plane", "gallery", "glyph_sheet", "head_maps", "intervals", "layer_curves", "mark",
    "points", "style", "training", "widths", "word_maps",
]  # fmt: skip
