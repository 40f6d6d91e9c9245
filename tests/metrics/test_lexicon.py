"""The lexicon: COCO's categories, complete and unambiguous."""

import re

from alea_lib.metrics.lexicon import load_lexicon

LEXICON = load_lexicon()


def test_eighty_categories_in_cocos_order_with_cocos_ids():
    ids = [c.id for c in LEXICON.categories]
    assert len(ids) == 80 and ids == sorted(set(ids))
    assert (ids[0], ids[-1]) == (1, 90)
    gaps = sorted(set(range(1, 91)) - set(ids))
    assert gaps == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]  # the ids that COCO never gave out
    assert LEXICON.category_ids["dining table"] == 67 and LEXICON.category_ids["toothbrush"] == 90


def test_supercategories_have_cocos_sizes():
    sizes: dict[str, int] = {}
    for c in LEXICON.categories:
        sizes[c.supercategory] = sizes.get(c.supercategory, 0) + 1
    assert sizes == {
        "person": 1, "vehicle": 8, "outdoor": 5, "animal": 10, "accessory": 5, "sports": 10, "kitchen": 7,
        "food": 10, "furniture": 6, "electronic": 6, "appliance": 5, "indoor": 7,
    }  # fmt: skip


def test_every_word_belongs_to_one_category_and_has_at_most_two_parts():
    words = [w for c in LEXICON.categories for w in c.words]
    assert len(words) == len(set(words)) and len(words) > 400
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", w) for w in words)
    assert all(c.name in c.words for c in LEXICON.categories)


def test_phrases_and_verbs_point_at_what_exists():
    for scope in LEXICON.phrases.values():
        assert {v for v in scope.values() if v is not None} <= set(LEXICON.names)
    assert LEXICON.verbs <= set(LEXICON.word_to_category)
    assert LEXICON.phrases["every"]["baby", "elephant"] == "elephant"
    assert LEXICON.phrases["every"]["hot", "dog"] == "hot dog"
    assert LEXICON.phrases["strict"]["coffee", "table"] is None


def test_plurals():
    odd = {
        "person": "people",
        "knife": "knives",
        "sheep": "sheep",
        "wine glass": "wine glasses",
        "mouse": "mice",
    }
    assert {name: LEXICON.plural(name) for name in odd} == odd
    assert LEXICON.plural("hot dog") == "hot dogs" and LEXICON.plural("bench") == "benches"
