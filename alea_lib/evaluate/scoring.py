"""One method through all measures: captions, items, and the rows of ``metrics.csv`` with paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from ..core.files import read_jsonl, read_parquet, write_csv, write_jsonl, write_parquet
from ..core.stats import paired_difference_seeds, ratio_items, summarise_seeds
from ..core.tables import DIFFERENCE, metric_rows
from ..datasets.world import Split, World
from ..metrics.amber import Amber, amber, amber_responses, read_amber
from ..metrics.chair import chair, distinct
from ..metrics.frontier import POINT_METRICS, drop_last_sentence, frontier, frontier_gap
from ..metrics.mme import mme, read_mme
from ..metrics.pope import SETTINGS, pope, read_pope
from ..metrics.truth import Truth
from ..models.delta import Delta, applied
from ..models.vlm import VLM
from .answers import captions, yes_no_answers
from .grounding import attention_share, counterfactual
from .kept_ability import ability, first_references

GROUP = ["benchmark", "scorer", "setting"]
ITEM = ["image_id", "metric"]
COLUMNS = [*GROUP, *ITEM, "num", "den"]
NO_PROMPT = ("pope", "mme")  # benchmarks whose questions are the prompt
FORCED = ("attn_*", "blank_effect", "swap_effect", "nll_grounded", "ppl_grounded")  # measures of given answers
NOTHING = pd.DataFrame(columns=["metric", "value", "lo", "hi", "n"])
QUESTION = ["question_id", "setting", "image", "text", "label", "image_id"]


@dataclass(frozen=True)
class Evaluated:
    """``captions``: image_id, caption, n_tokens, eos. ``items``: GROUP columns, image_id, metric, num, den.
    ``notes``: measures that are not defined for the method, with the reason."""

    captions: pd.DataFrame
    items: pd.DataFrame
    notes: pd.DataFrame


@dataclass(frozen=True)
class Benchmarks:
    """Questions about the images of a split: ``pope`` of all settings with ids made unique, ``mme``, and ``amber``.

    None where the world has none about these images; ``lacking`` says why, by benchmark."""

    pope: pd.DataFrame | None = None
    mme: pd.DataFrame | None = None
    amber: Amber | None = None
    lacking: dict[str, str] = field(default_factory=dict)

    def questions(self) -> dict[str, pd.DataFrame]:
        """Benchmark -> its yes/no questions, all in POPE's columns; those alone that there are."""
        found = {"pope": self.pope, "mme": self.mme, "amber": self.amber.questions() if self.amber else None}
        return {name: table for name, table in found.items() if table is not None}


def read_benchmarks(world: World, image_ids: list[int]) -> Benchmarks:
    """The question sets of a world, as far as they are about these images; those that it lacks are named."""
    found, lacking = {}, {}
    for name, read in {"pope": _read_pope, "mme": read_mme, "amber": read_amber}.items():
        if not world.has(name):
            lacking[name] = f"the world {world.info['name']} has no {name.upper()} questions"
            continue
        asked = read(world if name == "pope" else getattr(world, name)())
        table = asked.queries if name == "amber" else asked
        table = table[table["image_id"].isin(image_ids)].reset_index(drop=True)
        if table.empty:
            lacking[name] = f"no {name.upper()} question is about the images that were looked at"
        else:
            found[name] = replace(asked, queries=table) if name == "amber" else table
    return Benchmarks(**found, lacking=lacking)


def _read_pope(world: World) -> pd.DataFrame:
    asked = {s: read_pope(world.pope(s)) for s in SETTINGS}
    parts = [q.assign(setting=s, question_id=s + q["question_id"].astype(str)) for s, q in asked.items()]
    return pd.concat(parts, ignore_index=True)[QUESTION]


