"""One method through all measures: rows of the contract, paired differences, and what truncation lacks."""

import math

import pandas as pd
import pytest
import torch

from alea_lib.core.tables import METRIC_COLUMNS, check_metrics
from alea_lib.evaluate.scoring import (
    GROUP,
    _difference,
    _summary,
    evaluate,
    frontier_rows,
    read_benchmarks,
    read_evaluated,
    score_rows,
    truncated,
    write_evaluated,
)
from alea_lib.metrics.truth import Truth, read_truth
from alea_lib.models.delta import delta_of

KEYS = {"run_id": "r", "profile": "p", "world": "scenes", "model": "tiny", "split": "test", "prompt": "plain",
        "condition": "clean", "base_seed": 0, "seed": 0}  # fmt: skip


@pytest.fixture(scope="module")
def study(tiny, tiny_world):
    """Split, truth, questions, and the base model evaluated."""
    split = tiny_world.split("test")
    truth = read_truth(split.instances, split.captions)
    benchmarks = read_benchmarks(tiny_world, split.ids)
    return split, truth, benchmarks, evaluate(tiny, split, truth, benchmarks, 6)


@pytest.fixture(scope="module")
def changed(tiny):
    name = tiny.address("down_proj", 2)
    weight = tiny.model.get_submodule(name).weight.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return delta_of(tiny, {name: weight + weight.std() * 3 * noise}, {})


def test_base_rows_keep_the_contract(study):
    split, truth, benchmarks, base = study
    rows = check_metrics(score_rows(base, None, truth, method="base", **KEYS))
    assert list(rows.columns) == list(METRIC_COLUMNS)
    found = rows.set_index(["benchmark", "setting", "metric"])
    for metric in ("chair_s", "recall", "words", "objects_per_caption", "eos_rate"):
        assert ("chair", "max6,keep", metric) in found.index
    for setting in ("all", "random", "popular", "adversarial"):
        assert found.loc[("pope", setting, "pope_accuracy"), "n"] == benchmarks.pope["image_id"].nunique()
    assert ("pope", "", "pope_accuracy") not in found.index
    for benchmark in ("pope", "mme"):
        assert (rows.loc[rows["benchmark"] == benchmark, "prompt"] == "").all()
    for metric in ("mme_total", "mme_position_accuracy", "mme_color_accuracy_plus"):
        assert found.loc[("mme", "all", metric), "n"] >= 1
    for metric in ("amber_chair", "amber_cover", "amber_hal", "amber_cog", "amber_f1", "amber_score"):
        assert ("amber", "all", metric) in found.index
    for metric in ("attn_last_max", "attn_last_mean", "attn_all_mean"):
        assert ("grounding", "answer", metric) in found.index
    for metric in ("blank_effect", "swap_effect"):
        assert {("grounding", s, metric) for s in ("grounded", "hallucinated")} & set(found.index)
    nll, ppl = (found.loc[("ability", "reference", m)] for m in ("nll_grounded", "ppl_grounded"))
    for column in ("value", "lo", "hi"):
        assert ppl[column] == pytest.approx(math.exp(nll[column]))
    assert found.loc[("chair", "max6,keep", "distinct"), "value"] == base.captions["caption"].nunique() / len(split.ids)
    assert "kl_clean" not in set(rows["metric"]) and base.notes["metric"].tolist() == ["kl_clean"]
    assert (rows.loc[~rows["benchmark"].isin(["pope", "mme"]), "prompt"] == "plain").all()
    assert not rows["metric"].str.endswith("_diff").any() and "frontier_gap" not in set(rows["metric"])
    by_hand = base.captions["eos"].mean()
    assert found.loc[("chair", "max6,keep", "eos_rate"), "value"] == pytest.approx(by_hand)


