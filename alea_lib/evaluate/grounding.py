"""Does the model look, and does it matter? Attention on the image, and what changes without it.

Attention shares are confounded: softmax weights compete, and a position can be looked at and not used. So beside them
stands the counterfactual: the answer's log-probability with the image against a blank or another one, for the whole
model or through one head at a time (activation patching).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..core.stats import ratio_items
from ..datasets.world import Split
from ..metrics.parse import Mention, mentions
from ..metrics.truth import Truth
from ..models.batch import Batch, target_mask
from ..models.hooks import read_attention, read_heads, read_layers, replaced_heads, started_at
from ..models.vlm import VLM, object_tokens

ATTENTION = ("attn_last_max", "attn_last_mean", "attn_all_mean")
EFFECTS = ("blank_effect", "swap_effect")
ALL_HEADS = -1


class NamedObject(NamedTuple):
    """An object that a caption names, as the parser reads it, and whether it is in the image."""

    image_id: int
    mention: Mention
    present: bool

    @property
    def setting(self) -> str:
        return "grounded" if self.present else "hallucinated"


def batches(
    vlm: VLM, features: torch.Tensor, table: pd.DataFrame, prompt: str, batch_size: int
) -> Iterator[tuple[pd.DataFrame, Batch]]:
    """Parts of the table (image_id, caption) with their encoded image, prompt and caption; empty captions are left out.
    Column ``at`` is the row in ``features``."""
    batch_size = vlm.limits.of("read", batch_size)
    table = table.assign(at=range(len(table)))
    table = table[table["caption"].str.strip() != ""]
    for start in range(0, len(table), batch_size):
        part = table.iloc[start : start + batch_size]
        yield part, vlm.encode(features[part["at"].tolist()], vlm.prompt(prompt), part["caption"].tolist())


def object_batches(
    vlm: VLM, features: torch.Tensor, table: pd.DataFrame, truth: Truth, prompt: str, batch_size: int
) -> Iterator[tuple[pd.DataFrame, Batch, list[NamedObject]]]:
    """:func:`batches` with labels at the first tokens of the captions' object words alone, and these objects in row
    order, one a token."""
    for part, batch in batches(vlm, features, table, prompt, batch_size):
        labels, objects = torch.full_like(batch.labels, -100), []
        for i, (image_id, caption) in enumerate(zip(part["image_id"], part["caption"])):
            tokens = [o.token for o in object_tokens(vlm, caption, truth.family)]
            named = dict(zip(tokens, mentions(caption, truth.family), strict=True))
            for token in sorted(named):
                at = int(batch.answer[i]) + token
                labels[i, at] = batch.ids[i, at]
                objects.append(NamedObject(image_id, named[token], named[token].category in truth[image_id]))
        yield part, replace(batch, labels=labels), objects


def log_p(vlm: VLM, batch: Batch) -> torch.Tensor:
    """Log-probabilities [n] of the labelled tokens of a batch, in row order."""
    logits = vlm.answer_logits(batch).float()
    return logits.log_softmax(-1).gather(1, batch.labels[batch.labels != -100][:, None])[:, 0].cpu()


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_heads(
    vlm: VLM, features: torch.Tensor, table: pd.DataFrame, prompt: str = "plain", batch_size: int = 50
) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Share of attention on the image over the answer's tokens: of each head, and of the last layer's maximum.

    ``table``: image_id, caption; empty captions are left out. Returns the image ids [N], shares [N,L,H], and [N] the
    share of the last layer's largest weight over heads at each key, renormalised. Only the answer's rows of the
    attention are computed, one layer of one batch at a time; the model runs its fused kernel.
    """
    ids, shares, last_max = [], [torch.zeros(0, vlm.n_layers, vlm.n_heads)], [torch.zeros(0)]
    for part, batch in batches(vlm, features, table, prompt, batch_size):
        ids += part["image_id"].tolist()
        mean, top = _shares(vlm, batch)
        shares.append(mean)
        last_max.append(top)
    return ids, torch.cat(shares), torch.cat(last_max)


def attention_share(vlm: VLM, features: torch.Tensor, table: pd.DataFrame, *args, **options) -> pd.DataFrame:
    """Items of the three named variants of the image-attention share; arguments as :func:`attention_heads`.

    ``attn_last_max``: last layer, largest weight over heads at each key, renormalised (the official code's form, there
    for the last prompt token only). ``attn_last_mean``, ``attn_all_mean``: mean over heads, last layer or all layers.
    """
    ids, heads, last_max = attention_heads(vlm, features, table, *args, **options)
    values = (last_max, heads[:, -1].mean(1), heads.mean((1, 2)))
    return ratio_items(ids, {metric: (v.double().numpy(), 1.0) for metric, v in zip(ATTENTION, values)})


