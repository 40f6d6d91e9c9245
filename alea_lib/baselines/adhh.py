"""AD-HH (Yang et al. 2025): heads that were found to drive hallucination are switched off while they look at the text.

Two steps: :func:`learn_heads` scores all heads on pairs by zero-ablation; :func:`adhh` writes with them.
"""

from dataclasses import dataclass, replace

import pandas as pd
import torch

from ..locate.choose import choose_heads
from ..locate.run import locate_heads
from ..locate.settings import LocateSettings
from ..models.hooks import weighed_attention
from ..models.vlm import VLM
from .common import Columns, head_count
from .registry import Baseline, register

SWITCHED_OFF = ("head", "text")
N_PAIRS = 40  # the first of the pairs score the heads


@dataclass(frozen=True)
class AdhhSettings:
    """``top``: heads of a model with 1,024, the same share of another (1 of 36). ``threshold``: share of attention on
    question and answer from which a head is switched off. ``off``: its whole output (the paper: the head), or what it
    takes from the ``text`` (official code). ``heads``: (layer, head), those that pairs name unless they are given."""

    top: int = 20
    threshold: float = 0.4
    off: str = "head"
    heads: tuple[tuple[int, int], ...] = ()


def learn_heads(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AdhhSettings) -> AdhhSettings:
    """The settings with the heads without which the hallucinated objects lose most probability, compared with the
    grounded objects of the same answer; given heads stay. ``features`` [N,P,D] and ``pairs`` (positive, negative,
    wrong) are of the same images."""
    if s.heads:
        return s
    how = LocateSettings(grounded="negative")
    found = locate_heads(vlm, features[:N_PAIRS], pairs.head(N_PAIRS), ["zero-ablation"], how)
    n = head_count(s.top, vlm.n_layers, vlm.n_heads)
    return replace(s, heads=tuple(choose_heads(found.scores, k=n, rule="mean")))


def adhh(s: AdhhSettings, vlm, batch, embeds, mask):
    """Decoding under these settings."""
    if s.off not in SWITCHED_OFF:
        raise ValueError(f"off is {s.off!r}, it must be one of {SWITCHED_OFF}")
    if bad := [h for h in s.heads if not (0 <= h[0] < vlm.n_layers and 0 <= h[1] < vlm.n_heads)]:
        raise ValueError(f"heads {bad} are out of range: {vlm.key} has {vlm.n_layers} layers of {vlm.n_heads} heads")
    columns = Columns(vlm, batch)
    chosen = torch.zeros(vlm.n_layers, vlm.n_heads, dtype=torch.bool, device=vlm.device)
    for head in s.heads:
        chosen[head] = True

    def weigh(layer: int, scores: torch.Tensor) -> torch.Tensor:
        weights, text = scores.softmax(-1), columns.of_text(scores)
        off = chosen[layer] & ((weights * text).sum(-1) >= s.threshold)
        return torch.where(off[..., None] & (text | (s.off == "head")), 0.0, weights)

    with weighed_attention(vlm, weigh, {layer for layer, _ in s.heads}):
        yield {}


GRID = ({}, {"top": 50}, {"top": 100}, {"top": 50, "off": "text"})
register(
    Baseline("adhh", "decoding", adhh, AdhhSettings(), GRID, "hallucination heads are off while they look at the text",
             "AD-HH: Yang et al. 2025 (ICLR), official code", learn=learn_heads)
)  # fmt: skip
