"""SPIN (Sarkar et al. 2025): at each token and in each layer, heads that look little at the image are turned down."""

from dataclasses import dataclass

import torch

from ..models.hooks import weighed_attention
from .common import Columns
from .registry import Baseline, register

RANKED_BY = ("logits", "attention")


@dataclass(frozen=True)
class SpinSettings:
    """``kept``: share of a layer's heads that stay, rounded down as in the official code (30 of 32; 5 of 6).
    ``scale``: of the others' outputs. ``ranked_by``: a head's sum over image positions of its ``logits`` (official
    code) or of its ``attention`` (the paper's words)."""

    kept: float = 0.95
    scale: float = 0.08
    ranked_by: str = "logits"


def head_scales(scores: torch.Tensor, image: torch.Tensor, s: SpinSettings) -> torch.Tensor:
    """Scores [B,H,K] of the newest position and image columns [B,1,K] -> factors [B,H] of the heads' outputs."""
    looks = torch.where(image, scores if s.ranked_by == "logits" else scores.softmax(-1), 0.0).sum(-1)
    kept = looks.topk(int(s.kept * scores.shape[1]), dim=1).indices
    return torch.full_like(looks, s.scale).scatter(1, kept, 1.0)


def spin(s: SpinSettings, vlm, batch, embeds, mask):
    """Decoding under these settings."""
    if s.ranked_by not in RANKED_BY or not 0 <= s.kept <= 1:
        raise ValueError(f"ranked_by is {s.ranked_by!r}, one of {RANKED_BY}; kept is {s.kept}, a share from 0 to 1")
    columns = Columns(vlm, batch)

    def weigh(layer: int, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(-1) * head_scales(scores, columns.of_image(scores), s)[..., None]

    with weighed_attention(vlm, weigh):
        yield {}


GRID = ({}, {"kept": 0.8}, {"kept": 0.5}, {"kept": 0.8, "scale": 0.5}, {"ranked_by": "attention", "scale": 0.5})
register(
    Baseline("spin", "decoding", spin, SpinSettings(), GRID, "heads that look little at the image are turned down",
             "SPIN: Sarkar et al. 2025 (EMNLP), official code")
)  # fmt: skip
