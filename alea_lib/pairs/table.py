"""The schema of a table of pairs."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..core.files import DataError
from ..metrics.lexicon import load_lexicon

PAIR_COLUMNS = (
    "image_id", "image", "positive", "negative", "wrong", "label_source", "prompt_negative",
    "prompt_positive",
)  # fmt: skip
LABEL_SOURCES = ("truth", "detector", "import")


def check_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The table of pairs unchanged if it keeps the schema ``PAIR_COLUMNS``; DataError if not.

    ``positive`` and ``negative`` are answers about the same image; ``wrong`` lists the COCO categories that
    the negative names and the image lacks; ``label_source`` says who judged that.
    """
    missing = [c for c in PAIR_COLUMNS if c not in pairs.columns]
    if missing:
        raise DataError(f"pairs lack the columns {missing}; needed are {list(PAIR_COLUMNS)}")
    if pairs.empty:
        raise DataError("the table of pairs is empty: no image gave a usable pair")
    if not pd.api.types.is_integer_dtype(pairs["image_id"]):
        raise DataError("image_id of the pairs must be integers")
    for column in ("image", "positive", "negative", "prompt_negative", "prompt_positive"):
        _refuse_pairs(pairs, [not (isinstance(x, str) and x.strip()) for x in pairs[column]], f"empty {column}")
    _refuse_pairs(pairs, ~pairs["label_source"].isin(LABEL_SOURCES), f"label_source must be in {LABEL_SOURCES}")
    _refuse_pairs(pairs, pairs["positive"] == pairs["negative"], "positive and negative are the same text")
    names = set(load_lexicon().names)
    is_list = [not isinstance(w, str) and isinstance(w, Iterable) for w in pairs["wrong"]]
    _refuse_pairs(pairs, [not x for x in is_list], "wrong must be a list of categories")
    _refuse_pairs(pairs, [not set(w) <= names for w in pairs["wrong"]], "wrong holds a name that is no category")
    twice = pairs.duplicated(["image_id", "positive", "negative"], keep=False)
    _refuse_pairs(pairs, twice, "the same pair twice")
    return pairs


def _refuse_pairs(pairs: pd.DataFrame, bad, why: str) -> None:
    bad = pd.Series(list(bad), index=pairs.index, dtype=bool)
    if bad.any():
        raise DataError(f"pairs: {why} ({int(bad.sum())} rows, image_id {pairs.loc[bad, 'image_id'].head(3).tolist()})")
