"""Pairs: cutting unsupported objects out of the model's own words, and which images give a pair."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.datasets.describe import caption
from alea_lib.datasets.scenes import sample
from alea_lib.metrics.parse import mentions
from alea_lib.models.vlm import Answer
from alea_lib.pairs.activation import ActivateSettings, activate, keep_supported
from alea_lib.pairs.table import check_pairs


@pytest.mark.parametrize(
    ("text", "there", "want"),
    [
        # the last, the first, the middle of a list
        ("There is a spoon with a bowl.", {"spoon"}, "There is a spoon."),
        ("There is a spoon with a bowl.", {"bowl"}, "There is a bowl."),
        ("A kitchen scene shows a cup and a bowl.", {"cup"}, "A kitchen scene shows a cup."),
        ("A kitchen scene shows a cup and a bowl.", {"bowl"}, "A kitchen scene shows a bowl."),
        ("A kitchen scene shows a cup with a spoon and a bowl.", {"cup", "bowl"},
         "A kitchen scene shows a cup and a bowl."),
        ("A kitchen scene shows a cup with a spoon and a bowl.", {"cup"}, "A kitchen scene shows a cup."),
        ("A kitchen scene shows a cup with a spoon and a bowl.", {"bowl"}, "A kitchen scene shows a bowl."),
        ("There is a cup, a bowl, and a spoon.", {"cup", "bowl"}, "There is a cup, a bowl."),
        ("There is a cup, a bowl, and a spoon.", {"bowl", "spoon"}, "There is a bowl, and a spoon."),
        ("There is a cup, a bowl, and a spoon.", {"cup", "spoon"}, "There is a cup, and a spoon."),
        # whole sentences
        ("There is a cup. There is also a bowl.", {"cup"}, "There is a cup."),
        ("There is a cup. There is also a bowl.", {"bowl"}, "There is also a bowl."),
        ("There is a cup. There is also a bowl.", set(), ""),
        ("There is a spoon with a bowl.", set(), ""),
        ("There is a cup.", {"cup"}, "There is a cup."),
        ("A scene on a blue background. There is a cup.", set(), "A scene on a blue background."),
        ("", {"cup"}, ""),
        # number
        ("There are two cups with a bowl.", {"cup"}, "There are two cups."),
        ("There are two cups with a bowl.", {"bowl"}, "There is a bowl."),
        ("There is a bowl with two cups.", {"cup"}, "There are two cups."),
        ("On the left there are two cups with an apple.", {"apple"}, "On the left there is an apple."),
        ("In the middle there is a knife with a spoon.", {"knife"}, "In the middle there is a knife."),
        # compounds and words of several parts
        ("There is a hot dog with a cup.", {"cup"}, "There is a cup."),
        ("There is a hot dog with a cup.", {"hot dog"}, "There is a hot dog."),
        ("There is a dog with a hot dog.", {"dog"}, "There is a dog."),
        ("There is a teddy bear and a bear.", {"bear"}, "There is a bear."),
        ("There is a teddy bear and a bear.", {"teddy bear"}, "There is a teddy bear."),
        ("There is a pair of scissors with a book.", {"scissors"}, "There is a pair of scissors."),
        ("There is a book with a pair of scissors.", {"book"}, "There is a book."),
        ("There is a book with a pair of scissors.", {"scissors"}, "There is a pair of scissors."),
        ("There is a small red car next to a very big bus.", {"car"}, "There is a small red car."),
        ("There is a small red car next to a very big bus.", {"bus"}, "There is a very big bus."),
        ("A street scene on a grey background shows a car and a traffic light.", {"car"},
         "A street scene on a grey background shows a car."),
    ],
)  # fmt: skip
def test_by_hand(text, there, want):
    assert keep_supported(text, frozenset(there)) == want


def test_a_joint_is_a_whole_word():
    """'without' does not begin with the joint 'with', nor 'nearby' with 'near'."""
    for text in ("There is a bowl without a spoon.", "There is a bowl nearby, and a spoon."):
        left = keep_supported(text, frozenset({"spoon"}))
        assert not re.search(r"\bout\b|\bby\b", left), left


OBJECTS = ("cup", "bowl", "hot dog", "dog", "teddy bear", "apple", "pair of skis", "wine glass", "bus")
NAMES = {"pair of skis": "skis"}
PHRASE = st.tuples(st.sampled_from(OBJECTS), st.booleans(), st.sampled_from(["", "small ", "red "]))
JOINT = st.sampled_from([" and ", ", ", " with ", " next to ", " near ", ", and ", " or ", " behind "])
START = st.sampled_from(
    ["There is ", "On the left there is ", "A kitchen scene shows ", "In front of the wall stands "]
)


@st.composite
def sentence(draw):
    words = [draw(PHRASE) for _ in range(draw(st.integers(1, 4)))]
    nouns = [f"two {adj}{w}s" if many and w not in NAMES else f"a {adj}{w}" for w, many, adj in words]
    text = draw(START) + nouns[0]
    for noun in nouns[1:]:
        text += draw(JOINT) + noun
    return text + draw(st.sampled_from([".", "!", ""]))


def said(text):
    return [m.category for m in mentions(text)]


@settings(max_examples=150, deadline=None)
@given(st.lists(sentence(), min_size=1, max_size=4).map(" ".join), st.sets(st.sampled_from(OBJECTS)))
def test_no_unsupported_object_is_left(text, there):
    supported = frozenset(NAMES.get(k, k) for k in there)
    left = keep_supported(text, supported)
    assert set(said(left)) <= supported
    assert keep_supported(left, supported) == left  # nothing more to cut
    it = iter(re.findall(r"\w+", text))  # no word is added or moved, but for number agreement
    agree = {"is", "are"}
    assert all(any(a == b or (a in agree and b in agree) for b in it) for a in re.findall(r"\w+", left))


@settings(max_examples=60, deadline=None)
@given(sentence())
def test_what_is_all_supported_stays(text):
    assert keep_supported(text, frozenset(said(text))) == text.strip()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100_000), st.data())
def test_captions_of_the_world_keep_every_supported_object(index, data):
    """In the world's own sentences a cut never takes a supported object with it."""
    text = caption(sample("train", index), np.random.default_rng(index), "speculative")
    there = frozenset(data.draw(st.sets(st.sampled_from(sorted(set(said(text)))))))
    left = keep_supported(text, there)
    assert said(left) == [c for c in said(text) if c in there]
    assert not re.search(r"\b(and|with|shows|is|are)\s*[.]", left) and "  " not in left


