"""What an edit should leave alone: how well the model knows truthful captions, and how far it moved from its base."""

from __future__ import annotations

import json

import pandas as pd
import torch
import torch.nn.functional as F

from ..datasets.write import Split
from ..models.batch import target_mask
from ..models.delta import Delta, applied, verify
from ..models.vlm import VLM
from .grounding import batches


def first_references(split: Split) -> pd.DataFrame:
    """The first reference caption of each image of the split: image_id, caption, in the split's order."""
    rows = json.loads(split.captions.read_text(encoding="utf-8"))["annotations"]
    first: dict[int, str] = {}
    for row in sorted(rows, key=lambda r: r["id"]):
        first.setdefault(row["image_id"], row["caption"])
    if missing := [i for i in split.ids if i not in first]:
        raise ValueError(f"{split.captions} has no caption for {len(missing)} images, e.g. {missing[:3]}")
    return pd.DataFrame({"image_id": split.ids, "caption": [first[i] for i in split.ids]})


@torch.no_grad()
def ability(
    vlm: VLM,
    features: torch.Tensor,
    references: pd.DataFrame,
    delta: Delta | None = None,
    prompt: str = "plain",
    batch_size: int = 50,
) -> pd.DataFrame:
    """Items on truthful captions (image_id, caption), teacher-forced: ``nll_grounded`` and ``kl_clean``.

    Both in nats a token. ``kl_clean`` is KL(base || edited), there only with a delta. Perplexity is exp(nll_grounded).
    ``vlm`` is the base; memory is bounded by the batch.
    """
    if delta:
        verify(vlm, delta)
    rows = []
    for part, batch in batches(vlm, features, references, prompt, batch_size):
        base = vlm.answer_logits(batch).float().log_softmax(-1)
        with applied(vlm, delta, verified=True):
            now = vlm.answer_logits(batch).float().log_softmax(-1) if delta else base
        wanted = batch.labels[batch.labels != -100]
        item = torch.arange(len(part), device=wanted.device).repeat_interleave(target_mask(batch.labels).sum(1))
        found = {"nll_grounded": F.nll_loss(now, wanted, reduction="none")}
        if delta:
            found["kl_clean"] = F.kl_div(now, base, log_target=True, reduction="none").sum(-1)
        for metric, values in found.items():
            sums = torch.zeros(len(part), device=wanted.device).index_add_(0, item, values)
            n = torch.bincount(item, minlength=len(part))
            rows += zip(part["image_id"], [metric] * len(part), sums.tolist(), n.double().tolist())
    return pd.DataFrame(rows, columns=["image_id", "metric", "num", "den"])
