"""The trial of the locators on the tiny model with made-up implants, and what helps where nothing was implanted."""

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest

from alea_lib.experiments import locators
from alea_lib.experiments.locators import TrialSettings, edit_benefit, knockout_benefit, locator_trial, mean_scores
from alea_lib.metrics.truth import read_truth
from alea_lib.models.hooks import replaced_linear

PAIRS = [
    ("There is a cup.", "There is a cup with a spoon.", ["spoon"]),
    ("A kitchen scene shows a knife.", "A kitchen scene shows a knife. There is a bowl.", ["bowl"]),
    ("There are two apples.", "There are two apples with a banana.", ["banana"]),
    ("There is a dog.", "There is a dog. There is also a bird.", ["bird"]),
]


@pytest.fixture
def subjects(tiny, monkeypatch):
    """Two implants that enlarge one down-projection, and one of a head; pairs are the same for all."""
    rows = [("layer1", (1,), (), "strong"), ("layer3", (3,), (), "weak"), ("head2.1", (2,), (1,), "strong")]
    index = pd.DataFrame(rows, columns=["name", "layers", "heads", "strength"])

    @contextmanager
    def implanted(vlm, name):
        layer = index.set_index("name").loc[name, "layers"][0]
        weight = vlm.module("down_proj", layer).weight.detach()
        with replaced_linear(vlm, {vlm.address("down_proj", layer): 3 * weight}):
            yield vlm

    def activate(vlm, features, ids, files, supported, settings):
        table = pd.DataFrame(PAIRS, columns=["positive", "negative", "wrong"])
        return table.assign(image_id=ids[: len(PAIRS)], label_source=settings.label_source)

    monkeypatch.setattr(locators, "implants", lambda: index)
    monkeypatch.setattr(locators, "implanted", implanted)
    monkeypatch.setattr(locators, "activate", activate)
    return index


@pytest.fixture(scope="module")
def scene(tiny_world):
    split = tiny_world.split("activate")
    return split, read_truth(split.instances, split.captions)


def test_a_trial_of_layers(tiny, seen, scene, subjects, bits):
    split, truth = scene
    names = ("raw-l2", "ablation", "random", "last")
    settings = TrialSettings(locators=names, views=("object",), n_images=6, n_pairs=3, resamples=2)
    before = bits(tiny)
    found = locator_trial(tiny, ["layer1", "layer3"], split, seen, truth, settings)
    assert bits(tiny) == before
    rows = found.rows
    views = {f"{n}, object" for n in locators.STATES}
    assert set(rows["locator"]) == {*names, *views, "official"}
    assert len(rows) == 2 * 3 * (len(names) + len(views) + 1)  # models, the pairs and two resamples, locators
    assert (rows["n_pairs"] == 3).all() and set(rows["seed"]) == {0, 1, 2}
    assert rows.loc[rows["seed"] == 0, "forwards"].notna().all() and rows.loc[rows["seed"] > 0, "seconds"].isna().all()
    last = rows[rows["locator"] == "last"]
    assert (last.loc[last["model"] == "layer3", "rank"] == 1).all()  # the control says 3 of 4 whatever is there
    assert (last.loc[last["model"] == "layer1", "rank"] == 3).all()
    assert set(found.scores.columns) == {"model", "locator", "layer", "score"}


def test_resamples_differ_from_the_pairs_as_they_are():
    """Two pairs that disagree: drawn anew, either may have the say, so the truth's rank varies over resamples."""
    pairs = [(0, [5.0, 1.0]), (1, [0.0, 2.0])]
    rows = [("a", pair, layer, v) for pair, scores in pairs for layer, v in enumerate(scores)]
    scores = pd.DataFrame(rows, columns=["locator", "pair", "layer", "score"])
    keys = {"model": "m", "strength": "strong", "n_pairs": 2}
    found = pd.concat(locators._resampled(scores, [0], TrialSettings(resamples=20), keys, 0))
    assert set(found["rank"]) == {1.0, 2.0} and found["seed"].tolist() == list(range(1, 21))


