"""The parser: every trap as a sentence that can be checked by eye."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError
from alea_lib.metrics.lexicon import load_lexicon
from alea_lib.metrics.parse import FAMILIES, count_words, mentions

LEXICON = load_lexicon()
quick = settings(max_examples=40, deadline=None)


def named(caption, family="singularise"):
    return [m.category for m in mentions(caption, family)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", []),
        ("   \n ", []),
        ("Nothing of note; just grass.", []),
        (
            "A kitchen scene with a spoon and two cups. There is also a potted plant.",
            ["spoon", "cup", "potted plant"],
        ),
        ("two people, three women and a child", ["person", "person", "person"]),
        (
            "knives, mice, geese, sheep, scissors, skis",
            ["knife", "mouse", "bird", "sheep", "scissors", "skis"],
        ),
        ("A hot dog.", ["hot dog"]),
        ("Hot dogs and a hot-dog", ["hot dog", "hot dog"]),
        ("The food is hot. Dogs bark.", ["dog"]),
        ("The soup is hot\ndogs bark", ["dog"]),
        ("a hot, dog-like day", []),
        ("traffic lights above stop signs", ["traffic light", "stop sign"]),
        ("wine glasses", ["wine glass"]),
        ("glasses on her nose, a glass of water", []),
        ("a teddy bear beside a bear", ["teddy bear", "bear"]),
        ("a baby elephant and a baby", ["elephant", "person"]),
        ("adult zebras near a passenger train", ["zebra", "train"]),
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("A toilet. There is a seat too.", ["toilet", "chair"]),
        ("a bus, two buses", ["bus", "bus"]),
        ("a tie and four ties", ["tie", "tie"]),
        ("a man seated, his shoe tied", ["person"]),
        ("A DOG!!! (and a CAT?)", ["dog", "cat"]),
        ("the dog's bowl, the dogs\u2019 bowls", ["dog", "bowl", "dog", "bowl"]),
        (
            "\uff44\uff4f\uff47 \u00e9clair \u72d7 \U0001f436 cat",
            ["dog", "cat"],
        ),  # full-width letters, CJK, emoji
        ("a bow of ribbon, a plant, a notebook", []),
        ("skiing down a slope", []),
        ("computer mouse, computer", ["mouse", "laptop"]),
        ("microwave oven and toaster oven", ["microwave", "oven"]),
        ("train tracks beside a train", ["train"]),
    ],
)
def test_singularise(caption, expected):
    assert named(caption) == expected


@pytest.mark.parametrize(
    ("family", "caption", "expected"),
    [
        ("lemma", "a man seated, his shoe tied", ["person", "chair", "tie"]),
        ("lemma", "skiing, boated, ferried", ["skis", "boat", "boat"]),
        ("lemma", "cared, string, bed", ["bed"]),
        ("official", "a man ties ties on a bus", ["person"]),
        ("official", "two wine glasses", ["wine glass"]),
        ("official", "A toilet. There is a seat too.", ["toilet"]),
        ("official", "hot-dog", []),
        ("strict", "an orange bus and an orange", ["bus", "orange"]),
        ("strict", "an orange and black cat", ["cat"]),
        ("strict", "an apple, orange and banana", ["apple", "orange", "banana"]),
        ("strict", "red, orange and blue", []),
        ("strict", "slices of orange", ["orange"]),
        ("strict", "The bus is orange.", ["bus"]),
        ("strict", "oranges", ["orange"]),
        ("strict", "a remote beach; the remote on a couch", ["remote", "couch"]),
        ("strict", "A man ties his tie", ["person", "tie"]),
        ("strict", "learning to tie a knot, to train dogs", ["dog"]),
        ("strict", "next to train and bus", ["train", "bus"]),
        ("strict", "two ties, bears and books", ["tie", "bear", "book"]),
        ("strict", "he skis down on skis", ["skis"]),
        ("strict", "no people, without a car, without dogs, not a cat", ["cat"]),
        ("strict", "a car seat, a coffee table, a ski lift, toilet paper", []),
        ("strict", "a mother bear, a male lion, a mother", ["bear", "person", "person"]),
        ("strict", "carrot cake", ["cake"]),
        ("singularise", "A man ties his tie; it is tied", ["person", "tie", "tie"]),
        ("lemma", "A man ties his tie; it is tied", ["person", "tie", "tie", "tie"]),
        ("official", "A man ties his tie; it is tied", ["person", "tie"]),  # "ties" becomes "ty"
        ("lemma", "an orange bus", ["orange", "bus"]),
        ("official", "an orange wall", ["orange"]),
        ("official", "toilet seats, a hot dog, HOT DOGS", ["toilet", "hot dog", "hot dog"]),
        ("lemma", "toilet seats, a hot dog, HOT DOGS", ["toilet", "hot dog", "hot dog"]),
        ("strict", "toilet seats, a hot dog, HOT DOGS", ["toilet", "hot dog", "hot dog"]),
        ("official", "", []),
        ("official", "\u00e9clair \u72d7 \U0001f436, xyzzy: CAT!", ["cat"]),
        ("singularise", "carrot cake", ["carrot", "cake"]),
        ("singularise", "no people", ["person"]),
        ("singularise", "an orange bus", ["orange", "bus"]),
    ],
)
def test_families_differ_on_the_traps(family, caption, expected):
    if family == "official":
        pytest.importorskip("textblob")
    assert named(caption, family) == expected


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "official"])
def test_every_name_and_plural_is_understood(family):
    for c in LEXICON.categories:
        assert named(f"I see a {c.name} here", family) == [c.name]
        assert named(f"I see two {c.plural} here", family) == [c.name]


def test_every_word_names_its_category():
    for word, category in LEXICON.word_to_category.items():
        assert named(f"there: {word}.") == [category], word


def test_spans_are_the_words_as_written():
    caption = "Two  Hot \tDogs, a stop-sign and the dog's ball."
    found = mentions(caption)
    assert [caption[m.start : m.end] for m in found] == ["Hot \tDogs", "stop-sign", "dog", "ball"]
    assert [m.word for m in found] == ["hot dog", "stop sign", "dog", "ball"]


def test_words_are_counted_as_a_reader_would():
    assert count_words("A black-and-white dog's bowl -- it isn't full.") == 7
    assert count_words("") == 0 and count_words(" .,! ") == 0


def test_bad_input_says_what_to_do():
    with pytest.raises(DataError, match="choose one of singularise"):
        mentions("a dog", "wordnet")
    with pytest.raises(DataError, match="write ''"):
        mentions(None)


texts = st.lists(
    st.sampled_from(["a", "two", "hot", "dog", "dogs", "toilet", "seat", "no", "orange", "ties", ".", ",", "\n", "his"])
    | st.text(max_size=6),
    max_size=25,
).map(" ".join)


@quick
@given(texts, st.sampled_from([f for f in FAMILIES if f != "official"]))
def test_mentions_are_ordered_spans_of_known_categories(caption, family):
    found = mentions(caption, family)
    assert all(m.category in LEXICON.category_ids and 0 <= m.start < m.end <= len(caption) for m in found)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))


@quick
@given(texts)
def test_upper_case_changes_nothing(caption):
    ascii_only = caption.encode("ascii", "ignore").decode()
    assert named(ascii_only.upper()) == named(ascii_only.lower())


@quick
@given(texts, texts)
def test_sentences_are_parsed_on_their_own(first, second):
    assert named(f"{first}.\n{second}") == named(first + ".") + named(second)


@quick
@given(texts)
def test_strict_and_lemma_bracket_the_default(caption):
    """strict only drops words or relabels phrases; lemma only adds."""
    assert len(named(caption, "strict")) <= len(named(caption)) <= len(named(caption, "lemma"))


def test_measures_need_little_of_the_library():
    """The scorer runs where torch is not installed; of the library it imports ``core`` alone."""
    code = (
        "import importlib, pkgutil, sys, alea_lib.metrics as m\n"
        "sys.modules['torch'] = None\n"
        "[importlib.import_module(f'alea_lib.metrics.{x.name}') for x in pkgutil.iter_modules(m.__path__)]\n"
        "from alea_lib.metrics.parse import mentions\n"
        "assert [[x.category for x in mentions('Two dogs.', f)] for f in ('lemma', 'strict')] == [['dog']] * 2\n"
        "own = {x for x in sys.modules if x.startswith('alea_lib.') and not x.startswith('alea_lib.metrics')}\n"
        "assert all(x.startswith('alea_lib.core') for x in own), own"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
