"""Where nothing was implanted: a place is right if acting on it helps. Edit it, or switch it off, and count."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import pandas as pd
import torch
from tqdm import tqdm

from ..core.stats import paired_difference
from ..datasets.write import Split
from ..edit.fit import fit_edit
from ..edit.settings import preset
from ..evaluate.answers import captions
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.delta import applied
from ..models.hooks import replaced_heads
from ..models.vlm import VLM

METRICS = ("chair_s", "chair_i", "recall")


def edit_benefit(
    vlm: VLM,
    features: torch.Tensor,
    positives: list[str],
    places: list[tuple[int, ...]],
    split: Split,
    truth: Truth,
    max_new_tokens: int,
    **changes,
) -> pd.DataFrame:
    """Edit each set of layers alone, all with the same plain supervised edit, and caption the split.

    ``features`` [N,P,D] and ``positives`` [N]: the pairs' images and grounded answers; ``changes``: of the preset
    ``no-prefix``. Returns place, metric, value, lo, hi, n: edited minus unedited model, paired by image.
    """
    changed = {}
    for layers in places:
        settings = preset("no-prefix", layers=layers, **changes)
        changed["+".join(map(str, layers))] = applied(vlm, fit_edit(vlm, features, positives, None, settings)[0])
    return _differences(vlm, changed, split, truth, max_new_tokens)


def knockout_benefit(
    vlm: VLM, places: dict[str, list[tuple[int, int]]], split: Split, truth: Truth, max_new_tokens: int
) -> pd.DataFrame:
    """Switch sets of heads (layer, head) off while the model writes: their outputs before ``o_proj`` become zero.

    Returns place (the set's name), metric, value, lo, hi, n: without the heads minus the whole model, paired by image.
    """
    return _differences(
        vlm, {name: without(vlm, heads) for name, heads in places.items()}, split, truth, max_new_tokens
    )


def without(vlm: VLM, heads: list[tuple[int, int]]) -> AbstractContextManager:
    """The model with these heads switched off, inside the block."""
    off: dict[int, list[int]] = {}
    for layer, head in heads:
        off.setdefault(layer, []).append(head)

    def zeroed(layer: int, o: torch.Tensor) -> torch.Tensor:
        return o.index_fill(2, torch.tensor(off[layer], device=o.device), 0)

    return replaced_heads(vlm, zeroed, list(off))


def _differences(
    vlm: VLM, changed: Mapping[str, AbstractContextManager], split: Split, truth: Truth, budget: int
) -> pd.DataFrame:
    features = vlm.features(split.files)
    plain = chair(captions(vlm, split, features, max_new_tokens=budget), truth).items
    rows = []
    for name, change in tqdm(changed.items(), desc="places"):
        with change:
            written = captions(vlm, split, features, max_new_tokens=budget)
        found = paired_difference(chair(written, truth).items, plain)
        rows.append(found[found["metric"].isin(METRICS)].assign(place=name))
    return pd.concat(rows, ignore_index=True)[["place", "metric", "value", "lo", "hi", "n"]]
