"""The rule for a verdict, on intervals written by hand."""

import pandas as pd
import pytest

from alea_lib.report import verdicts
from alea_lib.report.comparison import frontier_line, frontier_points, headline, one, side_by_side
from alea_lib.report.findings import finding, recipe_sentence, robustness_finding
from alea_lib.report.labels import ADVERSARY
from alea_lib.report.verdicts import CLAIMS, KEPT, UNTESTED, Verdict, adversary, claims, kept, robust_recipes, verdict


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
    setting = "all" if benchmark == "pope" else "max64,keep"
    prompt = "" if benchmark == "pope" else "plain"
    return {"metric": metric, "benchmark": benchmark, "method": method, "value": value, "lo": lo, "hi": hi,
            "n": 100, "setting": setting, "prompt": prompt, "condition": "clean", "model": "scenes-natural",
            "world": "scenes", **more}  # fmt: skip


def all_rows():
    wanted = {(metric, benchmark, m) for _, _, metric, benchmark, _ in (*CLAIMS, *KEPT) for m in ADVERSARY}
    wanted |= {("chair_s_diff", "chair", "no-prefix")}
    attacked = [row("chair_s", "chair", m, 0.3, 0.2, 0.4, condition="attacked") for m in (*ADVERSARY, "no-prefix")]
    return [row(*key, -0.10, -0.20, -0.05) for key in sorted(wanted)] + attacked


@pytest.mark.parametrize("shift, judged", [(0.0, "not shown"), (0.5, "holds"), (-0.5, "does not hold")])
def test_the_adversary_is_judged_against_plain_editing(shift, judged):
    rows = all_rows()
    for r in rows:
        if r["method"] == "no-prefix":
            r.update({k: r[k] + shift for k in ("value", "lo", "hi")})
    assert adversary(pd.DataFrame(rows), "alea-mixed").verdict == judged


@pytest.mark.parametrize("shift, judged", [(0.0, "not shown"), (0.5, "holds"), (-0.5, "does not hold")])
def test_the_adversary_is_judged_under_attack(shift, judged):
    rows = all_rows()
    for r in rows:
        if r["method"] == "no-prefix" and r["condition"] == "attacked":
            r.update({k: r[k] + shift for k in ("value", "lo", "hi")})
    found = adversary(pd.DataFrame(rows), "alea-mixed", "chair_s", "attacked")
    assert found.verdict == judged and "under a fresh attack" in found.claim
    assert adversary(pd.DataFrame(rows), "alea-mixed").verdict == "not shown"


def trial_record(label, condition, metric, value, against="", half=0.01, model="m"):
    row = {
        "label": label,
        "method": label,
        "condition": condition,
        "metric": metric,
        "against": against,
        "value": value,
    }
    return {**row, "lo": value - half, "hi": value + half, "n": 300, "seeds": 5, "model": model}


def test_the_robustness_finding_by_hand():
    rows = [("no-prefix", "clean", 0.02), ("no-prefix", "attacked", 0.5), ("alea-mixed", "clean", 0.02)]
    table = [trial_record(m, c, "chair_s", v) for m, c, v in [*rows, ("alea-mixed", "attacked", 0.2)]]
    for half, said in ((0.1, "significantly lower"), (0.4, "no significant difference")):
        change = trial_record("alea-mixed", "attacked", "chair_s", -0.3, "no-prefix", half)
        text = robustness_finding(pd.DataFrame([*table, change]))
        assert "50.0% (49.0% to 51.0%) under a fresh attack" in text and text.strip().endswith(
            f"points), {said}.".replace("points", f"{100 * (half - 0.3):+.1f}")
        )
    other = trial_record("alea-mixed", "attacked", "chair_s", 0.3, "no-prefix")
    assert robustness_finding(pd.DataFrame([*table, other])).strip().endswith("significantly higher.")


def recipe(clean=0.0, recall=0.0, attacked=-0.3, half=0.01, model="m", label="alea-mixed"):
    cells = (("clean", "chair_s", clean), ("clean", "recall", recall), ("attacked", "chair_s", attacked))
    return [trial_record(label, c, m, v, "no-prefix", half, model) for c, m, v in cells]


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"clean": 0.011}, False),  # the interval reaches two points more
        ({"recall": -0.021}, False),  # three points less
        ({"attacked": -0.009}, False),  # the interval holds zero
        ({"attacked": 0.3}, False),
    ],
)
def test_a_recipe_is_as_good_clean_and_better_under_attack(changes, good):
    assert robust_recipes(pd.DataFrame(recipe(**changes)))["recipe"].tolist() == [good]


def test_the_recipe_must_hold_in_every_base_model():
    both = pd.DataFrame([*recipe(), *recipe(model="m2"), *recipe(label="sft", attacked=0.1)])
    said = recipe_sentence(robust_recipes(both))
    assert said.startswith("`alea-mixed`: as good") and "in all 2 base models (5 seeds each)" in said
    bad = pd.DataFrame([*recipe(), *recipe(model="m2", attacked=0.1)])
    assert recipe_sentence(robust_recipes(bad)).startswith("No edit tried is both")