def test_a_method_rows_hold_differences(tiny, study, changed):
    split, truth, benchmarks, base = study
    found = evaluate(tiny, split, truth, benchmarks, 6, changed)
    assert found.captions["caption"].tolist() != base.captions["caption"].tolist()  # the edit was at work
    rows = check_metrics(score_rows(found, base, truth, method="alea-mixed", **KEYS))
    alone = score_rows(base, None, truth, method="base", **KEYS)
    key = ["benchmark", "setting", "metric"]
    mine, theirs = rows.set_index(key)["value"], alone.set_index(key)["value"]
    for (benchmark, setting, metric), value in mine.items():
        if metric.endswith("_diff"):
            plain = metric.removesuffix("_diff")
            if metric.endswith("effect_diff"):  # paired by the images that both have: see below
                continue
            change = mine[benchmark, setting, plain] - theirs[benchmark, setting, plain]
            assert value == pytest.approx(change, abs=1e-9), metric
    assert ("chair", "max6,keep", "frontier_gap") in mine.index
    for benchmark, setting, metric in [
        ("pope", "all", "pope_accuracy"),
        ("grounding", "answer", "attn_last_max"),
        ("ability", "reference", "nll_grounded"),
    ]:
        assert (benchmark, setting, f"{metric}_diff") in mine.index


def test_effects_are_paired_by_the_images_that_both_have():
    columns = ["benchmark", "scorer", "setting", "image_id", "metric", "num", "den"]
    group = ("grounding", "teacher-forced", "hallucinated")

    def effects(**by_image):
        rows = [(*group, int(i[1:]), "blank_effect", num, den) for i, (num, den) in by_image.items()]
        return pd.DataFrame(rows, columns=columns)

    items = effects(i1=(2.0, 1.0), i2=(6.0, 2.0), i4=(9.0, 1.0))
    theirs = effects(i1=(1.0, 1.0), i2=(1.0, 1.0), i3=(50.0, 1.0))
    found = _difference({0: items}, theirs).set_index("metric").loc["blank_effect_diff"]
    assert found["value"] == pytest.approx(8 / 3 - 2 / 2) and found["n"] == 2
    assert len(_difference({0: items}, effects(i3=(1.0, 1.0)))) == 0

    other = effects(i1=(4.0, 1.0), i3=(7.0, 1.0))  # of another seed: only image 1 is seen by all
    both = _difference({0: items, 1: other}, theirs).set_index("metric").loc["blank_effect_diff"]
    assert both["value"] == pytest.approx((2.0 + 4.0) / 2 - 1.0) and both["n"] == 1
    mean = _summary({0: items, 1: other}).set_index("metric").loc["blank_effect"]
    assert mean["value"] == pytest.approx(3.0) and mean["n"] == 1


def test_rows_of_several_seeds_are_their_means(tiny, study, changed):
    split, truth, benchmarks, base = study
    edited = evaluate(tiny, split, truth, benchmarks, 6, changed)
    keys = {k: v for k, v in KEYS.items() if k != "seed"} | {"method": "vcd"}
    mean = check_metrics(score_rows({0: base, 1: edited}, base, truth, **keys))
    one, two = (score_rows(found, base, truth, **keys) for found in (base, edited))
    at = ["benchmark", "setting", "metric"]
    rows = {name: t.set_index(at)["value"] for name, t in {"mean": mean, "one": one, "two": two}.items()}
    for key in [
        ("chair", "max6,keep", "recall"),
        ("chair", "max6,keep", "words_diff"),
        ("pope", "all", "pope_accuracy"),
    ]:
        assert rows["mean"][key] == pytest.approx((rows["one"][key] + rows["two"][key]) / 2)
    assert mean["seed"].isna().all()
    assert set(rows["mean"].index) <= set(rows["one"].index) & set(rows["two"].index)


def test_frontier_rows_by_hand():
    told = table("There is a cup. There is a dog.", "There is a cup.", "There is a bowl. There is a dog.", "")
    rows = check_metrics(frontier_rows(told, TRUTH, 64, method="truncation", **KEYS))
    found = rows.set_index(["setting", "metric"])["value"]
    assert found["max64,cut1", "chair_s"] == 0 and found["max64,cut2", "chair_s"] == 0.5
    assert found["max64,cut1", "recall"] == found["max64,cut2", "recall"] == 3 / 8


def test_the_base_against_itself_differs_by_nothing(study):
    _, truth, _, base = study
    rows = score_rows(base, base, truth, method="base", **KEYS)
    changes = rows[rows["metric"].str.endswith("_diff")]
    assert len(changes) > 5 and (changes[["value", "lo", "hi"]] == 0).all(axis=None)