def test_the_random_control_is_drawn_anew_for_each_model(tiny, seen, scene, subjects):
    split, truth = scene
    settings = TrialSettings(locators=("random",), n_images=6, n_pairs=2, resamples=0)
    scores = locator_trial(tiny, ["layer1", "layer3"], split, seen, truth, settings).scores
    orders = [part["score"].tolist() for _, part in scores[scores["locator"] == "random"].groupby("model")]
    assert len(orders) == 2 and orders[0] != orders[1]


def test_a_trial_of_heads(tiny, seen, scene, subjects):
    split, truth = scene
    settings = TrialSettings("head", locators=("gradient", "random"), n_images=6, n_pairs=2, resamples=1)
    found = locator_trial(tiny, ["head2.1"], split, seen, truth, settings)
    assert set(found.rows["target"]) == {"head"} and len(found.rows) == 4
    assert len(found.scores) == 2 * tiny.n_layers * tiny.n_heads
    first = found.rows[(found.rows["seed"] == 0) & (found.rows["locator"] == "gradient")]
    scores = found.scores[found.scores["locator"] == "gradient"].set_index(["layer", "head"])["score"]
    assert first["rank"].item() == scores.rank(ascending=False)[2, 1]


def test_mean_scores_by_hand():
    scores = pd.DataFrame({"locator": "a", "pair": [0, 1, 0, 1], "layer": [0, 0, 1, 1], "score": [1.0, 3.0, 5.0, 5.0]})
    assert mean_scores(scores, "layer")["score"].tolist() == [2.0, 5.0]


# ---- what helps


def test_edits_of_single_layers_are_compared_with_the_whole_model(tiny, seen, scene, bits):
    split, truth = scene
    before = bits(tiny)
    found = edit_benefit(
        tiny, seen, [p for p, _, _ in PAIRS[:3]] * 2, [(0,), (1, 3)], split, truth, 6, epochs=1, batch=3
    )
    assert bits(tiny) == before
    assert set(found["place"]) == {"0", "1+3"} and set(found["metric"]) <= {"chair_s", "chair_i", "recall"}
    assert (found["n"] <= 6).all() and (found["lo"] <= found["value"]).all()


def test_heads_that_are_switched_off(tiny, seen, scene):
    split, truth = scene
    everything = [(layer, head) for layer in range(tiny.n_layers) for head in range(tiny.n_heads)]
    found = knockout_benefit(tiny, {"none": [], "all": everything}, split, truth, 6).set_index(["place", "metric"])
    assert (found.loc["none", ["value", "lo", "hi"]] == 0).all(axis=None)
    told = np.array([found.loc[("all", m), "value"] for m in ("chair_s", "recall") if ("all", m) in found.index])
    assert np.isfinite(told).all() and len(told)


@pytest.mark.slow
def test_the_same_trial_over_a_four_bit_base():
    """Shipped implants in a clean model whose other matrices are NF4: the causal locator finds the layer here too."""
    pytest.importorskip("bitsandbytes")
    from alea_lib.core.paths import root
    from alea_lib.datasets.scenes import compose, sample
    from alea_lib.datasets.world import Split
    from alea_lib.metrics.truth import Truth
    from alea_lib.models.loading import load

    clean = load("scenes-clean", four_bit=True, edited_layers=None, edited_parts=("down_proj", "o_proj"))
    scenes = [sample("activate", i) for i in range(24)]
    features = clean.features([compose(scene)[0] for scene in scenes])
    ids = [scene.image_id for scene in scenes]
    truth = Truth({s.image_id: frozenset(s.kinds) for s in scenes}, {}, {}, "singularise")
    split = Split("activate", ids, [root() / f"{i}.png" for i in ids], root(), root())
    settings = TrialSettings(locators=("ablation", "raw-l2"), n_images=24, n_pairs=4, resamples=0)
    rows = locator_trial(clean, ["layer1-s0-strong"], split, features, truth, settings).rows.set_index("locator")
    assert rows.loc["ablation", "rank"] == 1
    heads = TrialSettings("head", locators=("gradient",), n_images=24, n_pairs=2, resamples=0)
    found = locator_trial(clean, ["head3.1-s0-strong"], split, features, truth, heads).rows
    assert np.isfinite(found["rank"]).all() and found["rank"].between(1, 36).all()
