"""Where in the picture is a word's evidence? One map of attention and one of effect for each object that is named."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd
import torch
from tqdm import tqdm

from ..hooks import read_attention
from ..measures.parse import mentions
from ..measures.truth import Truth
from ..tables import DataError
from ..tokens import object_tokens
from ..vlm import VLM, Batch
from ..worlds.write import Split
from .grounding import batches, blank_features, log_p

COLUMNS = ["image_id", "start", "end", "category", "present", "attention", "effect"]


@dataclass(frozen=True)
class PatchSettings:
    """``block``: side of the square of patches that is blanked at once, odd (1 = one patch; a glyph of the small world
    covers four to nine). ``batch_size``: blanked pictures in one pass; memory goes with it."""

    block: int = 3
    prompt: str = "plain"
    batch_size: int = 64

    def __post_init__(self):
        if self.block < 1 or self.block % 2 == 0:
            raise ValueError(f"block is the side of a square around a patch: an odd number, not {self.block}")


@torch.no_grad()
def patch_maps(
    vlm: VLM,
    split: Split,
    features: torch.Tensor,
    table: pd.DataFrame,
    truth: Truth,
    settings: PatchSettings | None = None,
    progress: str = "",
) -> pd.DataFrame:
    """Two maps over the picture's patches for each object word of each caption: one row a word.

    ``table``: image_id, caption, in the order of ``features`` [N,P,D]. Columns image_id, start, end (of the word in the
    caption), category, present, and lists of length P in rows from the top:
    ``attention``: weights of the position that predicts the word's first token, mean over layers and heads, not
    renormalised (they sum to the share of attention on the picture).
    ``effect``: log p(first token) minus the same with the ``block`` x ``block`` patches around this one taken from a
    grey picture, the rest of the answer forced; in nats, positive = the patches speak for the word.
    DataError unless the patches form a square.
    """
    s = settings or PatchSettings()
    around = windows(features.shape[1], s.block)
    blank, rows = blank_features(vlm, split)[0], []
    todo = batches(vlm, features, table, s.prompt, batch_size=1)
    for part, batch in tqdm(todo, total=len(table), desc=progress, disable=not progress):
        image_id, caption = part["image_id"].iloc[0], part["caption"].iloc[0]
        words = _words(vlm, caption, truth.family)
        if not words:
            continue
        batch = _labelled(batch, sorted(words))
        attention, effect = _attention(vlm, batch), _effect(vlm, batch, blank, around, s.batch_size)
        for i, token in enumerate(sorted(words)):
            m = words[token]
            present = m.category in truth[image_id]
            maps = attention[i].tolist(), effect[i].tolist()
            rows.append((image_id, m.start, m.end, m.category, present, *maps))
    return pd.DataFrame(rows, columns=COLUMNS)


def windows(patches: int, block: int) -> torch.Tensor:
    """[P,P] bool: row p is the square of ``block`` x ``block`` patches around patch p, cut at the picture's edge."""
    side = round(patches**0.5)
    if side * side != patches:
        raise DataError(f"{patches} image positions form no square: maps need a family whose patches tile the picture")
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).reshape(2, -1)
    return ((at[:, :, None] - at[:, None]).abs() <= block // 2).all(0)


def _words(vlm: VLM, caption: str, family: str) -> dict:
    """Index of a word's first token -> its mention, as the parser reads them; one word a token."""
    tokens = [o.token for o in object_tokens(vlm, caption, family)]
    return dict(zip(tokens, mentions(caption, family), strict=True))


def _labelled(batch: Batch, tokens: list[int]) -> Batch:
    """One caption with labels at these tokens of its answer alone."""
    labels = torch.full_like(batch.labels, -100)
    at = batch.answer.item() + torch.tensor(tokens)
    labels[0, at] = batch.ids[0, at]
    return replace(batch, labels=labels)


def _attention(vlm: VLM, batch: Batch) -> torch.Tensor:
    """[n,P] of one caption: weights on the picture's positions, mean over layers and heads."""
    at = batch.target_mask.nonzero()[:, 1][None]
    image, total = batch.ids[0] == vlm.image_id, []
    with read_attention(vlm, lambda _, p: total.append(p[0].mean(0)[:, image].cpu()), at):
        vlm.hidden(vlm.embed(batch), batch.mask, batch)
    return torch.stack(total).mean(0)


def _effect(vlm: VLM, batch: Batch, blank: torch.Tensor, around: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[n,P] of one caption: what the words lose, in nats, when the square around a patch is grey."""
    whole, without = log_p(vlm, batch), []
    for part in around.to(batch.features.device).split(batch_size):
        seen = torch.where(part[..., None], blank, batch.features)
        without.append(log_p(vlm, _copies(batch, seen)).view(len(part), -1))
    return (whole - torch.cat(without)).T


def _copies(batch: Batch, features: torch.Tensor) -> Batch:
    """One caption as many times as there are pictures."""
    n = len(features)
    ids, mask, labels = (x.expand(n, -1) for x in (batch.ids, batch.mask, batch.labels))
    return Batch(ids, mask, labels, features, batch.question.expand(n), batch.answer.expand(n), batch.questions * n)
