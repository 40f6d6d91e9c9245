"""How constants published for a model of 32 layers with 32 heads each are carried over to another: by their share."""

from __future__ import annotations

PUBLISHED_LAYERS = PUBLISHED_HEADS = 32  # LLaVA-1.5-7B


def at_depth(layer: int, n_layers: int) -> int:
    """The layer at the same share of the depth: ``layer`` of 32, rounded (half to even), kept inside the model."""
    return min(n_layers - 1, round(layer * n_layers / PUBLISHED_LAYERS))


def head_count(heads: int, n_layers: int, n_heads: int) -> int:
    """The same share of all heads: ``heads`` of 1,024, rounded, at least one unless none were meant."""
    share = heads / (PUBLISHED_LAYERS * PUBLISHED_HEADS)
    return max(min(heads, 1), round(share * n_layers * n_heads))
