"""Baselines without further model passes: beams, a stronger wish to stop, other words, a shorter caption."""

from dataclasses import dataclass

import torch

from ..metrics.frontier import drop_last_sentence
from .registry import Baseline, register


@dataclass(frozen=True)
class BeamSettings:
    """``beams``: 1 is greedy decoding."""

    beams: int = 5


def beam(s: BeamSettings, vlm, batch, embeds, mask):
    """Beam search; scores are divided by the length, as transformers does."""
    yield {"num_beams": s.beams}


@dataclass(frozen=True)
class StopSettings:
    """``strength``: what is added to the end token's logit at each step (0: plain decoding)."""

    strength: float = 2.0


def stop_early(s: StopSettings, vlm, batch, embeds, mask):
    """The control of methods that only shorten: the end of the answer is made likelier, nothing else."""

    def lifted(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, vlm.end_id] += s.strength
        return scores

    yield {"logits_processor": [lifted]}


@dataclass(frozen=True)
class PromptSettings:
    """``role``: a prompt role of the family row."""

    role: str = "careful"


@dataclass(frozen=True)
class TruncationSettings:
    """Nothing to set: the last sentence goes. The control that any method must beat."""


register(
    Baseline("beam", "decoding", beam, BeamSettings(), ({"beams": 2}, {"beams": 5}), "beam search",
             "standard; 5 beams as in the CHAIR papers")
)  # fmt: skip
register(
    Baseline("stop-early", "decoding", stop_early, StopSettings(), tuple({"strength": x} for x in (1.0, 2.0, 4.0)),
             "the end token's logit is raised", "control of this study")
)  # fmt: skip
register(
    Baseline("careful-prompt", "prompt", lambda s: s.role, PromptSettings(),
             description="asked to name only what is visible", source="control of this study")
)  # fmt: skip
register(
    Baseline("truncation", "after", lambda s, captions: drop_last_sentence(captions), TruncationSettings(),
             description="the last sentence is deleted", source="control of this study")
)  # fmt: skip
