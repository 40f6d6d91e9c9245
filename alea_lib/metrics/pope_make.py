"""Make POPE questions (Li et al. 2023) from any world that has COCO's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ..core.files import DataError
from .chair import cooccurrence
from .truth import Truth

SETTINGS = ("random", "popular", "adversarial")


def existence_question(category: str) -> str:
    """POPE's wording, with the article that the spelling asks for."""
    return f"Is there {'an' if category[0] in 'aeiou' else 'a'} {category} in the image?"


def make_pope(
    truth: Truth,
    setting: str,
    n_images: int,
    per_image: int = 6,
    seed: int = 0,
    objects: Sequence[str] | None = None,
    question: Callable[[str], str] = existence_question,
) -> pd.DataFrame:
    """Questions of one setting: question_id, image, text, label, image_id, category; yes and no in turn.

    Of each image ``per_image / 2`` objects with an instance are asked for, and as many that neither an
    instance nor a reference caption shows: drawn at ``random``, the most frequent of the world
    (``popular``), or those that most often share an image with what is there (``adversarial``).
    ``objects``: the categories that may be asked for (default: all that occur). Images and positives depend
    on the seed alone, so the three settings share them. DataError when fewer than ``n_images`` images have
    enough objects.
    """
    if setting not in SETTINGS or per_image < 2 or per_image % 2:
        raise DataError(f"setting must be one of {SETTINGS} and per_image even; got {setting!r}, {per_image}")
    names, together = cooccurrence(truth.instances)
    allowed = [n for n in names if objects is None or n in set(objects)]
    half, rng = per_image // 2, np.random.default_rng(seed)
    rows = []
    for image_id in _choose_images(truth, set(allowed), n_images, half, rng):
        own = np.random.default_rng([seed, image_id])  # an image's positives do not depend on the other images
        present = [n for n in allowed if n in truth.instances[image_id]]
        absent = [n for n in allowed if n not in truth[image_id]]
        positive = [present[i] for i in own.permutation(len(present))[:half]]
        negative = _negatives(setting, absent, half, own, names, together, truth.instances[image_id])
        for yes, no in zip(positive, negative, strict=True):
            rows += [(image_id, yes, "yes"), (image_id, no, "no")]
    table = pd.DataFrame(rows, columns=["image_id", "category", "label"])
    table["question_id"] = range(1, len(rows) + 1)
    table["image"] = [truth.file_names[i] for i in table["image_id"]]
    table["text"] = [question(c) for c in table["category"]]
    return table[["question_id", "image", "text", "label", "image_id", "category"]]


def _choose_images(truth: Truth, allowed: set[str], n_images: int, half: int, rng) -> list[int]:
    fit = [
        i
        for i in sorted(truth.instances)
        if len(truth.instances[i] & allowed) >= half and len(allowed - truth[i]) >= half
    ]
    if len(fit) < n_images:
        raise DataError(
            f"only {len(fit)} images hold at least {half} askable objects and lack {half}, {n_images} are"
            " wanted; ask fewer questions an image (per_image) or take fewer images"
        )
    return sorted(fit[i] for i in rng.permutation(len(fit))[:n_images])


def _negatives(setting, absent, half, rng, names, together, present) -> list[str]:
    """The absent categories that the setting asks for, most tempting first; ties go by COCO's order."""
    if setting == "random":
        return [absent[i] for i in rng.permutation(len(absent))[:half]]
    index = {name: i for i, name in enumerate(names)}
    if setting == "popular":
        score = {n: together[index[n], index[n]] for n in absent}
    else:
        score = {n: together[index[n], [index[p] for p in present]].sum() for n in absent}
    return sorted(absent, key=lambda n: -score[n])[:half]
