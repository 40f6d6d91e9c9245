"""Shared by several baselines: constants carried over to another size, columns of the attention, the contrast with a
second stream of logits."""

from dataclasses import replace

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..models.batch import Batch
from ..models.vlm import VLM

PUBLISHED_LAYERS = PUBLISHED_HEADS = 32  # LLaVA-1.5-7B
PLAUSIBLE = 0.1  # the published beta of VCD, M3ID, DoLa and PAI


def at_depth(layer: int, n_layers: int) -> int:
    """The layer at the same share of the depth: ``layer`` of 32, rounded (half to even), kept inside the model."""
    return min(n_layers - 1, round(layer * n_layers / PUBLISHED_LAYERS))


def head_count(heads: int, n_layers: int, n_heads: int) -> int:
    """The same share of all heads: ``heads`` of 1,024, rounded, at least one unless none were meant."""
    share = heads / (PUBLISHED_LAYERS * PUBLISHED_HEADS)
    return max(min(heads, 1), round(share * n_layers * n_heads))


class Columns:
    """Which columns of the attention are the image's and which the text's, while a batch (padded on the left) is
    written. Soft prefix rows never stand before the image, so its columns are those of ``batch``."""

    def __init__(self, vlm: VLM, batch: Batch):
        self.image = batch.ids == vlm.image_id
        if not bool(self.image.any(1).all()):
            raise ValueError("a prompt of the batch has no image: attention baselines need one in each")

    def of_image(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [B,1,K] for scores [B,H,K]; beams of an item follow one another."""
        image = self.image.repeat_interleave(len(scores) // len(self.image), 0)
        return pad(image, (0, scores.shape[-1] - image.shape[1]))[:, None]

    def of_text(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool [B,1,K]: question and answer, i.e. everything behind the image (official code of AD-HH)."""
        image = self.of_image(scores)
        last = image.shape[-1] - 1 - image.flip(-1).long().argmax(-1, keepdim=True)
        return torch.arange(image.shape[-1], device=image.device) > last


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
            self.mask = pad(self.mask, (0, 1), value=1)
        h = self.vlm.hidden(self.next, self.mask, self.batch, self.cache, self.read)
        self.read += self.next.shape[1]
        return self.vlm.head(h[:, -1]).float()


Prompt = tuple[Batch, torch.Tensor, torch.Tensor]  # batch, embeddings, mask


def with_features(vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> Prompt:
    """The same prompt with other image features [B,P,D]; soft prefix rows stay where they are."""
    other = replace(batch, features=features)
    places = batch.ids == vlm.image_id
    places = pad(places, (0, embeds.shape[1] - places.shape[1]))
    projected = vlm.row.project(vlm, other).to(embeds.dtype)
    return other, embeds.masked_scatter(places.unsqueeze(-1), projected), mask


def without_image(vlm: VLM, batch: Batch, embeds: torch.Tensor, mask: torch.Tensor) -> Prompt:
    """The same prompt without the positions of the image: question and soft prefix move up to what stood before it."""
    image = batch.ids == vlm.image_id
    n, rows = int(image[0].sum()), len(batch.ids)
    ids, own, labels = (x[~image].view(rows, -1) for x in (batch.ids, batch.mask, batch.labels))
    kept = ~pad(image, (0, embeds.shape[1] - image.shape[1]))
    blind = Batch(ids, own, labels, batch.features[:0], batch.question - n, batch.answer - n, batch.questions)
    return blind, embeds[kept].view(rows, -1, embeds.shape[2]), mask[kept].view(rows, -1)


def plausible(scores: torch.Tensor, contrasted: torch.Tensor) -> torch.Tensor:
    """``contrasted`` [B,V], but -inf for tokens less than a tenth as likely as the likeliest of ``scores`` [B,V]."""
    likely = scores.softmax(-1)
    return contrasted.masked_fill(likely < PLAUSIBLE * likely.max(-1, keepdim=True).values, -torch.inf)
