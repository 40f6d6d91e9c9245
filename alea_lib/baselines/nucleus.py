"""Nucleus sampling (Holtzman et al. 2020), the baseline that many published gains are measured against."""

from dataclasses import dataclass

import torch

from .registry import Baseline, feature_digest, register


@dataclass(frozen=True)
class NucleusSettings:
    """``p``: the likeliest tokens with this probability together."""

    p: float = 0.9
    seed: int = 0


def nucleus(s: NucleusSettings, vlm, batch, embeds, mask):
    """Samples by the Gumbel trick: the likeliest token after noise is a sample. Each item's noise comes from the seed
    and its own image and question, so that an answer does not hang on its batch, nor on torch's global state."""
    digests = [feature_digest(f, f"{s.seed} {q}") for f, q in zip(batch.features, batch.questions, strict=True)]
    dice = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little") % 2**63) for d in digests]

    def drawn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = in_nucleus(scores, s.p)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=d, dtype=torch.float64) for d in dice])
        gumbel = -(-uniform.clamp(min=1e-300).log()).log()
        return (kept.log_softmax(-1) + gumbel.to(kept.device)).float()

    yield {"logits_processor": [drawn]}


def in_nucleus(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Scores [B,V], -inf outside the smallest set of the likeliest tokens that has probability ``p``."""
    ranked, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = ranked.cumsum(-1) - ranked >= p
    outside[:, 0] = False
    return scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)


register(
    Baseline("nucleus", "decoding", nucleus, NucleusSettings(), ({"p": 0.9}, {"p": 0.5}),
             "sampling from the likeliest tokens", "Holtzman et al. 2020")
)  # fmt: skip
