"""A model's answers: read from the files that people have, matched to questions, and read as yes or no."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable

import pandas as pd

from ..core.files import DataError, PathLike, read_jsonl, read_text

_LAST_NUMBER = re.compile(r"(\d+)(?:\.\w+)?$")


def read_records(path: PathLike, columns: tuple[str, ...]) -> list[dict]:
    """Records of a JSON-lines file, of a JSON list, or of ``{"annotations": [...]}``.

    DataError for an empty or malformed file, and for a record that lacks one of ``columns``, by its number.
    """
    records, needed = _records(path, read_text(path)), " and ".join(columns)
    if not records:
        raise DataError(f"{path}: is empty; needed are records with {needed}")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, record {number}: not a JSON object but {str(record)[:40]!r}")
        if missing := [c for c in columns if c not in record]:
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


def read_table(path: PathLike, key: str, value: str) -> pd.DataFrame:
    """The records as a table that has these two columns, of which ``key`` holds numbers or texts."""
    table = pd.DataFrame(read_records(path, (key, value)))
    if bad := [x for x in table[key] if not isinstance(x, (int, str)) or isinstance(x, bool)]:
        raise DataError(f"{path}: {key} must be a number or a text, got {str(bad[0])[:40]}")
    return table


def image_numbers(names: Iterable[str]) -> dict[str, int]:
    """An id for each image name: the number it ends in; the rank by name where a name has none or two share one."""
    distinct = sorted(set(names))
    numbers = [int(match.group(1)) for match in map(_LAST_NUMBER.search, distinct) if match]
    if len(set(numbers)) < len(distinct):
        numbers = list(range(1, len(distinct) + 1))
    return dict(zip(distinct, numbers, strict=True))


def match(answers: pd.DataFrame, questions: pd.DataFrame, key: list[str], value: str) -> pd.DataFrame:
    """Questions with the answers' column ``value``, matched by ``key`` whatever the order, in the questions' order.

    DataError naming missing, doubled or unknown keys, and answers that are no text.
    """
    if missing := [c for c in (*key, value) if c not in answers.columns]:
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
    if bad := [i for i, text in zip(answers[key[-1]], answers[value]) if not isinstance(text, str)]:
        raise DataError(f"the answers to {bad[:3]} are not text; write '' for an empty one")
    return questions.merge(answers[[*key, value]], on=key, how="left")


def refuse_doubled(table: pd.DataFrame, key: list[str], what: str) -> None:
    """DataError naming keys that stand twice in a table of questions or answers."""
    twice = table.loc[table.duplicated(key), key]
    if len(twice):
        named = [row[0] if len(key) == 1 else tuple(row) for row in twice.head(3).to_numpy().tolist()]
        raise DataError(f"{len(twice)} keys ({', '.join(key)}) are doubled in the {what}, e.g. {named}; keep one")


# ---- yes or no: a parser turns an answer into (yes, no or None, whether yes or no was said at all)


def _official(answer: str) -> tuple[str | None, bool]:
    """POPE's program: first sentence up to a full stop; "No", "no" or "not" is no, everything else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    if {"No", "no", "not"} & set(words):
        return "no", True
    return "yes", bool(re.search(r"\byes\b", answer, re.I))


def _strict(answer: str) -> tuple[str | None, bool]:
    """The first word must be yes or no, in any case."""
    first = re.match(r"\W*([^\W_]+)", answer)
    word = first.group(1).lower() if first else ""
    return (word, True) if word in ("yes", "no") else (None, False)


def _substring(answer: str) -> tuple[str | None, bool]:
    """ "yes" anywhere is yes, else "no" anywhere is no ("nothing" and "know" too)."""
    text = answer.lower()
    word = "yes" if "yes" in text else "no" if "no" in text else None
    return word, word is not None


def _mme(answer: str) -> tuple[str | None, bool]:
    """MME's tool: in lower case, "yes" or "no" whole, else "yes", else "no" within the first four characters."""
    return _substring(answer.lower()[:4])


def _exact(answer: str) -> tuple[str | None, bool]:
    """AMBER's program: the whole answer is "Yes" or "No", with this capital and no full stop."""
    return (answer.lower(), True) if answer in ("Yes", "No") else (None, False)


PARSERS: dict[str, Callable[[str], tuple[str | None, bool]]] = {
    "official": _official, "strict": _strict, "substring": _substring, "mme": _mme, "exact": _exact,
}  # fmt: skip


def judged(answered: pd.DataFrame, column: str, parser: str) -> pd.DataFrame:
    """The table with said (yes, no or None), parsed (whether either was said at all) and correct (said == label).

    DataError when there is no parser of that name.
    """
    if parser not in PARSERS:
        raise DataError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")
    said, parsed = zip(*(PARSERS[parser](text) for text in answered[column]), strict=True)
    said = pd.Series(said, index=answered.index, dtype=object)
    return answered.assign(said=said, parsed=list(parsed), correct=said == answered["label"])


def unparsed(rows: pd.DataFrame) -> tuple:
    """The share of answers that hold neither word, as (num, den) of each."""
    return 1.0 - rows["parsed"].to_numpy(float), 1.0


def yes_no_ratios(rows: pd.DataFrame, positive: str) -> dict[str, tuple]:
    """accuracy, precision, recall and f1 of judged answers, as (num, den) of each answer."""
    said, label = ((rows[c] == positive).to_numpy(float) for c in ("said", "label"))
    hit = said * label
    return {
        "accuracy": (rows["correct"].to_numpy(float), 1.0),
        "precision": (hit, said),
        "recall": (hit, label),
        "f1": (2 * hit, said + label),  # = 2TP / (2TP + FP + FN)
    }


def labels(values: pd.Series, ids: pd.Series, where: str) -> pd.Series:
    """Labels in lower case; DataError for one that is neither yes nor no."""
    found = values.astype(str).str.strip().str.lower()
    bad = ids[~found.isin(("yes", "no"))]
    if len(bad):
        raise DataError(f"{where}: the labels of questions {bad.head(3).tolist()} are neither yes nor no")
    return found
