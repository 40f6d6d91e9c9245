"""Baselines side by side: differences over seeds by hand, the best one, where others do better, rows of each seed."""

import pandas as pd
import pytest

from alea_lib.baselines.registry import baseline
from alea_lib.core.files import DataError
from alea_lib.evaluate.scoring import Evaluated
from alea_lib.experiments.baseline_comparison import against, baseline_differences, best_baseline, better_than
from alea_lib.experiments.baseline_trial import rows_of_seed
from alea_lib.metrics.truth import Truth
from alea_lib.report.comparison import baseline_comparison, published_baselines
from alea_lib.report.findings import baseline_finding

TRUTH = Truth({i: frozenset({"dog", "cup"}) for i in range(4)}, {}, {}, "singularise")


def said(*captions):
    """What a method said of four pictures that show a dog and a cup."""
    told = pd.DataFrame({"image_id": range(4), "caption": captions, "n_tokens": 8, "eos": True})
    wrong = [float("spoon" in c) for c in captions]
    recall = [sum(word in c for word in ("dog", "cup")) for c in captions]
    items = [
        ("chair", "singularise", "max64,keep", i, metric, num, den)
        for i in range(4)
        for metric, num, den in (("chair_s", wrong[i], 1.0), ("recall", recall[i], 2.0))
    ]
    columns = ["benchmark", "scorer", "setting", "image_id", "metric", "num", "den"]
    return Evaluated(told, pd.DataFrame(items, columns=columns), pd.DataFrame())


RIGHT, WRONG, HALF = "A dog. A cup.", "A dog. A cup. A spoon.", "A dog."
BASE = said(WRONG, WRONG, WRONG, WRONG)
FOUND = {
    "alea-mixed": {0: said(RIGHT, RIGHT, RIGHT, WRONG), 1: said(RIGHT, RIGHT, RIGHT, RIGHT)},
    "vcd": {0: said(WRONG, WRONG, RIGHT, RIGHT), 1: said(WRONG, WRONG, RIGHT, RIGHT)},
    "truncation": {0: said(HALF, HALF, HALF, HALF), 1: said(HALF, HALF, HALF, HALF)},
}


@pytest.fixture(scope="module")
def rows():
    return pd.concat([baseline_differences(FOUND, BASE, TRUTH), against(FOUND, "alea-mixed")], ignore_index=True)


def value(rows, method, other, metric):
    at = (rows["method"] == method) & (rows["against"] == other) & (rows["metric"] == metric)
    return rows[at].iloc[0]


def test_differences_are_means_over_seeds(rows):
    assert value(rows, "alea-mixed", "base", "chair_s_diff")["value"] == pytest.approx(-7 / 8)
    assert value(rows, "vcd", "alea-mixed", "chair_s_diff")["value"] == pytest.approx(0.5 - 1 / 8)
    assert value(rows, "truncation", "base", "recall_diff")["value"] == pytest.approx(-0.5)
    assert (rows["seeds"] == 2).all() and (rows["n"] == 4).all()
    # cutting the base model's last sentence takes the spoon alone: at full recall its frontier is at 0 already
    assert value(rows, "alea-mixed", "base", "frontier_gap")["value"] == pytest.approx(-1 / 8)


def test_the_best_baseline_is_no_control_and_no_edit_of_this_study(rows):
    assert best_baseline(rows) == "vcd"
    more = rows.assign(method=rows["method"].replace("vcd", "alea-mixed + vcd"))
    assert best_baseline(more) is None
    beside = baseline_comparison(rows, "alea-mixed")
    assert beside["method"].tolist() == ["alea-mixed", "vcd", "truncation"]
    assert beside["what"].tolist() == ["this study", "best baseline", "control"]
    assert beside.loc[1, "chair_s"].startswith("+37.5 points")


def test_better_is_said_only_where_the_interval_is_apart_from_zero(rows):
    assert better_than(rows, "alea-mixed").empty
    assert better_than(rows, "vcd").empty  # it is compared with nothing
    one = rows[(rows["method"] == "vcd") & (rows["against"] == "alea-mixed")].assign(value=0.2, lo=0.1, hi=0.3)
    better = better_than(one, "alea-mixed")
    assert better["metric"].tolist() == ["recall_diff"]  # fewer wrong captions lie below zero
    at = rows["metric"].eq("recall_diff") & rows["method"].eq("vcd") & rows["against"].eq("alea-mixed")
    lifted = rows.assign(**{c: rows[c].mask(at, v) for c, v in {"value": 0.2, "lo": 0.1, "hi": 0.3}.items()})
    assert "`vcd` (+20.0 points (+10.0 to +30.0))" in baseline_finding(lifted, "alea-mixed")
    assert "interval apart from zero: none" in baseline_finding(rows, "alea-mixed")


def test_nothing_to_compare_says_nothing():
    assert baseline_comparison(pd.DataFrame(columns=["method", "against", "metric", "value"]), "alea-mixed").empty
    with pytest.raises(KeyError, match="no method 'opera'"):
        against(FOUND, "opera")


def test_the_studys_method_stands_once_where_several_runs_share_it(tmp_path, monkeypatch, rows):
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path))

    class Run:
        def uses(self, name):
            return tmp_path / name

    assert published_baselines(Run(), "long").empty
    first = rows.assign(run_id="1", model="m")
    again = first[(first["method"] == "alea-mixed")].assign(run_id="2")
    other = first.assign(run_id="3", model="n")
    folder = tmp_path / "data" / "results" / "long"
    folder.mkdir(parents=True)
    pd.concat([first, again, other]).to_csv(folder / "rivals.csv", index=False)
    found = published_baselines(Run(), "long")
    assert len(again) and found["run_id"].tolist() == ["1"] * len(rows) + ["3"] * len(rows)
    assert set(found["source"]) == {"long"}


def test_seeds_share_no_rows():
    table = pd.DataFrame({"a": range(7)})
    assert rows_of_seed(table, 3, 0)["a"].tolist() == [0, 1, 2] and rows_of_seed(table, 3, 1)["a"].tolist() == [3, 4, 5]
    with pytest.raises(DataError, match="seed 2 needs rows 6 to 9, there are 7"):
        rows_of_seed(table, 3, 2)
    assert baseline("nucleus").seeded(3).settings.seed == 3
    assert baseline("truncation").seeded(3) == baseline("truncation")
