"""One baseline from its registration to its record: fitted, tuned on validate images, evaluated on test images.

All are given the same model, pairs, images and budget of tokens. Tuning tries every baseline's grid on the same
validate images by one rule (:func:`choose`). A finished record is kept in a folder, to resume a long comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ..baselines.registry import Baseline
from ..core.files import DataError, read_jsonl, write_jsonl
from ..datasets.world import Split
from ..evaluate.answers import captions
from ..evaluate.scoring import Benchmarks, Evaluated, evaluate, read_evaluated, truncated, write_evaluated
from ..metrics.chair import chair
from ..metrics.frontier import frontier_gap
from ..metrics.truth import Truth, read_truth
from ..models.delta import Delta, applied, load_delta, save_delta
from ..models.hooks import counted
from ..models.vlm import VLM

TOLERANCE = 0.03


@dataclass(frozen=True)
class EvaluationSplit:
    """Images of a split with their truth, features and the base model's captions, each computed once."""

    vlm: VLM
    split: Split
    max_new_tokens: int

    @cached_property
    def truth(self) -> Truth:
        return read_truth(self.split.instances, self.split.captions).only(self.split.ids)

    @cached_property
    def features(self) -> torch.Tensor:
        return self.vlm.features(self.split.files)

    @cached_property
    def base(self) -> pd.DataFrame:
        """Captions of the base model, plain prompt, greedy."""
        return captions(self.vlm, self.split, self.features, max_new_tokens=self.max_new_tokens)

    def with_views(self, baseline: Baseline) -> Baseline:
        """The baseline with what it reads of these images besides their features."""
        return baseline.with_views(self.vlm, self.split.files, self.features)


def rows_of_seed(whole, n: int, seed: int):
    """The ``n`` rows of one seed: seed 0 has the first ones, and no two seeds share any. DataError for too few."""
    rows = whole[seed * n : (seed + 1) * n]
    if len(rows) < n:
        raise DataError(
            f"seed {seed} needs rows {seed * n} to {(seed + 1) * n}, there are {len(whole)}: ask for fewer "
            "(N_PAIRS, N_VALIDATE) or fewer seeds, or make more (02_activate, N_IMAGES)"
        )
    return rows


@dataclass(frozen=True)
class EvaluationSetup:
    """``pairs`` and the ``pair_features`` [N,P,D] of their images: what baselines learn from. ``validate`` is where
    settings are chosen, ``test`` where the chosen ones are evaluated, ``benchmarks`` the questions about it."""

    vlm: VLM
    pairs: pd.DataFrame
    pair_features: torch.Tensor
    validate: EvaluationSplit
    test: EvaluationSplit
    benchmarks: Benchmarks
    n_grounding: int | None = None

    def fitted(self, baseline: Baseline) -> tuple[Baseline, dict[str, float]]:
        """The baseline with what it learns from the pairs, and the passes (``forwards``, ``backwards``) it took."""
        with counted(self.vlm) as count:
            fitted = baseline.fitted(self.vlm, self.pair_features, self.pairs)
        return fitted, {"forwards": count.forwards, "backwards": count.backwards}

    def captions(self, fitted: Baseline, images: EvaluationSplit) -> pd.DataFrame:
        """What a fitted baseline writes about these images."""
        if fitted.kind == "after":
            return fitted.apply(fitted.settings, images.base)
        ready = images.with_views(fitted)
        with applied(self.vlm, ready.delta):
            return captions(
                self.vlm, images.split, images.features, ready.prompt, images.max_new_tokens, decoding=ready.decoding
            )

    def evaluated(self, fitted: Baseline | None, edit: Delta | None = None) -> Evaluated:
        """All measures of a fitted baseline on the test images (None: of the base model), on top of an ``edit`` of the
        weights if there is one. ValueError for two edits at once."""
        test = self.test
        if fitted is not None and fitted.kind == "after":
            return truncated(test.base, test.truth, test.max_new_tokens, self.benchmarks.amber)
        options: dict = {"delta": edit, "n_grounding": self.n_grounding}
        if fitted is not None:
            if fitted.delta and edit:
                raise ValueError(f"{fitted.name} is an edit of the weights itself: it cannot stand on another one")
            ready = test.with_views(fitted)
            options |= {"delta": ready.delta or edit, "prompt": ready.prompt, "decoding": ready.decoding}
        return evaluate(self.vlm, test.split, test.truth, self.benchmarks, test.max_new_tokens, **options)


