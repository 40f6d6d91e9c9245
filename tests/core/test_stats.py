"""Statistics: intervals that are right, reproducible and paired."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.core.files import DataError
from alea_lib.core.stats import (
    bootstrap_weights,
    images_needed,
    interval,
    paired_difference,
    paired_difference_seeds,
    summarise,
    summarise_seeds,
)


def items(num, den=None, metric="m", ids=None):
    num = np.asarray(num, float)
    den = np.ones(len(num)) if den is None else den
    return pd.DataFrame({"image_id": range(len(num)) if ids is None else ids, "metric": metric, "num": num, "den": den})


def test_value_is_the_ratio_of_sums():
    row = summarise(items([1, 0, 2], [2, 1, 5]), 100).iloc[0]
    assert row["value"] == 3 / 8 and row["n"] == 3 and row["lo"] <= 3 / 8 <= row["hi"]


def test_rows_of_the_same_image_are_added():
    twice = pd.concat([items([1, 0]), items([0, 1])])
    once = items([1, 1], [2, 2])
    pd.testing.assert_frame_equal(summarise(twice, 100), summarise(once, 100))


def test_a_metric_without_denominator_is_absent():
    both = pd.concat([items([1, 0]), items([0, 0], [0, 0], "never")])
    assert summarise(both, 50)["metric"].tolist() == ["m"]


def test_interval_of_a_share_matches_its_standard_error():
    rng = np.random.default_rng(1)
    row = summarise(items(rng.random(500) < 0.4)).iloc[0]
    error = np.sqrt(row["value"] * (1 - row["value"]) / 500)
    assert row["hi"] - row["value"] == pytest.approx(1.96 * error, rel=0.06)
    assert row["value"] - row["lo"] == pytest.approx(1.96 * error, rel=0.06)


def test_intervals_cover_about_as_often_as_they_say():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        den = rng.integers(1, 5, 120)
        row = summarise(items(rng.binomial(den, 0.3), den), 300).iloc[0]
        hits += row["lo"] <= 0.3 <= row["hi"]
    assert 180 <= hits <= 199  # 95 % of 200 is 190, four standard errors are 12


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(3)
    a = rng.random(400) < 0.5
    b = a & (rng.random(400) < 0.9)  # the same images, some mended
    difference = paired_difference(items(a), items(b), 2000).iloc[0]
    wide = [summarise(items(x), 2000).iloc[0] for x in (a, b)]
    unpaired = np.hypot(*(row["hi"] - row["lo"] for row in wide))
    assert difference["value"] == pytest.approx(a.mean() - b.mean())
    assert difference["hi"] - difference["lo"] < 0.6 * unpaired
    assert difference["lo"] > 0


def test_difference_of_a_table_with_itself_is_exactly_zero():
    table = items([1, 0, 1, 1], [2, 1, 3, 1])
    row = paired_difference(table, table.sample(frac=1, random_state=0), 200).iloc[0]
    assert (row["value"], row["lo"], row["hi"]) == (0, 0, 0)


def test_other_images_are_refused_by_name():
    with pytest.raises(DataError, match=r"2 images .* \[0, 7\]"):
        paired_difference(items([1, 0]), items([1, 0], ids=[7, 1]))
    with pytest.raises(DataError, match="no metric in common"):
        paired_difference(items([1, 0]), items([1, 0], metric="other"))


@pytest.mark.parametrize("table", [items([]), items([1]).drop(columns="den"), items([np.nan, 1])])
def test_unusable_items_are_refused(table):
    with pytest.raises(DataError):
        summarise(table)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 9), st.integers(1, 70))
def test_weights_do_not_depend_on_the_chunk(n, n_resamples, seed, chunk):
    whole = np.concatenate(list(bootstrap_weights(n, n_resamples, seed)))
    parts = np.concatenate(list(bootstrap_weights(n, n_resamples, seed, chunk)))
    assert whole.shape == (n_resamples, n) and (whole == parts).all()
    assert (whole.sum(axis=1) == n).all()


def test_same_seed_same_interval_other_seed_another():
    table = items(np.random.default_rng(0).random(60))
    pd.testing.assert_frame_equal(summarise(table, 300, seed=4), summarise(table, 300, seed=4))
    assert summarise(table, 300, seed=4)["lo"][0] != summarise(table, 300, seed=5)["lo"][0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_swapping_the_sides_mirrors_the_difference(pairs):
    a, b = (items(side, np.full(len(pairs), 3.0)) for side in zip(*pairs, strict=True))
    one, other = paired_difference(a, b, 64).iloc[0], paired_difference(b, a, 64).iloc[0]
    assert one["value"] == -other["value"]
    assert one["lo"] == pytest.approx(-other["hi"]) and one["lo"] <= one["value"] <= one["hi"]


def test_interval_always_holds_its_value():
    assert interval(0.9, np.array([0.1, 0.2])) == (pytest.approx(0.1025), 0.9)
    assert interval(0.5, np.array([np.nan, np.inf])) == (0.5, 0.5)


# ---- sums of ratios


def test_a_metric_of_parts_is_the_sum_of_their_ratios():
    parts = pd.concat([items([1, 0], [2, 2], "sum|a"), items([3, 3], [4, 4], "sum|b", ids=[1, 2])])
    table = pd.concat([parts, items([1, 1, 1], metric="plain")])
    rows = summarise(table, 200).set_index("metric")
    assert (
        rows.loc["sum", "value"] == 1 / 4 + 6 / 8 and rows.loc["sum", "n"] == 3 and set(rows.index) == {"sum", "plain"}
    )
    lo, hi = rows.loc["sum", ["lo", "hi"]]
    assert (lo, hi) == (0 + 3 / 4, 1 / 2 + 3 / 4)  # image 0 or 1 alone gives part a; part b is the same in both
    missing = pd.concat([parts, items([0, 0], [0, 0], "sum|c")])
    with pytest.raises(DataError, match="no metric in common"):
        paired_difference(missing, missing, 20)  # one part has no denominator: no sum


def test_a_sum_of_parts_is_resampled_image_by_image():
    rng = np.random.default_rng(7)
    a, b = rng.random(40), rng.random(40)
    split = pd.concat([items(a, metric="sum|a"), items(b, metric="sum|b")])
    whole = items(a + b, metric="sum")
    pd.testing.assert_frame_equal(summarise(split, 300), summarise(whole, 300))
    pd.testing.assert_frame_equal(paired_difference(split, whole, 300), paired_difference(whole, whole, 300))
    assert images_needed(0.1, split, split)["images"][0] == 2
    half = items((a + b) / 2, metric="sum")
    pd.testing.assert_frame_equal(images_needed(0.1, split, half), images_needed(0.1, whole, half))


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(5)
    agree = {s: items(rng.random(300) < 0.5) for s in range(3)}
    apart = {s: items(rng.random(300) < p) for s, p in enumerate((0.3, 0.5, 0.7))}
    a, b = (summarise_seeds(x, 1000).iloc[0] for x in (agree, apart))
    assert b["value"] == pytest.approx(np.mean([x["num"].mean() for x in apart.values()]))
    assert b["hi"] - b["lo"] > 2 * (a["hi"] - a["lo"]) and b["n"] == 300
    zero = paired_difference_seeds(apart, apart, 200).iloc[0]
    assert (zero["value"], zero["lo"], zero["hi"]) == (0, 0, 0)
    with pytest.raises(DataError, match="seeds differ"):
        paired_difference_seeds(apart, {0: apart[0]})
    with pytest.raises(DataError, match="scored on one side only"):
        summarise_seeds({0: items([1, 0]), 1: items([1, 0, 1])})


def test_one_seed_is_the_plain_bootstrap():
    table = items(np.random.default_rng(0).random(60))
    pd.testing.assert_frame_equal(summarise_seeds({9: table}, 300), summarise(table, 300))


def test_power_matches_the_textbook_and_simulation():
    rng = np.random.default_rng(6)
    a, b = rng.random(4000) < 0.5, rng.random(4000) < 0.5
    row = images_needed(0.1, items(a), items(b)).iloc[0]
    assert row["sd"] == pytest.approx(np.sqrt(0.5), rel=0.03)  # variance of a difference of two fair coins
    assert row["images"] == pytest.approx((1.96 + 0.8416) ** 2 * 0.5 / 0.01, rel=0.06)
    n, found = int(row["images"]), 0
    for _ in range(150):
        x, y = rng.random(n) < 0.55, rng.random(n) < 0.45
        found += paired_difference(items(x), items(y), 200).iloc[0]["lo"] > 0
    assert 0.68 <= found / 150 <= 0.92
    with pytest.raises(DataError):
        images_needed(0, items(a), items(b))


def test_ten_thousand_resamples_of_five_thousand_images_are_quick():
    rng = np.random.default_rng(0)
    table = pd.concat([items(rng.random(5000) < 0.4, metric=f"m{i}") for i in range(6)])
    start = time.process_time()
    summarise(table)
    assert time.process_time() - start < 6  # about 0.7 s; the margin is for slow machines