def test_table_of_claims():
    table = claims(pd.DataFrame(all_rows()))
    assert len(table) == len(ADVERSARY) * (len(CLAIMS) + len(KEPT) + 2) + len(UNTESTED)
    assert list(table.columns) == ["claim", "paper", "method", "evidence", "n", "scenes", "coco"]
    found = table.set_index(["claim", "method"])["scenes"]
    assert found["The edit lowers hallucination in captions", "alea-corrected"] == "holds"  # asks for less
    assert found["It does better than saying less", "alea-corrected"] == "does not hold"  # asks for more
    assert found["Recall is kept (loss under 3 points)", "alea-corrected"] == "does not hold"
    assert table["evidence"][0] == "chair_s_diff -0.100 [-0.200, -0.050]" and table["n"][0] == 100
    assert set(table["coco"]) == {"not run: needs a GPU"}


def test_a_verdict_is_no_matter_of_wording(monkeypatch):
    reworded = [(claim, paper, "not under construction", judged) for claim, paper, _, judged in UNTESTED]
    monkeypatch.setattr(verdicts, "UNTESTED", reworded)
    found = claims(pd.DataFrame(all_rows())).tail(len(UNTESTED))
    assert found["scenes"].tolist() == ["holds", "not tested", "not tested"]
    assert set(found["evidence"]) == {"not under construction"}
    assert {str(v) for v in Verdict} == {"holds", "not shown", "does not hold", "not tested"}


def test_a_verdict_stands_in_the_column_of_its_world():
    rows = pd.DataFrame(all_rows())
    here = claims(rows)
    there = claims(rows.assign(world="coco", model="llava-1.5-7b"))
    assert list(there.columns) == list(here.columns) and there["coco"].equals(here["scenes"].rename("coco"))
    assert set(there["scenes"]) == {"not in this run: make study"}
    mine = claims(rows.assign(world="mine"))
    assert list(mine.columns) == [*here.columns, "mine"] and not set(mine["scenes"]) & {"holds", "does not hold"}


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
    assert table.loc["pope_accuracy", "truncation"] == "" and "frontier_gap" not in table.index


def cuts(model="scenes-natural"):
    """A frontier of two cuts and two methods, as ``06_measure`` writes them."""
    rows = [
        row(m, "chair", "truncation", v + k / 10, v, 1, setting=f"max64,cut{k}", model=model)
        for k in (1, 2)
        for m, v in (("chair_s", 0.1), ("chair_i", 0.05), ("recall", 0.5), ("words", 0.3))
    ]
    rows += [row(m, "chair", "truncation", 0.35, 0.3, 0.4, model=model) for m in ("chair_s", "recall")]
    return rows + [row(m, "chair", "base", 0.6, 0.5, 0.7, model=model) for m in ("chair_s", "recall")]


def test_the_frontier_and_its_points_come_from_the_table():
    metrics = pd.DataFrame(cuts())
    line, points = frontier_line(metrics), frontier_points(metrics)
    assert line["k"].tolist() == [1, 2] and line["chair_s"].tolist() == pytest.approx([0.2, 0.3])
    assert line["recall_lo"].tolist() == [0.5, 0.5] and line["words_hi"].tolist() == [1, 1]
    assert points["method"].tolist() == ["base", "truncation"] and points["chair_s"].tolist() == [0.6, 0.35]
    assert points.loc[1, ["recall_lo", "recall_hi"]].tolist() == [0.3, 0.4]


def test_cut_captions_are_no_method_of_their_own():
    metrics = pd.DataFrame(cuts())
    assert one(metrics, "chair_s", "chair", "truncation")["value"] == 0.35
    assert side_by_side(metrics, ("chair_s",)).loc["chair_s", "truncation"] == "0.350 [0.300, 0.400]"


def test_a_value_without_interval_stands_alone():
    metrics = pd.DataFrame([row("distinct", "chair", "base", 0.9, float("nan"), float("nan"))])
    assert side_by_side(metrics, ("distinct",)).loc["distinct", "base"] == "0.900"


def test_large_values_have_one_decimal():
    metrics = pd.DataFrame([row("mme_total", "mme", "base", 502.5, 490.07, 516.207, setting="all")])
    assert side_by_side(metrics, ("mme_total",)).loc["mme_total", "base"] == "502.5 [490.1, 516.2]"


def test_side_by_side_takes_the_setting_that_is_asked_for():
    rows = [
        row("pope_f1", "pope", "base", 0.9, 0.8, 1.0),
        row("pope_f1", "pope", "base", 0.7, 0.6, 0.8, setting="popular"),
    ]
    metrics = pd.DataFrame(rows)
    assert side_by_side(metrics, ("pope_f1",)).iloc[0, 0] == "0.900 [0.800, 1.000]"
    assert side_by_side(metrics, ("pope_f1",), "popular").iloc[0, 0] == "0.700 [0.600, 0.800]"


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
