"""Locating layers: pooled states, locators, choices. Known answers first, then the tiny model."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.locate.layers import LOCATORS, choose_layers, locate_layers, stability
from alea_lib.locate.states import answer_states, pair_states

# ---- states


def test_states_are_means_over_the_answers_own_tokens(tiny, seen, told):
    found = answer_states(tiny, seen, tiny.prompt("plain"), told)
    assert found.shape == (6, 4, 64)
    for i, text in enumerate(told[:3]):
        batch = tiny.encode(seen[i : i + 1], tiny.prompt("plain"), [text])
        with torch.no_grad():
            out = tiny.language_model(inputs_embeds=tiny.embed(batch), output_hidden_states=True)
        start = batch.answer.item()
        for layer in range(3):  # the last entry of hidden_states is after the final norm
            torch.testing.assert_close(
                found[i, layer], out.hidden_states[layer + 1][0, start:].mean(0), atol=1e-4, rtol=1e-4
            )


def test_the_last_layer_is_taken_before_the_norm(tiny, seen, told):
    found = answer_states(tiny, seen[:1], tiny.prompt("plain"), told[:1])
    batch = tiny.encode(seen[:1], tiny.prompt("plain"), told[:1])
    with torch.no_grad():
        normed = tiny.hidden(tiny.embed(batch), batch.mask)[0, batch.answer.item() :]
    assert (found[0, -1] - normed.mean(0)).abs().max() > 0.1


def test_padding_and_batches_do_not_matter(tiny, seen, told):
    whole = answer_states(tiny, seen, tiny.prompt("plain"), told)
    for size in (1, 4):
        parts = answer_states(tiny, seen, tiny.prompt("plain"), told, batch_size=size)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    order = [3, 0, 5, 1, 4, 2]
    moved = answer_states(tiny, seen[order], tiny.prompt("plain"), [told[i] for i in order], batch_size=4)
    torch.testing.assert_close(moved, whole[order], atol=1e-4, rtol=1e-4)


def test_states_depend_on_the_image_and_the_prompt(tiny, seen, told):
    whole = answer_states(tiny, seen, tiny.prompt("plain"), told)
    assert (answer_states(tiny, seen.flip(0), tiny.prompt("plain"), told) - whole).abs().max() > 1e-3
    assert (answer_states(tiny, seen, tiny.prompt("careful"), told) - whole).abs().max() > 1e-3


def test_pair_states_name_positive_first(tiny, seen, told):
    pairs = pd.DataFrame({"positive": told, "negative": told[::-1]})
    positive, negative = pair_states(tiny, seen, pairs, "careful")
    torch.testing.assert_close(positive, answer_states(tiny, seen, tiny.prompt("careful"), told))
    torch.testing.assert_close(negative, answer_states(tiny, seen, tiny.prompt("careful"), told[::-1]))


# ---- locators

P = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [0.0, 1.0]]])  # norms 5, 50, 1
N = torch.tensor([[[3.0, 0.0], [30.0, 30.0], [1.0, 0.0]]])  # differences 4, 10, sqrt 2


def test_distances_by_hand():
    raw, relative = LOCATORS["raw-l2"](P, N, 0), LOCATORS["relative-l2"](P, N, 0)
    np.testing.assert_allclose(raw, [[4, 10, 2**0.5]], rtol=1e-6)
    want = [[4 / ((5 + 3) / 2), 10 / ((50 + 1800**0.5) / 2), 2**0.5]]
    np.testing.assert_allclose(relative, want, rtol=1e-6)
    # raw distance follows the norms to layer 1, relative distance finds layer 2
    assert raw.argmax() == 1 and relative.argmax() == 2


@pytest.mark.parametrize("name", ["raw-l2", "relative-l2"])
def test_distances_are_symmetric(name):
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 5, 8)
    np.testing.assert_allclose(LOCATORS[name](a, b, 0), LOCATORS[name](b, a, 0), rtol=1e-6)
    assert (LOCATORS[name](a, a, 0) == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=5), st.integers(0, 1000))
def test_relative_distance_is_free_of_scale(scales, seed):
    a, b = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(seed))
    s = torch.tensor(scales)[None, :, None]
    plain = LOCATORS["relative-l2"](a, b, 0)
    np.testing.assert_allclose(LOCATORS["relative-l2"](a * s, b * s, 0), plain, rtol=1e-4)


def test_controls_ignore_the_states():
    a, b = torch.zeros(3, 5, 8), torch.ones(3, 5, 8)
    assert (LOCATORS["last"](a, b, 0) == np.arange(5)).all()
    assert (LOCATORS["random"](a, b, 3) == LOCATORS["random"](b, a, 3)).all()
    assert (LOCATORS["random"](a, b, 3) == LOCATORS["random"](a, b, 3)[0]).all()


def test_random_control_is_fair():
    """Over 600 seeds each of 5 layers comes first about 120 times (sd 9.8)."""
    a = torch.zeros(1, 5, 2)
    first = np.bincount([LOCATORS["random"](a, a, s).argmax() for s in range(600)], minlength=5)
    assert (np.abs(first - 120) < 40).all()


def test_locate_table():
    table = locate_layers(P, N)
    assert set(table["locator"]) == set(LOCATORS) and list(table.columns) == [
        "locator",
        "pair",
        "layer",
        "score",
    ]
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 8)
    one = locate_layers(a, b, ["raw-l2"])
    scores = LOCATORS["raw-l2"](a, b, 0)
    for row in one.itertuples():
        assert row.score == scores[row.pair, row.layer]
    with pytest.raises(KeyError, match="'nearest'.*relative-l2"):
        locate_layers(P, N, ["nearest"])


# ---- choice


def table(rows):
    return pd.DataFrame(
        [(p, layer, s) for p, row in enumerate(rows) for layer, s in enumerate(row)],
        columns=["pair", "layer", "score"],
    )


def test_vote_and_mean_differ():
    scores = table([[1, 2, 0], [1, 2, 0], [90, 0, 91]])  # votes: 0, 2, 1; sums: 92, 4, 91
    assert choose_layers(scores, 1, "vote") == [1]
    assert choose_layers(scores, 1, "mean") == [0]
    assert choose_layers(scores, 2, "vote") == [1, 2]
    assert choose_layers(scores, 2, "mean") == [0, 2]
    assert choose_layers(scores.sample(frac=1, random_state=0), 2, "mean") == [0, 2]


def test_ties_of_votes_go_to_the_higher_mean():
    scores = table([[5, 0, 0, 1], [0, 0, 9, 1]])  # one vote each for layers 0 and 2; means 2.5, 0, 4.5, 1
    assert choose_layers(scores, 1, "vote") == [2]
    assert choose_layers(scores, 3, "vote") == [0, 2, 3]  # layers without votes follow by their mean
    assert choose_layers(table([[1, 1, 1]]), 2, "mean") == [0, 1]


def test_all_layers_and_errors():
    scores = table([[3, 1, 2]])
    assert choose_layers(scores, 3) == [0, 1, 2]
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match="the model has 3"):
            choose_layers(scores, k)
    with pytest.raises(ValueError, match="unknown rule 'median'.*vote.*mean"):
        choose_layers(scores, 1, "median")


def test_stability_counts_resamples():
    sure = table([[0, 1, 5]] * 6).assign(locator="sure")
    split = table([[9, 0, 0]] * 3 + [[0, 9, 0]] * 3).assign(locator="split")
    share = stability(pd.concat([sure, split]), k=1, resamples=200)
    assert share.loc["sure"].tolist() == pytest.approx([0, 0, 1])
    assert share.loc["split"].sum() == pytest.approx(1) and share.loc["split", 2] == 0
    assert 0.3 < share.loc["split", 0] < 0.8
    pd.testing.assert_frame_equal(share, stability(pd.concat([sure, split]), k=1, resamples=200))


def test_a_planted_layer_is_found():
    """Layer 3 alone separates the pair by direction; norms grow with depth."""
    torch.manual_seed(1)
    depth = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 64.0])[None, :, None]
    positive = torch.randn(40, 6, 16) * depth
    negative = positive + 0.2 * torch.randn(40, 6, 16) * depth
    negative[:, 3] = -positive[:, 3]
    scores = locate_layers(positive, negative, ["relative-l2", "raw-l2"])
    found = {n: choose_layers(g, 1) for n, g in scores.groupby("locator")}
    assert found["relative-l2"] == [3]
