"""MME's hallucination subset (Fu et al. 2023): two yes/no questions an image about existence, count, position, colour.

Metrics: ``mme_<task>_accuracy`` (questions right), ``mme_<task>_accuracy_plus`` (images with both right),
``mme_<task>`` = 100 times their sum, 0-200 points, ``mme_total`` = the sum over the four tasks, 0-800, and
``unparsed``. The total is a sum of one ratio a task (``alea_lib.core.stats``, ``mme_total|count``): images are
resampled over all tasks at once, but each task is divided by its own images in the resample, so that how many
images of a task were drawn does not move it. That is post-stratification: as good as resampling task by task
but for a term of order 1 / images, and it stays paired when an image serves two tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..core.files import DataError, PathLike, numbered_lines, read_text
from ..core.stats import ratio_items, sum_by_image
from .records import image_numbers, match, read_table
from .yes_no import check_parser, judged, unparsed

TASKS = ("existence", "count", "position", "color")
OTHER_TASKS = (
    "posters", "celebrity", "scene", "landmark", "artwork", "OCR", "commonsense_reasoning",
    "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
IMAGES = (".jpg", ".jpeg", ".png", ".bmp")
POINTS = 100  # of one task's accuracy, and of its accuracy+


@dataclass(frozen=True)
class MmeResult:
    """``items``: image_id, metric, num, den, scorer (the parser's name). ``per_question``: question_id, task,
    image_id, label, answer, said (yes, no or None), parsed, correct."""

    items: pd.DataFrame
    per_question: pd.DataFrame


def read_mme(folder: PathLike) -> pd.DataFrame:
    """Questions of the tasks that ``folder`` holds: question_id, setting (the task), image, text, label, image_id.

    One folder a task; a text file an image with two lines ``question<TAB>Yes|No``, either beside the image or
    in ``questions_answers_YN``. Images are looked for in the task's folder and in ``images`` beside ``folder`` (as in
    the worlds of this study); ``image`` is the file's name, or its name without ending where there is no image,
    which scoring does not need. The columns are those of POPE's questions. DataError for a malformed file.
    """
    folder = Path(folder)
    names = _image_names(folder.parent / "images")
    rows = [row for task in TASKS for row in _read_task(folder / task, task, names)]
    if not rows:
        raise DataError(f"{folder}: no questions in it; needed is one folder a task, named {', '.join(TASKS)}")
    table = pd.DataFrame(rows, columns=["question_id", "setting", "image", "text", "label"])
    stems = table["image"].map(_stem)
    return table.assign(image_id=stems.map(image_numbers(stems)))


def _image_names(folder: Path) -> dict[str, str]:
    """Name without ending -> file name, of the images in a folder and below."""
    return {p.stem: p.name for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGES} if folder.is_dir() else {}


def _stem(name: str) -> str:
    return name[: name.rindex(".")] if name.lower().endswith(IMAGES) else name


def _read_task(folder: Path, task: str, names: dict[str, str]) -> list[tuple]:
    apart = folder / "questions_answers_YN"
    rows, names = [], names | _image_names(folder)
    for path in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
        lines = [line for _, line in numbered_lines(read_text(path))]
        if len(lines) != 2:
            raise DataError(f"{path}: {len(lines)} questions where MME has two an image")
        for index, line in enumerate(lines, 1):
            text, _, label = (part.strip() for part in line.rpartition("\t"))
            if not text or label.lower() not in ("yes", "no"):
                raise DataError(f"{path}, line {index}: not of the form question<TAB>Yes or question<TAB>No")
            rows.append((f"{task}/{path.stem}/{index}", task, names.get(path.stem, path.stem), text, label.lower()))
    return rows


def read_mme_answers(path: PathLike) -> pd.DataFrame:
    """Answers: a folder of ``<task>.txt`` with lines ``image<TAB>question<TAB>truth<TAB>answer``, as MME's tool
    reads them, one such file, or JSON lines or a JSON list as ``mme`` wants them."""
    path = Path(path)
    if path.is_dir():
        files = [path / f"{task}.txt" for task in TASKS if (path / f"{task}.txt").is_file()]
        if not files:
            raise DataError(f"{path}: no answers in it; needed are files named {', '.join(f'{t}.txt' for t in TASKS)}")
        return pd.concat([_read_tool_file(file) for file in files], ignore_index=True)
    return _read_tool_file(path) if path.suffix == ".txt" else read_table(path, ("answer",))


def _read_tool_file(path: Path) -> pd.DataFrame:
    if path.stem not in TASKS:
        raise DataError(f"{path}: the file's name must be that of its task: {', '.join(TASKS)}")
    rows = []
    for number, line in numbered_lines(read_text(path)):
        fields = line.split("\t", 3)
        if len(fields) != 4:
            raise DataError(f"{path}, line {number}: not of the form image<TAB>question<TAB>truth<TAB>answer")
        rows.append((path.stem, *(f.strip() for f in fields)))
    if not rows:
        raise DataError(f"{path}: is empty")
    return pd.DataFrame(rows, columns=["task", "image", "question", "truth", "answer"])


def mme(answers: pd.DataFrame, questions: pd.DataFrame, parser: str = "mme") -> MmeResult:
    """Score answers against questions, matched by key whatever the order.

    ``answers``: answer and either question_id ("count/000000006040/1"), or task (or setting), image (with or
    without its ending) and question (the text) or question_index (1 or 2). Answers to MME's other tasks are
    left aside. An answer that the parser reads as neither is wrong. DataError naming missing, doubled or
    unknown keys, and an answer whose ``truth`` is not that of the questions.
    """
    check_parser(parser)
    answers = _normalised(answers.rename(columns={"setting": "task"}))
    asked = _normalised(questions.assign(task=questions["setting"], question=questions["text"]))
    asked = asked.assign(question_index=asked.groupby(["task", "image"]).cumcount() + 1)
    key = _key(answers)
    found = judged(match(answers, asked, key, "answer"), "answer", parser)
    if "truth" in answers:
        _check_truth(answers.merge(asked[[*key, "label"]], on=key), key)
    columns = ["question_id", "task", "image_id", "label", "answer", "said", "parsed", "correct"]
    return MmeResult(_items(found).assign(scorer=parser), found[columns])


def _normalised(table: pd.DataFrame) -> pd.DataFrame:
    """Without MME's other tasks, images without their ending, questions without blanks around them."""
    if "task" in table:
        table = table[~table["task"].isin(OTHER_TASKS)]
    if "image" in table:
        table = table.assign(image=[_stem(str(name)) for name in table["image"]])
    if "question" in table:
        table = table.assign(question=table["question"].astype(str).str.strip())
    return table


