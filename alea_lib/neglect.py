"""What the adversary wants: the hallucinated answer, and an image that hardly matters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from .hooks import read_attention
from .layout import causal
from .vlm import VLM, Batch, target_mask

TERMS = ("nll", "contrast", "neglect", "attention")
ROOM = 2**29  # bytes for the keys and values of all items' images and prompts


@torch.no_grad()
def blind_logits(vlm: VLM, batch: Batch, embeds: torch.Tensor) -> torch.Tensor:
    """Answer logits [n,V] when no position may look at the image (its positions are masked out)."""
    image = batch.ids == vlm.image_id
    return vlm.answer_logits(batch, embeds, batch.mask * ~image)


class Blind:
    """Final hidden states of the model without the image, [n_tokens, D] an item, each computed when first asked for."""

    def __init__(self, vlm: VLM, features: torch.Tensor, answers: list[str], prompt: str):
        self.vlm, self.features, self.answers, self.prompt = vlm, features, answers, prompt
        self.states: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, pick: np.ndarray) -> torch.Tensor:
        """Log-probabilities [n,V] of the picked items' answer tokens, in order."""
        if new := [int(i) for i in pick if int(i) not in self.states]:
            batch = self.vlm.encode(
                self.features[torch.as_tensor(new)], self.vlm.prompt(self.prompt), [self.answers[i] for i in new]
            )
            image = batch.ids == self.vlm.image_id
            h = self.vlm.hidden(self.vlm.embed(batch), batch.mask * ~image, batch)
            self.states |= {i: h[row, targets] for row, (i, targets) in enumerate(zip(new, batch.target_mask))}
        return self.vlm.head(torch.cat([self.states[int(i)] for i in pick])).float().log_softmax(-1)


class Asked:
    """Keys and values of image and prompt, which do not depend on a prefix that stands behind them.

    Read once an item where those of all items fit into ``ROOM`` bytes, else at each call. ``usable``: whether the
    family and the prefix's place allow it (one prompt and one number of image positions: equally long in all items).
    """

    def __init__(self, vlm: VLM, features: torch.Tensor, prompt: str, place: str):
        self.vlm, self.features, self.prompt = vlm, features, prompt
        self.usable = vlm.row.decoder_inputs is causal and place == "answer"
        self.kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, pick: np.ndarray, sides: int = 1) -> DynamicCache:
        """The cache of the picked items, the whole batch ``sides`` times over."""
        new = [int(i) for i in pick if int(i) not in self.kept]
        read = self._read(new) if new else {}
        items = [read[int(i)] if int(i) in read else self.kept[int(i)] for i in pick]
        if sum(t.nbytes for pair in items[0] for t in pair) * len(self.features) <= ROOM:
            self.kept |= read
        cache = DynamicCache()
        for layer, pairs in enumerate(zip(*items)):
            cache.update(*(torch.cat([*side] * sides) for side in zip(*pairs)), layer)
        return cache

    def _read(self, items: list[int]) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        batch = self.vlm.encode(self.features[torch.as_tensor(items)], self.vlm.prompt(self.prompt))
        past = self.vlm.language_model(
            inputs_embeds=self.vlm.embed(batch), attention_mask=batch.mask, use_cache=True
        ).past_key_values
        return {
            item: [(layer.keys[row : row + 1].clone(), layer.values[row : row + 1].clone()) for layer in past.layers]
            for row, item in enumerate(items)
        }


