"""How long scoring takes at COCO's size: synthetic annotations and captions, and the times of each step.

Times are CPU seconds of this process on one core, so that other programs on the machine do not count. The
texts are made of the lexicon's words and of invented ones (few frequent, many rare, as in natural text), so every
look-up that real captions need is made; what they say means nothing.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..core.files import DataError, PathLike, write_json
from ..core.stats import RESAMPLES, summarise
from .chair import chair
from .lexicon import load_lexicon
from .parse import FAMILIES, forget
from .truth import Truth, read_truth

LIMITS = {"read": 60.0, "read again": 5.0, "score": 5.0, "bootstrap": 3.0}  # seconds at full size
INVENTED = 25_000  # different words beside the lexicon's; COCO's captions have about as many
FIRST_ID = 1_000


@dataclass(frozen=True)
class TimingSizes:
    """How much is made: the defaults are those of COCO val2014, with five captions an image, and POPE-like tests."""

    images: int = 40_000
    instances: int = 290_000
    references: int = 200_000
    captions: int = 5_000
    words: int = 90
    resamples: int = RESAMPLES

    def __post_init__(self):
        if self.references < self.images or not 0 < self.captions <= self.images:
            raise DataError("each image needs a reference, and captions are of different images: more images, please")


def synthesise(folder: PathLike, sizes: TimingSizes, seed: int = 0) -> tuple[Path, Path]:
    """Write COCO instances and captions files of that size to ``folder``; returns their paths."""
    ids, rng = load_lexicon().category_ids, np.random.default_rng([seed, 0])
    images = [{"id": FIRST_ID + i, "file_name": f"made_{FIRST_ID + i:012d}.jpg"} for i in range(sizes.images)]
    owners = FIRST_ID + rng.integers(sizes.images, size=sizes.instances)
    marked = rng.choice(list(ids.values()), size=sizes.instances)
    boxes = rng.integers(1, 200, size=(sizes.instances, 4))
    annotations = [
        {"id": i, "image_id": owner, "category_id": category, "bbox": box, "iscrowd": 0}
        for i, (owner, category, box) in enumerate(zip(owners.tolist(), marked.tolist(), boxes.tolist()))
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    texts = _texts(sizes.references, 10, np.random.default_rng([seed, 1]))
    captions = [{"id": i, "image_id": FIRST_ID + i % sizes.images, "caption": text} for i, text in enumerate(texts)]
    paths = Path(folder) / "instances_made.json", Path(folder) / "captions_made.json"
    contents = {"images": images, "annotations": annotations, "categories": categories}, {"annotations": captions}
    for path, content in zip(paths, contents):
        write_json(path, content, sort_keys=False, indent=None)
    return paths


def synthetic_captions(sizes: TimingSizes, seed: int = 0) -> pd.DataFrame:
    """Captions of different images: image_id, caption, each of ``sizes.words`` words in sentences of ten."""
    texts = _texts(sizes.captions, sizes.words, np.random.default_rng([seed, 2]))
    return pd.DataFrame({"image_id": FIRST_ID + np.arange(sizes.captions), "caption": texts})


def _texts(n: int, length: int, rng: np.random.Generator) -> list[str]:
    """``n`` texts of ``length`` words in sentences of ten; about a quarter of the words name objects."""
    lexicon = load_lexicon()
    objects = np.array([*lexicon.word_to_category, *(c.plural for c in lexicon.categories)], dtype=object)
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "ing", "ed", "s")]
    pieces = np.random.default_rng(0).choice(syllables, size=(INVENTED, 3)).astype(object)
    invented = pieces.sum(axis=1)
    rank = np.minimum(rng.zipf(1.3, size=(n, length)) - 1, INVENTED - 1)
    named = objects[rng.integers(len(objects), size=(n, length))]
    words = np.where(rng.random((n, length)) < 0.25, named, invented[rank])
    return [" ".join(" ".join(row[k : k + 10]).capitalize() + "." for k in range(0, length, 10)) for row in words]


def timings(sizes: TimingSizes, seed: int = 0) -> pd.DataFrame:
    """Make annotations and captions and time what the scorer does with them: what, n, seconds, limit.

    Steps: read the annotations for the first time, and again from the cache that their content hash finds; score
    the captions with each family of parsers, from empty tables; the intervals. A family whose package is not
    installed is left out. ``limit``: what a step may take at full size. Nothing that is made is kept.
    """
    captions, rows = synthetic_captions(sizes, seed), []
    with tempfile.TemporaryDirectory() as folder:
        files = synthesise(folder, sizes, seed)
        for what in ("read", "read again"):
            seconds, truth = _timed(lambda: read_truth(*files, cache=Path(folder) / "cache"))
            rows.append((what, len(truth), seconds, LIMITS[what]))
    alone = Truth(truth.instances, {}, truth.file_names, truth.family)  # references were parsed by one family only
    for family in families():
        forget()
        seconds, scored = _timed(lambda family=family: chair(captions, alone, family))
        rows.append((f"score, {family}", len(captions), seconds, LIMITS["score"]))
    seconds, _ = _timed(lambda: summarise(scored.items, sizes.resamples))
    rows.append((f"bootstrap, {sizes.resamples} resamples", len(captions), seconds, LIMITS["bootstrap"]))
    return pd.DataFrame(rows, columns=["what", "n", "seconds", "limit"])


def families() -> list[str]:
    """The families that can run here: ``official`` needs TextBlob."""
    return [f for f in FAMILIES if f != "official" or importlib.util.find_spec("textblob")]


def _timed(step):
    start = time.process_time()
    result = step()
    return time.process_time() - start, result
