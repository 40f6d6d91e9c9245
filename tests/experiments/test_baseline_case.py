"""From a row to a record: tuning by its rule, measures, cost, and taking up where one stopped."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.baselines.registry import Baseline, baseline
from alea_lib.evaluate.answers import captions
from alea_lib.evaluate.scoring import read_benchmarks
from alea_lib.experiments.baseline_trial import EvaluationSetup, EvaluationSplit, baseline_case, choose, tune
from alea_lib.experiments.overhead import CostSettings, Held, baseline_cost, relative_cost
from alea_lib.models.delta import delta_of
from alea_lib.models.hooks import full_weight


@pytest.fixture(scope="module")
def setup(tiny, tiny_world, seen, told):
    pairs = pd.DataFrame({"positive": told, "negative": told[::-1], "wrong": [["dog"]] * 6})
    test = tiny_world.split("test").take(6)
    return EvaluationSetup(
        tiny, pairs, seen, EvaluationSplit(tiny, tiny_world.split("validate"), 8), EvaluationSplit(tiny, test, 8),
        read_benchmarks(tiny_world, test.ids[:2]), n_grounding=2,
    )  # fmt: skip


def random_edit(vlm, features, pairs, settings):
    weight = full_weight(vlm, vlm.address("down_proj", 1))
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(settings.role)))
    return delta_of(vlm, {vlm.address("down_proj", 1): weight + noise}, {})


@pytest.fixture
def edit():
    return Baseline("sft", "delta", random_edit, baseline("careful-prompt").settings, grid=({"role": "plain"}, {}))


def record(*rows):
    return pd.DataFrame(rows, columns=["recall", "frontier_gap"])


def test_the_rule_of_tuning():
    assert choose(record((0.78, 0.05), (0.77, 0.10), (0.76, 0.50)), base_recall=0.80) == 1
    assert choose(record((0.80, 0.1), (0.81, 0.1)), base_recall=0.80) == 0  # the first of equals
    assert choose(record((0.50, 0.9), (0.60, -0.2)), base_recall=0.80) == 1  # none keeps the recall


def test_tuning_tries_the_whole_grid_on_validate_pictures(setup):
    ready, table, passes = tune(setup, baseline("stop-early"))
    assert table["settings"].map(json.loads).tolist() == list(baseline("stop-early").grid)
    assert (table["n"] == len(setup.validate.split.ids)).all() and table["chosen"].sum() == 1
    chosen = table[table["chosen"]].iloc[0]
    assert ready.settings == baseline("stop-early", **json.loads(chosen["settings"])).settings
    assert passes == {"forwards": 0, "backwards": 0}
    again = tune(setup, baseline("stop-early"))[1]
    pd.testing.assert_frame_equal(table, again)


def test_truncation_cuts_the_base_model(setup):
    told = setup.captions(baseline("truncation"), setup.test)
    assert told["image_id"].tolist() == setup.test.base["image_id"].tolist()
    assert all(b.startswith(t) for t, b in zip(told["caption"], setup.test.base["caption"], strict=True))
    assert set(setup.evaluated(baseline("truncation")).items["benchmark"]) == {"chair", "amber"}


def test_a_decoding_method_has_no_teacher_forced_measures(setup):
    found = setup.evaluated(baseline("vcd"))
    assert set(found.items["benchmark"]) == {"chair", "pope", "mme", "amber"}
    assert {"attn_*", "blank_effect", "ppl_grounded"} <= set(found.notes["metric"])
    assert set(setup.evaluated(None).items["benchmark"]) == {"chair", "pope", "mme", "amber", "grounding", "ability"}


def test_on_top_of_an_edit_both_count(setup, edit):
    ready, *_ = setup.fitted(edit)
    both = setup.evaluated(baseline("stop-early", strength=50.0), ready.delta)
    assert set(both.captions["caption"]) == {""}
    only = setup.evaluated(None, ready.delta).captions
    greedy = setup.evaluated(baseline("beam", beams=1), ready.delta).captions
    assert only["caption"].tolist() == greedy["caption"].tolist()
    assert only["caption"].tolist() != setup.test.base["caption"].tolist()
    with pytest.raises(ValueError, match="cannot stand on another"):
        setup.evaluated(ready, ready.delta)


def test_the_careful_prompt_is_another_question(setup, tiny):
    told = setup.captions(baseline("careful-prompt"), setup.test)
    asked = captions(tiny, setup.test.split, setup.test.features, "careful", 8)
    pd.testing.assert_frame_equal(told, asked)


@pytest.mark.parametrize("name", ["edit", "vcd"])
def test_a_case_is_taken_up_from_its_folder(setup, edit, tmp_path, monkeypatch, name):
    row = edit if name == "edit" else baseline("vcd")
    first = baseline_case(setup, row, tmp_path / "case")
    monkeypatch.setattr("alea_lib.experiments.baseline_trial.tune", None)  # nothing may be tuned again
    second = baseline_case(setup, row, tmp_path / "case")
    assert second.baseline.settings == first.baseline.settings and second.passes == first.passes
    pd.testing.assert_frame_equal(second.tuning, first.tuning)
    pd.testing.assert_frame_equal(second.evaluated.captions, first.evaluated.captions)
    assert setup.captions(second.baseline, setup.test).equals(setup.captions(first.baseline, setup.test))


def test_a_case_that_was_stopped_is_begun_again(setup, tmp_path):
    baseline_case(setup, baseline("beam"), tmp_path)
    (tmp_path / "case.json").unlink()
    (tmp_path / "captions.jsonl").write_text("half a li")
    assert len(baseline_case(setup, baseline("beam"), tmp_path).evaluated.captions) == 6


def test_cost_is_paired_over_the_same_batches(setup):
    rows = {"beam": baseline("beam", beams=4), "vcd": baseline("vcd"), "truncation": baseline("truncation")}
    table = baseline_cost(setup, rows, CostSettings(batches=2, batch=3, tokens=6))
    assert table["method"].tolist() == ["beam", "vcd"] * 2
    assert np.allclose(table["relative"], table["seconds"] / table["base_seconds"])
    short = relative_cost(table).set_index("method")
    assert (short["lo"] <= short["relative"]).all() and (short["relative"] <= short["hi"]).all()
    assert (short["memory"] > 1.2).all()  # a second cache, or four
    with pytest.raises(ValueError, match="needs 400 test images, there are 6"):
        baseline_cost(setup, rows, CostSettings(batches=100, batch=4, tokens=6))


def test_held_bytes_by_hand():
    outside = torch.zeros(1000)
    with Held() as held:
        a = torch.zeros(256)  # 1 KiB
        b = a.view(16, 16)  # no memory of its own
        del a, b
        c = torch.ones(512)  # 2 KiB
        d = c + 1  # 2 KiB more: 4 KiB at once
        outside.add_(1)
    assert held.peak == 4096 and held.now == 4096
    del c, d
    assert held.now == 0
