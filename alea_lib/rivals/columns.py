"""Which columns of the attention are the image's and which the text's, while an answer is written in batches."""

from __future__ import annotations

import torch

from ..vlm import VLM, Batch


class Columns:
    """Positions of a prompt padded on the left, soft prefix rows among them (never before the image, so that the
    image's positions are those of ``batch``); what is written later is text."""

    def __init__(self, vlm: VLM, batch: Batch):
        self.image = batch.ids == vlm.image_id
        if not bool(self.image.any(1).all()):
            raise ValueError("a prompt of the batch has no image: attention rivals need one in each")

    def of_image(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [B,1,K] for scores [B,H,K]; beams of an item follow one another."""
        image = self.image.repeat_interleave(len(scores) // len(self.image), 0)
        return torch.nn.functional.pad(image, (0, scores.shape[-1] - image.shape[1]))[:, None]

    def of_text(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [B,1,K]: question and answer, i.e. everything behind the image (official code of AD-HH)."""
        image = self.of_image(scores)
        last = image.shape[-1] - 1 - image.flip(-1).long().argmax(-1, keepdim=True)
        return torch.arange(image.shape[-1], device=image.device) > last
