"""MME's hallucination subset (Fu et al. 2023): two yes/no questions an image about existence, count, position, colour.

Metrics: ``mme_<task>_accuracy`` (questions right), ``mme_<task>_accuracy_plus`` (images with both right),
``mme_<task>`` = 100 times their sum, 0-200 points, ``mme_total`` = the sum over the four tasks, 0-800, and
``unparsed``. The total is a sum of one ratio a task (``alea_lib.core.stats``, ``mme_total|count``): images are
resampled over all tasks at once, but each task is divided by its own images in the resample, so that how many
images of a task were drawn does not move it. That is post-stratification: as good as resampling task by task
but for a term of order 1 / images, and it stays paired when an image serves two tasks.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..core.files import DataError, PathLike, numbered_lines, read_text
from ..core.stats import ratio_items, sum_by_image
from .answers import image_numbers, judged, match, read_table, unparsed
from .questions import TASKS

POINTS = 100  # of one task's accuracy, and of its accuracy+


def read_mme(folder: PathLike) -> pd.DataFrame:
    """Questions of the tasks that ``folder`` holds: question_id, setting (the task), image, text, label, image_id.

    One folder a task; a text file an image with two lines ``question<TAB>Yes|No``, in the folder or in
    ``questions_answers_YN``. ``image`` is the name of the file in ``images`` beside ``folder`` (as in the worlds of
    this study), or the name without ending where there is none, which scoring does not need. The columns are those of
    POPE's questions. DataError for a malformed file.
    """
    folder = Path(folder)
    names = {p.stem: p.name for p in sorted((folder.parent / "images").rglob("*.*"))}
    rows = [row for task in TASKS for row in _read_task(folder / task, task, names)]
    if not rows:
        raise DataError(f"{folder}: no questions in it; needed is one folder a task, named {', '.join(TASKS)}")
    table = pd.DataFrame(rows, columns=["question_id", "setting", "image", "text", "label"])
    return table.assign(image_id=table["image"].map(image_numbers(table["image"])))


def _read_task(folder: Path, task: str, names: dict[str, str]) -> list[tuple]:
    apart, rows = folder / "questions_answers_YN", []
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


def read_mme_answers(path: PathLike, questions: pd.DataFrame) -> pd.DataFrame:
    """Answers (question_id, answer) from records, or from a folder of ``<task>.txt`` as MME's tool reads them (or one
    such file): lines ``image<TAB>question<TAB>truth<TAB>answer``, matched by task, image and question."""
    path = Path(path)
    if not path.is_dir() and path.suffix != ".txt":
        return read_table(path, "question_id", "answer")
    key, rows = ["setting", "image", "text"], []
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    for file in (file for file in files if file.stem in TASKS):
        for number, line in numbered_lines(read_text(file)):
            fields = [field.strip() for field in line.split("\t", 3)]
            if len(fields) != 4:
                raise DataError(f"{file}, line {number}: not of the form image<TAB>question<TAB>truth<TAB>answer")
            rows.append((file.stem, Path(fields[0]).stem, fields[1], fields[3]))
    if not rows:
        raise DataError(f"{path}: no answers in it; needed are files named {', '.join(f'{t}.txt' for t in TASKS)}")
    asked = questions.assign(image=questions["question_id"].str.split("/").str[1])[["question_id", *key]]
    return match(pd.DataFrame(rows, columns=[*key, "answer"]), asked, key, "answer")[["question_id", "answer"]]


def mme(answers: pd.DataFrame, questions: pd.DataFrame, parser: str = "mme") -> pd.DataFrame:
    """Items (image_id, metric, num, den, scorer) of answers (question_id, answer), matched by id whatever the order.

    An answer that the parser reads as neither is wrong. DataError naming missing, doubled or unknown ids.
    """
    found = judged(match(answers, questions, ["question_id"], "answer"), "answer", parser)
    return _items(found.rename(columns={"setting": "task"})).assign(scorer=parser)


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
