"""Judging locators on hand-worked scores, against what chance gives, and beside each other."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError
from alea_lib.experiments.localisation import (
    LOCALISATION_COLUMNS,
    aggregate,
    agreement,
    chance,
    judge,
    kendall,
    localisation_rows,
    named_places,
    tau_with,
    write_localisation,
)
from alea_lib.report.comparison import league
from alea_lib.report.findings import localisation_finding


def layers(scores, name="a"):
    return pd.DataFrame({"locator": name, "layer": range(len(scores)), "score": scores})


def one(scores, truth):
    return judge(layers(scores), truth).iloc[0]


# ---- one model


def test_ranks_by_hand():
    found = judge(pd.concat([layers([0.1, 0.9, 0.5, 0.2]), layers([4, 1, 2, 3], "b")]), [2])
    assert list(found["locator"]) == ["a", "b"]
    assert list(found["rank"]) == [2, 3] and list(found["mrr"]) == [1 / 2, 1 / 3]
    assert list(found["hit@1"]) == [0, 0] and list(found["hit@2"]) == [1, 0]
    assert found["recall@2"].isna().all()  # one true place alone


def test_ties_share_their_ranks():
    tied = one([5, 5, 5, 1], [1])  # ranks 1, 2, 3 are equally likely
    assert tied["rank"] == 2 and tied["mrr"] == 1 / 2
    assert tied["hit@1"] == pytest.approx(1 / 3) and tied["hit@2"] == pytest.approx(2 / 3)
    below = one([5, 3, 3, 1], [1])  # second or third
    assert below["rank"] == 2.5 and below["hit@1"] == 0 and below["hit@2"] == pytest.approx(1 / 2)
    assert one([0, 0, 0, 0], [3])["rank"] == 2.5


def test_several_true_places_count_by_the_best():
    found = one([0.1, 0.9, 0.5, 0.2], [0, 2])
    assert found["rank"] == 2 and found["hit@1"] == 0 and found["hit@2"] == 1 and found["recall@2"] == 0.5
    assert one([0.9, 0.1, 0.8, 0.2], [0, 2])["recall@2"] == 1
    # three equal, two of them true: the first of them comes at (3 + 1) / (2 + 1)
    tied = one([5, 5, 5, 1], [0, 1])
    assert tied["rank"] == pytest.approx(4 / 3) and tied["hit@1"] == pytest.approx(2 / 3) and tied["hit@2"] == 1
    assert tied["recall@2"] == pytest.approx(2 / 3)


def test_heads():
    scores = pd.DataFrame({"locator": "h", "layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "score": [1, 4, 2, 3]})
    assert judge(scores, [(1, 1)]).iloc[0][["target", "rank"]].tolist() == ["head", 2]
    assert judge(scores, [(0, 0), (1, 0)]).iloc[0]["rank"] == 3  # any of a group


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_bad_scores(score):
    with pytest.raises(DataError, match="not finite"):
        judge(layers([1, score]), [0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=7), st.data())
def test_ties_are_the_mean_over_random_orders(scores, data):
    """Breaking ties at random many times gives the same rank and hits."""
    true = data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=2, unique=True))
    found, rng = one(scores, true), np.random.default_rng(0)
    jittered = np.array(scores) + 1e-3 * rng.random((3000, len(scores)))
    where = (-jittered).argsort(axis=1).argsort(axis=1)[:, true] + 1
    ranks, recalls = where.min(axis=1), (where <= 2).mean(axis=1)
    assert found["rank"] == pytest.approx(ranks.mean(), abs=0.2)
    assert found["hit@1"] == pytest.approx((ranks <= 1).mean(), abs=0.06)
    assert found["hit@2"] == pytest.approx((ranks <= 2).mean(), abs=0.06)
    if len(true) > 1:
        assert found["recall@2"] == pytest.approx(np.mean(recalls), abs=0.06)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5), st.floats(0.1, 10))
def test_only_the_order_matters(order, true, factor):
    a, b = one(np.array(order, float), [true]), one(np.exp(np.array(order) * factor / 10), [true])
    assert a[["rank", "hit@1", "hit@2", "mrr"]].tolist() == b[["rank", "hit@1", "hit@2", "mrr"]].tolist()


# ---- chance


def test_chance_by_hand():
    six = chance(6)
    assert six["rank"] == 3.5 and six["hit@1"] == pytest.approx(1 / 6) and six["hit@2"] == pytest.approx(1 / 3)
    assert six["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6)
    two = chance(4, 2)  # the first of two among four: 1, 2, 3 with 3/6, 2/6, 1/6
    assert two["rank"] == pytest.approx(10 / 6) and two["hit@1"] == pytest.approx(1 / 2)
    assert two["hit@2"] == pytest.approx(5 / 6) and two["mrr"] == pytest.approx((3 + 1 + 1 / 3) / 6)
    assert two["recall@2"] == 0.5


@pytest.mark.parametrize(("places", "truth"), [(6, [2]), (6, [1, 4]), (12, [0, 5, 7])])
def test_the_random_control_does_as_chance_does(places, truth):
    """Over 800 random orders, within four standard errors."""
    rng = np.random.default_rng(1)
    found = judge(pd.concat([layers(rng.permutation(places), k) for k in range(800)]), truth)
    for metric, value in chance(places, len(truth)).items():
        if np.isfinite(value):
            error = found[metric].std() / len(found) ** 0.5
            assert abs(found[metric].mean() - value) < 4 * error + 1e-9, metric


@pytest.mark.parametrize(("target", "places", "truth"), [("layer", 6, 2), ("head", 36, (3, 1))])
def test_the_random_control_of_the_library_does_too(target, places, truth):
    """Its hit rates over seeds are those of chance, within four standard errors."""
    from alea_lib.locate.run import TARGETS as REGISTRY

    def order(seed):
        evidence = SimpleNamespace(
            settings=SimpleNamespace(seed=seed), vlm=SimpleNamespace(n_layers=6, n_heads=6), pairs=[0]
        )
        scores = REGISTRY[target]["random"].function(evidence)[0]
        table = pd.DataFrame({"locator": seed, "layer": np.indices(scores.shape)[0].ravel(), "score": scores.ravel()})
        return table if target == "layer" else table.assign(head=np.indices(scores.shape)[1].ravel())

    found = judge(pd.concat([order(seed) for seed in range(600)]), [truth])
    for k, metric in ((1, "hit@1"), (2, "hit@2")):
        p = chance(places)[metric]
        assert p == pytest.approx(k / places)
        assert abs(found[metric].mean() - p) < 4 * (p * (1 - p) / len(found)) ** 0.5


# ---- many models


def test_aggregate_over_models():
    judged = pd.concat(
        [judge(layers(s), [0]).assign(model=m) for m, s in [("x", [3, 2, 1]), ("y", [1, 2, 3]), ("z", [9, 2, 1])]]
    )
    found = aggregate(judged).set_index("metric")
    assert found.loc["hit@1", "value"] == pytest.approx(2 / 3) and found.loc["rank", "value"] == pytest.approx(5 / 3)
    assert found.loc["mrr", "value"] == pytest.approx((1 + 1 / 3 + 1) / 3) and (found["n"] == 3).all()
    assert (found["lo"] <= found["value"]).all() and (found["value"] <= found["hi"]).all()
    assert found.loc["hit@1", "lo"] == 0 and found.loc["hit@1", "hi"] == 1  # three models say little
    assert "recall@2" not in found.index
    pd.testing.assert_frame_equal(aggregate(judged), aggregate(judged))


def test_more_models_narrow_the_interval():
    def width(n):
        parts = [judge(layers([3, 2, 1]), [k % 2]).assign(model=k) for k in range(n)]
        row = aggregate(pd.concat(parts)).set_index("metric").loc["hit@1"]
        assert row["value"] == 0.5
        return row["hi"] - row["lo"]

    assert width(64) < 0.7 * width(16)
    assert width(64) == pytest.approx(2 * 1.96 * 0.5 / 8, rel=0.15)


def test_resamples_of_a_model_are_not_models():
    """Ten resamples of the pairs of two models are two models: the interval stays that of two."""
    rows = [judge(layers([3, 2] if m else [2, 3]), [0]).assign(model=m, seed=s) for m in (0, 1) for s in range(10)]
    row = aggregate(pd.concat(rows)).set_index("metric").loc["hit@1"]
    assert row["n"] == 2 and (row["value"], row["lo"], row["hi"]) == (0.5, 0, 1)
    unsure = [judge(layers([3, 2] if s % 2 else [2, 3]), [0]).assign(model=m, seed=s) for m in range(9) for s in (0, 1)]
    row = aggregate(pd.concat(unsure)).set_index("metric").loc["hit@1"]
    assert row["value"] == 0.5 and row["lo"] < 0.4 and row["hi"] > 0.6  # the pairs alone make it move


def test_aggregate_by_strength():
    parts = [judge(layers([3, 2, 1]), [t]).assign(model=t, strength=s) for t, s in [(0, "weak"), (2, "strong")]]
    found = aggregate(pd.concat(parts), by=("locator", "strength"))
    hits = found[found["metric"] == "hit@1"].set_index("strength")["value"]
    assert hits.to_dict() == {"strong": 0, "weak": 1}


# ---- agreement


def test_kendall_by_hand():
    a = layers([1, 2, 3, 4])
    assert kendall(a, layers([10, 20, 30, 40])) == pytest.approx(1)
    assert kendall(a, layers([4, 3, 2, 1])) == pytest.approx(-1)
    assert kendall(a, layers([1, 3, 2, 4])) == pytest.approx((5 - 1) / 6)
    assert kendall(a, layers([1, 1, 2, 2])) == pytest.approx(4 / (6 * 4) ** 0.5)  # tau-b: two ties
    assert np.isnan(kendall(a, layers([7, 7, 7, 7])))
    shuffled = layers([10, 20, 30, 40]).sample(frac=1, random_state=3)
    assert kendall(a, shuffled) == pytest.approx(1)  # places are matched, not rows


# ---- the table


def rows(**changes):
    keys = {"model": "layer0-s0-weak", "seed": 0, "strength": "weak", "n_pairs": 120, "forwards": 240, **changes}
    return localisation_rows(judge(pd.concat([layers([3, 2, 1]), layers([1, 2, 3], "b")]), [0]), **keys)


def test_the_table_on_disk(tmp_path):
    table = rows()
    assert list(table.columns) == list(LOCALISATION_COLUMNS) and table["backwards"].isna().all()
    write_localisation(pd.concat([rows(seed=1), table.iloc[::-1]]), tmp_path / "localisation.csv")
    again = pd.read_csv(tmp_path / "localisation.csv")
    assert list(again["locator"]) == ["a", "a", "b", "b"] and list(again["rank"]) == [1, 1, 3, 3]
    assert again["seed"].tolist() == [0, 1, 0, 1] and (again["forwards"] == 240).all()
    with pytest.raises(DataError, match="doubled key"):
        write_localisation(pd.concat([table, table]), tmp_path / "localisation.csv")


# ---- beside each other


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
        parts.append(localisation_rows(judge(scores, place), model=f"m{m}", seed=0, strength="strong", n_pairs=5))
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
