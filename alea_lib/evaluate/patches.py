"""Where in the image is a word's evidence? One map of attention and one of effect for each object that is named."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from ..core.files import DataError
from ..datasets.world import Split
from ..metrics.truth import Truth
from ..models.batch import Batch
from ..models.hooks import read_attention
from ..models.vlm import VLM
from .grounding import blank_features, log_p, object_batches

COLUMNS = ["image_id", "start", "end", "category", "present", "attention", "effect"]


@torch.no_grad()
def patch_maps(
    vlm: VLM,
    split: Split,
    features: torch.Tensor,
    table: pd.DataFrame,
    truth: Truth,
    block: int = 3,
    prompt: str = "plain",
    batch_size: int = 64,
) -> pd.DataFrame:
    """Two maps over the image's patches for each object word of each caption: one row a word.

    ``table``: image_id, caption, in the order of ``features`` [N,P,D]. Columns image_id, start, end (of the word in the
    caption), category, present, and lists of length P in rows from the top:
    ``attention``: weights of the position that predicts the word's first token, mean over layers and heads, not
    renormalised (they sum to the share of attention on the image).
    ``effect``: log p(first token) minus the same with the ``block`` x ``block`` patches around this one taken from a
    grey image, the rest of the answer forced; in nats, positive = the patches speak for the word. ``batch_size``:
    images with grey patches in one pass.
    DataError unless the patches form a square, ValueError for an even ``block``.
    """
    around = windows(features.shape[1], block)
    blank, rows = blank_features(vlm, split), []
    for _, batch, objects in object_batches(vlm, features, table, truth, prompt, batch_size=1):
        if not objects:
            continue
        maps = (_attention(vlm, batch).tolist(), _effect(vlm, batch, blank, around, batch_size).tolist())
        for o, attention, effect in zip(objects, *maps, strict=True):
            m = o.mention
            rows.append((o.image_id, m.start, m.end, m.category, o.present, attention, effect))
    return pd.DataFrame(rows, columns=COLUMNS)


def windows(patches: int, block: int) -> torch.Tensor:
    """[P,P] bool: row p is the square of ``block`` x ``block`` patches around patch p, cut at the image's edge."""
    if block < 1 or block % 2 == 0:
        raise ValueError(f"block is the side of a square around a patch: an odd number, not {block}")
    side = round(patches**0.5)
    if side * side != patches:
        raise DataError(f"{patches} image positions form no square: maps need a family whose patches tile the image")
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return ((at[:, None] - at).abs() <= block // 2).all(-1)


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
        copies = batch.without_images(torch.zeros(len(part), dtype=torch.long, device=batch.ids.device))
        copies = replace(copies, features=blanked, questions=batch.questions * len(part))
        without.append(log_p(vlm, copies).view(len(part), -1))
    return (whole - torch.cat(without)).T
