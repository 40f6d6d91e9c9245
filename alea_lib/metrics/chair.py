"""CHAIR (Rohrbach et al. 2018): which of the objects that a caption names are not in the image.

Metrics, each a ratio of per-image sums: ``chair_s`` captions with a hallucinated object / captions,
``chair_i`` hallucinated mentions / mentions, ``recall`` unique correct objects / objects in the image,
``f1_objects`` 2 TP / (2 TP + FP + FN) over unique objects, ``words`` and ``objects_per_caption`` (unique
objects) a caption. CHAIR falls when a model merely says less: never read it without recall and words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..core.files import DataError
from ..core.stats import ratio_items
from .parse import count_words, mentions
from .truth import Truth

_PER_CAPTION = ("image_id", "caption", "mentioned", "hallucinated", "missed", "n_words")


@dataclass(frozen=True)
class ChairResult:
    """Scores of one table of captions; both tables have the column ``scorer`` = the parser's family.

    ``items``: image_id, metric, num, den (for ``alea_lib.core.stats``). ``per_caption``: image_id, caption,
    mentioned, hallucinated, missed (tuples of category names, in order of first mention or alphabetical for
    missed), n_words.
    """

    items: pd.DataFrame
    per_caption: pd.DataFrame


def check_captions(captions: pd.DataFrame, truth: Truth) -> pd.DataFrame:
    """Columns image_id and caption of a usable table; DataError saying what is wrong and how to repair it."""
    missing = [c for c in ("image_id", "caption") if c not in captions.columns]
    if missing:
        raise DataError(f"the table of captions lacks {missing}; needed are the columns image_id and caption")
    if captions.empty:
        raise DataError("the table of captions is empty; did the generation stage run?")
    ids = captions["image_id"]
    if len(twice := ids[ids.duplicated()].unique()):
        raise DataError(f"{len(twice)} images have two captions, e.g. {twice[:3].tolist()}; keep one caption an image")
    if unknown := [i for i in ids if i not in truth]:
        raise DataError(
            f"{len(unknown)} image ids have no ground truth, e.g. {unknown[:3]}; read the annotations of the"
            " split that was captioned (ids are integers)"
        )
    if bad := [i for i, text in zip(ids, captions["caption"]) if not isinstance(text, str)]:
        raise DataError(f"the captions of {len(bad)} images are not text, e.g. {bad[:3]}; write '' for an empty one")
    return captions[["image_id", "caption"]].reset_index(drop=True)


def chair(captions: pd.DataFrame, truth: Truth, family: str = "singularise") -> ChairResult:
    """Score one caption an image. ``captions``: columns image_id, caption; order does not matter.

    The truth must have been read by the same family. DataError (a ValueError) for unknown or doubled image
    ids, an empty table, or a caption that is not text.
    """
    captions = check_captions(captions, truth)
    if truth.captions and truth.family != family:
        raise DataError(
            f"the references were parsed by {truth.family!r}, the captions would be by {family!r};"
            " read the truth again with the same family"
        )
    rows = [_score(i, text, truth[i], family) for i, text in captions.itertuples(index=False)]
    per_caption = pd.DataFrame([row[:-1] for row in rows], columns=list(_PER_CAPTION))
    items = _items(per_caption["image_id"], np.array([row[-1] for row in rows], dtype=float))
    return ChairResult(items.assign(scorer=family), per_caption.assign(scorer=family))


def _score(image_id: int, caption: str, there: frozenset[str], family: str) -> tuple:
    """Fields of ``per_caption``, then the counts that ``_items`` needs."""
    named = [m.category for m in mentions(caption, family)]
    unique = tuple(dict.fromkeys(named))
    wrong = tuple(c for c in unique if c not in there)
    missed = tuple(sorted(there.difference(unique)))
    words = count_words(caption)
    counts = (sum(c not in there for c in named), len(named), len(wrong), len(unique), len(there), words)
    return image_id, caption, unique, wrong, missed, words, counts


def _items(image_ids: pd.Series, counts: np.ndarray) -> pd.DataFrame:
    wrong_mentions, named, wrong, unique, there, words = counts.T
    right = unique - wrong
    ratios = {
        "chair_s": (wrong > 0, 1.0),
        "chair_i": (wrong_mentions, named),
        "recall": (right, there),
        "f1_objects": (2 * right, unique + there),
        "words": (words, 1.0),
        "objects_per_caption": (unique, 1.0),
    }
    return ratio_items(image_ids, ratios)


def distinct(captions: pd.DataFrame) -> float:
    """Share of different captions: 1 when no two are the same. No ratio of sums, so no interval."""
    return captions["caption"].nunique() / len(captions)


def companion_share(per_caption: pd.DataFrame, truth: Truth, companions: Mapping[str, str]) -> pd.DataFrame:
    """Items of ``companion_share``: hallucinated objects that a present object calls for / all of them.

    ``companions``: category to what it calls for (a spoon for a bowl), the planted graph of the scenes world. Objects
    count once a caption.
    """
    called = [{companions.get(there) for there in truth[i]} for i in per_caption["image_id"]]
    wrong = per_caption["hallucinated"]
    hits = [len(expected.intersection(named)) for expected, named in zip(called, wrong)]
    items = ratio_items(per_caption["image_id"], {"companion_share": (hits, wrong.map(len))})
    return items.assign(scorer=per_caption["scorer"].iloc[0])