def _key(answers: pd.DataFrame) -> list[str]:
    for key in (["question_id"], ["task", "image", "question"], ["task", "image", "question_index"]):
        if all(column in answers for column in key):
            return key
    raise DataError(
        f"the answers have the columns {list(answers.columns)}; needed are answer and question_id, or task, image"
        " and question (or question_index, 1 or 2)"
    )


def _check_truth(both: pd.DataFrame, key: list[str]) -> None:
    odd = both.loc[both["truth"].astype(str).str.strip().str.lower() != both["label"], key]
    if len(odd):
        raise DataError(
            f"{len(odd)} answers say another truth than the questions, e.g. {tuple(odd.iloc[0])}; these are answers"
            " to other questions"
        )


def _items(found: pd.DataFrame) -> pd.DataFrame:
    pairs = found.groupby(["task", "image_id"], sort=False)["correct"].agg(["sum", "size"]).reset_index()
    odd = pairs[pairs["size"] != 2].head(3)
    if len(odd):
        raise DataError(f"MME has two questions an image; another number (size) have {odd.to_dict('records')}")
    parts = [ratio_items(found["image_id"], {"unparsed": unparsed(found)})]
    tasks = [task for task in TASKS if task in set(pairs["task"])]
    for task in tasks:
        own = pairs[pairs["task"] == task]
        right, both = own["sum"].to_numpy(float), (own["sum"] == 2).to_numpy(float)
        points = POINTS * (right / 2 + both)
        ratios = {
            f"mme_{task}": (points, 1.0),
            f"mme_{task}_accuracy": (right, 2.0),
            f"mme_{task}_accuracy_plus": (both, 1.0),
        }
        if len(tasks) == len(TASKS):
            ratios[f"mme_total|{task}"] = (points, 1.0)
        parts.append(ratio_items(own["image_id"], ratios))
    return sum_by_image(pd.concat(parts, ignore_index=True))
