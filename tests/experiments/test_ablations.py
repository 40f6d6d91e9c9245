"""Ablations: what is varied, that equal edits are made once, and that the record compares with the reference."""

import pandas as pd
import pytest

from alea_lib.core.files import DataError
from alea_lib.core.stats import summarise
from alea_lib.core.tables import METHOD_NAMES
from alea_lib.edit.methods import EditRequest
from alea_lib.experiments import ablations, edits
from alea_lib.experiments.ablations import FACTORS, Places, ablation_levels, ablation_rows, ablation_trial
from alea_lib.experiments.edits import BASE, EditBench, EditCase, EditTrialSettings
from alea_lib.metrics.frontier import frontier_gap
from alea_lib.metrics.truth import read_truth
from alea_lib.report.comparison import beside_published, published_ablations
from alea_lib.report.findings import ablation_finding

PLACES = Places(4, (1, 2), {name: (i % 4,) for i, name in enumerate(ablations.LOCATORS)})
SHORT = EditTrialSettings(layers=(1, 2), heads=((1, 0),), prefix_steps=2, attack_steps=2, max_new_tokens=6, epochs=3)


@pytest.fixture
def bench(tiny, tiny_world, tmp_path):
    activate, test = tiny_world.split("activate"), tiny_world.split("test").take(4)
    truth = read_truth(test.instances, test.captions).only(test.ids)

    def table(ids):
        return pd.DataFrame({"image_id": ids, "positive": "a cup on a table.", "negative": "a dog ."})

    own, fresh = table(activate.ids[:4]), table(activate.ids[4:])
    return EditBench(tiny, own, fresh, activate, test, truth, SHORT, tmp_path / "t")


# ---- what is varied


@pytest.mark.parametrize("name", FACTORS)
def test_every_level_is_an_edit_that_can_be_made(name):
    levels = ablation_levels({name: 2}, PLACES, n_pairs=3, largest=10_000)
    assert {e.level for e in levels} == set(FACTORS[name].levels) and FACTORS[name].reference in FACTORS[name].levels
    assert {e.case.seed for e in levels} == {0, 1} and {e.case.method for e in levels} <= set(METHOD_NAMES)
    labels = {e.level: (e.labels, e.case.label) for e in levels}
    assert len(set(labels.values())) == len(labels)  # no level is another one's case
    for each in levels:
        changes = {"epochs": 3, **each.case.changes}
        layers = changes.pop("layers", (1, 2))
        EditRequest(each.case.method, layers, ((1, 0),), seed=each.case.seed, changes=changes).settings(4)
        assert ("attacked" in each.case.conditions) == FACTORS[name].attacked


def test_a_level_varies_what_it_says():
    found = {(e.factor, e.level): e.case for e in ablation_levels(dict.fromkeys(FACTORS, 1), PLACES, 3, largest=10_000)}
    assert found["place", "all-layers"].changes["layers"] == (0, 1, 2, 3)
    assert found["place", "last-layer"].changes["layers"] == (3,) and not found["place", "located"].changes
    assert found["locator", "raw-l2"].changes["layers"] == PLACES.by_locator["raw-l2"]
    assert found["length", "20"].length == 20 and found["length", "5"].length is None
    assert found["pairs", "50"].n_pairs == 50
    assert found["pairs", "standard"].n_pairs == found["length", "20"].n_pairs == 3
    assert found["share", "0.25"].changes == {"prefix_share": 0.25}
    assert found["prefix", "tuned"].method == "alea-corrected" and found["prefix", "none"].method == "no-prefix"


def test_random_layers_follow_the_seed():
    levels = ablation_levels({"place": 8}, PLACES, 3)
    drawn = {e.case.changes["layers"] for e in levels if e.level == "random-layers"}
    assert len(drawn) > 1 and all(len(d) == 2 for d in drawn)
    assert len({e.case.label for e in levels if e.level == "random-layers"}) == 1


def test_equal_edits_share_a_case_and_all_its_conditions():
    levels = ablation_levels({"prefix": 1, "place": 1, "kl": 1, "length": 1}, PLACES, 3)
    name = {(e.factor, e.level): e.case.name for e in levels}
    assert name["prefix", "none"] == name["place", "located"]
    assert name["prefix", "tuned in half"] == name["kl", "0.2"] == name["length", "5"]
    conditions = {(e.factor, e.level): e.case.conditions for e in levels}
    assert conditions["place", "located"] == ("clean", "attacked") and conditions["place", "first"] == ("clean",)
    cases = {}
    for each in levels:
        assert cases.setdefault(each.case.name, each.case) == each.case


def test_levels_of_more_pairs_than_there_are_are_left_out():
    assert {e.level for e in ablation_levels({"pairs": 1}, PLACES, 3, largest=120)} == {"50", "100", "standard"}


def test_bad_ablations_are_told(bench):
    with pytest.raises(KeyError, match="unlikelihood"):
        ablation_levels({"plaice": 1}, PLACES, 3)
    with pytest.raises(DataError, match="50 pairs, there are 4"):
        ablation_trial({"detector": bench}, ablation_levels({"pairs": 1}, PLACES, 3, largest=60))


