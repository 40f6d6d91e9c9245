"""Make the hallucination subset of MME (Fu et al. 2023) from any world that has COCO's files, in MME's own format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.files import DataError, PathLike, read_json, write_text
from .lexicon import load_lexicon
from .pope_make import existence_question
from .truth import Truth

COLUMNS = 3  # left, middle, right
Asked = tuple[str, str]  # the question whose answer is yes, the one whose answer is no


def count_question(category: str) -> str:
    """MME counts; here whether there are two of a kind, which is true when exactly two are marked."""
    return f"Are there two {load_lexicon().plural(category)} in the image?"


@dataclass(frozen=True)
class Wording:
    """How each fact is asked for. ``side(category, 0 | 1 | 2)`` and ``colour(name)`` exist only in worlds whose
    annotations say where things stand without doubt, and what colour the ground has: None leaves them out."""

    existence: Callable[[str], str] = existence_question
    count: Callable[[str], str] = count_question
    side: Callable[[str, int], str] | None = None
    colour: Callable[[str], str] | None = None


PLAIN = Wording()


@dataclass(frozen=True)
class Facts:
    """What the annotations say of one image: how often each category is marked (crowds apart), the column of
    what is there once, the colour of the ground ("" when the file does not tell)."""

    image_id: int
    file_name: str
    counts: dict[str, int]
    columns: dict[str, int]
    colour: str


def read_facts(instances_json: PathLike) -> list[Facts]:
    """The facts of every image of a COCO instances file, by id."""
    data = read_json(instances_json)
    try:
        names = {c["id"]: c["name"] for c in data["categories"]}
        boxes: dict[int, list] = {image["id"]: [] for image in data["images"]}
        for a in data["annotations"]:
            boxes[a["image_id"]].append((names[a["category_id"]], a.get("bbox"), a.get("iscrowd", 0)))
        return [_facts(image, boxes[image["id"]]) for image in sorted(data["images"], key=lambda i: i["id"])]
    except (KeyError, TypeError) as error:
        raise DataError(f"{instances_json}: an image or annotation lacks {error}; not a COCO instances file") from error


def _facts(image: dict, marked: list[tuple]) -> Facts:
    crowds = {name for name, _, crowd in marked if crowd}
    counts = Counter(name for name, _, _ in marked if name not in crowds)
    columns = {}
    for name, box, _ in marked:
        if counts[name] == 1 and box and image.get("width"):
            columns[name] = min(int((box[0] + box[2] / 2) * COLUMNS / image["width"]), COLUMNS - 1)
    return Facts(image["id"], image.get("file_name", ""), dict(counts), columns, image.get("background", ""))


@dataclass(frozen=True)
class Askable:
    """What questions are made from. ``facts``: those of the images with ground truth. ``objects``: the categories that
    may be asked for. ``colours``: those of the ground that occur, in alphabetical order."""

    truth: Truth
    facts: list[Facts]
    objects: list[str]
    colours: list[str]
    wording: Wording


def read_askable(truth: Truth, instances_json: PathLike, objects: Sequence[str] | None, wording: Wording) -> Askable:
    """The facts of a COCO instances file, as far as there is ground truth; ``objects``: None for all that occur."""
    facts = [f for f in read_facts(instances_json) if f.image_id in truth]
    objects = [c for c in truth.categories if objects is None or c in set(objects)]
    return Askable(truth, facts, objects, sorted({f.colour for f in facts} - {""}), wording)


def existence(world: Askable, facts: Facts, rng) -> Asked | None:
    """An object that is marked, and one that neither an instance nor a reference caption shows."""
    there = [c for c in world.objects if c in facts.counts]
    absent = [c for c in world.objects if c not in world.truth[facts.image_id]]
    return _two(world.wording.existence, there, absent, rng)


def count(world: Askable, facts: Facts, rng) -> Asked | None:
    """A category that is there twice, and one that is there once."""
    twice, once = ([c for c in world.objects if facts.counts.get(c) == n] for n in (2, 1))
    return _two(world.wording.count, twice, once, rng)


def side(world: Askable, facts: Facts, rng) -> Asked | None:
    """The true and a false side of a category that is there once."""
    single = [c for c in world.objects if c in facts.columns]
    if not single or world.wording.side is None:
        return None
    chosen = _pick(rng, single)
    true = facts.columns[chosen]
    false = _pick(rng, [c for c in range(COLUMNS) if c != true])
    return world.wording.side(chosen, true), world.wording.side(chosen, false)


def colour(world: Askable, facts: Facts, rng) -> Asked | None:
    """The ground's colour, and another one of the world."""
    others = [c for c in world.colours if c != facts.colour]
    if not facts.colour or not others or world.wording.colour is None:
        return None
    return world.wording.colour(facts.colour), world.wording.colour(_pick(rng, others))


def _two(question: Callable[[str], str], right: Sequence[str], wrong: Sequence[str], rng) -> Asked | None:
    return (question(_pick(rng, right)), question(_pick(rng, wrong))) if right and wrong else None


def _pick(rng: np.random.Generator, values: Sequence):
    return values[int(rng.integers(len(values)))]


QUESTIONS = {"existence": existence, "count": count, "position": side, "color": colour}  # by MME's tasks


def make_mme(
    truth: Truth,
    instances_json: PathLike,
    n_images: int = 60,
    seed: int = 0,
    objects: Sequence[str] | None = None,
    wording: Wording = PLAIN,
) -> pd.DataFrame:
    """Two questions an image, yes then no: task, image, text, label, image_id; at most ``n_images`` a task.

    Existence and count need the annotations alone; position and colour also their ``wording``. ``objects``:
    the categories that may be asked for (default: all that occur). A task that no image allows is left out;
    DataError when none is left.
    """
    world = read_askable(truth, instances_json, objects, wording)
    rows = []
    for number, (task, ask) in enumerate(QUESTIONS.items()):
        asked = [(f, ask(world, f, np.random.default_rng([seed, number, f.image_id]))) for f in world.facts]
        asked = [(f, pair) for f, pair in asked if pair is not None]
        chosen = np.random.default_rng([seed, number]).permutation(len(asked))[:n_images]
        for k in sorted(chosen):  # by image id, as the facts are
            f, pair = asked[k]
            rows += [(task, f.file_name, text, label, f.image_id) for text, label in zip(pair, ("yes", "no"))]
    if not rows:
        raise DataError(f"{instances_json}: no image allows a question; are there objects in it?")
    return pd.DataFrame(rows, columns=["task", "image", "text", "label", "image_id"])


def write_mme(questions: pd.DataFrame, folder: PathLike) -> None:
    """Write questions in MME's format: one folder a task, a text file an image, named as the image."""
    for (task, image), pair in questions.groupby(["task", "image"], sort=False):
        lines = [f"{text}\t{label.capitalize()}\n" for text, label in zip(pair["text"], pair["label"])]
        write_text(Path(folder) / task / f"{Path(image).stem}.txt", "".join(lines))
