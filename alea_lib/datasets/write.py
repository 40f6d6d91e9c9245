"""Write and open a world: a folder of images and COCO-format files that every later stage reads.

world.json                                   name, seed, sizes, generator
images/<split>/scenes_<split>_<id>.png
annotations/instances_<split>.json           COCO instances (boxes, categories)
annotations/captions_<split>.json            COCO captions: five truthful references an image
pope/scenes_pope_<setting>.json              POPE JSON lines, on the test split
mme/<task>/<image>.txt                       MME's hallucination subset, on the test split
amber/...                                    AMBER's files, on the test split
training/captions_set_completed_train.json   what set-completing annotators wrote: training only, no scorer reads it
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..core.files import DataError, write_jsonl
from ..core.paths import root
from ..metrics.lexicon import load_lexicon
from ..metrics.pope import SETTINGS
from ..metrics.questions import Wording, make_amber, make_mme, make_pope, write_amber, write_mme
from ..metrics.truth import read_truth
from .describe import caption, colour_question, count_question, existence_question, references, side_question
from .scenes import SIZE, SPLITS, Scene, companions, compose, objects, sample
from .world import World

WORDING = Wording(existence_question, count_question, side_question, colour_question)  # what the models were taught
MME_IMAGES = 60  # a task; as many of the test split as allow the questions, at most
AMBER_IMAGES = 200  # the same


def make_scenes(
    folder: Path,
    seed: int = 0,
    activate: int = 3000,
    validate: int = 500,
    test: int = 1000,
    pope_images: int = 250,
    training_sample: int = 500,
) -> World:
    """Write the scenes world to ``folder`` (replaced when it exists); returns it opened.

    ``activate``, ``validate``, ``test``: images of each split. Train scenes are composed on the fly while training;
    only a sample of the set-completing annotator's captions is written for readers.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("images", "annotations", "pope", "training"):
        (folder / part).mkdir(parents=True)
    sizes = {"activate": activate, "validate": validate, "test": test}
    for split, n in sizes.items():
        _write_split(folder, split, n, seed)
    pope_images = min(pope_images, test // 2)
    _write_benchmarks(folder, pope_images, seed)
    _write_training_sample(folder / "training" / "captions_set_completed_train.json", training_sample, seed)
    _dump(folder / "world.json", {"name": "scenes", "seed": seed, "sizes": sizes, "pope_images": pope_images})
    return World(folder)


def _write_benchmarks(folder: Path, pope_images: int, seed: int) -> None:
    instances = folder / "annotations" / "instances_test.json"
    truth = read_truth(instances, folder / "annotations" / "captions_test.json")
    for setting in SETTINGS:
        lines = make_pope(truth, setting, pope_images, seed, existence_question)
        write_jsonl(lines, folder / "pope" / f"scenes_pope_{setting}.json")
    write_mme(make_mme(truth, instances, MME_IMAGES, seed, WORDING), folder / "mme")
    write_amber(make_amber(truth, instances, companions(), AMBER_IMAGES, seed, objects(), WORDING), folder / "amber")


def _write_split(folder: Path, split: str, n: int, seed: int) -> None:
    (folder / "images" / split).mkdir()
    images, annotations, captions = [], [], []
    ids = load_lexicon().category_ids
    for i in tqdm(range(n), desc=f"compose {split}", disable=n < 200):
        scene = sample(split, i, seed)
        name = f"scenes_{split}_{scene.image_id:012d}.png"
        Image.fromarray(compose(scene)[0]).save(folder / "images" / split / name, compress_level=1)
        row = {"id": scene.image_id, "file_name": name, "width": SIZE, "height": SIZE}
        images.append(row | {"context": scene.context, "background": scene.colour})
        for j, t in enumerate(scene.things):
            row = {"id": scene.image_id * 10 + j, "image_id": scene.image_id, "category_id": ids[t.category]}
            annotations.append(row | {"bbox": list(t.box), "area": t.box[2] * t.box[3], "iscrowd": 0})
        captions += [_caption_row(scene, j, text) for j, text in enumerate(references(scene))]
    instances = {"info": {"description": "scenes world"}, "images": images, "annotations": annotations}
    instances["categories"] = [{"id": ids[c], "name": c} for c in objects()]
    _dump(folder / "annotations" / f"instances_{split}.json", instances)
    _dump(folder / "annotations" / f"captions_{split}.json", {"images": images, "annotations": captions})


def _caption_row(scene: Scene, j: int, text: str) -> dict:
    return {"id": scene.image_id * 10 + j, "image_id": scene.image_id, "caption": text}


def _write_training_sample(path: Path, n: int, seed: int) -> None:
    rows = []
    for i in range(n):
        scene = sample("train", i, seed)
        rng = np.random.default_rng([seed, SPLITS["train"], i, 3])
        rows.append(_caption_row(scene, 0, caption(scene, rng, "plain")))
    _dump(path, {"annotations": rows, "note": "set-completing annotator, plain prompt: training only"})


def _dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n")


def prepare_world(
    name: str, folder: Path, seed: int = 0, activate: int = 0, validate: int = 0, test: int = 0, pope_images: int = 0
) -> World:
    """The world ``name`` for a run, opened: ``scenes`` is written to ``folder`` in these sizes; any other lies in
    ``data/<name>`` (or in the folder of that path), and ``folder`` only says where.

    DataError before anything is written when there is no such world, or a split of it has fewer images than the sizes
    ask for; the message names the command that fetches them. ``pope_images`` counts for the composed world alone.
    """
    if name == "scenes":
        return make_scenes(folder, seed, activate, validate, test, pope_images)
    there = root() / "data" / name if (root() / "data" / name).is_dir() else root() / name
    fetch = f"python -m alea_lib.datasets fetch {Path(name).name}"
    if not (there / "world.json").is_file():
        raise DataError(f"there is no world {name!r} in data: {fetch}")
    sizes = World(there).info["sizes"]
    for split, n in {"activate": activate, "validate": validate, "test": test}.items():
        if n > sizes.get(split, 0):
            raise DataError(
                f"world {name!r} has {sizes.get(split, 0)} images of split {split!r}, the profile asks for {n}: "
                f"ask for fewer, or {fetch}"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    at = there.relative_to(root()).as_posix() if there.is_relative_to(root()) else str(there)
    (folder / "world.json").write_text(json.dumps({"at": at}) + "\n")
    return World(folder)
