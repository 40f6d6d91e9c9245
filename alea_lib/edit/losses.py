"""The terms of an edit's loss, the passes that feed them (plain, or reusing what is frozen), and the KL's reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..hooks import replaced_linear
from ..layout import causal
from ..prefix import Prefix
from ..tail import Cached, capture, capture_last, run_last, run_tail
from ..vlm import VLM, Batch, target_mask
from .kept import Kept
from .settings import EditSettings

BLOCK = 24


def answer_nll(vlm: VLM, batch: Batch, prefix: Prefix | None = None) -> torch.Tensor:
    """Mean NLL of the answer's tokens (EOS included, BOS and prompt not), in nats."""
    logits, labels = plain_pass(vlm, batch, prefix)
    return F.cross_entropy(logits.float(), labels)


def plain_pass(vlm: VLM, batch: Batch, prefix: Prefix | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n,V] at the scored positions by a whole forward pass, and the tokens [n] that they predict."""
    embeds, mask, labels = inputs(vlm, batch, prefix)
    return vlm.answer_logits(batch, embeds, mask, target_mask(labels)), labels[labels != -100]


@torch.no_grad()
def inputs(vlm: VLM, batch: Batch, prefix: Prefix | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, mask and labels of a batch, with the prefix in its place if there is one."""
    embeds = vlm.embed(batch)
    return (embeds, batch.mask, batch.labels) if prefix is None else prefix.insert(batch, embeds)


def kl_to_base(vlm: VLM, batch: Batch, base: torch.Tensor) -> torch.Tensor:
    """Mean over answer tokens of KL(base || model now), in nats. ``base`` [n,D]: final states of the base."""
    with torch.no_grad():
        teacher = vlm.head(base).float().log_softmax(-1)
    return kl_divergence(vlm.answer_logits(batch), teacher)


def kl_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(teacher || softmax(logits)); ``teacher`` [n,V] are log-probabilities."""
    student = logits.float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor, unsaid: torch.Tensor) -> torch.Tensor:
    """Mean of -log(1 - p) over the tokens [n] bool ``unsaid``, zero where there is none."""
    p = logits.float().softmax(-1).gather(1, labels[:, None])[unsaid, 0]
    return -torch.log1p(-p.clamp(max=1 - 1e-6)).sum() / max(1, len(p))


class Passes:
    """Logits of items under a condition, (texts, prompt role, prefix number), with weights in place of the model's.

    Plain: a whole forward pass. Fast: what enters the first edited layer is read once an item and condition; for the
    last layer's down-projection alone, once and for all what surrounds it. Beyond the model's limit (``keep``) what is
    read goes to ``folder``, or without one is read again.
    """

    def __init__(
        self,
        vlm: VLM,
        features,
        texts: dict[str, list[str]],
        settings: EditSettings,
        first: int,
        last: bool,
        folder: Path | None = None,
    ):
        self.vlm, self.features, self.texts, self.settings = vlm, features, texts, settings
        self.first, self.last = first, last
        # where mask or positions depend on the item, what is read once cannot be run again without it
        self.fast = settings.fast and first > 0 and not settings.prefix_dropout and vlm.row.decoder_inputs is causal
        self.kept = Kept(vlm.limits.keep, folder and folder / "inputs")
        self.folder = folder

    def encode(self, key: str, role: str, pick: np.ndarray) -> Batch:
        """The items' images, a prompt and their texts as a batch."""
        seen, answers = self.features[torch.as_tensor(pick)], [self.texts[key][int(i)] for i in pick]
        s = self.settings
        return self.vlm.encode(seen, self.vlm.prompt(role), answers, eos=s.eos, bos=s.bos)

    def __call__(
        self,
        key: str,
        role: str,
        pick: np.ndarray,
        weights: dict[str, torch.Tensor],
        prefix: Prefix | None = None,
        number: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n,V] of the picked items' answers, and the tokens [n]. ``number`` names the prefix in the cache."""
        if not self.fast:
            with replaced_linear(self.vlm, weights):
                return plain_pass(self.vlm, self.encode(key, role, pick), prefix)
        items = self._cached((key, role, number), pick, prefix)
        labels = torch.cat([c.labels for c in items])
        if self.last:
            return run_last(self.vlm, items, next(iter(weights.values()))), labels
        with replaced_linear(self.vlm, weights):
            return run_tail(self.vlm, self.first, items), labels

    def _cached(self, condition: tuple, pick: np.ndarray, prefix: Prefix | None) -> list[Cached]:
        new: dict[int, Cached] = {}
        for block in blocks(pick, len(self.features), lambda i: (*condition, i) in self.kept):
            given = inputs(self.vlm, self.encode(*condition[:2], block), prefix)
            found = capture_last(self.vlm, *given) if self.last else capture(self.vlm, self.first, *given)
            new |= {int(i): c for i, c in zip(block, found, strict=True)}
        for i, item in new.items():
            if (*condition, i) not in self.kept:
                self.kept.put((*condition, i), item)
        return [new[int(i)] if int(i) in new else self.kept[(*condition, int(i))] for i in pick]

    def forget(self, number: int) -> None:
        """Drop what was read under a prefix that is used no more."""
        self.kept.forget(lambda key: key[2] != number)


