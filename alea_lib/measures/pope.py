"""POPE (Li et al. 2023): yes/no questions about objects, half of them about objects that are not there.

Questions are JSON lines ``question_id, image, text, label`` (an ``image_id`` of ours is kept); answers are
matched to them by question id, never by order. Metrics, each a ratio of sums clustered by image, with "yes"
as the positive class: ``pope_accuracy, pope_precision, pope_recall, pope_f1, pope_yes`` (share of yes) and
``unparsed`` (share of answers that hold neither word, as the parser reads them).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from alea_lib.tables import DataError, read_jsonl

POPE_METRICS = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes", "unparsed")
QUESTION_COLUMNS = ("question_id", "image", "text", "label")
_LAST_NUMBER = re.compile(r"(\d+)\.\w+$")


# ---- parsers: an answer to (yes, no or None, whether yes or no was said at all)


def _official(answer: str) -> tuple[str | None, bool]:
    """First sentence up to a full stop; "No", "no" or "not" is no, everything else is yes."""
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


PARSERS: dict[str, Callable[[str], tuple[str | None, bool]]] = {
    "official": _official,
    "strict": _strict,
    "substring": _substring,
}


# ---- scoring


@dataclass(frozen=True)
class PopeResult:
    """Scores of one table of answers.

    ``items``: all questions, by image: image_id, metric, num, den, scorer (the parser's name).
    ``by_setting``: the same for each setting ("" when the questions name none).
    ``per_question``: question_id, setting, image_id, label, answer, said (yes, no or None), parsed, correct.
    """

    items: pd.DataFrame
    by_setting: dict[str, pd.DataFrame]
    per_question: pd.DataFrame
    parser: str


def read_pope(path: str | os.PathLike, images: Mapping[str, int] | str | os.PathLike | None = None) -> pd.DataFrame:
    """Questions of one POPE file: question_id, image, text, label (yes/no), image_id (for clustering).

    The image id is the line's own ``image_id``; else the one that ``images`` (file name to id, or a COCO
    instances file) gives; else the number at the end of the file name. ``attrs["edition"]`` tells a full
    file ("3000") from the older random file of COCO ("2910"); other sizes are named by their number.
    DataError for a malformed file.
    """
    records = read_jsonl(path)
    if not records:
        raise DataError(f"{path}: no questions in it")
    for number, record in enumerate(records, 1):
        missing = [c for c in QUESTION_COLUMNS if c not in record]
        if missing:
            raise DataError(f"{path}, question {number}: lacks {missing}; this is not a POPE file")
    questions = pd.DataFrame(records)
    questions["label"] = questions["label"].astype(str).str.strip().str.lower()
    bad = questions.loc[~questions["label"].isin(("yes", "no")), "question_id"]
    if len(bad):
        raise DataError(f"{path}: the labels of questions {bad.head(3).tolist()} are neither yes nor no")
    _refuse_doubled(questions, "questions")
    if "image_id" not in questions:
        questions["image_id"] = _image_ids(questions["image"], images)
    questions.attrs["edition"] = str(len(questions))
    return questions


def _image_ids(names: pd.Series, images) -> list[int]:
    if images is not None and not isinstance(images, Mapping):
        data = json.loads(Path(images).read_bytes())
        images = {image["file_name"]: image["id"] for image in data["images"]}
    ids, lost = [], []
    for name in names:
        number = _LAST_NUMBER.search(name)
        if images is not None and name in images:
            ids.append(images[name])
        elif images is None and number:
            ids.append(int(number.group(1)))
        else:
            lost.append(name)
    if lost:
        raise DataError(
            f"no image id for {len(lost)} questions, e.g. image {lost[0]!r}; give the instances file of the"
            " images that the questions are about"
        )
    return ids


def pope(answers: pd.DataFrame, questions: pd.DataFrame, parser: str = "official") -> PopeResult:
    """Score answers (question_id, answer) against questions, matched by id, whatever the order.

    When the questions have a column ``setting`` (ids repeat between settings), the answers need it too. An
    answer that the parser reads as neither counts as wrong, and as not yes. DataError naming missing,
    doubled or unknown question ids.
    """
    if parser not in PARSERS:
        raise DataError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")
    per_question = _match(answers, questions)
    said, parsed = zip(*(PARSERS[parser](text) for text in per_question["answer"]), strict=True)
    per_question["said"] = pd.Series(said, dtype=object)
    per_question["parsed"] = list(parsed)
    per_question["correct"] = per_question["said"] == per_question["label"]
    by_setting = {str(setting): _items(rows, parser) for setting, rows in per_question.groupby("setting", sort=True)}
    return PopeResult(_items(per_question, parser), by_setting, per_question, parser)


def _match(answers: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    key = ["setting", "question_id"] if "setting" in questions else ["question_id"]
    missing = [c for c in (*key, "answer") if c not in answers.columns]
    if missing:
        raise DataError(f"the table of answers lacks {missing}; needed are {[*key, 'answer']}")
    _refuse_doubled(answers, "answers")
    _refuse_doubled(questions, "questions")
    asked, answered = pd.MultiIndex.from_frame(questions[key]), pd.MultiIndex.from_frame(answers[key])
    for what, odd in (("questions have no answer", asked.difference(answered)),
                      ("answers belong to no question", answered.difference(asked))):  # fmt: skip
        if len(odd):
            named = [i[0] if len(i) == 1 else i for i in odd[:3].tolist()]
            raise DataError(f"{len(odd)} {what}, e.g. question_id {named}; answer exactly the questions of the file")
    bad = [i for i, text in zip(answers["question_id"], answers["answer"], strict=True) if not isinstance(text, str)]
    if bad:
        raise DataError(f"the answers to {bad[:3]} are not text; write '' for an empty one")
    matched = questions.merge(answers[[*key, "answer"]], on=key, how="left", validate="one_to_one")
    if "setting" not in matched:
        matched["setting"] = ""
    return matched[["question_id", "setting", "image_id", "label", "answer"]]


def _refuse_doubled(table: pd.DataFrame, what: str) -> None:
    key = [c for c in ("setting", "question_id") if c in table]
    twice = table.loc[table.duplicated(key), "question_id"]
    if len(twice):
        raise DataError(f"{len(twice)} question ids are doubled in the {what}, e.g. {twice.head(3).tolist()}")


def _items(rows: pd.DataFrame, parser: str) -> pd.DataFrame:
    yes, label = (rows["said"] == "yes").to_numpy(float), (rows["label"] == "yes").to_numpy(float)
    right, one = rows["correct"].to_numpy(float), np.ones(len(rows))
    hit = yes * label
    ratios = {
        "pope_accuracy": (right, one),
        "pope_precision": (hit, yes),
        "pope_recall": (hit, label),
        "pope_f1": (2 * hit, yes + label),  # = 2TP / (2TP + FP + FN)
        "pope_yes": (yes, one),
        "unparsed": (1 - rows["parsed"].to_numpy(float), one),
    }
    parts = [
        pd.DataFrame({"image_id": rows["image_id"].to_numpy(), "metric": m, "num": num, "den": den})
        for m, (num, den) in ratios.items()
    ]
    items = pd.concat(parts).groupby(["metric", "image_id"], sort=False, as_index=False).sum()
    return items[["image_id", "metric", "num", "den"]].assign(scorer=parser)
