"""The truncation frontier: what CHAIR and recall become when captions are merely cut short.

Deleting the last sentence of a caption lowers CHAIR and costs a little recall; a method is an improvement
only if it lies below the curve that its base model draws when its captions are cut to 1, 2, 3, ... whole
sentences.

A sentence ends at ``.``, ``!``, ``?`` or an ellipsis (closing quotes and brackets belong to it) followed by
a blank or the end of the text, and at a line break; not after a common abbreviation, an initial or the
number of a list item, and never inside a number ("3.5").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..core.files import DataError
from ..core.stats import RESAMPLES, interval, resampled_sums
from .chair import chair, check_captions
from .truth import Truth

_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s|$)|\n+")
_NO_END = re.compile(r"(?<![\w'\u2019])(?:mr|mrs|ms|dr|st|vs|e\.g|i\.e|approx|[a-z])\.$", re.I)
_CUT_NUMBER = re.compile(r"\s*\d+[.)]*$")
_CLOSED = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]*]*\s*$")
POINT_METRICS = ("chair_s", "chair_i", "recall", "words")


def sentence_ends(caption: str) -> list[int]:
    """Character positions at which the sentences of a caption end; the last is the end of its text."""
    ends: list[int] = []
    for match in _END.finditer(caption):
        is_break = match.group()[0] == "\n"
        stop = len(caption[: match.start()].rstrip()) if is_break else match.end()
        sentence = caption[ends[-1] if ends else 0 : stop]
        if not sentence.strip() or _CUT_NUMBER.match(sentence):
            continue
        if is_break or not _NO_END.search(caption, max(0, match.start() - 8), match.start() + 1):
            ends.append(stop)
    length = len(caption.rstrip())
    if length and (not ends or ends[-1] < length):
        ends.append(length)
    return ends


def cut(captions: pd.DataFrame, k: int) -> pd.DataFrame:
    """The same table with every caption cut to its first ``k`` whole sentences (k = 0: to nothing)."""
    return captions.assign(caption=[_cut(text, k) for text in captions["caption"]])


def _cut(text: str, k: int) -> str:
    ends = sentence_ends(text)
    return text if k >= len(ends) else text[: ends[k - 1]] if k else ""


def drop_last_sentence(captions: pd.DataFrame) -> pd.DataFrame:
    """The control method ``truncation``: delete the last sentence of every caption that has at least two."""
    return captions.assign(caption=[_without_last(text) for text in captions["caption"]])


def _without_last(text: str) -> str:
    return _cut(text, max(len(sentence_ends(text)) - 1, 1))


def drop_incomplete(captions: pd.DataFrame) -> pd.DataFrame:
    """Delete a last sentence that was cut off (no end mark), unless it is the only one."""
    return captions.assign(
        caption=[text if _CLOSED.search(text) else _without_last(text) for text in captions["caption"]]
    )


def frontier(
    captions: pd.DataFrame, truth: Truth, family: str = "singularise", n_resamples: int = RESAMPLES
) -> pd.DataFrame:
    """The frontier's points: k, chair_s, chair_i, recall, words, each with ``_lo`` and ``_hi``; n, scorer.

    One row for k = 1 .. the largest number of sentences; the last row is the captions as they are. A value
    that is not defined (no object named at all) is NaN.
    """
    points = _points(check_captions(captions, truth), truth, family)
    values, resampled = _ratio(points.sum(axis=0)), _ratio(resampled_sums(points, n_resamples))
    rows = []
    for k in range(1, points.shape[1]):
        row: dict = {"k": k}
        for j, metric in enumerate(POINT_METRICS):
            lo, hi = interval(values[k, j], resampled[:, k, j])
            row |= {metric: values[k, j], f"{metric}_lo": lo, f"{metric}_hi": hi}
        rows.append(row | {"n": len(points), "scorer": family})
    return pd.DataFrame(rows)


def frontier_gap(
    base_captions: pd.DataFrame,
    method_captions: pd.DataFrame | Sequence[pd.DataFrame],
    truth: Truth,
    family: str = "singularise",
    n_resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """CHAIRs of the base model cut to the method's recall, minus the method's CHAIRs: positive = better.

    Linear between cuts, from the empty caption (recall 0, CHAIRs 0) up, and clamped at the base model's full
    caption. Several tables (seeds of a method, of the same images) count together. Where several cuts have the same
    recall, the one with the lowest CHAIRs stands for the frontier. Paired bootstrap by image: in each resample the
    whole frontier and the method are computed again. Returns value, lo, hi, n (images).
    """
    methods = [method_captions] if isinstance(method_captions, pd.DataFrame) else method_captions
    base, *methods = (
        check_captions(t, truth).sort_values("image_id", ignore_index=True) for t in (base_captions, *methods)
    )
    for method in methods:
        if odd := sorted(set(base["image_id"]).symmetric_difference(method["image_id"])):
            raise DataError(
                f"{len(odd)} images are captioned by one side only, e.g. {odd[:3]}; caption the same images"
            )
    own = np.sum([_counts(method, truth, family) for method in methods], axis=0)
    stacked = np.concatenate([_points(base, truth, family), own[:, None]], axis=1)
    value = float(_gap(_ratio(stacked.sum(axis=0))[None])[0])
    lo, hi = interval(value, _gap(_ratio(resampled_sums(stacked, n_resamples, seed))))
    return {"value": value, "lo": lo, "hi": hi, "n": len(base)}


def _gap(points: np.ndarray) -> np.ndarray:
    """points [resamples, cuts + 1, metrics], the method last: frontier minus method, [resamples]."""
    chair_s, recall = points[:, :-1, 0], points[:, :-1, 2]
    method, wanted = points[:, -1, 0], points[:, -1, 2]
    above = np.minimum((recall < wanted[:, None]).sum(axis=1), recall.shape[1] - 1)
    below = np.maximum(above - 1, 0)
    rows = np.arange(len(points))
    low, high = recall[rows, below], recall[rows, above]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, np.minimum((wanted - low) / (high - low), 1.0), 1.0)
    return chair_s[rows, below] + share * (chair_s[rows, above] - chair_s[rows, below]) - method


def _points(captions: pd.DataFrame, truth: Truth, family: str) -> np.ndarray:
    """[images, cuts, metrics, (num, den)] for 0, 1, ... sentences; what a cut leaves whole is parsed once."""
    captions = captions.sort_values("image_id", ignore_index=True)
    sentences = np.array([len(sentence_ends(text)) for text in captions["caption"]])
    full = _counts(captions, truth, family)
    cuts = []
    for k in range(max(sentences.max(), 1)):
        point, longer = full.copy(), sentences > k
        if longer.any():
            point[longer] = _counts(cut(captions[longer], k), truth, family)
        cuts.append(point)
    return np.stack([*cuts, full], axis=1)


def _counts(captions: pd.DataFrame, truth: Truth, family: str) -> np.ndarray:
    """[images, metrics, (num, den)] in the order of ``POINT_METRICS``."""
    items = chair(captions, truth, family).items
    return np.stack([items.loc[items["metric"] == m, ["num", "den"]].to_numpy(float) for m in POINT_METRICS], axis=1)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Last axis (num, den) to num / den."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]
