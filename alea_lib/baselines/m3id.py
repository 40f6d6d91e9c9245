"""M3ID (Favero et al., CVPR 2024): what the model would also say without an image counts against a token, more and
more as the answer grows."""

from dataclasses import dataclass
from math import exp

import torch

from .common import Stream, plausible, without_image
from .registry import Baseline, register


@dataclass(frozen=True)
class M3idSettings:
    """``rate``: after t tokens the weight is exp(rate t) - 1 (0: plain decoding); captions of LLaVA-1.5 have about 100
    tokens, so a world with shorter ones is given higher rates too."""

    rate: float = 0.02


def m3id(s: M3idSettings, vlm, batch, embeds, mask):
    """Log-probabilities l + (exp(rate t) - 1)(l - l without image), t = 1 for the first token."""
    blind = Stream(vlm, *without_image(vlm, batch, embeds, mask))

    def contrasted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        own, prior = scores.log_softmax(-1), blind(ids).log_softmax(-1)
        return plausible(scores, own + (exp(s.rate * (ids.shape[1] + 1)) - 1) * (own - prior))

    yield {"logits_processor": [contrasted]}


register(
    Baseline("m3id", "decoding", m3id, M3idSettings(), tuple({"rate": r} for r in (0.02, 0.05, 0.1)),
             "contrast with no image, growing along the answer", "Favero et al. 2024")
)  # fmt: skip
