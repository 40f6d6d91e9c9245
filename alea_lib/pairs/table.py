"""The schema of a table of pairs, and pairs that a user brings as JSON lines. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ..core.files import DataError, numbered_lines, read_text
from ..datasets.world import Split
from ..metrics.lexicon import load_lexicon
from ..metrics.parse import mentions

TEXTS = ("positive", "negative")

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


def import_pairs(path: Path | str, split: Split) -> pd.DataFrame:
    """Pairs from a file, one JSON object a line, in the columns of ``activate``; ``label_source`` is ``import``.

    Each line: ``image_id`` or ``file`` (a file name), ``positive``, ``negative``, and where known ``wrong``, the
    categories that the negative names though absent (else: those that it names and the positive does not).
    DataError names line and field of the first mistake.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of pairs")
    by_id = dict(zip(split.ids, (f.name for f in split.files)))
    lines = numbered_lines(read_text(path))
    rows = [_row(line, f"{path.name}, line {number}", by_id, split.name) for number, line in lines]
    return check_pairs(pd.DataFrame(rows, columns=list(PAIR_COLUMNS)))


def _row(line: str, where: str, by_id: dict[int, str], split: str) -> dict:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(given, dict):
        raise DataError(f"{where}: must be an object with image_id or file, positive and negative")
    field = "image_id" if "image_id" in given else "file"
    image_id = given.get(field)
    if field == "file":
        image_id = next((i for i, name in by_id.items() if name == given.get("file")), None)
    if image_id not in by_id:
        raise DataError(f"{where}: {field} {given.get(field)!r} is no image of split {split!r}")
    for field in TEXTS:
        if not isinstance(given.get(field), str) or not given[field].strip():
            raise DataError(f"{where}: {field} must be a text that is not empty, it is {given.get(field)!r}")
    texts = {t: given[t].strip() for t in TEXTS}
    named = {t: {m.category for m in mentions(given[t])} for t in TEXTS}
    wrong = given.get("wrong", sorted(named["negative"] - named["positive"]))
    if not isinstance(wrong, list) or not wrong or not set(map(str, wrong)) <= named["negative"]:
        raise DataError(f"{where}: wrong must list categories of COCO that the negative names, it is {wrong!r}")
    row = {"image_id": image_id, "image": by_id[image_id], **texts, "wrong": wrong}
    return row | {"label_source": "import", "prompt_negative": "given", "prompt_positive": "given"}
