"""POPE (Li et al. 2023): yes/no questions about objects, half of them about objects that are not there.

Questions are JSON lines (COCO) or a JSON list (A-OKVQA, GQA) of ``question_id, image, text, label`` (an
``image_id`` of ours is kept); answers are matched to them by question id, never by order. Metrics, each a
ratio of sums clustered by image, with "yes" as the positive class: ``pope_accuracy, pope_precision,
pope_recall, pope_f1, pope_yes`` (share of yes) and ``unparsed`` (share of answers that hold neither word, as
the parser reads them).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from alea_lib.tables import DataError

from .records import image_numbers, match, read_json, read_records, refuse_doubled

POPE_METRICS = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1", "pope_yes", "unparsed")
QUESTION_COLUMNS = ("question_id", "image", "text", "label")
EDITIONS = {3000: "3000", 2910: "2910 (older COCO random file)"}


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


def _mme(answer: str) -> tuple[str | None, bool]:
    """MME's tool: in lower case, "yes" or "no" whole, else "yes", else "no" within the first four characters."""
    text = answer.lower()
    start = text[:4]
    word = "yes" if "yes" in start else "no" if "no" in start else None
    return word, word is not None


def _exact(answer: str) -> tuple[str | None, bool]:
    """AMBER's program: the whole answer is "Yes" or "No", with this capital and no full stop."""
    return (answer.lower(), True) if answer in ("Yes", "No") else (None, False)


PARSERS: dict[str, Callable[[str], tuple[str | None, bool]]] = {
    "official": _official,
    "strict": _strict,
    "substring": _substring,
    "mme": _mme,
    "exact": _exact,
}


def check_parser(parser: str) -> None:
    """DataError when there is no parser of that name."""
    if parser not in PARSERS:
        raise DataError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")


def read_answers(answers: Iterable[str], parser: str) -> pd.DataFrame:
    """Answers as a parser reads them: said (yes, no or None), parsed (whether yes or no was said at all)."""
    check_parser(parser)
    said, parsed = zip(*(PARSERS[parser](text) for text in answers), strict=True)
    return pd.DataFrame({"said": pd.Series(said, dtype=object), "parsed": list(parsed)})


# ---- scoring


@dataclass(frozen=True)
class PopeResult:
    """Scores of one table of answers.

    ``items``: all questions, by image: image_id, metric, num, den, scorer (the parser's name).
    ``by_setting``: the same for each setting ("" when the questions name none).
    ``per_question``: question_id, setting, image_id, label, answer, said (yes, no or None), parsed, correct.
    ``editions``: setting to the edition of its file: "3000", the older COCO random file, else its number of
    questions. Scores of two editions are not comparable.
    """

    items: pd.DataFrame
    by_setting: dict[str, pd.DataFrame]
    per_question: pd.DataFrame
    parser: str
    editions: dict[str, str]


def read_pope(path: str | os.PathLike, images: Mapping[str, int] | str | os.PathLike | None = None) -> pd.DataFrame:
    """Questions of one POPE file: question_id, image, text, label (yes/no), image_id (for clustering).

    The image id is the line's own ``image_id``; else the one that ``images`` (file name to id, or a COCO
    instances file) gives; else the number at the end of the file name (the images' rank by name where that
    does not tell them apart). ``attrs["edition"]`` tells a full file ("3000") from the older random file of
    COCO; other sizes are named by their number. DataError for a malformed file.
    """
    records = read_records(path, QUESTION_COLUMNS)
    questions = pd.DataFrame(records)
    questions["label"] = questions["label"].astype(str).str.strip().str.lower()
    bad = questions.loc[~questions["label"].isin(("yes", "no")), "question_id"]
    if len(bad):
        raise DataError(f"{path}: the labels of questions {bad.head(3).tolist()} are neither yes nor no")
    refuse_doubled(questions, ["question_id"], "questions")
    if "image_id" not in questions:
        questions["image_id"] = _image_ids(questions["image"], images)
    questions.attrs["edition"] = edition(len(questions))
    return questions


def edition(n_questions: int) -> str:
    """Name of a POPE file by its size: 3,000 questions, 2,910 (COCO's older random file), or another number."""
    return EDITIONS.get(n_questions, str(n_questions))


def _image_ids(names: pd.Series, images) -> list[int]:
    if images is not None and not isinstance(images, Mapping):
        images = {image.get("file_name"): image.get("id") for image in read_json(images, dict).get("images", [])}
    if images is None:
        images = image_numbers(names)
    lost = [name for name in names if name not in images]
    if lost:
        raise DataError(
            f"no image id for {len(lost)} questions, e.g. image {lost[0]!r}; give the instances file of the"
            " images that the questions are about"
        )
    return [images[name] for name in names]


def pope(answers: pd.DataFrame, questions: pd.DataFrame, parser: str = "official") -> PopeResult:
    """Score answers (question_id, answer) against questions, matched by id, whatever the order.

    When the questions have a column ``setting`` (ids repeat between settings), the answers need it too. An
    answer that the parser reads as neither counts as wrong, and as not yes. DataError naming missing,
    doubled or unknown question ids.
    """
    check_parser(parser)
    per_question = _match(answers, questions)
    per_question[["said", "parsed"]] = read_answers(per_question["answer"], parser)
    per_question["correct"] = per_question["said"] == per_question["label"]
    by_setting = {str(setting): _items(rows, parser) for setting, rows in per_question.groupby("setting", sort=True)}
    editions = {str(setting): edition(len(rows)) for setting, rows in per_question.groupby("setting", sort=True)}
    return PopeResult(_items(per_question, parser), by_setting, per_question, parser, editions)


def _match(answers: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    key = ["setting", "question_id"] if "setting" in questions else ["question_id"]
    matched = match(answers, questions, key, "answer")
    if "setting" not in matched:
        matched["setting"] = ""
    return matched[["question_id", "setting", "image_id", "label", "answer"]]


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
