"""The schema of metrics.csv."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from alea_lib.core import tables
from alea_lib.core.files import DataError, write_csv
from alea_lib.core.tables import (
    METRIC_COLUMNS,
    METRIC_KEYS,
    check_metrics,
    declare_method,
    metric_rows,
    read_csv,
    read_metrics,
    write_metrics,
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


def test_rows_of_a_new_method_may_enter_once_it_is_declared(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "_declared", set())
    table = rows(method="my-own-2")
    with pytest.raises(DataError, match="method must be one of"):
        write_metrics(table, tmp_path / "m.csv")
    declare_method("my-own-2")
    assert check_metrics(table) is table
    write_metrics(table, tmp_path / "m.csv")
    monkeypatch.setattr(tables, "_declared", set())  # another process reads it, and joins it with others
    back = read_metrics(tmp_path / "m.csv")
    assert set(back["method"]) == {"base", "my-own-2"}
    write_metrics(back, tmp_path / "joined.csv", declared_only=False)
    assert (tmp_path / "joined.csv").read_bytes() == (tmp_path / "m.csv").read_bytes()


@pytest.mark.parametrize("name", ["", "Mine", "my_own", "my own", "-mine", "my--own", "mine-"])
def test_a_method_has_a_plain_name(name, tmp_path):
    with pytest.raises(DataError, match="lower-case letters, digits and single hyphens"):
        declare_method(name)
    write_csv(rows(method=name), tmp_path / "m.csv")
    with pytest.raises(DataError, match="lower-case letters|empty method"):
        read_metrics(tmp_path / "m.csv")


def test_registering_a_baseline_declares_its_name(monkeypatch):
    from alea_lib.baselines import registry

    monkeypatch.setattr(tables, "_declared", set())
    monkeypatch.setattr(registry, "ROWS", {"vcd": registry.baseline("vcd")})
    registry.register(registry.replace(registry.ROWS["vcd"], name="declared-by-its-row"))
    check_metrics(rows(method="declared-by-its-row"))


def test_tables_need_neither_torch_nor_lexicon_nor_registry():
    code = (
        "import sys, pandas as pd, alea_lib.core.tables as t\n"
        "summary = pd.DataFrame([('chair_s', 0.4, 0.3, 0.5, 9)], columns=['metric', 'value', 'lo', 'hi', 'n'])\n"
        "keys = dict(run_id='1', profile='p', world='w', model='m', method='not-known', benchmark='chair')\n"
        "row = t.metric_rows(summary, **keys)\n"
        "t.check_metrics(row, declared_only=False)\n"
        "try:\n    t.check_metrics(row)\nexcept t.DataError:\n    pass\n"
        "own = {m for m in sys.modules if m.startswith('alea_lib')}\n"
        "assert all(m == 'alea_lib' or m.startswith('alea_lib.core') for m in own) and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_numbers_of_a_metrics_table_are_numbers_even_where_all_are_missing(tmp_path):
    write_metrics(rows(lo=np.nan, hi=np.nan)[:1], tmp_path / "m.csv")
    back = read_metrics(tmp_path / "m.csv")
    assert back["lo"].dtype == float and back["lo"].isna().all() and back["base_seed"].isna().all()
    write_csv(rows().astype({"n": object}).assign(n="many"), tmp_path / "m.csv")
    with pytest.raises(DataError, match="n holds text"):
        read_csv(tmp_path / "m.csv")


def test_key_columns_stay_text_in_every_table(tmp_path):
    write_csv(pd.DataFrame({"setting": ["0.25", "1"], "number": ["0.25", "1"]}), tmp_path / "t.csv")
    back = read_csv(tmp_path / "t.csv")
    assert back["setting"].tolist() == ["0.25", "1"] and back["number"].tolist() == [0.25, 1]
