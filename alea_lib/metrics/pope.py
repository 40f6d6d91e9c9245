"""POPE (Li et al. 2023): yes/no questions about objects, half of them about objects that are not there.

Questions are JSON lines (COCO) or a JSON list (A-OKVQA, GQA) of ``question_id, image, text, label`` (an
``image_id`` of ours is kept); answers are matched to them by question id, never by order. Metrics, each a
ratio of sums clustered by image, with "yes" as the positive class: ``pope_accuracy, pope_precision,
pope_recall, pope_f1, pope_yes`` (share of yes) and ``unparsed`` (share of answers that hold neither word, as
the parser reads them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from ..core.files import DataError, PathLike, read_json
from ..core.stats import ratio_items, sum_by_image
from .records import image_numbers, match, read_records, refuse_doubled
from .yes_no import check_parser, judged, labels, unparsed, yes_no_ratios

SETTINGS = ("random", "popular", "adversarial")
QUESTION_COLUMNS = ("question_id", "image", "text", "label")
EDITIONS = {3000: "3000", 2910: "2910 (older COCO random file)"}


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


def read_pope(path: PathLike, images: Mapping[str, int] | PathLike | None = None) -> pd.DataFrame:
    """Questions of one POPE file: question_id, image, text, label (yes/no), image_id (for clustering).

    The image id is the line's own ``image_id``; else the one that ``images`` (file name to id, or a COCO
    instances file) gives; else the number at the end of the file name (the images' rank by name where that
    does not tell them apart). ``attrs["edition"]`` tells a full file ("3000") from the older random file of
    COCO; other sizes are named by their number. Scores of two editions are not comparable. DataError for a
    malformed file.
    """
    questions = pd.DataFrame(read_records(path, QUESTION_COLUMNS))
    questions["label"] = labels(questions["label"], questions["question_id"], str(path))
    refuse_doubled(questions, ["question_id"], "questions")
    if "image_id" not in questions:
        questions["image_id"] = _image_ids(questions["image"], images)
    questions.attrs["edition"] = EDITIONS.get(len(questions), str(len(questions)))
    return questions


def _image_ids(names: pd.Series, images) -> list[int]:
    if images is None:
        images = image_numbers(names)
    elif not isinstance(images, Mapping):
        images = {image.get("file_name"): image.get("id") for image in read_json(images).get("images", [])}
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
    key = ["setting", "question_id"] if "setting" in questions else ["question_id"]
    found = match(answers, questions, key, "answer")
    if "setting" not in found:
        found["setting"] = ""
    found = judged(found[["question_id", "setting", "image_id", "label", "answer"]], "answer", parser)
    by_setting = {str(setting): _items(rows, parser) for setting, rows in found.groupby("setting", sort=True)}
    return PopeResult(_items(found, parser), by_setting, found)


def _items(rows: pd.DataFrame, parser: str) -> pd.DataFrame:
    ratios = {f"pope_{metric}": ratio for metric, ratio in yes_no_ratios(rows, "yes").items()}
    ratios |= {"pope_yes": (rows["said"] == "yes", 1.0), "unparsed": unparsed(rows)}
    return sum_by_image(ratio_items(rows["image_id"], ratios)).assign(scorer=parser)
