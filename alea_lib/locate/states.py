"""What locators look at: pooled hidden states of the two answers of a pair, layer by layer."""

from __future__ import annotations

import pandas as pd
import torch

from ..taps import read_layers
from ..vlm import VLM


@torch.no_grad()
def answer_states(
    vlm: VLM, features: torch.Tensor, question: str, answers: list[str], batch_size: int = 50
) -> torch.Tensor:
    """Mean over the answer's own tokens (EOS included) of each layer's output, [N, L, D].

    Padding, prompt and image positions are never counted; states are taken before the final norm. Memory is bounded
    by the batch.
    """
    out = torch.zeros(len(answers), vlm.n_layers, vlm.model.config.get_text_config().hidden_size)
    for start in range(0, len(answers), batch_size):
        rows = slice(start, start + batch_size)
        batch = vlm.encode(features[rows], question, answers[rows])
        weight = (batch.labels != -100).float()
        weight = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)

        def take(layer: int, h: torch.Tensor, rows=rows, weight=weight) -> None:
            out[rows, layer] = (h.float() * weight).sum(1).cpu()

        with read_layers(vlm, take):
            vlm.hidden(vlm.embed(batch), batch.mask)
    return out


def pair_states(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, prompt: str = "plain"
) -> tuple[torch.Tensor, torch.Tensor]:
    """States of the positive and the negative answers of ``pairs``, each [N, L, D], under one prompt role."""
    question = vlm.prompt(prompt)
    return tuple(answer_states(vlm, features, question, pairs[column].tolist()) for column in ("positive", "negative"))
