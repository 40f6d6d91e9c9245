"""PAI (Liu et al. 2024): image logits of the newest token's attention are raised by a share of their size, and the
answer is guided away from what the prompt says without the image."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ..models.hooks import weighed_attention
from .common import Columns, Stream, at_depth, plausible, without_image
from .registry import Baseline, register


@dataclass(frozen=True)
class PaiSettings:
    """``alpha``: image logits a become a + alpha |a| (0: no change). ``gamma``: strength of the guidance (1: none).
    ``first``: the lowest layer of a model with 32 whose attention is changed."""

    alpha: float = 0.5
    gamma: float = 1.1
    first: int = 2


def raised(scores: torch.Tensor, image: torch.Tensor, alpha: float) -> torch.Tensor:
    """Attention logits [B,H,K] with those of the image columns [B,1,K] raised by ``alpha`` times their size."""
    return torch.where(image, scores + alpha * scores.abs(), scores)


def guided(scores: torch.Tensor, blind: torch.Tensor, gamma: float) -> torch.Tensor:
    """Scores [B,V] and those of the stream without image -> log p + (gamma - 1)(log p - log p without image), where
    plausible."""
    own, prior = scores.float().log_softmax(-1), blind.float().log_softmax(-1)
    return plausible(scores, gamma * (own - prior) + prior)


def pai(s: PaiSettings, vlm, batch, embeds, mask):
    """Decoding under these settings."""
    columns, second = Columns(vlm, batch), Stream(vlm, *without_image(vlm, batch, embeds, mask))
    blind = False  # while the second stream is read, attention stays as it is

    def weigh(layer: int, scores: torch.Tensor) -> torch.Tensor | None:
        return None if blind else raised(scores, columns.of_image(scores), s.alpha).softmax(-1)

    def guide(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal blind
        blind = True
        try:
            return guided(scores, second(ids), s.gamma)
        finally:
            blind = False

    layers = range(at_depth(s.first, vlm.n_layers), vlm.n_layers)
    with weighed_attention(vlm, weigh, layers) if s.alpha else nullcontext():
        yield {"logits_processor": [guide]} if s.gamma != 1 else {}


GRID = tuple({"alpha": a, "gamma": g} for a, g in ((0.2, 1.1), (0.5, 1.1), (0.2, 1.5), (0.5, 1.5), (0.5, 1.0)))
register(
    Baseline("pai", "decoding", pai, PaiSettings(), GRID, "image attention raised, guidance against the prompt alone",
             "PAI: Liu et al. 2024 (ECCV), official code")
)  # fmt: skip
