"""The pointing game (Zhang et al. 2018): does the strongest place of a word's map lie on the object?

For a word whose object is there, on that object. For the planted companion of an object that is there, on the object
that calls for it: whether a wrong word, too, depends on something in the image.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..core.files import PathLike, read_json

METRICS = ("point_effect", "point_attention", "point_chance")


def boxes(instances_json: PathLike) -> dict[tuple[int, str], list[tuple[float, float, float, float]]]:
    """(image_id, category) -> boxes (left, top, right, bottom) as shares of width and height, from a COCO file."""
    data = read_json(instances_json)
    names = {c["id"]: c["name"] for c in data["categories"]}
    size = {i["id"]: (i["width"], i["height"]) for i in data["images"]}
    found: dict = {}
    for a in data["annotations"]:
        (x, y, w, h), (width, height) = a["bbox"], size[a["image_id"]]
        box = (x / width, y / height, (x + w) / width, (y + h) / height)
        found.setdefault((a["image_id"], names[a["category_id"]]), []).append(box)
    return found


def pointing(maps: pd.DataFrame, instances_json: PathLike, companions: Mapping[str, str], block: int) -> pd.DataFrame:
    """Items setting, image_id, metric, num, den: hits over words, for ``alea_lib.core.stats``.

    ``maps``: as of ``evaluate.patch_maps``, with effects of squares of ``block`` x ``block`` patches; attention is
    summed over the same squares, so that both are equally coarse. ``point_effect``, ``point_attention``: words whose
    strongest patch has its centre in a box; ``point_chance``: the share of patches that have. ``setting``: ``grounded``
    (boxes of the object), ``companion`` (boxes of the present objects that call for it); other words do not count.
    """
    where, rows = boxes(instances_json), []
    for word in maps.itertuples():
        callers = [word.category] if word.present else [a for a, c in companions.items() if c == word.category]
        targets = [box for name in callers for box in where.get((word.image_id, name), [])]
        if not targets:
            continue
        inside = _inside(targets, round(len(word.effect) ** 0.5))
        hits = inside[np.argmax(word.effect)], inside[np.argmax(_summed(word.attention, block))], inside.mean()
        setting = "grounded" if word.present else "companion"
        rows += [(setting, word.image_id, m, float(hit), 1.0) for m, hit in zip(METRICS, hits)]
    items = pd.DataFrame(rows, columns=["setting", "image_id", "metric", "num", "den"])
    return items.groupby(["setting", "image_id", "metric"], as_index=False).sum()


def _inside(targets: list, side: int) -> np.ndarray:
    """[side * side] bool: patches whose centre lies in one of the boxes."""
    y, x = ((np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij")) + 0.5) / side).reshape(2, -1)
    return np.any(
        [(left <= x) & (x < right) & (top <= y) & (y < bottom) for left, top, right, bottom in targets], axis=0
    )


def _summed(values: list[float], block: int) -> np.ndarray:
    """Sums over the square of patches around each, cut at the edge."""
    side, reach = round(len(values) ** 0.5), block // 2
    grid = np.pad(np.reshape(values, (side, side)), reach)
    return np.lib.stride_tricks.sliding_window_view(grid, (block, block)).sum((2, 3)).ravel()
