"""Locators beside each other, by hand."""

import pandas as pd
import pytest

from alea_lib.experiments.localisation import aggregate, judge, localisation_rows
from alea_lib.experiments.locator_agreement import agreement, named_places, tau_with
from alea_lib.report.comparison import league
from alea_lib.report.findings import localisation_finding


def means(**scores):
    rows = [(name, layer, float(v)) for name, values in scores.items() for layer, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["locator", "layer", "score"])


def test_agreement_by_hand():
    found = agreement(means(up=[1, 2, 3], down=[3, 2, 1], mixed=[1, 3, 2], flat=[0, 0, 0]))
    assert list(found) == ["up", "down", "mixed"]  # a flat one has no order
    assert found.loc["up", "up"] == 1 and found.loc["up", "down"] == -1
    assert found.loc["up", "mixed"] == found.loc["mixed", "up"] == pytest.approx(1 / 3)  # 2 pairs agree, 1 does not


def test_gain_is_the_fall_of_chair():
    rows = [("0", "chair_s", -0.1), ("1", "chair_s", -0.3), ("2", "chair_s", 0.2), ("0", "recall", 9.0)]
    benefit = pd.DataFrame(rows, columns=["place", "metric", "value"])
    found = tau_with(means(right=[2, 3, 1], wrong=[2, 1, 3], flat=[1, 1, 1]), benefit)
    assert found.to_dict() == {"right": 1.0, "wrong": -1.0}


def test_named_places_share_ties_and_leave_spread_implants_out():
    scores = pd.concat([means(a=[1, 5, 2], tied=[4, 4, 0]).assign(model="m1"), means(a=[7, 5, 2]).assign(model="both")])
    index = pd.DataFrame({"name": ["m1", "both"], "layers": [(1,), (0, 2)]})
    found = named_places(scores, index)
    assert set(found["model"]) == {"m1"} and (found["true"] == 1).all()
    assert found[found["locator"] == "a"]["named"].tolist() == [1]
    assert found[found["locator"] == "tied"][["named", "share"]].values.tolist() == [[0, 0.5], [1, 0.5]]


def rows_of_models(target="layer"):
    """Ten models of four places: ``good`` is always right, ``bad`` never."""
    parts = []
    for m in range(10):
        true = m % 4
        good = [float(i == true) for i in range(4)]
        bad = [float(i == (true + 1) % 4) for i in range(4)]
        scores = means(good=good, bad=bad)
        place = [true] if target == "layer" else [(true, 0)]
        scores = scores if target == "layer" else scores.assign(head=0)
        judged = judge(scores, place).drop(columns="places")
        parts.append(localisation_rows(judged, model=f"m{m}", seed=0, strength="strong", n_pairs=5))
    return pd.concat(parts, ignore_index=True)


def test_league_and_finding_by_hand():
    layers = rows_of_models()
    table = league(aggregate(layers))
    assert table["locator"].tolist() == ["good", "bad"] and table["models"].tolist() == [10, 10]
    assert table.loc[0, "hit@1"] == "1.00 [1.00, 1.00]" and table.loc[1, "hit@1"] == "0.00 [0.00, 0.00]"
    official = layers[layers["locator"] == "bad"].assign(locator="official")
    norm = layers[layers["locator"] == "good"].assign(locator="weight-norm")  # a control is no finder, however good
    text = localisation_finding(
        aggregate(pd.concat([layers, official, norm])), aggregate(rows_of_models("head")), n_layers=4, n_heads=4
    )
    assert "implant and decoy: 100% [100%, 100%]" in text and "`weight-norm` (100%" not in text
    assert "`good` (100% [100%, 100%])" in text and "`bad`" not in text and "(25%)" in text
    assert "`official` in 0% [0%, 0%] of the models" in text and "the head stands first" in text


def test_a_finding_without_a_winner_says_none():
    bad = rows_of_models().query("locator == 'bad'")
    text = localisation_finding(aggregate(bad), aggregate(bad.assign(target="head")), n_layers=4, n_heads=4)
    assert text.count("for: none.") == 2