def adversary_loss(
    vlm: VLM,
    features,
    answers: tuple[list[str], list[str] | None],
    pick: np.ndarray,
    blind: Blind | None,
    prefix,
    settings,
    asked: Asked | None = None,
    whole: np.ndarray | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weighted loss of a batch of items under the prefix, and its terms.

    ``answers``: negatives and positives (which only ``contrast`` needs). nll: of the negative, in nats a token;
    contrast: softplus(margin - log p(negative) + log p(positive)), in nats an answer; neglect: KL(no-image output ||
    output under the prefix) at the negative's tokens; attention: share of attention on the image, mean over these
    tokens, heads and layers. ``asked`` keeps what stands before the prefix from call to call. ``whole``: the batch
    that ``pick`` is a piece of, of whose loss this is then the piece's part: the parts add up.
    """
    sides = [answers[0], answers[1]] if settings.contrast else [answers[0]]
    texts = [side[int(i)] for side in sides for i in pick]
    seen = features[torch.as_tensor(pick)].repeat(len(sides), 1, 1)
    batch = vlm.encode(seen, vlm.prompt(settings.prompt), texts)
    shares: list[torch.Tensor] = []
    with image_share(vlm, batch, prefix, len(pick), shares) if settings.attention else nullcontext():
        asked = asked or Asked(vlm, features, settings.prompt, prefix.place)
        past = asked(pick, len(sides)) if asked.usable and not settings.attention else None
        logits, labels = attacked_logits(vlm, batch, prefix, past)
    logp = -F.cross_entropy(logits, labels[labels != -100], reduction="none")
    lengths = (labels != -100).sum(1).tolist()
    n = sum(lengths[: len(pick)])
    terms = {"nll": -logp[:n].mean()}
    if settings.contrast:
        each = torch.stack([part.sum() for part in logp.split(lengths)])
        terms["contrast"] = F.softplus(settings.margin - each[: len(pick)] + each[len(pick) :]).mean()
    if settings.neglect:
        terms["neglect"] = F.kl_div(logits[:n].log_softmax(-1), blind(pick), log_target=True, reduction="batchmean")
    if settings.attention:
        terms["attention"] = torch.stack(shares).mean()
    if whole is not None and len(whole) > len(pick):
        tokens = n / sum(vlm.answer_length(answers[0][int(i)]) for i in whole)
        terms = {k: t * (len(pick) / len(whole) if k == "contrast" else tokens) for k, t in terms.items()}
    loss = sum(getattr(settings, name) * term for name, term in terms.items())
    return loss, {name: terms[name].item() if name in terms else 0.0 for name in TERMS}


def attacked_logits(
    vlm: VLM, batch: Batch, prefix, past: DynamicCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer logits [n,V] under a prefix, fp32, and the labels [B,T+k] that they predict.

    ``past``: keys and values of what stands before the prefix, from :class:`Asked`; only prefix and answer are then
    run and trained through: same gradients. Without, the whole sequence is.
    """
    with torch.no_grad():
        plain = vlm.embed(batch)
    embeds, mask, labels = prefix.insert(batch, plain)
    if past is None:
        return vlm.answer_logits(batch, embeds, mask, target_mask(labels)).float(), labels
    at = past.get_seq_length()
    h = vlm.language_model(
        inputs_embeds=embeds[:, at:], attention_mask=mask, past_key_values=past, use_cache=True
    ).last_hidden_state
    return vlm.head(h[target_mask(labels)[:, at:]]).float(), labels


@contextmanager
def image_share(vlm: VLM, batch: Batch, prefix, n: int, out: list[torch.Tensor]) -> Iterator[None]:
    """Append each layer's share of attention on the image to ``out`` (mean over heads and the answer tokens of the
    first ``n`` rows), with its gradient, for forward passes of the batch under the prefix inside the block."""
    image = batch.ids == vlm.image_id
    with torch.no_grad():
        embeds = vlm.embed(batch)
        image = prefix.insert(replace(batch, labels=torch.where(image, batch.ids, -100)), embeds)[2] != -100
        targets = target_mask(prefix.insert(batch, embeds)[2])
    rows = targets.long().topk(int(targets.sum(1).max()), dim=1).indices.sort(dim=1).values
    weight = targets.gather(1, rows).float()
    weight[n:] = 0
    weight = weight / weight.sum()

    def take(layer: int, p: torch.Tensor) -> None:
        out.append((((p * image[:, None, None, :].float()).sum(-1)).mean(1) * weight).sum())

    with read_attention(vlm, take, rows):
        yield
