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
    if missing := [c for c in PAIR_COLUMNS if c not in pairs.columns]:
        raise DataError(f"pairs lack the columns {missing}; needed are {list(PAIR_COLUMNS)}")
    if pairs.empty:
        raise DataError("the table of pairs is empty: no image gave a usable pair")
    if not pd.api.types.is_integer_dtype(pairs["image_id"]):
        raise DataError("image_id of the pairs must be integers")
    names = set(load_lexicon().names)
    is_list = pairs["wrong"].map(lambda w: not isinstance(w, str) and isinstance(w, Iterable))
    faults = {
        f"empty {c}": ~pairs[c].map(lambda x: isinstance(x, str) and bool(x.strip()))
        for c in ("image", "positive", "negative", "prompt_negative", "prompt_positive")
    }
    faults |= {
        f"label_source must be in {LABEL_SOURCES}": ~pairs["label_source"].isin(LABEL_SOURCES),
        "positive and negative are the same text": pairs["positive"] == pairs["negative"],
        "wrong must be a list of categories": ~is_list,
        "wrong holds a name that is no category": is_list & ~pairs["wrong"].map(lambda w: set(w) <= names),
        "the same pair twice": pairs.duplicated(["image_id", "positive", "negative"], keep=False),
    }
    for why, bad in faults.items():
        if bad.any():
            images = pairs.loc[bad, "image_id"].head(3).tolist()
            raise DataError(f"pairs: {why} ({int(bad.sum())} rows, image_id {images})")
    return pairs