def evaluate(
    vlm: VLM,
    split: Split,
    truth: Truth,
    benchmarks: Benchmarks,
    max_new_tokens: int,
    delta: Delta | None = None,
    prompt: str = "plain",
    n_grounding: int | None = None,
    decoding=None,
) -> Evaluated:
    """All measures of a model, edited by ``delta`` if there is one.

    ``n_grounding``: how many of the split's images, from the first, the counterfactual measures take (all if None).
    ``decoding``: how it writes (see ``VLM.generate``); teacher-forced measures are then absent, with a note.
    """
    features = vlm.features(split.files)
    empty = pd.DataFrame(columns=["benchmark", *QUESTION])
    asked = pd.concat([empty, *(q.assign(benchmark=b) for b, q in benchmarks.questions().items())], ignore_index=True)
    with applied(vlm, delta):
        written = captions(vlm, split, features, prompt, max_new_tokens, decoding=decoding)
        answers = yes_no_answers(vlm, split, features, asked, decoding)
    parts = [_caption_items(written, truth, max_new_tokens), *_question_items(answers, written, benchmarks)]
    notes = {f"{name}_*": why for name, why in benchmarks.lacking.items()}
    if delta is None:
        notes["kl_clean"] = "the distance from the unedited model is defined for edits alone"
    if decoding is None:
        few = split.take(n_grounding)
        n = len(few.ids)
        with applied(vlm, delta):
            share = attention_share(vlm, features, written, prompt)
            effect = counterfactual(vlm, few, features[:n], written[:n], truth, prompt)
        kept = ability(vlm, features, first_references(split), delta, prompt)
        parts += [
            share.assign(benchmark="grounding", scorer="teacher-forced", setting="answer"),
            effect.assign(benchmark="grounding", scorer="teacher-forced"),
            kept.assign(benchmark="ability", scorer="teacher-forced", setting="reference"),
        ]
    else:
        why = "the method changes how an answer is written; the model that reads a given answer is not changed"
        notes |= dict.fromkeys(FORCED, why)
    return Evaluated(written, pd.concat(parts, ignore_index=True)[COLUMNS], _notes(notes))


def _question_items(answers: pd.DataFrame, written: pd.DataFrame, benchmarks: Benchmarks) -> list[pd.DataFrame]:
    """Items of the benchmarks that there are; AMBER's descriptions are the captions of its images."""
    parts, by_benchmark = [], dict(list(answers[["setting", "question_id", "answer"]].groupby(answers["benchmark"])))
    if benchmarks.pope is not None:
        found = pope(by_benchmark["pope"], benchmarks.pope)
        by_setting = {"all": found.items, **found.by_setting}
        parts += [items.assign(benchmark="pope", setting=s) for s, items in by_setting.items()]
    if benchmarks.mme is not None:
        parts.append(mme(by_benchmark["mme"], benchmarks.mme).assign(benchmark="mme", setting="all"))
    if benchmarks.amber is not None:
        parts.append(_amber_items(written, by_benchmark.get("amber"), benchmarks.amber))
    return parts


def _amber_items(written: pd.DataFrame, answers: pd.DataFrame | None, benchmark: Amber) -> pd.DataFrame:
    responses = amber_responses(written[["image_id", "caption"]], answers, benchmark)
    return amber(responses, benchmark).assign(benchmark="amber", setting="all")


def truncated(
    base_captions: pd.DataFrame, truth: Truth, max_new_tokens: int, benchmark: Amber | None = None
) -> Evaluated:
    """The control ``truncation``: the base model's captions without their last sentence, scored as captions alone."""
    shortened = drop_last_sentence(base_captions)
    parts = [_caption_items(shortened, truth, max_new_tokens)]
    if benchmark is not None:
        parts.append(_amber_items(shortened, None, benchmark)[COLUMNS])
    why = "truncation cuts captions after they are written: the model that answers and attends is the base model"
    lacking = ("pope_*", "mme_*", "amber_f1", "amber_score", *FORCED, "kl_clean")
    return Evaluated(shortened, pd.concat(parts, ignore_index=True), _notes(dict.fromkeys(lacking, why)))


def _caption_items(table: pd.DataFrame, truth: Truth, max_new_tokens: int) -> pd.DataFrame:
    ended = ratio_items(table["image_id"], {"eos_rate": (table["eos"], 1.0)})
    items = pd.concat([chair(table, truth).items, ended], ignore_index=True)
    return items.assign(benchmark="chair", scorer=truth.family, setting=f"max{max_new_tokens},keep")[COLUMNS]


def _notes(reasons: dict[str, str]) -> pd.DataFrame:
    return pd.DataFrame(list(reasons.items()), columns=["metric", "reason"])


