"""Tables of answers and captions from the files that people have: JSON lines, a JSON list, COCO's annotations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import pandas as pd

from ..core.files import DataError, PathLike, read_jsonl, read_text

_LAST_NUMBER = re.compile(r"(\d+)(?:\.\w+)?$")


def read_records(path: PathLike, columns: tuple[str, ...] = ()) -> list[dict]:
    """Records of a JSON-lines file, of a JSON list, or of ``{"annotations": [...]}``.

    DataError for an empty or malformed file, and for a record that lacks one of ``columns``, by its number.
    """
    records, needed = _records(path, read_text(path)), " and ".join(columns)
    if not records:
        raise DataError(f"{path}: is empty; needed are records with {needed or 'content'}")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: not a JSON object but {str(record)[:40]!r}")
        missing = [c for c in columns if c not in record]
        if missing:
            raise DataError(f"{path}, record {number}: lacks {missing}; each record needs {needed}")
    return records


def _records(path: PathLike, text: str) -> list:
    if not text.strip():
        return []
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise DataError(f"{path}: not valid JSON ({error}); is the file cut short?") from error
        return read_jsonl(path)
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        return data["annotations"]
    return data if isinstance(data, list) else [data]


def read_table(path: PathLike, columns: tuple[str, ...]) -> pd.DataFrame:
    """The records as a table that has these columns."""
    table = pd.DataFrame(read_records(path, columns))
    for column in {"image_id", "question_id", "id"}.intersection(columns):
        bad = [x for x in table[column] if not isinstance(x, (int, str)) or isinstance(x, bool)]
        if bad:
            raise DataError(f"{path}: {column} must be a number or a text, got {str(bad[0])[:40]}")
    return table


def image_numbers(names: Iterable[str]) -> dict[str, int]:
    """An id for each image name: the number it ends in; the rank by name where a name has none or two share one."""
    distinct = sorted(set(names))
    found = [_LAST_NUMBER.search(name) for name in distinct]
    numbers = [int(match.group(1)) for match in found if match]
    if len(set(numbers)) < len(distinct):
        numbers = list(range(1, len(distinct) + 1))
    return dict(zip(distinct, numbers, strict=True))


def match(answers: pd.DataFrame, questions: pd.DataFrame, key: list[str], value: str) -> pd.DataFrame:
    """Questions with the answers' column ``value``, matched by ``key`` whatever the order, in the questions' order.

    DataError naming missing, doubled or unknown keys, and answers that are no text.
    """
    missing = [c for c in (*key, value) if c not in answers.columns]
    if missing:
        raise DataError(f"the table of answers lacks {missing}; needed are {[*key, value]}")
    refuse_doubled(answers, key, "answers")
    refuse_doubled(questions, key, "questions")
    asked, answered = pd.MultiIndex.from_frame(questions[key]), pd.MultiIndex.from_frame(answers[key])
    for what, odd in (("questions have no answer", asked.difference(answered)),
                      ("answers belong to no question", answered.difference(asked))):  # fmt: skip
        if len(odd):
            named = [i[0] if len(i) == 1 else i for i in odd[:3].tolist()]
            raise DataError(
                f"{len(odd)} {what}, e.g. {', '.join(key)} {named}; answer exactly the questions of the file"
            )
    bad = [i for i, text in zip(answers[key[-1]], answers[value], strict=True) if not isinstance(text, str)]
    if bad:
        raise DataError(f"the answers to {bad[:3]} are not text; write '' for an empty one")
    return questions.merge(answers[[*key, value]], on=key, how="left", validate="one_to_one")


def refuse_doubled(table: pd.DataFrame, key: list[str], what: str) -> None:
    """DataError naming keys that stand twice in a table of questions or answers."""
    twice = table.loc[table.duplicated(key), key]
    if len(twice):
        named = [row[0] if len(key) == 1 else tuple(row) for row in twice.head(3).to_numpy().tolist()]
        name = "question ids" if key[-1] == "question_id" else f"{', '.join(key)}"
        raise DataError(f"{len(twice)} {name} are doubled in the {what}, e.g. {named}; keep one of each")
