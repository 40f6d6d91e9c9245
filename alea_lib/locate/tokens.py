"""Which tokens of a pair's answers locators compare, and what they weigh."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ..core.files import DataError
from ..models.batch import Batch
from ..models.vlm import VLM, object_tokens
from .settings import LocateSettings


def suspects(vlm: VLM, positive: str, negative: str, wrong: Iterable[str]) -> tuple[list[int], list[int], list[int]]:
    """Token indices: truthful objects of the positive; wrong ones of the negative; the negative's truthful ones.

    DataError when no wrong category is named in the negative.
    """
    wrong = set(map(str, wrong))
    theirs, own = object_tokens(vlm, positive), object_tokens(vlm, negative)
    bad = [o.token for o in own if o.category in wrong]
    if not bad:
        raise DataError(
            f"the negative {negative!r} names none of {sorted(wrong)}; make pairs with `activate`, or correct `wrong`"
        )
    truthful = [[o.token for o in side if o.category not in wrong] for side in (theirs, own)]
    return truthful[0], bad, truthful[1]


# ---- batches ---------------------------------------------------------------------------------------------------------


def encode(vlm: VLM, features: torch.Tensor, answers: list[str], s: LocateSettings) -> Batch:
    """Answers after image and prompt, or without one or both, padded on the right."""
    batch = vlm.encode(features, vlm.prompt(s.prompt or "plain"), answers, eos=False)
    if s.prompt is None:
        batch = replace(batch, questions=("",) * len(batch.ids))
    if s.prompt is not None and s.image:
        return batch
    is_image = batch.ids == vlm.image_id
    drop = torch.zeros_like(is_image) if s.image else is_image
    if s.prompt is None:
        prompt = (batch.labels == -100) & ~is_image
        drop = drop | prompt.scatter(1, prompt.long().argmax(1, keepdim=True), False)  # beginning-of-text stays
    return _without(batch, drop, vlm.tokenizer.pad_token_id, s.image)


def _without(batch: Batch, drop: torch.Tensor, pad: int, image: bool) -> Batch:
    """The batch without some of its tokens, padded again."""
    keep = (batch.mask == 1) & ~drop
    width, rows = int(keep.sum(1).max()), len(keep)
    ids, mask = batch.ids.new_full((rows, width), pad), batch.mask.new_zeros(rows, width)
    labels, answer = batch.labels.new_full((rows, width), -100), batch.answer.clone()
    for i, k in enumerate(keep):
        n = int(k.sum())
        ids[i, :n], mask[i, :n], labels[i, :n] = batch.ids[i, k], 1, batch.labels[i, k]
        answer[i] -= int(drop[i, : batch.answer[i]].sum())
    question = torch.where(answer < batch.question, answer, batch.question)
    features = batch.features if image else batch.features[:, :0]
    return Batch(ids, mask, labels, features, question, answer, batch.questions)


def pooling_weights(vlm: VLM, batch: Batch, positives: list[str], negatives: list[str], wrong: list, s: LocateSettings):
    """[2B,T] weights that sum to 1 in each row (positives first): the positions whose states are compared."""
    own = batch.labels != -100
    if s.pooling == "padded":
        return torch.full(own.shape, 1 / own.shape[1], device=own.device)
    if (empty := ~own.any(1)).any():
        raise DataError(f"answer {int(empty.nonzero()[0])} of a batch has no token: drop pairs with empty answers")
    if s.pooling == "object":
        picked = torch.zeros_like(own)
        for i, pair in enumerate(zip(positives, negatives, wrong)):
            of_positive, bad, _ = suspects(vlm, *pair)
            for row, tokens in ((i, of_positive), (i + len(positives), bad)):
                picked[row, [int(batch.answer[row]) + t for t in tokens]] = True
        own = torch.where(picked.any(1, keepdim=True), picked, own)
    weight = own.float()
    return weight / weight.sum(1, keepdim=True)


def contrast_weights(
    vlm: VLM, batch: Batch, positives: list[str], negatives: list[str], wrong: list, s: LocateSettings
) -> torch.Tensor:
    """[2B,T] weights on label positions: the sum of weight times probability is the mean over the wrong objects of the
    negative minus the mean over the truthful objects of the answer that ``s.grounded`` names (0 if it names none)."""
    out = torch.zeros(batch.labels.shape, device=batch.labels.device)
    for i, (p, n, w) in enumerate(zip(positives, negatives, wrong)):
        of_positive, bad, of_negative = suspects(vlm, p, n, w)
        row = i + len(positives)
        out[row, [int(batch.answer[row]) + t for t in bad]] = 1 / len(bad)
        row, good = (i, of_positive) if s.grounded == "positive" else (row, of_negative)
        if good:
            out[row, [int(batch.answer[row]) + t for t in good]] = -1 / len(good)
    return out
