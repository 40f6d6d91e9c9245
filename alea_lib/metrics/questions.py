"""Make questions as of POPE, MME's hallucination subset and AMBER, in their formats, from a world with COCO's files.

The world's annotations must be complete: what an image lacks is asked about as absent. ``Wording`` says how.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.files import DataError, PathLike, read_json, write_json, write_text
from .lexicon import load_lexicon
from .truth import Truth

TASKS = ("existence", "count", "position", "color")  # of MME's hallucination subset

COLUMNS = 3  # left, middle, right
HALF = 3  # objects of an image that POPE asks about with the answer yes, and with the answer no
DESCRIBE = "Describe this image."
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Wording:
    """How each fact is asked for; of ``side`` the arguments are the category and its column 0, 1 or 2."""

    existence: Callable[[str], str]
    count: Callable[[str], str]
    side: Callable[[str, int], str]
    colour: Callable[[str], str]


# ---- POPE


def make_pope(truth: Truth, setting: str, n_images: int, seed: int, question: Callable[[str], str]) -> pd.DataFrame:
    """Six questions an image, yes and no in turn: question_id, image, text, label, image_id, category.

    Asked for are objects with an instance, and objects that neither an instance nor a reference caption shows: drawn
    at ``random``, the most frequent of the world (``popular``), or those that most often share an image with what
    is there (``adversarial``). Images and positives depend on the seed alone, so the three settings share them.
    DataError when fewer than ``n_images`` images have enough objects.
    """
    names, together = cooccurrence(truth.instances)
    rng, rows = np.random.default_rng(seed), []
    for image_id in _choose_images(truth, set(names), n_images, rng):
        own = np.random.default_rng([seed, image_id])  # an image's positives do not depend on the other images
        present = [n for n in names if n in truth.instances[image_id]]
        absent = [n for n in names if n not in truth[image_id]]
        positive = [present[i] for i in own.permutation(len(present))[:HALF]]
        negative = _negatives(setting, absent, own, names, together, truth.instances[image_id])
        for pair in zip(positive, negative, strict=True):
            rows += [(image_id, category, label) for category, label in zip(pair, YES_NO)]
    table = pd.DataFrame(rows, columns=["image_id", "category", "label"])
    table["question_id"] = range(1, len(rows) + 1)
    table["image"] = table["image_id"].map(truth.file_names)
    table["text"] = table["category"].map(question)
    return table[["question_id", "image", "text", "label", "image_id", "category"]]


def cooccurrence(objects: Mapping[int, frozenset[str]]) -> tuple[list[str], np.ndarray]:
    """(names, counts [names, names]): images that hold both; on the diagonal, images of each category."""
    everything = frozenset().union(*objects.values())
    names = [n for n in load_lexicon().names if n in everything]
    present = np.array([[name in there for name in names] for there in objects.values()], dtype=int)
    return names, present.T @ present


def _choose_images(truth: Truth, names: set[str], n_images: int, rng) -> list[int]:
    fit = [i for i, there in sorted(truth.instances.items()) if len(there) >= HALF and len(names - truth[i]) >= HALF]
    if len(fit) < n_images:
        raise DataError(f"only {len(fit)} images hold and lack {HALF} askable objects, {n_images} are wanted")
    return sorted(fit[i] for i in rng.permutation(len(fit))[:n_images])


def _negatives(setting, absent, rng, names, together, present) -> list[str]:
    """The absent categories that the setting asks for, most tempting first; ties go by COCO's order."""
    if setting == "random":
        return [absent[i] for i in rng.permutation(len(absent))[:HALF]]
    index = {name: i for i, name in enumerate(names)}
    if setting == "popular":
        score = {n: together[index[n], index[n]] for n in absent}
    else:
        score = {n: together[index[n], [index[p] for p in present]].sum() for n in absent}
    return sorted(absent, key=lambda n: -score[n])[:HALF]


# ---- what MME and AMBER ask about


