"""Truncation: sentences, cuts, and the gap to the frontier, worked by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError
from alea_lib.core.stats import bootstrap_weights
from alea_lib.metrics.chair import chair
from alea_lib.metrics.frontier import (
    _gap,
    cut,
    drop_incomplete,
    drop_last_sentence,
    frontier,
    frontier_gap,
    sentence_ends,
)
from alea_lib.metrics.truth import Truth

quick = settings(max_examples=40, deadline=None)


def table(*captions):
    return pd.DataFrame({"image_id": range(len(captions)), "caption": list(captions)})


def truth_of(*objects):
    return Truth({i: frozenset(o) for i, o in enumerate(objects)}, {}, {}, "singularise")


def sentences(text):
    starts = [0, *sentence_ends(text)]
    return [text[a:b].strip() for a, b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n", []),
        ("A dog", ["A dog"]),
        ("A dog. A cat.", ["A dog.", "A cat."]),
        ("a dog! a cat? a cow...  a bird", ["a dog!", "a cat?", "a cow...", "a bird"]),
        ('He says "stop." She (too.) goes', ['He says "stop."', "She (too.)", "goes"]),
        (
            "It is 3.5 m long. Mr. T. Smith sits, e.g. here. End.",
            ["It is 3.5 m long.", "Mr. T. Smith sits, e.g. here.", "End."],
        ),
        ("1. A dog.\n2. A cat\n\nThe end", ["1. A dog.", "2. A cat", "The end"]),
        ("Wait\u2026 A dog.", ["Wait\u2026", "A dog."]),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_cuts():
    captions = table("A dog. A cat. A cow", "One.", "")
    assert cut(captions, 0)["caption"].tolist() == ["", "", ""]
    assert cut(captions, 1)["caption"].tolist() == ["A dog.", "One.", ""]
    assert cut(captions, 2)["caption"].tolist() == ["A dog. A cat.", "One.", ""]
    assert cut(captions, 9)["caption"].tolist() == captions["caption"].tolist()
    assert drop_last_sentence(captions)["caption"].tolist() == ["A dog. A cat.", "One.", ""]
    assert drop_incomplete(captions)["caption"].tolist() == ["A dog. A cat.", "One.", ""]
    assert drop_incomplete(table("A dog. A cat.", "A dog and"))["caption"].tolist() == [
        "A dog. A cat.",
        "A dog and",
    ]


def test_a_sentence_that_was_cut_off_is_dropped():
    cut_off = table("A dog. A cat and a", "A dog. A cat.", "A dog with a")
    kept = ["A dog.", "A dog. A cat.", "A dog with a"]  # the only sentence stays
    assert drop_incomplete(cut_off)["caption"].tolist() == kept


# Two images, two sentences each. Cut to one sentence: recall 2/4, CHAIRs 0. In full: recall 3/4, CHAIRs 1/2.
BASE = table("A dog. A bowl.", "A cat. A cup.")
TRUTH = truth_of(["dog", "person"], ["cat", "cup"])


def test_frontier_points():
    points = frontier(BASE, TRUTH, n_resamples=200)
    assert points["k"].tolist() == [1, 2]
    assert points["recall"].tolist() == [0.5, 0.75]
    assert points["chair_s"].tolist() == [0, 0.5]
    assert points["chair_i"].tolist() == [0, 0.25]
    assert points["words"].tolist() == [2, 4]
    assert (points["chair_s_lo"] <= points["chair_s"]).all() and (points["chair_s"] <= points["chair_s_hi"]).all()
    assert set(points["n"]) == {2} and set(points["scorer"]) == {"singularise"}


@pytest.mark.parametrize(
    ("captions", "gap"),
    [
        (("A dog. A bowl.", "A cat. A cup."), 0.5 - 0.5),  # the base model itself
        (("A dog.", "A cat. A cup."), 0.5 - 0),  # the wrong bowl is gone at full recall: better
        (("A dog.", "A cat."), 0 - 0),  # on the frontier: no better than cutting
        (("A dog and a bowl.", "A cat."), 0 - 0.5),  # worse than cutting to one sentence
        (("A dog and a person.", "A cat. A cup."), 0.5 - 0),  # recall above the full caption: clamped there
        (("", ""), 0 - 0),  # says nothing: at the foot of the frontier
        (("A bowl.", ""), 0 - 0.5),
        (("A dog.", ""), 0 - 0),  # recall 1/4, halfway between nothing and the first cut
    ],
)
def test_gap(captions, gap):
    result = frontier_gap(BASE, table(*captions), TRUTH, n_resamples=300)
    assert result["value"] == pytest.approx(gap, abs=1e-12)
    assert result["lo"] <= result["value"] <= result["hi"] and result["n"] == 2


def test_gap_is_linear_between_cuts():
    base = np.array([[0, 0.0, 0.0], [0.2, 0.0, 0.4], [0.6, 0.0, 0.8]])  # chair_s, chair_i, recall
    for recall, expected in ((0.2, 0.1), (0.4, 0.2), (0.6, 0.4), (0.7, 0.5), (0.9, 0.6)):
        points = np.concatenate([base, [[0.1, 0.0, recall]]])[None]
        assert _gap(points)[0] == pytest.approx(expected - 0.1)


def test_a_cut_that_costs_no_recall_sets_the_frontier():
    base = table("A dog. A bowl.", "A cat.")
    truth = truth_of(["dog"], ["cat"])
    assert frontier_gap(base, base, truth, n_resamples=50)["value"] == -0.5


def test_interval_is_the_frontier_recomputed_in_every_resample():
    method = table("A dog.", "A cat and a bowl.")
    result = frontier_gap(BASE, method, TRUTH, n_resamples=40, seed=3)
    gaps = []
    for weights in np.concatenate(list(bootstrap_weights(2, 40, 3))):
        drawn = [i for i, w in enumerate(weights) for _ in range(int(w))]

        def again(captions, drawn=drawn):
            return table(*(captions["caption"][i] for i in drawn))

        truth = truth_of(*(TRUTH[i] for i in drawn))
        gaps.append(frontier_gap(again(BASE), again(method), truth, n_resamples=1)["value"])
    lo, hi = np.quantile(gaps, [0.025, 0.975])
    assert (result["lo"], result["hi"]) == pytest.approx((min(lo, result["value"]), max(hi, result["value"])))


def test_images_must_be_the_same_and_their_order_does_not_matter():
    with pytest.raises(DataError, match=r"e.g. \[1\]"):
        frontier_gap(BASE, BASE[:1], TRUTH)
    a = frontier_gap(BASE, table("A dog.", "A cat. A cup."), TRUTH, n_resamples=100)
    b = frontier_gap(BASE[::-1], table("A dog.", "A cat. A cup.")[::-1], TRUTH, n_resamples=100)
    assert a == b


def test_all_empty_captions():
    points = frontier(table("", ""), TRUTH, n_resamples=10)
    assert points["chair_s"].tolist() == [0] and points["recall"].tolist() == [0]
    assert np.isnan(points["chair_i"][0])


texts = st.lists(
    st.sampled_from(["A dog", "a cat.", "Two cups!", "\n", "3.5", "the bowl", "Dr.", "?", '."']), max_size=9
)


@quick
@given(texts.map(" ".join))
def test_sentences_cover_the_text_in_order(text):
    ends = sentence_ends(text)
    assert ends == sorted(set(ends)) and all(s for s in sentences(text))
    assert (ends[-1] if ends else 0) == len(text.rstrip())


@quick
@given(st.lists(texts.map(" ".join), min_size=1, max_size=4), st.integers(0, 4))
def test_cutting_never_adds(captions, k):
    captions = table(*captions)
    truth = truth_of(*(["dog", "cup"] for _ in range(len(captions))))
    short, longer = (chair(cut(captions, j), truth).items for j in (k, k + 1))
    kept = short["metric"].isin(["chair_s", "recall", "words", "objects_per_caption"])
    assert (short.loc[kept, "num"] <= longer.loc[kept, "num"]).all()
    assert cut(cut(captions, k + 1), k)["caption"].tolist() == cut(captions, k)["caption"].tolist()
