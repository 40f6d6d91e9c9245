"""What a prefix does on pairs that it was not tuned on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..core.stats import summarise
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.batch import Batch, target_mask
from ..models.vlm import VLM
from .prefix import Prefix

WRITTEN = ("chair_s", "chair_i", "recall", "words")
BOUNDED = ("chair_s", "recall")  # with their intervals


@torch.no_grad()
def prefix_evidence(
    vlm: VLM,
    features: torch.Tensor,
    pairs: pd.DataFrame,
    prefixes: dict[str, Prefix | None],
    prompt: str,
    truth: Truth,
    max_new_tokens: int,
    batch_size: int = 50,
) -> pd.DataFrame:
    """What prefixes do on pairs; None is no prefix, for comparison.

    Rows: the names of ``prefixes``. Columns: NLL of both answers in nats a token; image_effect, KL(seeing || blind) at
    the tokens of the positive; chair_s, chair_i, recall and words of what the model then writes (_lo and _hi of the
    first and the third, 95 % over images; NaN where undefined); n pairs. ``prompt``: the role of the prompt that all
    these answer.
    """
    rows = []
    for name, prefix in prefixes.items():
        row = {"prefix": name, **_read(vlm, features, pairs, prefix, prompt, batch_size)}
        rows.append({**row, **_written(vlm, features, pairs, prefix, prompt, truth, max_new_tokens), "n": len(pairs)})
    return pd.DataFrame(rows).set_index("prefix")


def _read(vlm: VLM, features, pairs: pd.DataFrame, prefix: Prefix | None, prompt: str, batch_size: int) -> dict:
    """Teacher-forced: likelihood of both answers, and the image's effect."""
    sums, batch_size = np.zeros(5), vlm.limits.of("read", batch_size)
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        for i, column in enumerate(("negative", "positive")):
            batch = vlm.encode(features[part], vlm.prompt(prompt), pairs[column].tolist()[part])
            nll, effect, n = _effects(vlm, batch, prefix)
            sums[2 * i : 2 * i + 2] += nll, n
            sums[4] += effect if column == "positive" else 0.0
    return {"nll_negative": sums[0] / sums[1], "nll_positive": sums[2] / sums[3], "image_effect": sums[4] / sums[3]}


def _effects(vlm: VLM, batch: Batch, prefix: Prefix | None) -> tuple[float, float, int]:
    """Summed NLL and summed KL(seeing || blind) over the answer's tokens, and their number."""
    embeds, mask, labels = vlm.embed(batch), batch.mask, batch.labels
    hidden = mask * (batch.ids != vlm.image_id)
    if prefix is not None:
        hidden = prefix.insert(replace(batch, mask=hidden), embeds)[1]
        embeds, mask, labels = prefix.insert(batch, embeds)
    seeing = vlm.answer_logits(batch, embeds, mask, target_mask(labels)).float().log_softmax(-1)
    blind = vlm.answer_logits(batch, embeds, hidden, target_mask(labels)).float().log_softmax(-1)
    nll = F.nll_loss(seeing, labels[labels != -100], reduction="sum")
    return nll.item(), F.kl_div(blind, seeing, log_target=True, reduction="sum").item(), len(seeing)


def _written(vlm: VLM, features, pairs: pd.DataFrame, prefix, prompt: str, truth: Truth, max_new_tokens: int) -> dict:
    """Greedy captions under the prefix, scored."""
    answers = vlm.generate(features, vlm.prompt(prompt), max_new_tokens, prefix=prefix)
    table = pd.DataFrame({"image_id": pairs["image_id"].tolist(), "caption": [a.text for a in answers]})
    found = summarise(chair(table, truth).items).set_index("metric")
    found = found.reindex(WRITTEN)  # captions that name nothing, as under a strong prefix, have no chair_i
    out = {name: found.loc[name, "value"] for name in WRITTEN}
    return out | {f"{name}_{side}": found.loc[name, side] for name in BOUNDED for side in ("lo", "hi")}
