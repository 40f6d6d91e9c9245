"""The pointing game by hand."""

import json

import numpy as np
import pandas as pd
import pytest

from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.pointing import _summed, boxes, pointing

COMPANIONS = {"cup": "spoon", "dog": "cat"}


@pytest.fixture
def instances(tmp_path):
    """One picture of 40 x 40 pixels with a cup in its upper left quarter; patches are 10 pixels wide."""
    ids = load_lexicon().category_ids
    path = tmp_path / "instances.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "width": 40, "height": 40}],
                "annotations": [{"image_id": 7, "category_id": ids["cup"], "bbox": [0, 0, 20, 20]}],
                "categories": [{"id": ids[c], "name": c} for c in ("cup", "spoon")],
            }
        )
    )
    return path


def word(category, present, effect_at, attention_at):
    maps = [0.0] * 16, [0.0] * 16
    maps[0][attention_at], maps[1][effect_at] = 1.0, 1.0
    return (7, 0, 3, category, present, *maps)


def play(rows, instances, block=1):
    columns = ["image_id", "start", "end", "category", "present", "attention", "effect"]
    items = pointing(pd.DataFrame(rows, columns=columns), instances, COMPANIONS, block)
    return {(r.setting, r.metric): (r.num, r.den) for r in items.itertuples()}


def test_hits_by_hand(instances):
    assert boxes(instances) == {(7, "cup"): [(0.0, 0.0, 0.5, 0.5)]}
    grounded = [word("cup", True, 5, 10), word("cup", True, 2, 0)]  # patches 0, 1, 4, 5 lie on the cup
    wrong = [word("spoon", False, 4, 15), word("cat", False, 0, 0)]  # nothing there calls for a cat
    found = play([*grounded, *wrong], instances)
    assert found == {
        ("grounded", "point_effect"): (1.0, 2.0),
        ("grounded", "point_attention"): (1.0, 2.0),
        ("grounded", "point_chance"): (0.5, 2.0),
        ("companion", "point_effect"): (1.0, 1.0),
        ("companion", "point_attention"): (0.0, 1.0),
        ("companion", "point_chance"): (0.25, 1.0),
    }


def test_attention_is_summed_over_the_squares_of_the_effects():
    values = np.arange(16.0)
    assert _summed(values, 1) == pytest.approx(values)
    summed = _summed(values, 3)
    assert summed[0] == 0 + 1 + 4 + 5 and summed[5] == values.reshape(4, 4)[:3, :3].sum()