def score_rows(
    found: Evaluated | Mapping[int, Evaluated], base: Evaluated | None, truth: Truth, **keys
) -> pd.DataFrame:
    """Rows of ``metrics.csv``: each measure with its interval; with ``base`` also ``<metric>_diff`` (method minus base,
    paired by image) and ``frontier_gap``. ``keys``: world, model, method, split, prompt, condition, seeds.

    ``found`` of several seeds gives means over them, with intervals that resample seeds and images (those of
    ``frontier_gap`` images alone)."""
    seeds = found if isinstance(found, Mapping) else {0: found}
    tables = [one.captions for one in seeds.values()]
    groups = _by_group(seeds)
    chair_group = next(group for group in groups if group[0] == "chair")
    rows = [(group, _derived(_summary(by_seed))) for group, by_seed in groups.items()]
    share = {"metric": "distinct", "value": np.mean([distinct(t) for t in tables]), "n": len(tables[0])}
    rows.append((chair_group, pd.DataFrame([share])))
    if base is not None:
        theirs = dict(list(base.items.groupby(GROUP)))
        rows += [(g, _difference(by_seed, theirs[g])) for g, by_seed in groups.items() if g in theirs]
        gap = frontier_gap(base.captions, tables, truth)
        rows.append((chair_group, pd.DataFrame([{"metric": "frontier_gap", **gap}])))
    return pd.concat([_rows(group, summary, keys) for group, summary in rows], ignore_index=True)


def _by_group(seeds: Mapping[int, Evaluated]) -> dict[tuple, dict[int, pd.DataFrame]]:
    """Group (benchmark, scorer, setting) -> seed -> items, for the groups that all seeds have."""
    parts = {seed: dict(list(one.items.groupby(GROUP, sort=True))) for seed, one in seeds.items()}
    common = [g for g in next(iter(parts.values())) if all(g in part for part in parts.values())]
    return {g: {seed: part[g] for seed, part in parts.items()} for g in common}


def _summary(by_seed: dict[int, pd.DataFrame]) -> pd.DataFrame:
    shared = _shared(list(by_seed.values()))
    return NOTHING if shared[0].empty else summarise_seeds(dict(zip(by_seed, shared)))


def _shared(tables: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Items of the images that all tables have (by metric): a caption without a wrong object has no effect on one."""
    common = tables[0][ITEM]
    for table in tables[1:]:
        common = common.merge(table[ITEM], on=ITEM)
    return [table.merge(common, on=ITEM) for table in tables]


def _derived(summary: pd.DataFrame) -> pd.DataFrame:
    """With perplexity, exp of the mean NLL, where there is one; its interval is the NLL's, seen through exp."""
    nll = summary[summary["metric"] == "nll_grounded"]
    ppl = nll.assign(metric="ppl_grounded", **{c: np.exp(nll[c]) for c in ("value", "lo", "hi")})
    return pd.concat([summary, ppl], ignore_index=True)


def _difference(by_seed: dict[int, pd.DataFrame], theirs: pd.DataFrame) -> pd.DataFrame:
    """Paired by the images that all have (``n``)."""
    other, *own = _shared([theirs, *by_seed.values()])
    if other.empty:
        return NOTHING
    change = paired_difference_seeds(dict(zip(by_seed, own)), dict.fromkeys(by_seed, other))
    return change.assign(metric=change["metric"] + DIFFERENCE)


def frontier_rows(base_captions: pd.DataFrame, truth: Truth, max_new_tokens: int, **keys) -> pd.DataFrame:
    """The base model's truncation frontier as rows of ``metrics.csv``, ``setting`` = ``max<budget>,cut<sentences>``."""
    points, rows = frontier(base_captions, truth, truth.family), []
    for k, point in points.set_index("k").iterrows():
        values = [(m, point[m], point[f"{m}_lo"], point[f"{m}_hi"], point["n"]) for m in POINT_METRICS]
        summary = pd.DataFrame(values, columns=NOTHING.columns).dropna()
        rows.append(_rows(("chair", truth.family, f"max{max_new_tokens},cut{k}"), summary, keys))
    return pd.concat(rows, ignore_index=True)


def _rows(group: tuple, summary: pd.DataFrame, keys: dict) -> pd.DataFrame:
    prompt = {"prompt": ""} if group[0] in NO_PROMPT else {}
    return metric_rows(summary, **dict(zip(GROUP, group)), **{**keys, **prompt})


def read_evaluated(folder) -> Evaluated:
    """What ``write_evaluated`` wrote, without the notes."""
    table = pd.DataFrame(read_jsonl(folder / "captions.jsonl"))
    return Evaluated(table, read_parquet(folder / "items.parquet"), _notes({}))


def write_evaluated(found: Evaluated, folder) -> None:
    """Captions as JSON lines, items as parquet, notes as csv (only if there are any)."""
    write_jsonl(found.captions, folder / "captions.jsonl")
    write_parquet(found.items, folder / "items.parquet")
    if len(found.notes):
        write_csv(found.notes, folder / "notes.csv")