def tune(setup: EvaluationSetup, baseline: Baseline) -> tuple[Baseline, pd.DataFrame, dict[str, float]]:
    """The baseline fitted with its chosen settings, the record, and the passes of one fit with them.

    Record: rival (the baseline's name), settings (what is changed of the defaults, as JSON), chair_s, recall,
    frontier_gap, n (images), chosen. The rule is :func:`choose`.
    """
    rows, tried = [], []
    for changes in tqdm(baseline.grid, desc=f"tune {baseline.name}", disable=len(baseline.grid) < 2):
        fitted, passes = setup.fitted(baseline.changed(**changes))
        tried.append((fitted, passes))
        written = setup.captions(fitted, setup.validate)
        scores = _caption_scores(written, setup.validate.truth)
        gap = frontier_gap(setup.validate.base, written, setup.validate.truth, n_resamples=2)  # without its interval
        row = {"rival": baseline.name, "settings": json.dumps(changes, sort_keys=True), **scores}
        rows.append({**row, "frontier_gap": gap["value"], "n": len(written)})
    record = pd.DataFrame(rows)
    best = choose(record, _caption_scores(setup.validate.base, setup.validate.truth)["recall"])
    record["chosen"] = [i == best for i in range(len(record))]
    return tried[best][0], record, tried[best][1]


def choose(record: pd.DataFrame, base_recall: float) -> int:
    """Which row: the best ``frontier_gap`` among those whose recall is at most ``TOLERANCE`` under the base model's; if
    there is none, the highest recall. The first of equals."""
    near = record[record["recall"] >= base_recall - TOLERANCE - 1e-9]
    return int(near["frontier_gap"].idxmax() if len(near) else record["recall"].idxmax())


def _caption_scores(table: pd.DataFrame, truth: Truth) -> dict[str, float]:
    sums = chair(table, truth).items.groupby("metric")[["num", "den"]].sum()
    ratio = sums["num"] / sums["den"]
    return {metric: float(ratio[metric]) for metric in ("chair_s", "recall")}


@dataclass(frozen=True)
class Case:
    """One baseline's record: itself fitted with the chosen settings, ``tuning`` (see :func:`tune`), what it wrote about
    the test images, and the passes that fitting took."""

    baseline: Baseline
    tuning: pd.DataFrame
    evaluated: Evaluated
    passes: dict[str, float]


def baseline_case(setup: EvaluationSetup, baseline: Baseline, folder: Path) -> Case:
    """Tune and evaluate a baseline; read from ``folder`` if that was done before. ``case.json`` is written last."""
    mark = folder / "case.json"
    if mark.is_file():
        return _read(baseline, folder, json.loads(mark.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    fitted, tuning, passes = tune(setup, baseline)
    evaluated = setup.evaluated(fitted)
    write_evaluated(evaluated, folder)
    write_jsonl(tuning, folder / "tuning.jsonl")
    if fitted.delta is not None:
        save_delta(fitted.delta, folder / "delta.safetensors")
    mark.write_text(json.dumps({"settings": vars(fitted.settings), "passes": passes}), encoding="utf-8")
    return Case(fitted, tuning, evaluated, passes)


def _read(baseline: Baseline, folder: Path, record: dict) -> Case:
    fitted = baseline.changed(**{k: _tuples(v) for k, v in record["settings"].items()})
    if baseline.kind == "delta":
        fitted = replace(fitted, delta=load_delta(folder / "delta.safetensors"))
    return Case(fitted, pd.DataFrame(read_jsonl(folder / "tuning.jsonl")), read_evaluated(folder), record["passes"])


def _tuples(value):
    """JSON knows lists alone; settings are frozen."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
