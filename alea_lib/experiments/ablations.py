"""Ablations of the edit: one thing is varied at a time, and every level is compared with the factor's reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd
from tqdm import tqdm

from ..core.files import DataError, read_parquet, write_parquet
from ..edit.settings import control_layers
from ..evaluate.kept_ability import ability, first_references
from ..metrics.frontier import frontier_gap
from .edits import BASE, EditBench, EditCase, edit_trial, trial_rows

SHOWN = ("chair_s", "recall", "words", "kl_clean")
COLUMNS = ["factor", "level", "method", "condition", "metric", "against", "value", "lo", "hi", "n", "seeds"]


@dataclass(frozen=True)
class Factor:
    """One thing that is varied, of the edit ``method``. ``levels``: name -> what differs from it: "method", "place" (a
    control of :func:`control_layers`), "locator" (whose layers are edited), "length" (of the prefix), "n_pairs",
    "labels" (the source of the pairs' labels), or options of the edit's settings. ``reference``: the level that the
    others are compared with. ``attacked``: judged under a fresh attack on the edited model too."""

    question: str
    method: str
    reference: str
    levels: Mapping[str, dict]
    attacked: bool = False


def _each(name: str, *values) -> dict[str, dict]:
    return {f"{v}": {name: v} for v in values}


def _methods(**names: str) -> dict[str, dict]:
    return {level.replace("_", " "): {"method": name} for level, name in names.items()}


PLACES = {"located": {}, **_each("place", "random-layers", "last-layer", "first", "all-layers")}
LOCATORS = ("relative-l2", "raw-l2", "official", "ablation", "gradient")
FACTORS = {
    "prefix": Factor(
        "Is it the prefix?", "no-prefix", "none", attacked=True,
        levels=_methods(none="no-prefix", random="random-prefix", tuned="alea-corrected", tuned_in_half="alea-mixed"),
    ),
    "share": Factor(
        "How many steps should see it?", "alea-mixed", "0", attacked=True,
        levels={"0": {"method": "no-prefix"}, "0.25": {"prefix_share": 0.25}, "0.5": {}, "0.75": {"prefix_share": 0.75},
                "1": {"method": "alea-corrected"}},
    ),
    "length": Factor("How long should it be?", "alea-mixed", "5", attacked=True,
                     levels=_each("length", 1, 2, 5, 10, 20)),
    "rounds": Factor("Tuned again against the edit?", "alea-mixed", "1", attacked=True,
                     levels=_each("rounds", 1, 2, 3)),
    "dropout": Factor("Rows left out by chance?", "alea-mixed", "0.0", attacked=True,
                      levels=_each("prefix_dropout", 0.0, 0.3, 0.6)),
    "place": Factor("Is it the place?", "no-prefix", "located", levels=PLACES),
    "place under attack": Factor("Is it the place?", "alea-mixed", "located", levels=PLACES, attacked=True),
    "locator": Factor("Is it the locator?", "no-prefix", LOCATORS[0], levels=_each("locator", *LOCATORS)),
    "matrices": Factor(
        "Which matrices?", "no-prefix", "down-projections",
        levels={"down-projections": {}, **_methods(heads="heads", low_rank="lora", whole_decoder="sft")},
    ),
    "kl": Factor("How strong a tie to the base?", "alea-mixed", "0.2", attacked=True,
                 levels=_each("kl", 0.0, 0.2, 1.0)),
    "unlikelihood": Factor("Push the wrong words away?", "no-prefix", "0.0",
                           levels=_each("unlikelihood", 0.0, 0.5, 1.0)),
    "pairs": Factor("Is it just the data?", "no-prefix", "standard",
                    levels={**_each("n_pairs", 50, 100, 200), "standard": {}, **_each("n_pairs", 1000, 1500)}),
    "labels": Factor("Whose labels?", "no-prefix", "detector", levels={"detector": {}, "truth": {"labels": "truth"}}),
}  # fmt: skip
# values that the trial has anyway (EditTrialSettings): levels that say these are the method itself, and share its case
STANDARD = {"length": 5, "kl": 0.2, "rounds": 1, "prefix_dropout": 0.0, "unlikelihood": 0.0}
OWN = ("method", "place", "locator", "length", "n_pairs", "labels")  # keys of a level that are no edit's option


@dataclass(frozen=True)
class Places:
    """Where edits can be made: the number of layers, the located ``layers``, and those that each locator names."""

    n_layers: int
    layers: tuple[int, ...]
    by_locator: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Level:
    """One level of one factor with one seed: the case to run, on the pairs of which labels."""

    factor: str
    level: str
    labels: str
    case: EditCase


def ablation_levels(
    factors: Mapping[str, int], places: Places, n_pairs: int, largest: int | None = None
) -> list[Level]:
    """All levels of the named factors. ``factors``: name -> number of seeds; levels of more than ``largest`` pairs are
    left out.

    Levels that are the same edit share a case, which is then judged under all conditions that any of them asks for.
    KeyError names the factors there are.
    """
    if unknown := sorted(set(factors) - set(FACTORS)):
        raise KeyError(f"unknown factors {unknown}; there are {', '.join(FACTORS)}")
    found = [
        Level(name, level, what.get("labels", "detector"), _case(FACTORS[name], what, seed, places, n_pairs))
        for name, seeds in factors.items()
        for level, what in FACTORS[name].levels.items()
        if what.get("n_pairs", 0) <= (largest or n_pairs)
        for seed in range(seeds)
    ]
    attacked = {each.case.name for each in found if "attacked" in each.case.conditions}
    both = ("clean", "attacked")
    return [replace(e, case=replace(e.case, conditions=both)) if e.case.name in attacked else e for e in found]


def _case(factor: Factor, what: dict, seed: int, places: Places, n_pairs: int) -> EditCase:
    what = {k: v for k, v in what.items() if v != STANDARD.get(k)}
    method = what.get("method", factor.method)
    changes = {k: v for k, v in what.items() if k not in OWN}
    changed = [f"{k}={v}" for k, v in what.items() if k != "method"]
    if place := what.get("place"):
        changes["layers"] = control_layers(place, places.n_layers, len(places.layers), seed)
    if locator := what.get("locator"):
        changes["layers"] = places.by_locator[locator]
    return EditCase(
        method, seed, label="-".join([method, *changed]), changes=changes, length=what.get("length"),
        n_pairs=what.get("n_pairs", n_pairs), conditions=("clean", "attacked") if factor.attacked else ("clean",),
    )  # fmt: skip


def ablation_trial(benches: Mapping[str, EditBench], levels: list[Level]) -> pd.DataFrame:
    """Run all cases, each once, and the unedited model: the items of :func:`edit_trial`, and ``kl_clean`` on the test
    split's captions. ``benches``: label source -> pairs, model and images; what is finished is kept in their folders.
    DataError when a case asks for more pairs than there are.
    """
    parts = []
    for labels, bench in benches.items():
        cases = {each.case.name: each.case for each in levels if each.labels == labels}
        for case in cases.values():
            if case.n_pairs and case.n_pairs > len(bench.pairs):
                raise DataError(
                    f"{case.name} asks for {case.n_pairs} pairs, there are {len(bench.pairs)}: make more "
                    "(02_activate, N_IMAGES), or leave that level out"
                )
        attacked = {c.seed: ("clean", "attacked") for c in cases.values() if "attacked" in c.conditions}
        seeds = sorted({c.seed for c in cases.values()}) if labels == "detector" else []
        bases = [EditCase(BASE, seed, conditions=attacked.get(seed, ("clean",))) for seed in seeds]
        if cases:
            parts.append(edit_trial(bench, [*bases, *cases.values()]))
            parts += [_drift(bench, case) for case in tqdm(cases.values(), desc="distance to the base")]
    return pd.concat(parts, ignore_index=True)


def _drift(bench: EditBench, case: EditCase) -> pd.DataFrame:
    """Items of kl_clean, nats a token on truthful captions of the test images; kept in ``<name>-kl.parquet``."""
    path = bench.folder / f"{case.name}-kl.parquet"
    if not path.exists():
        found = ability(bench.vlm, bench.test_features, first_references(bench.test), bench.fit(case))
        write_parquet(found[found["metric"] == "kl_clean"].reset_index(drop=True), path)
    keys = {"condition": "clean", "label": case.label, "method": case.method, "seed": case.seed}
    return read_parquet(path).assign(**keys)


def ablation_rows(items: pd.DataFrame, levels: list[Level], benches: Mapping[str, EditBench]) -> pd.DataFrame:
    """The record (COLUMNS): every level under every condition, and its paired difference to the reference level.

    ``against`` is "" for the values themselves. Means over seeds; intervals resample seeds and images, those of
    frontier_gap images alone. The unedited model is the factor ``base``.
    """
    items = items[items["metric"].isin(SHOWN)]
    parts = []
    for factor in dict.fromkeys(each.factor for each in levels):
        mine = [each for each in levels if each.factor == factor]
        name = {each.case.label: each.level for each in mine}
        reference = next(label for label, level in name.items() if level == FACTORS[factor].reference)
        seeds = {each.case.seed for each in mine}
        conditions = {c for e in mine for c in e.case.conditions} if FACTORS[factor].attacked else {"clean"}
        part = items[items["label"].isin(name) & items["seed"].isin(seeds) & items["condition"].isin(conditions)]
        rows = pd.concat([trial_rows(part, (reference,)), _gaps(mine, benches)], ignore_index=True)
        rows["against"] = rows["against"].map({"": "", **name})
        parts.append(rows.assign(factor=factor, level=rows["label"].map(name)))
    base = trial_rows(items[items["label"] == BASE], ())
    parts.append(base.assign(factor=BASE, level="unedited"))
    return pd.concat(parts, ignore_index=True)[COLUMNS]


def _gaps(mine: list[Level], benches: Mapping[str, EditBench]) -> pd.DataFrame:
    rows = []
    for label in dict.fromkeys(each.case.label for each in mine):
        cases = [(each.case, benches[each.labels]) for each in mine if each.case.label == label]
        base = benches["detector"].captions(EditCase(BASE, cases[0][0].seed))
        gap = frontier_gap(base, [bench.captions(case) for case, bench in cases], benches["detector"].truth)
        keys = {"label": label, "method": cases[0][0].method, "condition": "clean", "against": "", "seeds": len(cases)}
        rows.append({**keys, "metric": "frontier_gap", **gap})
    return pd.DataFrame(rows)
