"""The trial of the edits: what each method is, that cases are kept, and that the attacks are fresh."""

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.adversary.prefix import Prefix, save_prefix
from alea_lib.core.files import DataError
from alea_lib.core.tables import METHOD_NAMES
from alea_lib.edit import methods
from alea_lib.edit.methods import METHODS, EditRequest, adversary_settings, method_prefix, read_adversary
from alea_lib.experiments import edits
from alea_lib.experiments.edits import EditBench, EditCase, EditTrialSettings, edit_trial, trial_rows
from alea_lib.metrics.truth import read_truth
from alea_lib.models.delta import applied

SHORT = EditTrialSettings(layers=(1, 2), prefix_steps=2, attack_steps=2, max_new_tokens=6, epochs=1)


def table(ids):
    return pd.DataFrame(
        {"image_id": ids, "positive": ["a cup on a table."] * len(ids), "negative": ["a dog ."] * len(ids)}
    )


@pytest.fixture
def bench(tiny, tiny_world, tmp_path):
    activate, test = tiny_world.split("activate"), tiny_world.split("test").take(4)
    truth = read_truth(test.instances, test.captions).only(test.ids)
    return EditBench(
        tiny, table(activate.ids[:4]), table(activate.ids[4:]), activate, test, truth, SHORT, tmp_path / "t"
    )


# ---- what each method is


