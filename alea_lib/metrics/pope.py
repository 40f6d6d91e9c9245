"""POPE (Li et al. 2023): yes/no questions about objects, half of them about objects that are not there.

Questions are JSON lines (COCO) or a JSON list (A-OKVQA, GQA) of ``question_id, image, text, label`` (an
``image_id`` of ours is kept); answers are matched to them by question id, never by order. Metrics, each a
ratio of sums clustered by image, with "yes" as the positive class: ``pope_accuracy, pope_precision,
pope_recall, pope_f1, pope_yes`` (share of yes) and ``unparsed`` (share of answers that hold neither word, as
the parser reads them).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ..core.files import PathLike
from ..core.stats import ratio_items, sum_by_image
from .answers import image_numbers, judged, labels, match, read_records, refuse_doubled, unparsed, yes_no_ratios

SETTINGS = ("random", "popular", "adversarial")
QUESTION_COLUMNS = ("question_id", "image", "text", "label")
EDITIONS = {3000: "3000", 2910: "2910 (older COCO random file)"}


@dataclass(frozen=True)
class PopeResult:
    """Scores of one table of answers.

    ``items``: all questions, by image: image_id, metric, num, den, scorer (the parser's name).
    ``by_setting``: the same for each setting ("" when the questions name none).
    """

    items: pd.DataFrame
    by_setting: dict[str, pd.DataFrame]


def read_pope(path: PathLike) -> pd.DataFrame:
    """Questions of one POPE file: question_id, image, text, label (yes/no), image_id (for clustering).

    The image id is the line's own ``image_id``, else the number at the end of the file name (the images' rank by
    name where that does not tell them apart). ``attrs["edition"]`` tells a full file ("3000") from the older random
    file of COCO; other sizes are named by their number. Scores of two editions are not comparable. DataError for a
    malformed file.
    """
    questions = pd.DataFrame(read_records(path, QUESTION_COLUMNS))
    questions["label"] = labels(questions["label"], questions["question_id"], str(path))
    refuse_doubled(questions, ["question_id"], "questions")
    if "image_id" not in questions:
        questions["image_id"] = questions["image"].map(image_numbers(questions["image"]))
    questions.attrs["edition"] = EDITIONS.get(len(questions), str(len(questions)))
    return questions


def pope(answers: pd.DataFrame, questions: pd.DataFrame, parser: str = "official") -> PopeResult:
    """Score answers (question_id, answer) against questions, matched by id, whatever the order.

    When the questions have a column ``setting`` (ids repeat between settings), the answers need it too. An
    answer that the parser reads as neither counts as wrong, and as not yes. DataError naming missing,
    doubled or unknown question ids.
    """
    key = ["setting", "question_id"] if "setting" in questions else ["question_id"]
    found = match(answers, questions, key, "answer")
    found = judged(found if "setting" in found else found.assign(setting=""), "answer", parser)
    by_setting = {str(setting): _items(rows, parser) for setting, rows in found.groupby("setting")}
    return PopeResult(_items(found, parser), by_setting)


def _items(rows: pd.DataFrame, parser: str) -> pd.DataFrame:
    ratios = {f"pope_{metric}": ratio for metric, ratio in yes_no_ratios(rows, "yes").items()}
    ratios |= {"pope_yes": (rows["said"] == "yes", 1.0), "unparsed": unparsed(rows)}
    return sum_by_image(ratio_items(rows["image_id"], ratios)).assign(scorer=parser)
