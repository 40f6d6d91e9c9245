"""The explorer's data: which pictures, which filters, what a page holds; and the maps, where the answer is known."""

import base64
import json
import re
import shutil

import handmade
import numpy as np
import pandas as pd
import pytest
import torch
from explorer_data import SETTINGS, captions, write

from alea_lib.core.files import DataError
from alea_lib.core.paths import root
from alea_lib.datasets.scenes import companions
from alea_lib.evaluate.patches import patch_maps, windows
from alea_lib.metrics.truth import read_truth
from alea_lib.report.explorer import GROUPS, ExplorerSettings, called_for, choose_images, groups_of, publish

CUP_AND_SPOON = (frozenset({"cup"}), frozenset({"spoon"}), "singularise")  # a cup is there, and calls for a spoon


# ---- which pictures


@pytest.mark.parametrize(
    "base, edit, want",
    [
        ("A cup and a spoon.", "A cup.", ("better", "companion")),
        ("A cup.", "A cup and a dog.", ("worse",)),
        ("A dog. A dog.", "A cat.", ("still",)),
        ("A dog and a spoon.", "A spoon.", ("better", "still", "companion")),
        ("A cup.", "", ("right",)),
    ],
)
def test_filters_by_hand(base, edit, want):
    assert groups_of(base, edit, *CUP_AND_SPOON) == want


def test_a_companion_that_is_there_is_not_called_for():
    graph = {"cup": "spoon", "spoon": "bowl", "dog": "cat"}
    assert called_for(frozenset({"cup", "spoon"}), graph) == {"bowl"}


@pytest.fixture(scope="module")
def told(tiny_world):
    split = tiny_world.split("test")
    truth = read_truth(split.instances, split.captions)
    return captions(truth), truth


def test_filters_draw_in_turn_and_a_picture_once(told):
    texts, truth = told
    chosen = choose_images(texts, truth, companions(), ExplorerSettings(n_images=5, shown="edit"))
    assert sorted(chosen["drawn_for"]) == sorted(GROUPS) and chosen["image_id"].is_unique
    both = {m: dict(t.itertuples(index=False)) for m, t in texts.items()}
    for i, name in chosen.itertuples(index=False):
        called = called_for(truth[i], companions())
        assert name in groups_of(both["base"][i], both["edit"][i], truth[i], called, truth.family)
    everything = choose_images(texts, truth, companions(), ExplorerSettings(n_images=99, shown="edit"))
    assert set(everything["image_id"]) == set(truth.instances)


def test_the_seed_draws_and_the_order_of_rows_does_not(told):
    texts, truth = told
    mixed = {m: t.sample(frac=1, random_state=1) for m, t in texts.items()}

    def drawn(table, seed):
        return choose_images(table, truth, companions(), ExplorerSettings(n_images=6, shown="edit", seed=seed))

    pd.testing.assert_frame_equal(drawn(texts, 0), drawn(mixed, 0))
    assert any(not drawn(texts, 0).equals(drawn(texts, seed)) for seed in (1, 2, 3))


def test_a_method_without_captions_is_named(told):
    with pytest.raises(DataError, match="no captions of .'magic'."):
        choose_images(*told, companions(), ExplorerSettings(shown="magic"))


# ---- what the page holds


