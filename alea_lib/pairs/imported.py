"""Pairs that a user brings: JSON lines of an image, a grounded and a hallucinated answer. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ..core.files import DataError, numbered_lines, read_text
from ..datasets.write import Split
from ..metrics.parse import mentions
from .table import PAIR_COLUMNS, check_pairs

TEXTS = ("positive", "negative")


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
