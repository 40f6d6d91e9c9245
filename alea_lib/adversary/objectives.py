"""What the adversary wants: the hallucinated answer, and an image that hardly matters."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ..models.batch import Batch, target_mask
from ..models.layout import causal
from ..models.vlm import VLM

TERMS = ("nll", "contrast", "neglect")
ROOM = 2**29  # bytes for the keys and values of all items' images and prompts


class NoImageReference:
    """Final hidden states of the model without the image, [n_tokens, D] an item, each computed at its first use."""

    def __init__(self, vlm: VLM, features: torch.Tensor, answers: list[str], prompt: str):
        self.vlm, self.features, self.answers, self.prompt = vlm, features, answers, prompt
        self.states: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, pick: np.ndarray) -> torch.Tensor:
        """Log-probabilities [n,V] of the picked items' answer tokens, in order."""
        if new := [int(i) for i in pick if int(i) not in self.states]:
            texts = [self.answers[i] for i in new]
            batch = self.vlm.encode(self.features[torch.as_tensor(new)], self.vlm.prompt(self.prompt), texts)
            image = batch.ids == self.vlm.image_id
            h = self.vlm.hidden(self.vlm.embed(batch), batch.mask * ~image, batch)
            self.states |= {i: h[row, targets] for row, (i, targets) in enumerate(zip(new, batch.target_mask))}
        return self.vlm.head(torch.cat([self.states[int(i)] for i in pick])).float().log_softmax(-1)


class PromptKVCache:
    """Keys and values of image and prompt, which do not depend on a prefix behind them.

    Computed once an item where those of all items fit into ``ROOM`` bytes, else at each call. ``usable``: whether the
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
        computed = self._compute(new) if new else {}
        items = [computed[int(i)] if int(i) in computed else self.kept[int(i)] for i in pick]
        if sum(t.nbytes for pair in items[0] for t in pair) * len(self.features) <= ROOM:
            self.kept |= computed
        cache = DynamicCache()
        for layer, pairs in enumerate(zip(*items)):
            cache.update(*(torch.cat([*side] * sides) for side in zip(*pairs)), layer)
        return cache

    def _compute(self, items: list[int]) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
        batch = self.vlm.encode(self.features[torch.as_tensor(items)], self.vlm.prompt(self.prompt))
        embeds = self.vlm.embed(batch)
        output = self.vlm.language_model(inputs_embeds=embeds, attention_mask=batch.mask, use_cache=True)
        layers = output.past_key_values.layers
        return {
            item: [(layer.keys[row : row + 1].clone(), layer.values[row : row + 1].clone()) for layer in layers]
            for row, item in enumerate(items)
        }


class AdversaryLoss:
    """The adversary's loss on items: image ``features`` [N,P,D] and ``answers``, the negatives and the positives (which
    only ``contrast`` needs). What does not depend on the prefix is kept from call to call.

    nll: of the negative, in nats a token; contrast: softplus(margin - log p(negative) + log p(positive)), in nats an
    answer; neglect: KL(no-image output || output under the prefix) at the negative's tokens. ``settings``: a
    ``PrefixSettings``.
    """

    def __init__(self, vlm: VLM, features, answers: tuple[list[str], list[str] | None], settings):
        self.vlm, self.features, self.settings, self.negatives = vlm, features, settings, answers[0]
        self.sides = [side for side in answers if side is not None] if settings.contrast else [answers[0]]
        self.no_image = NoImageReference(vlm, features, answers[0], settings.prompt)
        self.cache = PromptKVCache(vlm, features, settings.prompt, settings.place)

    def __call__(
        self, prefix, pick: np.ndarray, whole: np.ndarray | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted loss of the picked items under the prefix, and its terms. ``whole``: the batch that ``pick`` is
        a piece of; the loss is then the piece's part of that batch's: the parts add up."""
        vlm, s = self.vlm, self.settings
        texts = [side[int(i)] for side in self.sides for i in pick]
        features = self.features[torch.as_tensor(pick)].repeat(len(self.sides), 1, 1)
        batch = vlm.encode(features, vlm.prompt(s.prompt), texts)
        past = self.cache(pick, len(self.sides)) if self.cache.usable else None
        logits, labels = attacked_logits(vlm, batch, prefix, past)
        terms, n = self._terms(logits, labels, pick)
        if whole is not None and len(whole) > len(pick):
            tokens = n / sum(vlm.answer_length(self.negatives[int(i)]) for i in whole)
            terms = {k: t * (len(pick) / len(whole) if k == "contrast" else tokens) for k, t in terms.items()}
        loss = sum(getattr(s, name) * term for name, term in terms.items())
        return loss, {name: terms[name].item() if name in terms else 0.0 for name in TERMS}

    def _terms(self, logits, labels, pick: np.ndarray) -> tuple[dict, int]:
        """The terms that have a weight, and the number of the negatives' tokens."""
        s = self.settings
        logp = -F.cross_entropy(logits, labels[labels != -100], reduction="none")
        lengths = (labels != -100).sum(1).tolist()
        n = sum(lengths[: len(pick)])
        terms = {"nll": -logp[:n].mean()}
        if s.contrast:
            each = torch.stack([part.sum() for part in logp.split(lengths)])
            terms["contrast"] = F.softplus(s.margin - each[: len(pick)] + each[len(pick) :]).mean()
        if s.neglect:
            reference = self.no_image(pick)
            terms["neglect"] = F.kl_div(logits[:n].log_softmax(-1), reference, log_target=True, reduction="batchmean")
        return terms, n


def attacked_logits(
    vlm: VLM, batch: Batch, prefix, past: DynamicCache | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer logits [n,V] under a prefix, fp32, and the labels [B,T+k] that they predict.

    ``past``: keys and values of what stands before the prefix, from :class:`PromptKVCache`; only prefix and answer are
    then run and differentiated: same gradients. Without, the whole sequence is.
    """
    with torch.no_grad():
        plain = vlm.embed(batch)
    embeds, mask, labels = prefix.insert(batch, plain)
    if past is None:
        return vlm.answer_logits(batch, embeds, mask, target_mask(labels)).float(), labels
    at = past.get_seq_length()
    output = vlm.language_model(inputs_embeds=embeds[:, at:], attention_mask=mask, past_key_values=past, use_cache=True)
    return vlm.head(output.last_hidden_state[target_mask(labels)[:, at:]]).float(), labels