# ---- the trial and its record


def test_a_trial_of_ablations(bench, tiny, bits, monkeypatch):
    before = bits(tiny)
    levels = ablation_levels({"unlikelihood": 1, "dropout": 1}, PLACES, 3)
    benches = {"detector": bench}
    items = ablation_trial(benches, levels)
    assert bits(tiny) == before
    rows = ablation_rows(items, levels, benches)
    assert list(rows) == ablations.COLUMNS and not rows.duplicated(ablations.COLUMNS[:6]).any()
    values = rows[rows["against"] == ""].set_index(["factor", "level", "condition", "metric"])["value"]
    case = next(e.case for e in levels if e.level == "0.5")
    own = items[(items["label"] == case.label) & (items["metric"] == "chair_s")]
    want = summarise(own[["image_id", "metric", "num", "den"]])["value"].item()
    assert values["unlikelihood", "0.5", "clean", "chair_s"] == want
    gap = frontier_gap(bench.captions(EditCase(BASE)), bench.captions(case), bench.truth)["value"]
    assert values["unlikelihood", "0.5", "clean", "frontier_gap"] == gap
    assert values["unlikelihood", "0.5", "clean", "kl_clean"] > 0
    assert {c for f, _, c, _ in values.index if f == "dropout"} == {"clean", "attacked"}
    assert {c for f, _, c, _ in values.index if f == "unlikelihood"} == {"clean"}
    against = rows[rows["against"] != ""].set_index(["factor", "level", "condition", "metric"])
    assert set(against.loc["dropout", "against"]) == {"0.0"} and ("dropout", "0.0") not in against.index.droplevel(
        [2, 3]
    )
    one, two = (values["dropout", level, "clean", "words"] for level in ("0.3", "0.0"))
    assert against.loc[("dropout", "0.3", "clean", "words"), "value"] == pytest.approx(one - two)
    for name in ("fit_method", "captions"):  # all is kept: nothing is made again
        monkeypatch.setattr(edits, name, None)
    monkeypatch.setattr(ablations, "ability", None)
    pd.testing.assert_frame_equal(ablation_trial(benches, levels), items)
    assert "`dropout`" in ablation_finding(rows)


def test_the_finding_says_what_is_shown_and_what_is_not():
    made = [
        ("none", "clean", "", 0.02, 0.01, 0.03),
        ("tuned", "clean", "none", -0.002, -0.01, 0.01),
        ("tuned", "attacked", "none", -0.4, -0.5, -0.3),
        ("first", "clean", "none", 0.0, 0.0, 0.0),
    ]
    rows = pd.DataFrame(made, columns=["level", "condition", "against", "value", "lo", "hi"])
    rows = rows.assign(factor="prefix", metric="chair_s", n=300, seeds=5)
    assert ablation_finding(rows).splitlines() == [
        "- Is it the prefix? (`prefix`, 5 seeds, 300 images) none 2.0% (1.0% to 3.0%).",
        "  - Shown (against none): tuned under attack -40.0 points (-50.0 to -30.0).",
        "  - Not shown (against none): tuned.",
        "  - Equal on every image (against none): first.",
    ]


def test_labels_come_from_their_own_pairs(bench, tiny, tiny_world, tmp_path):
    pairs, activate = bench.pairs.assign(positive="a bowl."), tiny_world.split("activate")
    other = EditBench(tiny, pairs, bench.fresh, activate, bench.test, bench.truth, SHORT, tmp_path / "other")
    levels = ablation_levels({"labels": 1}, PLACES, 3)
    benches = {"detector": bench, "truth": other}
    rows = ablation_rows(ablation_trial(benches, levels), levels, benches)
    assert set(rows[rows["factor"] == "labels"]["level"]) == {"detector", "truth"}
    drift = rows[(rows["metric"] == "kl_clean") & (rows["against"] == "truth")]
    assert not len(drift) and (rows["against"] == "detector").any()
    assert len(list((tmp_path / "other").glob("no-prefix*-s0.safetensors"))) == 1


def test_published_tables_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path))
    rows = pd.DataFrame({"factor": ["place", "kl"], "against": ["", ""], "value": [1.0, 2.0]})

    class Run:
        def uses(self, name):
            return tmp_path / name

    none = published_ablations(Run(), "long")
    assert beside_published(none, rows, "live")["source"].tolist() == ["live", "live"]
    folder = tmp_path / "data" / "results" / "long"
    folder.mkdir(parents=True)
    rows[:1].assign(value=9.0).to_csv(folder / "ablations.csv", index=False)
    found = beside_published(published_ablations(Run(), "long"), rows, "live").set_index("factor")
    assert found.loc["place", ["source", "value"]].tolist() == ["long", 9.0] and found.loc["kl", "source"] == "live"
    assert found.loc["place", "against"] == ""
