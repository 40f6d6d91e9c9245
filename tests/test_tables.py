"""The tables' contract, and files that are never half written."""

import errno
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alea_lib.rivals import registry
from alea_lib.tables import (
    METRIC_COLUMNS,
    METRIC_KEYS,
    DataError,
    DiskFullError,
    check_metrics,
    check_pairs,
    metric_rows,
    read_csv,
    read_jsonl,
    read_metrics,
    read_parquet,
    replacing,
    write_csv,
    write_jsonl,
    write_metrics,
    write_parquet,
)

KEYS = {
    "run_id": "0012",
    "profile": "scenes",
    "world": "scenes",
    "model": "natural",
    "method": "base",
    "benchmark": "chair",
    "split": "test",
    "prompt": "plain",
    "condition": "clean",
    "scorer": "singularise",
    "seed": 3,
}
SUMMARY = pd.DataFrame(
    [("chair_s", 0.4, 0.35, 0.45, 500), ("words", 31.5, 30.0, 33.0, 500)],
    columns=["metric", "value", "lo", "hi", "n"],
)


def rows(**changes):
    table = metric_rows(SUMMARY, **KEYS)
    for column, value in changes.items():
        table[column] = table[column].astype(object)
        table.loc[0, column] = value
    return table


def test_points_and_fractions_of_the_benchmarks():
    """MME's and AMBER's scores are points; what they are made of are fractions, so per cent given there is caught."""
    for name in ("mme_total", "mme_count", "amber_score", "amber_chair_diff", "mme_count_diff"):
        check_metrics(rows(metric=name, value=40.0, lo=-35.0, hi=45.0))
    for name in ("amber_chair", "amber_relation_f1", "mme_count_accuracy", "mme_count_accuracy_plus"):
        with pytest.raises(DataError, match="0-1"):
            check_metrics(rows(metric=name, value=40.0, lo=35.0, hi=45.0))


def test_rows_have_the_contracts_columns():
    table = rows()
    assert tuple(table.columns) == METRIC_COLUMNS and METRIC_COLUMNS[:12] == METRIC_KEYS
    assert table.loc[0, "seed"] == 3 and pd.isna(table.loc[0, "base_seed"]) and table.loc[0, "setting"] == ""
    assert check_metrics(table) is table
    with pytest.raises(DataError, match="unknown column .'no_such'"):
        metric_rows(SUMMARY, no_such="natural")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": 40.0, "lo": 35.0, "hi": 45.0}, "0-1"),
        ({"lo": 0.41}, "lo <= value <= hi"),
        ({"hi": 0.39}, "lo <= value <= hi"),
        ({"hi": 1.2}, "0-1"),
        ({"value": np.nan}, "finite"),
        ({"value": np.inf, "hi": np.inf}, "finite"),
        ({"lo": np.nan}, "both"),
        ({"n": 0}, "n must be"),
        ({"n": pd.NA}, "n must be"),
        ({"metric": "chair"}, "unknown metric"),
        ({"metric": "words"}, "same key twice"),
        ({"method": "alea"}, "method must be"),
        ({"method": ""}, "empty method"),
        ({"split": "val"}, "split must be"),
        ({"condition": "dirty"}, "condition must be"),
        ({"run_id": ""}, "empty run_id"),
    ],
)
def test_broken_rows_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        check_metrics(rows(**changes))


def test_rows_of_a_new_baseline_may_enter(monkeypatch):
    table = rows(method="mine")
    with pytest.raises(DataError, match="method must be one of"):
        check_metrics(table)
    registry.baseline_names()
    monkeypatch.setitem(registry.ROWS, "mine", registry.ROWS["vcd"])
    assert check_metrics(table) is table


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": "chair_s_diff", "value": -0.1, "lo": -0.2, "hi": 0.0},
        {"metric": "frontier_gap", "value": -0.1, "lo": -0.2, "hi": 0.0},
        {"metric": "mme_existence", "value": 180.0, "lo": 170.0, "hi": 190.0},
        {"metric": "peak_mib", "value": 900.0, "lo": np.nan, "hi": np.nan},
        {"split": "", "prompt": "", "condition": ""},
    ],
)
def test_what_the_contract_allows(changes):
    check_metrics(rows(**changes))


def test_missing_or_reordered_columns_are_refused():
    with pytest.raises(DataError, match="in this order"):
        check_metrics(rows()[list(METRIC_COLUMNS)[::-1]])


