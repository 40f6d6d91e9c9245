"""Make a benchmark in AMBER's formats (Wang et al. 2023) from any world that has COCO's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..core.files import DataError, PathLike, write_json, write_text
from .lexicon import load_lexicon
from .mme_make import PLAIN, Askable, Facts, Wording, colour, count, read_askable, side
from .truth import Truth

DESCRIBE = "Describe this image."


def make_amber(
    truth: Truth,
    instances_json: PathLike,
    companions: Mapping[str, str | Iterable[str]],
    n_images: int = 200,
    seed: int = 0,
    objects: Sequence[str] | None = None,
    wording: Wording = PLAIN,
) -> dict[str, list | dict]:
    """The content of AMBER's files by name, of at most ``n_images`` images drawn by the seed.

    ``truth`` of a description: what instances or references show; ``hallu``: the absent companions of what is
    there, the objects that people would expect. ``companions``: the planted graph of the scenes world, or
    ``frequent_companions`` of the training images. Questions: existence (one object that is there, and each
    expected one, or another absent one where none is), attribute (count, and side and colour where ``wording`` has
    them; yes and no in turn). There are none about contact between objects (AMBER's relation). The vocabulary is
    ``objects`` (default: all that occur or are expected) with the lexicon's words for them. DataError when
    there is no image.
    """
    world = read_askable(truth, instances_json, objects, wording)
    if not world.facts:
        raise DataError(f"{instances_json}: no image of it has ground truth")
    graph = {a: [c] if isinstance(c, str) else list(c) for a, c in companions.items()}
    chosen = sorted(np.random.default_rng([seed, 9]).permutation(len(world.facts))[:n_images].tolist())
    generative, asked = [], []
    for number, f in enumerate((world.facts[k] for k in chosen), 1):
        there = [c for c in world.objects if c in truth[f.image_id]]
        expected = [c for c in dict.fromkeys(c for t in there for c in graph.get(t, ())) if c not in truth[f.image_id]]
        generative.append((number, f.file_name, DESCRIBE, {"type": "generative", "truth": there, "hallu": expected}))
        asked += _questions(world, f, there, expected, seed)
    numbered = [(i, *rest) for i, rest in enumerate(asked, len(generative) + 1)]
    hallu = (c for *_, note in generative for c in note["hallu"])
    return _files(generative, numbered, list(dict.fromkeys([*world.objects, *(objects or ()), *hallu])))


def _questions(world: Askable, f: Facts, there: list[str], expected: list[str], seed: int) -> list[tuple]:
    """(image, question, annotation) of one image."""
    rng = np.random.default_rng([seed, 9, f.image_id])
    absent = expected or rng.permutation([c for c in world.objects if c not in world.truth[f.image_id]])[:1].tolist()
    present = rng.permutation(there)[:1].tolist()
    rows = [(world.wording.existence(c), "hallucination", "yes") for c in present]
    rows += [(world.wording.existence(c), "hallucination", "no") for c in absent]
    for kind, ask in (("attribute-number", count), ("attribute-state", colour), ("attribute-state", side)):
        if (pair := ask(world, f, rng)) is not None:
            rows += [(text, kind, label) for text, label in zip(pair, ("yes", "no"))]
    return [(f.file_name, text, {"type": f"discriminative-{kind}", "truth": label}) for text, kind, label in rows]


def _files(generative: list[tuple], asked: list[tuple], objects: Sequence[str]) -> dict[str, list | dict]:
    def queries(rows):
        return [{"id": i, "image": image, "query": text} for i, image, text, _ in rows]

    lexicon = load_lexicon()
    relation = {c: [w for w in lexicon.category(c).words if w != c] for c in objects}
    return {
        "annotations.json": [{"id": i, **note} for i, _, _, note in [*generative, *asked]],
        "relation.json": relation,
        "query/query_all.json": queries([*generative, *asked]),
        "query/query_generative.json": queries(generative),
        "query/query_discriminative.json": queries(asked),
    }


def write_amber(files: Mapping[str, list | dict], folder: PathLike) -> None:
    """Write the files as AMBER's folder ``data`` has them, with an empty list of safe words."""
    for name, content in files.items():
        write_json(Path(folder) / name, content, sort_keys=False)
    write_text(Path(folder) / "safe_words.txt", "")