@dataclass(frozen=True)
class Facts:
    """What the annotations say of one image: how often each category is marked, the column of what is there once,
    the colour of the ground."""

    image_id: int
    file_name: str
    counts: Counter[str]
    columns: dict[str, int]
    colour: str


class Askable:
    """The facts of every image of a COCO instances file, by id, and pairs of questions about them.

    A pair is the question whose answer is yes and the one whose answer is no; None where the image allows none. The
    methods for it are named as MME's tasks.
    """

    def __init__(self, truth: Truth, instances_json: PathLike, wording: Wording):
        self.truth, self.wording = truth, wording
        data = read_json(instances_json)
        names = {c["id"]: c["name"] for c in data["categories"]}
        boxes: dict[int, list] = {image["id"]: [] for image in data["images"]}
        for a in data["annotations"]:
            boxes[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        self.facts = [_facts(image, boxes[image["id"]]) for image in sorted(data["images"], key=lambda i: i["id"])]
        self.colours = sorted({f.colour for f in self.facts})

    def absent(self, f: Facts) -> list[str]:
        """The categories of the world that neither an instance nor a reference caption shows."""
        return [c for c in self.truth.categories if c not in self.truth[f.image_id]]

    def existence(self, f: Facts, rng) -> tuple[str, str] | None:
        """An object that is marked, and one that is not there."""
        marked = [c for c in self.truth.categories if c in f.counts]
        return _two(self.wording.existence, marked, self.absent(f), rng)

    def count(self, f: Facts, rng) -> tuple[str, str] | None:
        """A category that is there twice, and one that is there once."""
        twice, once = ([c for c in self.truth.categories if f.counts[c] == n] for n in (2, 1))
        return _two(self.wording.count, twice, once, rng)

    def position(self, f: Facts, rng) -> tuple[str, str] | None:
        """The true and a false side of a category that is there once."""
        single = [c for c in self.truth.categories if c in f.columns]
        if not single:
            return None
        chosen = _pick(rng, single)
        false = _pick(rng, [c for c in range(COLUMNS) if c != f.columns[chosen]])
        return self.wording.side(chosen, f.columns[chosen]), self.wording.side(chosen, false)

    def color(self, f: Facts, rng) -> tuple[str, str] | None:
        """The ground's colour, and another one of the world."""
        others = [c for c in self.colours if c != f.colour]
        return (self.wording.colour(f.colour), self.wording.colour(_pick(rng, others))) if others else None


def _facts(image: dict, marked: list[tuple]) -> Facts:
    counts = Counter(name for name, _ in marked)
    columns = {
        name: min(int((x + width / 2) * COLUMNS / image["width"]), COLUMNS - 1)
        for name, (x, _, width, _) in marked
        if counts[name] == 1
    }
    return Facts(image["id"], image["file_name"], counts, columns, image["background"])


def _two(question: Callable[[str], str], right: Sequence[str], wrong: Sequence[str], rng) -> tuple[str, str] | None:
    return (question(_pick(rng, right)), question(_pick(rng, wrong))) if right and wrong else None


def _pick(rng: np.random.Generator, values: Sequence):
    return values[int(rng.integers(len(values)))]


def make_mme(truth: Truth, instances_json: PathLike, n_images: int, seed: int, wording: Wording) -> pd.DataFrame:
    """Two questions an image, yes then no: task, image, text, label, image_id; at most ``n_images`` a task."""
    world, rows = Askable(truth, instances_json, wording), []
    for number, task in enumerate(TASKS):
        ask = getattr(world, task)
        asked = [(f, ask(f, np.random.default_rng([seed, number, f.image_id]))) for f in world.facts]
        asked = [(f, pair) for f, pair in asked if pair is not None]
        for k in sorted(np.random.default_rng([seed, number]).permutation(len(asked))[:n_images]):
            f, pair = asked[k]
            rows += [(task, f.file_name, text, label, f.image_id) for text, label in zip(pair, YES_NO)]
    return pd.DataFrame(rows, columns=["task", "image", "text", "label", "image_id"])


def write_mme(questions: pd.DataFrame, folder: PathLike) -> None:
    """Write questions in MME's format: one folder a task, a text file an image, named as the image."""
    for (task, image), pair in questions.groupby(["task", "image"], sort=False):
        lines = [f"{text}\t{label.capitalize()}\n" for text, label in zip(pair["text"], pair["label"])]
        write_text(Path(folder) / task / f"{Path(image).stem}.txt", "".join(lines))


# ---- AMBER


def make_amber(
    truth: Truth,
    instances_json: PathLike,
    companions: Mapping[str, str],
    n_images: int,
    seed: int,
    objects: Sequence[str],
    wording: Wording,
) -> dict[str, list | dict]:
    """The content of AMBER's files by name, of at most ``n_images`` images drawn by the seed.

    ``hallu`` of a description: the absent companions of what is there (``companions``: the planted graph). Questions:
    existence (one object that is there, and each expected one, or another absent one where none is) and attribute
    (count, colour, side; yes and no in turn), none about contact between objects (AMBER's relation). The vocabulary
    is ``objects`` with the lexicon's words for them.
    """
    world = Askable(truth, instances_json, wording)
    chosen = sorted(np.random.default_rng([seed, 9]).permutation(len(world.facts))[:n_images].tolist())
    generative, asked = [], []
    for f in (world.facts[k] for k in chosen):
        there = [c for c in truth.categories if c in truth[f.image_id]]
        called = dict.fromkeys(companions[c] for c in there if c in companions)
        expected = [c for c in called if c not in truth[f.image_id]]
        generative.append((f.file_name, DESCRIBE, {"type": "generative", "truth": there, "hallu": expected}))
        asked += _amber_questions(world, f, there, expected, seed)
    hallu = [c for *_, note in generative for c in note["hallu"]]
    return _amber_files(generative, asked, list(dict.fromkeys([*truth.categories, *objects, *hallu])))


def _amber_questions(world: Askable, f: Facts, there: list[str], expected: list[str], seed: int) -> list[tuple]:
    """(image, question, annotation) of one image."""
    rng = np.random.default_rng([seed, 9, f.image_id])
    absent = expected or rng.permutation(world.absent(f))[:1].tolist()
    present = rng.permutation(there)[:1].tolist()
    rows = [(world.wording.existence(c), "hallucination", "yes") for c in present]
    rows += [(world.wording.existence(c), "hallucination", "no") for c in absent]
    for kind, ask in (("number", world.count), ("state", world.color), ("state", world.position)):
        rows += [(text, f"attribute-{kind}", label) for text, label in zip(ask(f, rng) or (), YES_NO)]
    return [(f.file_name, text, {"type": f"discriminative-{kind}", "truth": label}) for text, kind, label in rows]


def _amber_files(generative: list[tuple], asked: list[tuple], objects: list[str]) -> dict[str, list | dict]:
    numbered = [(i, *row) for i, row in enumerate([*generative, *asked], 1)]
    queries = [{"id": i, "image": image, "query": text} for i, image, text, _ in numbered]
    words = {c.name: c.words for c in load_lexicon().categories}
    return {
        "annotations.json": [{"id": i, **note} for i, _, _, note in numbered],
        "relation.json": {c: [w for w in words[c] if w != c] for c in objects},
        "query/query_all.json": queries,
        "query/query_generative.json": queries[: len(generative)],
        "query/query_discriminative.json": queries[len(generative) :],
    }


def write_amber(files: Mapping[str, list | dict], folder: PathLike) -> None:
    """Write the files as AMBER's folder ``data`` has them, with an empty list of safe words."""
    for name, content in files.items():
        write_json(Path(folder) / name, content, sort_keys=False)
    write_text(Path(folder) / "safe_words.txt", "")
