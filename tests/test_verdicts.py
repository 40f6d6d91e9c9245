"""The rule for a verdict, on intervals written by hand."""

import pandas as pd
import pytest

from alea_lib.verdicts import (
    ADVERSARY,
    CLAIMS,
    KEPT,
    UNTESTED,
    adversary,
    claims,
    finding,
    headline,
    kept,
    one,
    verdict,
)


@pytest.mark.parametrize(
    ("lo", "hi", "sign", "said"),
    [
        (-0.3, -0.1, -1, "holds"),
        (-0.3, -0.1, +1, "does not hold"),
        (0.1, 0.3, +1, "holds"),
        (0.1, 0.3, -1, "does not hold"),
        (-0.1, 0.3, +1, "not shown"),
        (-0.1, 0.3, -1, "not shown"),
        (0.0, 0.3, +1, "not shown"),  # an end on zero shows nothing
        (-0.3, 0.0, +1, "not shown"),
        (0.0, 0.0, -1, "not shown"),
    ],
)
def test_a_claim_of_change(lo, hi, sign, said):
    assert verdict(lo, hi, sign) == said


@pytest.mark.parametrize(
    ("lo", "hi", "said"),
    [
        (-0.02, 0.01, "holds"),  # the whole interval is above -0.03
        (0.01, 0.02, "holds"),
        (-0.05, -0.04, "does not hold"),
        (-0.05, 0.01, "not shown"),
        (-0.04, -0.02, "not shown"),
        (-0.03, 0.00, "not shown"),
    ],
)
def test_a_claim_of_no_loss(lo, hi, said):
    assert kept(lo, hi, 0.03) == said


def row(metric, benchmark, method, value, lo, hi, **more):
    setting = "all" if benchmark == "pope" else "max64"
    prompt = "" if benchmark == "pope" else "plain"
    return {"metric": metric, "benchmark": benchmark, "method": method, "value": value, "lo": lo, "hi": hi,
            "n": 100, "setting": setting, "prompt": prompt, "model": "scenes-natural", **more}  # fmt: skip


def all_rows():
    wanted = {(metric, benchmark, method) for _, _, metric, benchmark, method, _ in (*CLAIMS, *KEPT)}
    wanted |= {("chair_s_diff", "chair", "no-prefix")}
    return [row(*key, -0.10, -0.20, -0.05) for key in sorted(wanted)]


@pytest.mark.parametrize("shift, judged", [(0.0, "not shown"), (0.5, "holds"), (-0.5, "does not hold")])
def test_the_adversary_is_judged_against_plain_editing(shift, judged):
    rows = all_rows()
    for r in rows:
        if r["method"] == "no-prefix":
            r.update({k: r[k] + shift for k in ("value", "lo", "hi")})
    assert adversary(pd.DataFrame(rows), "alea-mixed")[5] == judged


def test_table_of_claims():
    table = claims(pd.DataFrame(all_rows()))
    assert len(table) == len(CLAIMS) + len(KEPT) + len(ADVERSARY) + len(UNTESTED)
    assert list(table.columns) == ["claim", "paper", "method", "evidence", "n", "scenes", "coco"]
    found = table.set_index(["claim", "method"])["scenes"]
    assert found["The edit lowers hallucination in captions", "alea-corrected"] == "holds"  # asks for less
    assert found["It does better than saying less", "alea-corrected"] == "does not hold"  # asks for more
    assert found["Recall is kept (loss under 3 points)", "alea-corrected"] == "does not hold"
    assert table["evidence"][0] == "chair_s_diff -0.100 [-0.200, -0.050]" and table["n"][0] == 100
    assert set(table["coco"]) == {"not run: needs a GPU"}


def test_a_missing_or_doubled_row_is_named():
    rows = all_rows()
    gone = [r for r in rows if r["metric"] != "recall_diff"]
    with pytest.raises(KeyError, match="0 rows of recall_diff.*06_measure"):
        claims(pd.DataFrame(gone))
    with pytest.raises(KeyError, match="2 rows"):
        claims(pd.DataFrame(rows + [rows[0]]))


def test_other_prompts_and_settings_are_left_out():
    rows = all_rows()
    rows += [{**r, "prompt": "careful", "value": 0.9} for r in rows if r["benchmark"] != "pope"]
    rows += [{**r, "setting": "random", "value": 0.9} for r in rows if r["benchmark"] == "pope"]
    assert one(pd.DataFrame(rows), "chair_s_diff", "chair", "alea-mixed")["value"] == -0.10
    assert one(pd.DataFrame(rows), "pope_accuracy_diff", "pope", "alea-mixed")["value"] == -0.10


def test_headline_leaves_undefined_cells_empty():
    rows = [
        row("chair_s", "chair", "base", 0.5, 0.4, 0.6),
        row("attn_last_max", "grounding", "base", 0.3, 0.2, 0.4),
        row("pope_accuracy", "pope", "base", 0.8, 0.7, 0.9),
        row("chair_s", "chair", "truncation", 0.4, 0.3, 0.5),
        row("chair_s", "chair", "base", 0.1, 0.0, 0.2, model="scenes-clean"),
        row("chair_s", "chair", "base", 0.7, 0.6, 0.8, prompt="speculative"),
        row("pope_accuracy", "pope", "base", 0.9, 0.8, 1.0, setting="random"),
    ]
    table = headline(pd.DataFrame(rows))
    assert table.columns.tolist() == ["base", "truncation"]
    assert table.loc["chair_s", "base"] == "0.500 [0.400, 0.600]"
    assert table.loc["pope_accuracy", "base"] == "0.800 [0.700, 0.900]"
    assert table.loc["pope_accuracy", "truncation"] == "" and table.loc["frontier_gap", "base"] == ""


def test_the_finding_states_values_intervals_and_signs():
    rows = [row("chair_s", "chair", "base", 0.5, 0.4, 0.6)]
    rows += [
        row("chair_s", "chair", "alea-mixed", 0.1, 0.05, 0.2),
        row("recall_diff", "chair", "alea-mixed", -0.01, -0.02, 0.0),
        row("frontier_gap", "chair", "alea-mixed", 0.3, 0.2, 0.4),
    ]
    text = finding(pd.DataFrame(rows))
    assert "50.0% (40.0% to 60.0%)" in text and "10.0% (5.0% to 20.0%)" in text
    assert "-1.0 points (-2.0 to +0.0)" in text and "+30.0 points" in text and "truncation`" not in text
