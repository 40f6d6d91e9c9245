"""The trial of the edits: each case is fitted, then writes captions: clean, speculative, and under attacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from ..adversary.prefix import Prefix, adversary_preset, fit_prefix
from ..core.files import read_parquet, write_parquet
from ..core.stats import paired_difference_seeds, summarise_seeds
from ..core.tables import DIFFERENCE, metric_rows
from ..datasets.world import Split
from ..edit.methods import EditRequest, fit_method, kept_prefix
from ..evaluate.answers import captions
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.delta import Delta, applied, load_delta, save_delta
from ..models.vlm import VLM

CONDITIONS = ("clean", "speculative", "transferred", "attacked")
ATTACK_SEED = 7  # plus the case's, never that of the edit's adversary
METRICS = ("chair_s", "chair_i", "recall", "words", "objects_per_caption")
BASE = "base"


@dataclass(frozen=True)
class EditCase:
    """One edit of one seed. ``label`` names it in tables and files; ``changes`` are of the edit's settings (layers
    among them), ``n_pairs`` and ``pairs`` what it is trained on. ``conditions``: what it is judged under."""

    method: str
    seed: int = 0
    label: str = ""
    changes: dict = field(default_factory=dict)
    length: int | None = None  # rows of the prefix
    n_pairs: int | None = None  # the first so many of the bench's pairs
    conditions: tuple[str, ...] = CONDITIONS

    @property
    def name(self) -> str:
        return f"{self.label or self.method}-s{self.seed}"


@dataclass(frozen=True)
class EditTrialSettings:
    """What all cases share. ``heads`` that are not given are located when a case needs them.

    ``transferred``: the fresh attack on the unedited model, put before the edited model's answers; ``attacked``: one
    that is tuned against the edited model itself, with the same budget of steps and norm.
    """

    layers: tuple[int, ...]  # located
    heads: tuple[tuple[int, int], ...] = ()
    official: tuple[int, ...] = ()  # where `alea-official` is made; () is the located layers
    length: int = 5
    prefix_steps: int = 100
    attack_steps: int = 100
    max_new_tokens: int = 64
    epochs: int = 3


class EditBench:
    """A model, the pairs to edit on, pairs that no edit sees (for the attacks), test images, and a folder.

    ``pairs``, ``fresh``: tables with image_id, positive, negative; ``activate``: the split that they are of. What is
    finished stands in ``folder`` and is not made again, so that a killed trial goes on; the caller's folder belongs to
    one set of inputs (a run's checkpoint does). ValueError when there are no fresh pairs.
    """

    def __init__(
        self,
        vlm: VLM,
        pairs: pd.DataFrame,
        fresh: pd.DataFrame,
        activate: Split,
        test: Split,
        truth: Truth,
        settings: EditTrialSettings,
        folder: Path,
    ):
        if not len(pairs) or not len(fresh):
            raise ValueError(f"{len(pairs)} pairs to edit on, {len(fresh)} fresh ones for the attacks: both are needed")
        self.vlm, self.pairs, self.fresh, self.settings, self.folder = vlm, pairs, fresh, settings, Path(folder)
        self.test, self.truth = test, truth
        self.features = vlm.features(activate.find(pairs["image_id"].tolist()).files)
        self.fresh_features = vlm.features(activate.find(fresh["image_id"].tolist()).files)
        self.test_features = vlm.features(test.files)
        self.folder.mkdir(parents=True, exist_ok=True)

    def fit(self, case: EditCase) -> Delta | None:
        """The case's delta (None for the unedited model), kept in ``<name>.safetensors``."""
        if case.method == BASE:
            return None
        path = self.folder / f"{case.name}.safetensors"
        if path.exists():
            return load_delta(path)
        pairs = self.pairs.head(case.n_pairs or len(self.pairs))
        part = self.folder / f"part-{case.name}.safetensors"
        s, changes = self.settings, {"epochs": self.settings.epochs, **case.changes}
        layers, length = changes.pop("layers", s.layers), case.length or s.length
        request = EditRequest(case.method, layers, s.heads, s.official, case.seed, changes, length, s.prefix_steps)
        features = self.features[: len(pairs)]
        delta, _ = fit_method(self.vlm, features, pairs, request, checkpoint=part, folder=self.folder)
        save_delta(delta, path)
        part.unlink(missing_ok=True)
        return delta

    def attack(self, case: EditCase) -> Prefix:
        """A fresh attack on the model as it is now (edited, inside ``applied``), on pairs that no edit has seen."""
        s, (negatives, positives) = self.settings, (self.fresh[k].tolist() for k in ("negative", "positive"))
        settings = adversary_preset("contrast", length=s.length, steps=s.attack_steps, seed=ATTACK_SEED + case.seed)

        def tune() -> Prefix:
            return fit_prefix(self.vlm, self.fresh_features, negatives, settings, positives)[0]

        return kept_prefix(self.vlm, self.folder / f"attack-{case.name}.safetensors", tune)

    def judge(self, case: EditCase, delta: Delta | None) -> pd.DataFrame:
        """Items of the test images: condition, image_id, metric, num, den; kept in ``<name>.parquet``."""
        path = self.folder / f"{case.name}.parquet"
        if path.exists():
            return read_parquet(path)
        write = partial(captions, self.vlm, self.test, self.test_features, max_new_tokens=self.settings.max_new_tokens)
        prefixes, parts = {}, []
        if "transferred" in case.conditions:
            prefixes["transferred"] = self.attack(EditCase(BASE, case.seed))
        with applied(self.vlm, delta):
            if "attacked" in case.conditions:
                prefixes["attacked"] = self.attack(case)
            for condition in case.conditions:
                prompt = "speculative" if condition == "speculative" else "plain"
                written = write(prompt=prompt, prefix=prefixes.get(condition))
                if condition == "clean":
                    write_parquet(written, self._captions_path(case))
                parts.append(chair(written, self.truth).items.assign(condition=condition))
        found = pd.concat(parts, ignore_index=True)
        found = found[found["metric"].isin(METRICS)].reset_index(drop=True)
        write_parquet(found, path)
        return found

    def captions(self, case: EditCase) -> pd.DataFrame:
        """The captions that the case wrote under ``clean``; FileNotFoundError before it was judged."""
        return read_parquet(self._captions_path(case))

    def _captions_path(self, case: EditCase) -> Path:
        return self.folder / f"{case.name}-captions.parquet"


def edit_trial(bench: EditBench, cases: Iterable[EditCase], given: dict[str, Delta] | None = None) -> pd.DataFrame:
    """All cases, one after the other: label, method, seed, condition, image_id, metric, num, den.

    ``given``: deltas by case name that were made elsewhere. The model is left bit-equal.
    """
    cases, parts = list(cases), []
    if doubled := sorted({c.name for c in cases if [d.name for d in cases].count(c.name) > 1}):
        raise ValueError(f"cases need names of their own; {doubled} stand twice: give labels")
    for case in tqdm(cases, desc="edits"):
        delta = (given or {}).get(case.name) or bench.fit(case)
        found = bench.judge(case, delta)
        parts.append(found.assign(label=case.label or case.method, method=case.method, seed=case.seed))
    return pd.concat(parts, ignore_index=True)


ROWS = ["label", "method", "condition", "metric", "against", "value", "lo", "hi", "n", "seeds"]


def trial_rows(items: pd.DataFrame, against: Iterable[str] = (BASE,)) -> pd.DataFrame:
    """The trial's record: every label under every condition, and its paired difference to the labels ``against``.

    Means over seeds; the intervals resample seeds and images, differences are paired by both. ``against`` is "" for the
    values themselves; ``n`` counts images. DataError when a label lacks a seed that the other has.
    """
    by = {key: dict(list(part.groupby("seed"))) for key, part in items.groupby(["label", "condition"], sort=False)}
    method = dict(zip(items["label"], items["method"]))
    rows = []
    for (label, condition), seeds in by.items():
        keys = {"label": label, "method": method[label], "condition": condition, "seeds": len(seeds)}
        rows.append(summarise_seeds(seeds).assign(against="", **keys))
        for other in against:
            if label not in (other, BASE) and (other, condition) in by:
                found = by[other, condition]  # all its seeds where it lacks one, so that the error names both
                same = {s: found[s] for s in seeds} if set(seeds) <= set(found) else found
                rows.append(paired_difference_seeds(seeds, same).assign(against=other, **keys))
    return pd.concat(rows, ignore_index=True)[ROWS]


def robustness_scores(rows: pd.DataFrame, world: str, model: str, max_new_tokens: int) -> pd.DataFrame:
    """The trial's record as rows of ``metrics.csv``: values, and differences to the base as ``<metric>_diff``, means
    over seeds. Differences to other methods and transferred attacks have no columns there."""
    known = rows[rows["against"].isin(["", BASE]) & (rows["condition"] != "transferred")]
    known = known[known["label"] == known["method"]]
    keys = {"world": world, "model": model, "split": "test", "benchmark": "chair", "scorer": "singularise"}
    parts = []
    for (method, condition, against), part in known.groupby(["method", "condition", "against"], sort=False):
        how = {"prompt": "speculative" if condition == "speculative" else "plain"}
        how |= {"condition": "attacked" if condition == "attacked" else "clean", "setting": f"max{max_new_tokens},keep"}
        part = part.assign(metric=part["metric"] + (DIFFERENCE if against else ""))
        parts.append(metric_rows(part[["metric", "value", "lo", "hi", "n"]], method=method, **keys, **how))
    return pd.concat(parts, ignore_index=True)
