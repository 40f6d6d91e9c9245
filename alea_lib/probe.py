"""Model passes that measures need. Each writes a tidy ``items`` table: image_id, metric, num, den."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from .taps import read_attention
from .vlm import VLM, Answer, Batch, scored
from .worlds.write import Split

ATTENTION = ("attn_last_max", "attn_last_mean", "attn_all_mean")


def captions(
    vlm: VLM,
    split: Split,
    features: torch.Tensor,
    prompt: str = "plain",
    max_new_tokens: int = 64,
    prefix=None,
    **options,
) -> pd.DataFrame:
    """Captions of a split: image_id, caption, n_tokens, eos."""
    answers = vlm.generate(
        features, vlm.prompt(prompt), max_new_tokens, prefix=prefix, progress=f"captions {prompt}", **options
    )
    return _answer_table(split.ids, answers)


def _answer_table(ids: list[int], answers: list[Answer]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": ids,
            "caption": [a.text for a in answers],
            "n_tokens": [a.n_tokens for a in answers],
            "eos": [a.eos for a in answers],
        }
    )


def pope_answers(
    vlm: VLM, split: Split, features: torch.Tensor, questions: pd.DataFrame, batch_size: int = 200
) -> pd.DataFrame:
    """Answers to POPE questions: question_id, answer. Equal questions about an image are asked once."""
    asked = questions[["image", "text"]].drop_duplicates().reset_index(drop=True)
    row = {f.name: i for i, f in enumerate(split.files)}
    if missing := sorted(set(asked["image"]) - set(row))[:3]:
        raise ValueError(f"POPE asks about images that split {split.name!r} lacks: {missing}")
    where = torch.tensor([row[name] for name in asked["image"]])
    texts = [q + vlm.row.short_answer for q in asked["text"]]
    found = vlm.generate(features[where], texts, max_new_tokens=4, batch_size=batch_size, progress="POPE")
    asked["answer"] = [a.text for a in found]
    keys = [c for c in ("setting", "question_id") if c in questions]
    return questions.merge(asked, on=["image", "text"], how="left")[[*keys, "answer"]]


@torch.no_grad()
def attention_share(
    vlm: VLM, features: torch.Tensor, table: pd.DataFrame, prompt: str = "plain", prefix=None, batch_size: int = 50
) -> pd.DataFrame:
    """Share of attention on the image, averaged over the answer's tokens, in three named variants.

    ``attn_last_max``: last layer, largest weight over heads at each key, renormalised (the official code's form, there
    for the last prompt token only). ``attn_last_mean``, ``attn_all_mean``: mean over heads, last layer or all layers.
    ``table``: image_id, caption (empty captions are left out).
    """
    table = table.assign(at=range(len(table)))
    table = table[table["caption"].str.strip() != ""]
    rows = []
    for start in range(0, len(table), batch_size):
        part = table.iloc[start : start + batch_size]
        batch = vlm.encode(
            features[torch.as_tensor(part["at"].to_numpy())], vlm.prompt(prompt), part["caption"].tolist()
        )
        shares = _shares(vlm, batch, prefix)
        for i, image_id in enumerate(part["image_id"]):
            rows += [(image_id, metric, shares[metric][i].item(), 1.0) for metric in ATTENTION]
    return pd.DataFrame(rows, columns=["image_id", "metric", "num", "den"])


def _shares(vlm: VLM, batch: Batch, prefix) -> dict[str, torch.Tensor]:
    """The three variants for each item of a batch, [B]."""
    image = batch.ids == vlm.model.config.image_token_id
    embeds, mask, labels = vlm.embed(batch), batch.mask, batch.labels
    if prefix is not None:
        image = prefix.insert(replace(batch, labels=torch.where(image, batch.ids, -100)), embeds)[2] != -100
        embeds, mask, labels = prefix.insert(batch, embeds)
    targets = scored(labels)
    width = int(targets.sum(1).max())
    positions = targets.long().topk(width, dim=1).indices.sort(dim=1).values
    weight = targets.gather(1, positions).float()
    weight = weight / weight.sum(1, keepdim=True)
    where, sums = image[:, None, None, :].float(), {}

    def take(layer: int, p: torch.Tensor) -> None:
        mean = ((p * where).sum(-1).mean(1) * weight).sum(1)
        sums["attn_all_mean"] = sums.get("attn_all_mean", 0) + mean / vlm.n_layers
        if layer == vlm.n_layers - 1:
            top = p.amax(1, keepdim=True)
            sums["attn_last_mean"] = mean
            sums["attn_last_max"] = ((((top * where).sum(-1) / top.sum(-1))[:, 0]) * weight).sum(1)

    with read_attention(vlm, take, positions):
        vlm.hidden(embeds, mask)
    return sums