class Reference:
    """What the base says at the answer's tokens on the clean prompt: log-probabilities [n,V] of the picked items.

    ``states`` keeps [n_tokens, D] an item and makes logits when asked, so that memory does not grow with the
    vocabulary; ``weights`` keeps nothing and runs the base again (its own matrices are in place, since an edit in the
    making is never written to the model); ``logits`` keeps [n_tokens, V] an item, as the official code does.
    """

    def __init__(self, passes: Passes):
        self.passes, self.kind = passes, passes.settings.kl_reference
        self.kept = Kept(passes.vlm.limits.keep, passes.folder and passes.folder / "reference")

    @torch.no_grad()
    def __call__(self, pick: np.ndarray) -> torch.Tensor:
        vlm = self.passes.vlm
        if self.kind == "weights":
            return vlm.head(torch.cat(self._states(pick))).float().log_softmax(-1)
        new: dict[int, torch.Tensor] = {}
        for block in blocks(pick, len(self.passes.features), self.kept.__contains__):
            states = self._states(block)
            new |= {int(i): vlm.head(h) if self.kind == "logits" else h for i, h in zip(block, states)}
        for i, item in new.items():
            if i not in self.kept:
                self.kept.put(i, item)
        found = torch.cat([new[int(i)] if int(i) in new else self.kept[int(i)] for i in pick])
        return (found if self.kind == "logits" else vlm.head(found)).float().log_softmax(-1)

    def _states(self, pick: np.ndarray) -> list[torch.Tensor]:
        """Final states of the base at the scored positions, [n_tokens, D] an item."""
        batch = self.passes.encode("positive", self.passes.settings.kl_prompt, pick)
        h = self.passes.vlm.hidden(self.passes.vlm.embed(batch), batch.mask, batch)
        return [h[i, t].clone() for i, t in enumerate(batch.target_mask)]


def blocks(pick: np.ndarray, n: int, known) -> list[np.ndarray]:
    """Blocks of neighbouring items that hold an item not yet known. Fixed blocks, so that what is kept of an item
    does not depend on the batch that first asked for it: a resumed run computes the same bits."""
    wanted = sorted({int(i) // BLOCK for i in pick if not known(int(i))})
    return [np.arange(b * BLOCK, min(n, (b + 1) * BLOCK)) for b in wanted]


def dropped(prefix: Prefix, settings: EditSettings, step: int) -> Prefix:
    """The prefix with some rows left out by chance, at least one kept."""
    if not settings.prefix_dropout:
        return prefix
    rng = np.random.default_rng([settings.seed, 4, step])
    kept = rng.random(len(prefix.rows)) >= settings.prefix_dropout
    kept[rng.integers(len(kept))] |= not kept.any()
    return replace(prefix, rows=prefix.rows[torch.as_tensor(kept)])
