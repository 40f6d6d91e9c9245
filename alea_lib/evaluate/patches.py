"""Where in the image is a word's evidence? One map of attention and one of effect for each object that is named."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from tqdm import tqdm

from ..core.files import DataError
from ..datasets.write import Split
from ..metrics.truth import Truth
from ..models.batch import Batch
from ..models.hooks import read_attention
from ..models.vlm import VLM
from .grounding import blank_features, log_p, object_batches

COLUMNS = ["image_id", "start", "end", "category", "present", "attention", "effect"]


@dataclass(frozen=True)
class PatchSettings:
    """``block``: side of the square of patches that is blanked at once, odd (1 = one patch; a glyph of the small world
    covers four to nine). ``batch_size``: blanked images in one pass; memory goes with it."""

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
    s: PatchSettings = PatchSettings(),
    progress: str = "",
) -> pd.DataFrame:
    """Two maps over the image's patches for each object word of each caption: one row a word.

    ``table``: image_id, caption, in the order of ``features`` [N,P,D]. Columns image_id, start, end (of the word in the
    caption), category, present, and lists of length P in rows from the top:
    ``attention``: weights of the position that predicts the word's first token, mean over layers and heads, not
    renormalised (they sum to the share of attention on the image).
    ``effect``: log p(first token) minus the same with the ``block`` x ``block`` patches around this one taken from a
    grey image, the rest of the answer forced; in nats, positive = the patches speak for the word.
    DataError unless the patches form a square.
    """
    around = windows(features.shape[1], s.block)
    blank, rows = blank_features(vlm, split)[0], []
    single = object_batches(vlm, features, table, truth, s.prompt, batch_size=1)
    for _, batch, objects in tqdm(single, total=len(table), desc=progress, disable=not progress):
        if not objects:
            continue
        maps = (_attention(vlm, batch).tolist(), _effect(vlm, batch, blank, around, s.batch_size).tolist())
        for o, attention, effect in zip(objects, *maps, strict=True):
            m = o.mention
            rows.append((o.image_id, m.start, m.end, m.category, o.present, attention, effect))
    return pd.DataFrame(rows, columns=COLUMNS)


def windows(patches: int, block: int) -> torch.Tensor:
    """[P,P] bool: row p is the square of ``block`` x ``block`` patches around patch p, cut at the image's edge."""
    side = round(patches**0.5)
    if side * side != patches:
        raise DataError(f"{patches} image positions form no square: maps need a family whose patches tile the image")
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).reshape(2, -1)
    return ((at[:, :, None] - at[:, None]).abs() <= block // 2).all(0)


def _attention(vlm: VLM, batch: Batch) -> torch.Tensor:
    """[n,P] of one caption: weights on the image's positions, mean over layers and heads."""
    at = batch.target_mask.nonzero()[:, 1][None]
    image, total = batch.ids[0] == vlm.image_id, []
    with read_attention(vlm, lambda _, p: total.append(p[0].mean(0)[:, image].cpu()), at):
        vlm.hidden(vlm.embed(batch), batch.mask, batch)
    return torch.stack(total).mean(0)


def _effect(vlm: VLM, batch: Batch, blank: torch.Tensor, around: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[n,P] of one caption: what the words lose, in nats, when the square around a patch is grey."""
    whole, without = log_p(vlm, batch), []
    for part in around.to(batch.features.device).split(batch_size):
        blanked = torch.where(part[..., None], blank, batch.features)
        without.append(log_p(vlm, _copies(batch, blanked)).view(len(part), -1))
    return (whole - torch.cat(without)).T


def _copies(batch: Batch, features: torch.Tensor) -> Batch:
    """One caption as many times as there are images."""
    n = len(features)
    ids, mask, labels = (x.expand(n, -1) for x in (batch.ids, batch.mask, batch.labels))
    return Batch(ids, mask, labels, features, batch.question.expand(n), batch.answer.expand(n), batch.questions * n)
