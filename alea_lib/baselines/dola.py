"""DoLa (Chuang et al., ICLR 2024): what an early layer would say already counts against a token."""

from dataclasses import dataclass

import torch

from ..models.hooks import read_layers
from .common import plausible
from .registry import Baseline, register


@dataclass(frozen=True)
class DolaSettings:
    """``low``: candidates are every other layer of the lower half, else of the upper half without the last.
    ``normed``: early states pass the last norm before the head (the official code: they do not). ``weight`` of the
    contrast: 0 is plain decoding."""

    low: bool = True
    normed: bool = False
    weight: float = 1.0


def candidates(s: DolaSettings, n_layers: int) -> list[int]:
    """The early layers, one of which is chosen at each step: that whose prediction is farthest from the last one's."""
    half = n_layers // 2
    return list(range(0, half, 2) if s.low else range(half, n_layers - 1, 2))


def dola(s: DolaSettings, vlm, batch, embeds, mask):
    """Log-probabilities l(last) - weight l(early), among the plausible tokens of the last layer; the early layer is
    chosen for each item and step by the largest Jensen-Shannon divergence."""
    states: dict[int, torch.Tensor] = {}
    norm = vlm.model.get_submodule(vlm.row.norm) if s.normed else torch.nn.Identity()

    def contrasted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        own = scores.log_softmax(-1)
        early = torch.stack([vlm.head(norm(h)).float().log_softmax(-1) for h in states.values()])
        return plausible(scores, own - s.weight * farthest(own, early))

    with read_layers(vlm, lambda layer, h: states.update({layer: h[:, -1]}), candidates(s, vlm.n_layers)):
        yield {"logits_processor": [contrasted]}


def farthest(own: torch.Tensor, early: torch.Tensor) -> torch.Tensor:
    """Of the log-probabilities early [L,B,V], for each item those farthest from own [B,V]: [B,V]."""
    middle = ((own.exp() + early.exp()) / 2).log()
    sides = (x.clamp(min=-1e4) for x in (own.expand_as(early), early))  # an impossible token adds nothing
    half = [(p.exp() * (p - middle)).sum(-1) for p in sides]
    return early[(half[0] + half[1]).argmax(0), torch.arange(len(own), device=own.device)]


register(
    Baseline("dola", "decoding", dola, DolaSettings(), ({}, {"low": False}, {"normed": True, "weight": 0.5}),
             "contrast with an early layer", "Chuang et al. 2024, official code")
)  # fmt: skip