# ---- activate


class Scripted:
    """Answers by prompt role. The choice of pairs is tested, not the model."""

    def __init__(self, **answers):
        self.answers = answers

    def prompt(self, role):
        return role

    def generate(self, features, question, **options):
        assert options["max_new_tokens"] == 7
        return [Answer(text, 5, True) for text in self.answers[question]]


def pairs_of(negatives, positives, supported, **more):
    n, vlm = len(negatives), Scripted(speculative=negatives, careful=positives)
    files = [f"{i}.png" for i in range(n)]
    return activate(
        vlm, [None] * n, list(range(10, 10 + n)), files, supported, ActivateSettings(max_new_tokens=7, **more)
    )


def test_which_images_give_a_pair():
    negatives = [
        "There is a cup with a spoon.",  # a pair
        "There is a cup.",  # nothing wrong in the negative
        "There is a dog.",  # the positive has nothing left
        "There is a cup with a bowl and a spoon.",  # two wrong objects
        "There is a cup.",  # the same text on both sides
    ]
    drafts = ["There is a cup with a bowl.", "There is a cup.", "There is a dog.", "There is a cup.", "There is a cup."]
    cup = frozenset({"cup"})
    pairs = pairs_of(negatives, drafts, [cup, cup, cup, cup, cup], label_source="truth")
    assert pairs["image_id"].tolist() == [10, 13] and pairs["image"].tolist() == ["0.png", "3.png"]
    assert pairs["positive"].tolist() == ["There is a cup."] * 2
    assert pairs["wrong"].tolist() == [["spoon"], ["bowl", "spoon"]]
    assert set(pairs["label_source"]) == {"truth"} and set(pairs["prompt_negative"]) == {"speculative"}
    check_pairs(pairs)
    for row in pairs.itertuples():
        assert not set(said(row.positive)) & set(row.wrong)


def test_no_pair_at_all_is_said():
    with pytest.raises(ValueError, match="no pair among 1 images"):
        pairs_of(["There is a cup."], ["There is a cup."], [frozenset({"cup"})])


def test_activate_with_a_real_model(tiny, tiny_world):
    """What a random model happens to name, judged against all that it names under the other prompt."""
    split = tiny_world.split("activate")
    names, features = [f.name for f in split.files], tiny.features(split.files)
    drafts, negatives = (tiny.generate(features, tiny.prompt(role), 12) for role in ("careful", "speculative"))
    there = [frozenset(said(draft.text)) for draft in drafts]
    pairs = activate(tiny, features, split.ids, names, there, ActivateSettings(max_new_tokens=12))
    want = [i for i in range(6) if drafts[i].text and set(said(negatives[i].text)) - there[i]]
    assert pairs["image_id"].tolist() == [split.ids[i] for i in want] != []
    for row, i in zip(pairs.itertuples(), want, strict=True):
        assert (row.image, row.negative, row.positive) == (names[i], negatives[i].text, drafts[i].text)
        assert row.wrong == sorted(set(said(row.negative)) - there[i])