def _shares(vlm: VLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one batch: the share of each head [B,L,H] and of the last layer's maximum [B]."""
    targets = target_mask(batch.labels)
    width = int(targets.sum(1).max())
    positions = targets.long().topk(width, dim=1).indices.sort(dim=1).values
    weight = targets.gather(1, positions).float()
    weight = (weight / weight.sum(1, keepdim=True))[:, None]
    image = (batch.ids == vlm.image_id)[:, None, None].float()
    shares, last_max = torch.zeros(len(image), vlm.n_layers, vlm.n_heads), torch.zeros(len(image))

    def take(layer: int, p: torch.Tensor) -> None:
        shares[:, layer] = ((p * image).sum(-1) * weight).sum(-1).cpu()
        if layer == vlm.n_layers - 1:
            top = p.amax(1, keepdim=True)
            last_max[:] = (((top * image).sum(-1) / top.sum(-1)) * weight).sum(-1)[:, 0].cpu()

    with read_attention(vlm, take, positions):
        vlm.hidden(vlm.embed(batch), batch.mask, batch)
    return shares, last_max


# ---- counterfactual --------------------------------------------------------------------------------------------------


def blank_features(vlm: VLM, split: Split) -> torch.Tensor:
    """Features [P,D] of an even mid-grey image of the size of the split's first."""
    with Image.open(split.files[0]) as first:
        return vlm.features([Image.new("RGB", first.size, (128, 128, 128))])[0]


def swapped(n: int, seed: int = 0) -> np.ndarray:
    """For each of ``n`` images another one: one random cycle through all, so that none keeps its own."""
    order = np.random.default_rng([seed, 11]).permutation(n)
    out = np.empty(n, dtype=np.int64)
    out[order] = np.roll(order, -1)
    return out


@torch.no_grad()
def counterfactual(
    vlm: VLM,
    split: Split,
    features: torch.Tensor,
    table: pd.DataFrame,
    truth: Truth,
    prompt: str = "plain",
    batch_size: int = 50,
) -> pd.DataFrame:
    """What the image contributes to the objects that the model names, in nats: items with a column ``setting``.

    ``blank_effect``: log p(object token | image) - log p(the same token | grey image), the rest of the answer forced;
    ``swap_effect``: the same against another image of the split. ``setting`` is ``grounded`` for objects that are
    there and ``hallucinated`` for those that are not: near zero means that the word came without the image.
    """
    blank, other, rows = blank_features(vlm, split), features[swapped(len(features))], []
    for part, batch, objects in object_batches(vlm, features, table, truth, prompt, batch_size):
        whole = log_p(vlm, batch)
        for metric, without in zip(EFFECTS, (blank.expand_as(batch.features), other[part["at"].tolist()])):
            effect = (whole - log_p(vlm, replace(batch, features=without))).tolist()
            rows += [(o.setting, o.image_id, metric, e, 1.0) for o, e in zip(objects, effect, strict=True)]
    items = pd.DataFrame(rows, columns=["setting", "image_id", "metric", "num", "den"])
    return items.groupby(["setting", "image_id", "metric"], as_index=False).sum()


@torch.no_grad()
def counterfactual_heads(
    vlm: VLM,
    split: Split,
    features: torch.Tensor,
    table: pd.DataFrame,
    truth: Truth,
    prompt: str = "plain",
    batch_size: int = 10,
) -> pd.DataFrame:
    """What of the image's effect passes through each head: setting, layer, head, image_id, num, den; in nats.

    log p(object token) minus the same when this head's outputs are those of the run with a grey image, everything
    else as it was. ``head`` -1: all heads of the layer together. ``setting`` as in :func:`counterfactual`. Each costs a
    pass from its layer on; memory goes with the batch.
    """
    blank, rows = blank_features(vlm, split), []
    for _, batch, objects in object_batches(vlm, features, table, truth, prompt, batch_size):
        heads, outputs = {}, {}
        with read_heads(vlm, heads.__setitem__):
            log_p(vlm, replace(batch, features=blank.expand_as(batch.features)))
        with read_layers(vlm, outputs.__setitem__):
            whole = log_p(vlm, batch)
        for layer in range(vlm.n_layers):
            h = outputs[layer - 1] if layer else vlm.embed(batch)
            for head in (ALL_HEADS, *range(vlm.n_heads)):
                effect = (whole - _patched(vlm, batch, layer, head, heads[layer], h)).tolist()
                rows += [(o.setting, layer, head, o.image_id, e, 1.0) for o, e in zip(objects, effect, strict=True)]
    columns = ["setting", "layer", "head", "image_id"]
    return pd.DataFrame(rows, columns=[*columns, "num", "den"]).groupby(columns, as_index=False).sum()


def _patched(vlm: VLM, batch: Batch, layer: int, head: int, blind: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with one head (or all) of a layer blind, from that layer on, whose input is h [B,T,D]."""

    def change(_, o: torch.Tensor) -> torch.Tensor:
        if head == ALL_HEADS:
            return blind
        o = o.clone()
        o[:, :, head] = blind[:, :, head]
        return o

    with started_at(vlm, layer, h), replaced_heads(vlm, change, [layer]):
        return log_p(vlm, batch)
