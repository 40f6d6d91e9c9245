"""What an edit should leave alone: how well the model knows truthful captions, and how far it moved from its base."""

from __future__ import annotations

import json

import pandas as pd
import torch
import torch.nn.functional as F

from ..core.stats import ratio_items
from ..datasets.world import Split
from ..models.batch import target_mask
from ..models.delta import Delta, applied, verify
from ..models.vlm import VLM
from .grounding import batches


def first_references(split: Split) -> pd.DataFrame:
    """The first reference caption of each image of the split: image_id, caption, in the split's order."""
    rows = json.loads(split.captions.read_text(encoding="utf-8"))["annotations"]
    first = {r["image_id"]: r["caption"] for r in sorted(rows, key=lambda r: r["id"], reverse=True)}
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
    parts = []
    for part, batch in batches(vlm, features, references, prompt, batch_size):
        now = base = vlm.answer_logits(batch).float().log_softmax(-1)
        if delta:
            with applied(vlm, delta, verified=True):
                now = vlm.answer_logits(batch).float().log_softmax(-1)
        values = {"nll_grounded": F.nll_loss(now, batch.labels[batch.labels != -100], reduction="none")}
        if delta:
            values["kl_clean"] = F.kl_div(now, base, log_target=True, reduction="none").sum(-1)
        n = target_mask(batch.labels).sum(1)
        item = torch.arange(len(n), device=n.device).repeat_interleave(n)
        sums = {m: torch.zeros(len(n), device=n.device).index_add_(0, item, v) for m, v in values.items()}
        parts.append(ratio_items(part["image_id"], {m: (v.cpu(), n.cpu()) for m, v in sums.items()}))
    return pd.concat(parts, ignore_index=True)