def test_metrics_survive_the_file_byte_for_byte(tmp_path):
    write_metrics(rows()[::-1], tmp_path / "a.csv")
    back = read_metrics(tmp_path / "a.csv")
    assert back.loc[0, "run_id"] == "0012" and back["n"].tolist() == [500, 500]
    pd.testing.assert_frame_equal(back, rows(), check_dtype=False)
    write_metrics(back, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
def test_floats_are_written_alike_and_read_back(tmp_path, numbers):
    write_csv(pd.DataFrame({"name": "x", "number": numbers}), tmp_path / "t.csv")
    back = read_csv(tmp_path / "t.csv")
    assert back["number"].to_numpy(float) == pytest.approx(np.array(numbers), rel=1e-9, abs=1e-300)
    first = (tmp_path / "t.csv").read_bytes()
    write_csv(back.assign(number=back["number"].astype(float)), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == first


def test_noise_below_ten_digits_and_negative_zero_leave_no_trace(tmp_path):
    write_csv(pd.DataFrame({"x": [0.1 + 0.2, -0.0, 1e-9, np.nan]}), tmp_path / "a.csv")
    write_csv(pd.DataFrame({"x": [0.3, 0.0, 1e-9, np.nan]}), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert (tmp_path / "a.csv").read_text() == 'x\n0.3\n0\n1e-09\n""\n'


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "t"
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    with pytest.raises(DataError, match=r"t, line 3: .*; mend or delete that line"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        read_jsonl(path)
    path.write_text("")
    with pytest.raises(DataError, match="not a table"):
        read_csv(path)
    with pytest.raises(DataError, match="not a Parquet table"):
        read_parquet(path)


def test_json_lines_and_parquet_round_trip(tmp_path):
    records = [
        {"image_id": 1, "caption": "\u00e9clair \U0001f436\nsecond line"},
        {"image_id": 2, "caption": ""},
    ]
    write_jsonl(records, tmp_path / "deep" / "t.jsonl")
    assert read_jsonl(tmp_path / "deep" / "t.jsonl") == records
    write_jsonl(pd.DataFrame(records).assign(wrong=[frozenset({"b", "a"}), np.array([1])]), tmp_path / "t.jsonl")
    assert [r["wrong"] for r in read_jsonl(tmp_path / "t.jsonl")] == [["a", "b"], [1]]
    write_parquet(pd.DataFrame(records), tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet").to_dict("records") == records


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")]
)
def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, fault):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(DiskFullError if isinstance(fault, OSError) else type(fault)) as caught:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise fault
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["t.csv"]
    if isinstance(fault, OSError):
        assert "free some space" in str(caught.value)


def test_a_reader_of_the_old_file_never_sees_half_of_the_new(tmp_path):
    path = tmp_path / "t.csv"
    write_csv(pd.DataFrame({"x": [1]}), path)
    with open(path) as reader:
        write_csv(pd.DataFrame({"x": [2, 3]}), path)
        assert reader.read() == "x\n1\n"
    assert path.read_text() == "x\n2\n3\n" and os.listdir(tmp_path) == ["t.csv"]


# ---- pairs

PAIR = {
    "image_id": 1,
    "image": "1.png",
    "positive": "A cup.",
    "negative": "A cup and a bowl.",
    "wrong": ["bowl"],
    "label_source": "truth",
    "prompt_negative": "p",
    "prompt_positive": "q",
}


def test_good_pairs_pass_and_survive_parquet(tmp_path):
    pairs = pd.DataFrame([PAIR, PAIR | {"image_id": 2, "label_source": "detector"}])
    assert check_pairs(pairs) is pairs
    write_parquet(pairs, tmp_path / "pairs.parquet")
    assert list(check_pairs(read_parquet(tmp_path / "pairs.parquet"))["wrong"][1]) == ["bowl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_source": "guess"}, "label_source must be"),
        ({"wrong": "bowl"}, "must be a list"),
        ({"wrong": ["lion"]}, "no category"),
        ({"positive": "  "}, "empty positive"),
        ({"negative": None}, "empty negative"),
        ({"negative": "A cup."}, "same text"),
        ({"image_id": "1"}, "integers"),
    ],
)
def test_broken_pairs_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        check_pairs(pd.DataFrame([PAIR | change]))


def test_empty_doubled_or_incomplete_pairs_are_refused():
    with pytest.raises(DataError, match="empty"):
        check_pairs(pd.DataFrame(columns=list(PAIR)))
    with pytest.raises(DataError, match="same pair twice"):
        check_pairs(pd.DataFrame([PAIR, PAIR]))
    with pytest.raises(DataError, match="lack the columns .'wrong'"):
        check_pairs(pd.DataFrame([PAIR]).drop(columns="wrong"))