@pytest.fixture(scope="module")
def written(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explorer") / "run"
    return folder, *write(tiny_world, folder)


def test_captions_and_maps_come_back(written):
    folder, truth, told, chosen = written
    data = json.loads((folder / "explorer.json").read_text())
    assert [i["id"] for i in data["images"]] == chosen["image_id"].tolist()
    seen = 0
    for image in data["images"]:
        for method, parts in image["captions"].items():
            text = told[method].set_index("image_id").loc[image["id"], "caption"]
            assert "".join(p if isinstance(p, str) else p[0] for p in parts) == text
            words = [p for p in parts if not isinstance(p, str)]
            assert [(c in truth[image["id"]], state) for _, c, state, _ in words if state == "right"] == [
                (True, "right") for w in words if w[1] in truth[image["id"]]
            ]
            for k, (_, _, _, number) in enumerate(words):
                if method == "cut":
                    assert number == -1, "a method without maps"
                    continue
                attention, effect, share = data["maps"][number]
                effect = np.frombuffer(base64.b64decode(effect), np.int8) / 127 * data["scale"]["effect"]
                attention = np.frombuffer(base64.b64decode(attention), np.uint8) / 255 * data["scale"]["attention"]
                assert effect[k] == pytest.approx(2.0, abs=0.02) and effect[k + 1] == pytest.approx(-1.0, abs=0.02)
                assert attention[k - 1] == pytest.approx(0.3, abs=0.01) and share == 0.3
                seen += 1
    assert seen > 20


def test_the_page_holds_its_data_and_nothing_breaks_out(written, tmp_path):
    folder, *_ = written
    run = shutil.copytree(folder, tmp_path / "run")
    data = json.loads((run / "explorer.json").read_text())
    data["images"][0]["objects"] = ["</script><script>alert(1)"]
    (run / "explorer.json").write_text(json.dumps(data))
    page = publish(run, root() / "book" / "explorer", tmp_path / "html").read_text()
    kept = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert kept == data
    assert len(list((tmp_path / "html" / "pictures").glob("*.webp"))) == SETTINGS.n_images


def test_a_page_that_is_too_large_is_refused(written, tmp_path, monkeypatch):
    monkeypatch.setattr("alea_lib.report.explorer.MAX_BYTES", 1000)
    with pytest.raises(DataError, match="fewer images"):
        publish(written[0], root() / "book" / "explorer", tmp_path / "html")


# ---- the maps


def test_squares_around_a_patch_are_cut_at_the_edge():
    around = windows(16, 3)
    assert around[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert around[5].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert windows(16, 1).equal(torch.eye(16, dtype=torch.bool))
    with pytest.raises(DataError, match="no square"):
        windows(15, 3)
    with pytest.raises(ValueError, match="odd"):
        windows(16, 2)


def test_a_word_that_hangs_on_one_patch(tiny_world):
    vlm, split = handmade.blank_model(), tiny_world.split("activate").take(1)
    handmade.head_writes(vlm, 1, 2, handmade.FIRST, handmade.RIGHT, 50.0)
    truth = read_truth(split.instances, split.captions)
    table = pd.DataFrame({"image_id": split.ids, "caption": [handmade.POSITIVE.strip()]})
    found = patch_maps(vlm, split, handmade.picture(), table, truth, 3).iloc[0]
    effect = np.array(found["effect"])
    assert np.flatnonzero(np.abs(effect) > 1e-4).tolist() == [0, 1, 6, 7], "the squares that hold the first patch"
    assert (effect[[0, 1, 6, 7]] > 0.01).all()
    assert found["category"] == "cup" and table["caption"][0][found["start"] : found["end"]] == "cup"
    even = np.array(found["attention"])  # every head attends evenly to all that came before
    batch = vlm.encode(handmade.picture(), vlm.prompt("plain"), ["There is a cup."])
    assert even == pytest.approx(np.full(36, 1 / (batch.answer.item() + 3)), abs=1e-6)


def test_maps_by_hand(tiny, seen, told_words, tiny_world):
    split, table, truth, at = told_words
    found = patch_maps(tiny, split, seen[:1], table, truth, 1, batch_size=5)
    assert found["category"].tolist() == ["knife", "spoon", "bowl"]
    grey = tiny.features([np.full((96, 96, 3), 128, np.uint8)])
    for patch in (0, 20, 35):
        features = seen[:1].clone()
        features[0, patch] = grey[0, patch]
        for row, token in zip(found.itertuples(), at):
            want = log_p(tiny, seen[:1], table, token) - log_p(tiny, features, table, token)
            assert row.effect[patch] == pytest.approx(want, abs=1e-4)


@pytest.fixture(scope="module")
def told_words(tiny, tiny_world):
    split = tiny_world.split("activate").take(1)
    truth = read_truth(split.instances, split.captions)
    text = "A kitchen scene shows a knife and a spoon. There is also a bowl."
    words = tiny.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    at = [words.index(tiny.tokenizer.convert_tokens_to_ids(f" {w}")) for w in ("knife", "spoon", "bowl")]
    return split, pd.DataFrame({"image_id": split.ids, "caption": [text]}), truth, at


@torch.no_grad()
def log_p(vlm, features, table, token):
    batch = vlm.encode(features, vlm.prompt("plain"), table["caption"].tolist())
    at = batch.answer.item() + token
    h = vlm.hidden(vlm.embed(batch), batch.mask, batch)
    return vlm.head(h)[0, at - 1].log_softmax(-1)[batch.ids[0, at]].item()