def test_methods_have_the_names_of_the_tables():
    assert set(METHODS) <= set(METHOD_NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings(name):
    changes = {"epochs": 9, "lr": 0.5, "kl": 0.7}
    s = EditRequest(name, (2, 3), ((1, 0),), seed=4, changes=changes).settings(6)
    assert s.seed == 4
    assert bool(s.prefix_share) == (METHODS[name].adversary != "")
    official, sft = name == "alea-official", name == "sft"
    assert (s.epochs, s.lr) == ((5, 1e-3) if official else (9, 0.5))  # as coded, whatever the profile says
    assert s.kl == (1.0 if official else 0.0 if sft else 0.7)


def test_places():
    def place(name):
        return EditRequest(name, (2, 3), ((4, 1), (0, 2))).settings(6).layers

    assert place("no-prefix") == (2, 3) and place("last-layer") == (5,) and place("sft") == tuple(range(6))
    assert len(place("random-layers")) == 2 and place("all-layers") == tuple(range(6))
    assert EditRequest("heads", (2, 3), ((4, 1), (0, 2))).settings(6).heads == ((4, 1), (0, 2))
    official = EditRequest("alea-official", (2, 3), official=(5,))
    assert official.settings(6).layers == (5,)  # the official code's own place
    assert EditRequest("alea-official", (2, 3), official=()).settings(6).layers == (2, 3)
    assert EditRequest("alea-mixed", (2, 3), official=(5,)).settings(6).layers == (2, 3)


def test_bad_methods_are_told():
    with pytest.raises(KeyError, match="alea-mixed"):
        EditRequest("alea-mixd", (2,)).settings(6)
    with pytest.raises(ValueError, match="located_heads"):
        EditRequest("heads", (2,)).settings(6)
    with pytest.raises(KeyError, match="contrast"):
        adversary_settings("gradient", None, [], 0)


def test_random_rows_have_the_tuned_norms(tiny, seen, told):
    pairs = pd.DataFrame({"negative": told, "positive": told[::-1]})
    tuned, found = (
        method_prefix(tiny, seen, pairs, EditRequest(name, (1,), prefix_length=3, prefix_steps=2))
        for name in ("alea-mixed", "random-prefix")
    )
    assert torch.allclose(found.rows.norm(dim=-1), tuned.rows.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(found.rows, tuned.rows)


def test_the_official_adversary_stands_at_an_index(tiny, seen, told):
    s = adversary_settings("official", tiny, told * 4, seen.shape[1], steps=3, length=2)
    assert s.place == "index" and s.index > seen.shape[1] and not s.reset and s.length == 2
    assert s.steps == 3 * 24 // 4  # three passes over the answers in batches of four, whatever the common steps are
    assert adversary_settings("imitation", tiny, told, seen.shape[1], steps=3).contrast == 0
    with pytest.raises(KeyError, match="imitation"):
        adversary_settings("random", tiny, told, seen.shape[1])


def test_each_method_reads_its_own_prefix(tiny, tmp_path):
    for i, name in enumerate(("contrast", "random", "official")):
        save_prefix(Prefix(torch.full((1, 4), float(i))), tmp_path / f"{name}.safetensors")
    wanted = {"alea-mixed": 0.0, "alea-corrected": 0.0, "random-prefix": 1.0, "alea-official": 2.0}
    for method, value in wanted.items():
        assert read_adversary(method, tmp_path).rows[0, 0] == value
    assert read_adversary("no-prefix", tmp_path) is None and read_adversary("sft", tmp_path) is None
    with pytest.raises(FileNotFoundError, match="05_adversary"):
        read_adversary("alea-mixed", tmp_path / "none")


@pytest.mark.parametrize("name", ["no-prefix", "heads"])
def test_what_is_edited_is_loaded_in_full_precision(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(methods, "load", lambda *args, **kwargs: asked.update(args=args, **kwargs))
    monkeypatch.setattr(methods, "layers_of", lambda key: 6)
    methods.load_for_edit("some", EditRequest(name, (2, 3), ((4, 1), (4, 2))), True)
    layers, parts = ((4,), ("o_proj",)) if name == "heads" else ((2, 3), None)
    assert asked["args"] == ("some", True, layers) and asked.get("edited_parts") == parts
    methods.load_for_edit("some", EditRequest("heads"), True)  # not located yet: any layer may be edited
    assert asked["args"] == ("some", True, None)


# ---- the trial


def test_a_trial_is_kept_by_case_and_leaves_the_model(bench, tiny, bits, monkeypatch):
    before = bits(tiny)
    cases = [EditCase("base"), EditCase("alea-mixed"), EditCase("random-prefix", label="chance")]
    found = edit_trial(bench, cases)
    assert bits(tiny) == before
    assert set(found["label"]) == {"base", "alea-mixed", "chance"} and set(found["condition"]) == set(edits.CONDITIONS)
    monkeypatch.setattr(edits, "fit_method", None)
    monkeypatch.setattr(edits, "captions", None)  # nothing is made again
    pd.testing.assert_frame_equal(edit_trial(bench, cases), found)


def test_the_attack_is_fresh_and_on_the_edited_model(bench, tiny):
    case = EditCase("no-prefix", seed=1)
    delta = bench.fit(case)
    bench.judge(case, delta)
    own = bench.attack(case).rows
    kept = methods.load_prefix(bench.folder / "attack-base-s1.safetensors")
    assert torch.equal(bench.attack(EditCase("base", 1)).rows, kept.rows)
    assert not torch.equal(own, bench.attack(EditCase("base", 1)).rows)  # same seed, another model
    settings = edits.adversary_preset("contrast", length=5, steps=2, seed=8)  # 7 + the case's seed
    answers = bench.fresh["negative"].tolist(), bench.fresh["positive"].tolist()
    with applied(tiny, delta):
        again = edits.fit_prefix(tiny, bench.fresh_features, answers[0], settings, answers[1])[0]
    assert torch.equal(again.rows, own)


def test_given_deltas_are_not_made_again(bench, monkeypatch):
    delta = bench.fit(EditCase("no-prefix"))
    monkeypatch.setattr(edits, "fit_method", None)
    case = EditCase("no-prefix", label="given", conditions=("clean",))
    assert len(edit_trial(bench, [case], {"given-s0": delta}))


def test_cases_of_one_name_are_refused(bench):
    with pytest.raises(ValueError, match="base-s0"):
        edit_trial(bench, [EditCase("base"), EditCase("base")])


def test_no_fresh_pairs_are_refused(bench, tiny, tiny_world):
    split = tiny_world.split("activate")
    with pytest.raises(ValueError, match="fresh"):
        EditBench(tiny, bench.pairs, bench.fresh[:0], split, bench.test, bench.truth, SHORT, bench.folder)


# ---- its record


def items(values: dict) -> pd.DataFrame:
    """(label, seed) -> chair_s of each image."""
    parts = [
        pd.DataFrame({"image_id": range(len(v)), "metric": "chair_s", "num": v, "den": 1.0}).assign(
            label=label, seed=seed
        )
        for (label, seed), v in values.items()
    ]
    return pd.concat(parts).assign(condition="clean", method=lambda t: t["label"])


def test_rows_are_means_over_seeds_and_paired():
    ones, zeros = np.ones(8), np.zeros(8)
    found = trial_rows(
        items({("base", 0): ones, ("base", 1): ones, ("sft", 0): zeros, ("sft", 1): np.r_[ones[:4], zeros[:4]]})
    )
    rows = found.set_index(["label", "against"])["value"]
    assert rows["base", ""] == 1 and rows["sft", ""] == 0.25 and rows["sft", "base"] == -0.75
    assert ("base", "base") not in rows.index and (found["seeds"] == 2).all() and (found["n"] == 8).all()


def test_a_missing_seed_is_told():
    with pytest.raises(DataError, match="seeds differ"):
        trial_rows(items({("base", 0): np.ones(4), ("sft", 0): np.ones(4), ("sft", 1): np.ones(4)}))
