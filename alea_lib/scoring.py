"""One method through all measures: captions, items, and the rows of ``metrics.csv`` with paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from .edit.delta import Delta, applied
from .measures.chair import chair
from .measures.frontier import drop_last_sentence, frontier_gap
from .measures.pope import pope
from .measures.truth import Truth
from .probe.ability import ability, first_references
from .probe.answers import captions, pope_answers
from .probe.grounding import attention_share, counterfactual
from .stats import paired_difference, summarise
from .tables import DIFFERENCE, metric_rows, read_jsonl, read_parquet, write_csv, write_jsonl, write_parquet
from .vlm import VLM
from .worlds.write import Split

GROUP = ["benchmark", "scorer", "setting"]


@dataclass(frozen=True)
class Evaluated:
    """``captions``: image_id, caption, n_tokens, eos. ``items``: GROUP columns, image_id, metric, num, den.
    ``notes``: measures that are not defined for the method, with the reason."""

    captions: pd.DataFrame
    items: pd.DataFrame
    notes: pd.DataFrame


def evaluate(
    vlm: VLM,
    split: Split,
    truth: Truth,
    questions: pd.DataFrame,
    max_new_tokens: int,
    delta: Delta | None = None,
    prompt: str = "plain",
) -> Evaluated:
    """Captions, POPE answers and image attention of a model, edited by ``delta`` if there is one."""
    features = vlm.features(split.files)
    with applied(vlm, delta):
        told = captions(vlm, split, features, prompt, max_new_tokens)
        said = pope(pope_answers(vlm, split, features, questions), questions)
        share = attention_share(vlm, features, told, prompt)
    parts = [
        _caption_items(told, truth, max_new_tokens),
        share.assign(benchmark="grounding", scorer="teacher-forced", setting="answer"),
    ]
    parts += [items.assign(benchmark="pope", scorer="official", setting=s) for s, items in said.by_setting.items()]
    parts += [said.items.assign(benchmark="pope", scorer="official", setting="all")]
    return Evaluated(
        told, pd.concat(parts, ignore_index=True)[[*GROUP, "image_id", "metric", "num", "den"]], _notes([])
    )


def truncated(base_captions: pd.DataFrame, truth: Truth, max_new_tokens: int) -> Evaluated:
    """The control ``truncation``: the base model's captions without their last sentence."""
    told = drop_last_sentence(base_captions)
    why = "truncation cuts captions after they are written: the model that answers and attends is the base model"
    return Evaluated(told, _caption_items(told, truth, max_new_tokens), _notes([("pope_*", why), ("attn_*", why)]))


def _caption_items(told: pd.DataFrame, truth: Truth, max_new_tokens: int) -> pd.DataFrame:
    items = chair(told, truth).items
    ended = pd.DataFrame(
        {"image_id": told["image_id"], "metric": "eos_rate", "num": told["eos"].astype(float), "den": 1.0}
    )
    items = pd.concat([items, ended], ignore_index=True)
    return items.assign(benchmark="chair", scorer="singularise", setting=f"max{max_new_tokens}")[
        [*GROUP, "image_id", "metric", "num", "den"]
    ]


def _notes(rows: list[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["metric", "reason"])


def score_rows(found: Evaluated, base: Evaluated | None, truth: Truth, **keys) -> pd.DataFrame:
    """Rows of ``metrics.csv``: each measure with its interval; with ``base`` also ``<metric>_diff`` (method minus base,
    paired by image) and ``frontier_gap``. ``keys``: world, model, method, split, prompt, condition, seeds."""
    rows = [_rows(group, summarise(items), keys) for group, items in found.items.groupby(GROUP, sort=True)]
    if base is not None:
        theirs = dict(list(base.items.groupby(GROUP)))
        for group, items in found.items.groupby(GROUP, sort=True):
            change = paired_difference(items, theirs[group])
            rows.append(_rows(group, change.assign(metric=change["metric"] + DIFFERENCE), keys))
        gap = pd.DataFrame([{"metric": "frontier_gap", **frontier_gap(base.captions, found.captions, truth)}])
        chair_group = found.items.loc[found.items["benchmark"] == "chair", GROUP].iloc[0]
        rows.append(_rows(tuple(chair_group), gap, keys))
    return pd.concat(rows, ignore_index=True)


def _rows(group: tuple, summary: pd.DataFrame, keys: dict) -> pd.DataFrame:
    prompt = {} if group[0] != "pope" else {"prompt": ""}
    return metric_rows(summary, **dict(zip(GROUP, group)), **{**keys, **prompt})


def read_evaluated(folder) -> Evaluated:
    """What ``write_evaluated`` wrote."""
    return Evaluated(
        pd.DataFrame(read_jsonl(folder / "captions.jsonl")), read_parquet(folder / "items.parquet"), _notes([])
    )


def write_evaluated(found: Evaluated, folder) -> None:
    """Captions as JSON lines, items as parquet, notes as csv (only if there are any)."""
    write_jsonl(found.captions, folder / "captions.jsonl")
    write_parquet(found.items, folder / "items.parquet")
    if len(found.notes):
        write_csv(found.notes, folder / "notes.csv")