def test_truncated_rows_lack_what_is_not_defined(study):
    _, truth, benchmarks, base = study
    found = truncated(base.captions, truth, 6, benchmarks.amber)
    assert set(found.items["benchmark"]) == {"chair", "amber"}
    assert "amber_cover" in set(found.items["metric"]) and "amber_f1" not in set(found.items["metric"])
    assert {"pope_*", "mme_*", "amber_f1", "attn_*", "blank_effect", "ppl_grounded"} <= set(found.notes["metric"])
    assert found.notes["reason"].str.len().min() > 20
    rows = check_metrics(score_rows(found, base, truth, method="truncation", **KEYS))
    assert not rows["metric"].str.startswith(("pope", "attn")).any()
    assert {"chair_s", "chair_s_diff", "frontier_gap"} <= set(rows["metric"])


TRUTH = Truth(
    {i: frozenset({"cup", "bowl"}) for i in range(1, 5)},
    {},
    {i: f"{i}.png" for i in range(1, 5)},
    "singularise",
)


def table(*texts):
    return pd.DataFrame({"image_id": range(1, 5), "caption": texts, "n_tokens": 5, "eos": [True, True, True, False]})


def test_signs_by_hand():
    """The method drops the hallucinated dog: CHAIR falls, so its difference is negative."""
    base = truncated(table(*["There is a cup with a bowl and a dog."] * 4), TRUTH, 64)
    method = truncated(table(*["There is a cup with a bowl."] * 3, "There is a cup with a dog."), TRUTH, 64)
    rows = score_rows(method, base, TRUTH, method="alea-mixed", **KEYS).set_index("metric")
    assert rows.loc["chair_s", "value"] == 0.25 and rows.loc["chair_s_diff", "value"] == -0.75
    assert rows.loc["chair_i_diff", "value"] == pytest.approx(1 / 8 - 4 / 12)
    assert rows.loc["recall_diff", "value"] == pytest.approx(7 / 8 - 1)
    assert rows.loc["words_diff", "value"] == pytest.approx((3 * 7 + 7) / 4 - 10)
    assert rows.loc["objects_per_caption_diff", "value"] == pytest.approx(2 - 3)
    assert rows.loc["eos_rate", "value"] == 0.75 and rows.loc["eos_rate_diff", "value"] == 0
    # cut to no sentence at all the base has CHAIRs 0 at recall 0, whole 1 at 1; at recall 7/8 it has 7/8
    assert rows.loc["frontier_gap", "value"] == pytest.approx(7 / 8 - 1 / 4)
    assert (rows["n"] == 4).all() and rows.loc["distinct", "value"] == 0.5
    rows = rows.drop("distinct")  # no ratio of sums: it has no interval
    assert (rows["lo"] <= rows["value"]).all() and (rows["value"] <= rows["hi"]).all()


def test_truncation_drops_the_last_sentence():
    base = table("There is a cup. There is a dog.", "There is a cup.", "There is a cup. It is big. There is a dog.", "")
    found = truncated(base, TRUTH, 64)
    assert found.captions["caption"].tolist() == [
        "There is a cup.",
        "There is a cup.",
        "There is a cup. It is big.",
        "",
    ]


def test_evaluated_round_trip(study, tmp_path):
    _, _, _, base = study
    write_evaluated(base, tmp_path)
    again = read_evaluated(tmp_path)
    pd.testing.assert_frame_equal(again.items, base.items, check_dtype=False)
    pd.testing.assert_frame_equal(again.captions, base.captions, check_dtype=False)
    assert list(again.items.columns) == [*GROUP, "image_id", "metric", "num", "den"]
    assert (tmp_path / "notes.csv").read_text().splitlines()[1].startswith("kl_clean,")
    write_evaluated(truncated(base.captions, _all(base), 6), tmp_path)
    assert (tmp_path / "notes.csv").read_text().startswith("metric,reason")


def _all(found):
    ids = found.captions["image_id"]
    return Truth({i: frozenset({"cup"}) for i in ids}, {}, {i: "" for i in ids}, "singularise")
