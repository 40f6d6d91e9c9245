"""A second reading of the same answer, beside the one that ``generate`` runs: another picture, or none."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import DynamicCache

from ..vlm import VLM, Batch


class Stream:
    """Logits [B,V] of the next token for another prompt and the same answer so far, with a cache of its own.

    Call it once a step with the answer's tokens [B,t], as a logits processor gets them. Rows must stay in their places:
    greedy or sampled answers, no beams (ValueError).
    """

    def __init__(self, vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor):
        self.vlm, self.batch, self.next, self.mask = vlm, batch, embeds, mask
        self.cache, self.read = DynamicCache(), 0

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) != len(self.mask):
            raise ValueError(f"{len(ids)} rows are written for {len(self.mask)} prompts: contrasting needs one beam")
        if ids.shape[1]:
            self.next = self.vlm.model.get_input_embeddings()(ids[:, -1:])
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        h = self.vlm.hidden(self.next, self.mask, self.batch, self.cache, self.read)
        self.read += self.next.shape[1]
        return self.vlm.head(h[:, -1]).float()


def with_features(
    vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor, features: torch.Tensor
) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The same prompt with other image features [B,P,D]; soft prefix rows stay where they are."""
    other = replace(batch, features=features)
    places = batch.ids == vlm.image_id
    places = torch.nn.functional.pad(places, (0, embeds.shape[1] - places.shape[1]))
    seen = vlm.row.project(vlm, other).to(embeds.dtype)
    return other, embeds.masked_scatter(places.unsqueeze(-1), seen), mask


def without_image(
    vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor
) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """The same prompt without the positions of the image: question and soft prefix move up to what stood before it."""
    image = batch.ids == vlm.image_id
    n, rows = int(image[0].sum()), len(batch.ids)
    ids, own, labels = (x[~image].view(rows, -1) for x in (batch.ids, batch.mask, batch.labels))
    kept = ~torch.nn.functional.pad(image, (0, embeds.shape[1] - image.shape[1]))
    blind = Batch(ids, own, labels, batch.features[:0], batch.question - n, batch.answer - n, batch.questions)
    return blind, embeds[kept].view(rows, -1, embeds.shape[2]), mask[kept].view(rows, -1)


def plausible(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Bool [B,V]: tokens at least ``share`` times as likely as the likeliest (0: all that are possible)."""
    likely = scores.softmax(-1)
    return scores.isfinite() & (likely >= share * likely.max(-1, keepdim=True).values)
