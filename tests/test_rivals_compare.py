"""The comparison: paired by picture, the best by one rule, and a sentence that says no more than the table."""

import pandas as pd
import pytest

from alea_lib.rivals.compare import beside, best_rival, compare_rivals, rivals_finding
from alea_lib.scoring import Evaluated


class Known:
    """Enough of a truth for the frontier: every picture has a cup."""

    family = "singularise"


def told(wrong: list[int], recalled: float = 1.0) -> Evaluated:
    n = len(wrong)
    rows = [("chair_s", w, 1.0) for w in wrong] + [("recall", recalled, 1.0)] * n
    ids = [*range(n), *range(n)]
    items = pd.DataFrame(rows, columns=["metric", "num", "den"]).assign(
        image_id=ids, benchmark="chair", scorer="s", setting="x"
    )
    return Evaluated(pd.DataFrame({"image_id": range(n)}), items, pd.DataFrame())


@pytest.fixture
def methods(monkeypatch):
    gaps = {4: 0.1, 2: 0.3, 1: 0.2, 0: 0.9}

    def gap(base, captions, truth):
        return {"value": gaps[captions.attrs["wrong"]], "lo": 0.0, "hi": 1.0, "n": 8}

    monkeypatch.setattr("alea_lib.rivals.compare.frontier_gap", gap)
    found = {
        "vcd": told([1] * 2 + [0] * 6),
        "pai": told([1] + [0] * 7),
        "beam": told([0] * 8, 0.5),
        "alea-mixed": told([0] * 8),
    }
    for each in found.values():
        each.captions.attrs["wrong"] = int(each.items["num"][:8].sum())
    return told([1] * 4 + [0] * 4), found


def test_values_and_paired_differences(methods):
    base, found = methods
    table = compare_rivals(base, found, dict.fromkeys(found, "decoding"), Known()).set_index(
        ["method", "metric", "against"]
    )["value"]
    assert table["vcd", "chair_s", ""] == 0.25 and table["vcd", "chair_s", "base"] == -0.25
    assert table["beam", "recall", "base"] == -0.5 and table["base", "chair_s", ""] == 0.5
    assert table["vcd", "frontier_gap", ""] == 0.3 and ("base", "frontier_gap", "") not in table.index


def test_the_best_keeps_recall(methods):
    base, found = methods
    table = compare_rivals(base, found, dict.fromkeys(found, "decoding"), Known())
    assert best_rival(table, ["vcd", "pai", "beam"]) == "vcd"  # beam has the larger gap, and half of the recall
    assert best_rival(table, ["beam"]) == "beam"
    with pytest.raises(ValueError, match="RIVALS"):
        best_rival(table, [])


def test_the_sentence_is_the_tables(methods):
    base, found = methods
    table = compare_rivals(base, found, dict.fromkeys(found, "decoding"), Known())
    text = rivals_finding(table, "vcd", beside("vcd", ["alea-mixed", "vcd"], found), "alea-mixed")
    assert "`vcd`: 25.0%" in text and "-25.0 points" in text and text.count("\n- ") == 2
    assert text.strip().endswith("not shown to differ.") or text.strip().endswith("fewer.")
    worse = pd.DataFrame([{"method": "alea-mixed", "metric": "chair_s", "value": 0.2, "lo": 0.1, "hi": 0.3}])
    assert rivals_finding(table, "vcd", worse, "alea-mixed").strip().endswith("more.")
