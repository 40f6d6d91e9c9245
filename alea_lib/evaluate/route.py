"""Through which layers and heads does the image reach the words? One place at a time is given a blank image."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from ..datasets.write import Split
from ..metrics.truth import Truth
from ..models.batch import Batch
from ..models.hooks import read_heads, read_layers, replaced_heads, started_at
from ..models.vlm import VLM
from .grounding import blank_features, log_p, object_batches

ALL_HEADS = -1


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
    else as it was (activation patching). ``head`` -1: all heads of the layer together. ``setting`` as in
    :func:`alea_lib.evaluate.grounding.counterfactual`. Each costs a pass from its layer on; memory goes with the batch.
    """
    blank, rows = blank_features(vlm, split)[0], []
    for _, batch, objects in object_batches(vlm, features, table, truth, prompt, batch_size):
        heads, states = _runs(vlm, batch, blank)
        whole = log_p(vlm, batch)
        for layer in range(vlm.n_layers):
            for head in (ALL_HEADS, *range(vlm.n_heads)):
                effect = (whole - _patched(vlm, batch, layer, head, heads[layer], states[layer])).tolist()
                rows += [(o.setting, layer, head, o.image_id, e, 1.0) for o, e in zip(objects, effect, strict=True)]
    columns = ["setting", "layer", "head", "image_id"]
    return pd.DataFrame(rows, columns=[*columns, "num", "den"]).groupby(columns, as_index=False).sum()


def _runs(vlm: VLM, batch: Batch, blank: torch.Tensor) -> tuple[dict, dict]:
    """Layer -> head outputs [B,T,H,D/H] of the blank run, and layer -> its input [B,T,D] in the run with the image."""
    heads, states = {}, {0: vlm.embed(batch)}
    with read_heads(vlm, heads.__setitem__):
        log_p(vlm, replace(batch, features=blank.expand_as(batch.features)))
    with read_layers(vlm, lambda layer, h: states.__setitem__(layer + 1, h)):
        log_p(vlm, batch)
    return heads, states


def _patched(vlm: VLM, batch: Batch, layer: int, head: int, blind: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Log-probabilities with one head (or all) of a layer blind, from that layer on."""

    def change(_, o: torch.Tensor) -> torch.Tensor:
        if head == ALL_HEADS:
            return blind
        o = o.clone()
        o[:, :, head] = blind[:, :, head]
        return o

    with started_at(vlm, layer, h), replaced_heads(vlm, change, [layer]):
        return log_p(vlm, batch)
