"""ACTIVATE: a grounded and a hallucinated answer for the same image, both in the model's own words."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from ..metrics.parse import Mention, mentions
from ..models.vlm import VLM
from .table import PAIR_COLUMNS

# What may stand between two noun phrases of a list, longest first.
JOINTS = (", and", ",", " and", " with", " next to", " beside", " near", " along with", " as well as", " or")
_DETERMINER = r"(?:a|an|the|some|one|two|three|four|several|many)"
_BEFORE = re.compile(rf"\b{_DETERMINER}\s+(?:(?!{_DETERMINER}\s)[\w-]+\s+){{0,3}}$", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?]+[.!?]*\s*")


NEGATIVE, POSITIVE = "speculative", "careful"  # roles of the prompts; the positive starts from the careful answer


@dataclass(frozen=True)
class ActivateSettings:
    """``label_source``: who says what is really there, ``detector`` or ``truth``. ``max_new_tokens`` of an answer."""

    label_source: str = "detector"
    max_new_tokens: int = 64


def activate(
    vlm: VLM,
    features,
    image_ids: list[int],
    files: list[str],
    supported: list[frozenset[str]],
    settings: ActivateSettings = ActivateSettings(),
) -> pd.DataFrame:
    """Pairs, one row an image whose negative names something unsupported and whose positive is not empty.

    ``supported``: the categories that the detector (or the truth) says are in each image. Columns: ``PAIR_COLUMNS``.
    """
    options = {"max_new_tokens": settings.max_new_tokens}
    negatives = vlm.generate(features, vlm.prompt(NEGATIVE), progress="negatives", **options)
    drafts = vlm.generate(features, vlm.prompt(POSITIVE), progress="positives", **options)
    rows = []
    for image_id, file, there, negative, draft in zip(image_ids, files, supported, negatives, drafts, strict=True):
        wrong = sorted({m.category for m in mentions(negative.text)} - there)
        positive = keep_supported(draft.text, there)
        if wrong and positive and positive != negative.text:
            rows.append((image_id, file, positive, negative.text, wrong, settings.label_source, NEGATIVE, POSITIVE))
    if not rows:
        raise ValueError(
            f"no pair among {len(image_ids)} images: no negative answer names an unsupported object; "
            "use more images or a model that hallucinates"
        )
    return pd.DataFrame(rows, columns=list(PAIR_COLUMNS))


def keep_supported(text: str, supported: frozenset[str]) -> str:
    """The text without the objects that are not supported.

    In each sentence an unsupported noun phrase goes together with the word that joins it to its neighbour; a sentence
    with nothing else to say, or whose phrase cannot be cut out cleanly, goes whole.
    """
    kept = (_clean(sentence.strip(), supported) for sentence in _SENTENCE.findall(text))
    return " ".join(s for s in kept if s).strip()


def _clean(sentence: str, supported: frozenset[str]) -> str:
    for _ in range(20):
        found = mentions(sentence)
        wrong = [m for m in found if m.category not in supported]
        if not wrong:
            return sentence
        if len(wrong) == len(found):
            return ""
        sentence = _without(sentence, wrong[-1])
    return ""


def _without(sentence: str, mention: Mention) -> str:
    """Cut one noun phrase and its joint; an empty string when there is no joint."""
    determiner = _BEFORE.search(sentence[: mention.start])
    start = determiner.start() if determiner else mention.start
    before, after = sentence[:start].rstrip(), sentence[mention.end :]
    for joint in JOINTS:
        if before.endswith(joint):
            return _agree(before[: -len(joint)] + after)
    for joint in JOINTS:
        if re.match(rf"{joint}(?!\w)", after):
            return _agree(f"{before} {after[len(joint) :].lstrip()}")
    return ""


def _agree(sentence: str) -> str:
    """Number agreement after a cut: 'There are a cup' -> 'There is a cup', and the other way round."""
    sentence = re.sub(r"\b([Tt])here are (a|an)\b", r"\1here is \2", sentence)
    return re.sub(r"\b([Tt])here is two\b", r"\1here are two", sentence)
