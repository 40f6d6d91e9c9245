"""A second stream beside the one that is written: the same answer after another prompt, with a cache of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..vlm import VLM, Batch


class SecondStream:
    """Next-token logits [B,V] of an answer as it grows, after ``embeds`` [B,T,D] and ``mask`` [B,T] (padding on the
    left). ``batch`` says where answers begin and images are, for families that need to know."""

    def __init__(self, vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor):
        from transformers import DynamicCache

        self.vlm, self.batch, self.embeds, self.mask = vlm, batch, embeds, mask
        self.cache, self.read = DynamicCache(), 0

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """After the new tokens ``ids`` [B,n], one more at each call. ValueError with beams, whose order changes."""
        if len(ids) != len(self.mask):
            raise ValueError(f"{len(ids)} rows for {len(self.mask)} prompts: a second stream goes with one beam")
        new = self.embeds
        if self.read:
            new = self.vlm.model.get_input_embeddings()(ids[:, -1:])
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        start, self.read = self.read, self.mask.shape[1]
        return self.vlm.head(self.vlm.hidden(new, self.mask, self.batch, self.cache, start)[:, -1])


def without_images(vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor) -> SecondStream:
    """The stream after the same prompts (soft prefix rows included) with the image positions taken out."""
    image = torch.nn.functional.pad(batch.ids == vlm.image_id, (0, mask.shape[1] - batch.ids.shape[1]))
    n, kept = int(image[0].sum()), ~image[:, : batch.ids.shape[1]]

    def cut(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return x[keep].unflatten(0, (len(x), -1))

    ids, seen, labels = (cut(x, kept) for x in (batch.ids, batch.mask, batch.labels))
    blind = replace(
        batch, ids=ids, mask=seen, labels=labels, features=batch.features[:, :0], question=batch.question - n,
        answer=batch.answer - n,
    )  # fmt: skip
    return SecondStream(vlm, blind, cut(embeds, ~image), cut(mask, ~image))
