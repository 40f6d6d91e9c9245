"""AD-HH (Yang et al. 2025): heads that were found to drive hallucination are switched off while they look at the text.

Two steps: :func:`find_heads` scores all heads on pairs by zero-ablation, once a model; :func:`adhh` writes with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch

from ..locate.choose import choose_heads
from ..locate.run import locate_heads
from ..locate.settings import LocateSettings
from ..models.batch import Batch
from ..models.hooks import weighed_attention
from ..models.vlm import VLM
from .common import Columns, head_count
from .registry import Baseline, register

SWITCHED_OFF = ("head", "text")


@dataclass(frozen=True)
class AdhhSettings:
    """``top``: heads of a model with 1,024, the same share of another (1 of 36). ``threshold``: share of attention on
    question and answer from which a head is switched off. ``off``: its whole output (the paper: the head), or what it
    takes from the ``text`` (official code). ``heads``: (layer, head) instead of those that pairs name. ``n_pairs``: of
    the pairs, from the first, that score the heads."""

    top: int = 20
    threshold: float = 0.4
    off: str = "head"
    n_pairs: int = 40
    heads: tuple[tuple[int, int], ...] = ()


def find_heads(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AdhhSettings = AdhhSettings()
) -> tuple[tuple[int, int], ...]:
    """The heads without which the hallucinated objects lose most probability, compared with the grounded objects of
    the same answer. ``features`` [N,P,D] and ``pairs`` (positive, negative, wrong) are of the same images."""
    n, how = head_count(s.top, vlm.n_layers, vlm.n_heads), LocateSettings(grounded="negative")
    if not n:
        return ()
    found = locate_heads(vlm, features[: s.n_pairs], pairs.head(s.n_pairs), ["zero-ablation"], how)
    return tuple(choose_heads(found.scores, k=n, rule="mean"))


def learn_heads(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AdhhSettings) -> AdhhSettings:
    """The settings with the heads that the pairs name; given ones stay."""
    return s if s.heads else replace(s, heads=find_heads(vlm, features, pairs, s))


@contextmanager
def adhh(s: AdhhSettings, vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor) -> Iterator[dict]:
    """Decoding under these settings; without heads it is plain decoding."""
    if s.off not in SWITCHED_OFF:
        raise ValueError(f"off is {s.off!r}, it must be one of {SWITCHED_OFF}")
    if bad := [h for h in s.heads if not (0 <= h[0] < vlm.n_layers and 0 <= h[1] < vlm.n_heads)]:
        raise ValueError(f"heads {bad} are out of range: {vlm.key} has {vlm.n_layers} layers of {vlm.n_heads} heads")
    columns, chosen = Columns(vlm, batch), torch.zeros(vlm.n_layers, vlm.n_heads, dtype=torch.bool)
    for layer, head in s.heads:
        chosen[layer, head] = True
    chosen = chosen.to(vlm.device)

    def weigh(layer: int, scores: torch.Tensor) -> torch.Tensor:
        weights, text = scores.softmax(-1), columns.of_text(scores)
        off = chosen[layer] & ((weights * text).sum(-1) >= s.threshold)
        return torch.where(off[..., None] & (text | (s.off == "head")), 0.0, weights)

    if not s.heads:
        yield {}
        return
    with weighed_attention(vlm, weigh, sorted({layer for layer, _ in s.heads})):
        yield {}


GRID = ({}, {"top": 50}, {"top": 100}, {"top": 50, "off": "text"})
register(
    Baseline("adhh", "decoding", adhh, AdhhSettings(), GRID, "hallucination heads are off while they look at the text",
             "AD-HH: Yang et al. 2025 (ICLR), official code", learn=learn_heads)
)  # fmt: skip
