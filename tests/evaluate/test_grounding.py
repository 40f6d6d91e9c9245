"""Grounding and kept ability: by hand, and where the answer is known by construction."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.evaluate.grounding import (
    attention_heads,
    attention_share,
    blank_features,
    counterfactual,
    counterfactual_heads,
    swapped,
)
from alea_lib.evaluate.kept_ability import ability, first_references
from alea_lib.metrics.truth import read_truth
from alea_lib.models.delta import delta_of
from alea_lib.models.hooks import read_heads, replaced_heads, replaced_linear
from alea_lib.models.vlm import object_tokens


@pytest.fixture(scope="module")
def scene(tiny_world):
    split = tiny_world.split("activate")
    return split, read_truth(split.instances, split.captions)


def said(split, texts):
    return pd.DataFrame({"image_id": split.ids, "caption": texts})


@torch.no_grad()
def log_p(vlm, features, question, answer, at):
    """log p of the answer's token ``at`` of one item, from the whole sequence's logits."""
    batch = vlm.encode(features, question, [answer])
    embeds, start = vlm.embed(batch), batch.answer.item()
    token = batch.ids[0, start + at]
    h = vlm.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return vlm.head(h)[0, start + at - 1].log_softmax(-1)[token].item()


# ---- counterfactual


@pytest.mark.parametrize("n", [2, 3, 50])
def test_every_image_is_swapped_for_another(n):
    other = swapped(n, seed=4)
    assert sorted(other) == list(range(n)) and (other != np.arange(n)).all()
    assert (swapped(n, seed=4) == other).all()


def test_effects_by_hand(tiny, seen, scene, told):
    split, truth = scene
    found = counterfactual(tiny, split, seen, said(split, told), truth, "careful", batch_size=4)
    blank, other = blank_features(tiny, split)[None], swapped(6)
    for i in (0, 2, 4):
        want: dict = {}
        for category, at in object_tokens(tiny, told[i]):
            setting = "grounded" if category in truth[split.ids[i]] else "hallucinated"
            for metric, f in (("blank_effect", blank), ("swap_effect", seen[other[i]][None])):
                ask = (tiny.prompt("careful"), told[i], at)
                effect = log_p(tiny, seen[i : i + 1], *ask) - log_p(tiny, f, *ask)
                num, den = want.get((setting, metric), (0.0, 0))
                want[setting, metric] = num + effect, den + 1
        mine = found[found["image_id"] == split.ids[i]].set_index(["setting", "metric"])
        assert set(mine.index) == set(want)
        for key, (num, den) in want.items():
            assert mine.loc[key, "num"] == pytest.approx(num, abs=1e-4) and mine.loc[key, "den"] == den


def test_a_model_that_sees_the_blank_image_loses_nothing_without_it(tiny, scene, told):
    split, truth = scene
    same = blank_features(tiny, split).expand(6, -1, -1)
    found = counterfactual(tiny, split, same, said(split, told), truth)
    assert len(found) and found["num"].abs().max() < 1e-4


def test_batches_do_not_matter_and_empty_captions_are_left_out(tiny, seen, scene, told):
    split, truth = scene
    texts = [told[0], "", *told[2:]]
    one = counterfactual(tiny, split, seen, said(split, texts), truth, batch_size=1)
    many = counterfactual(tiny, split, seen, said(split, texts), truth, batch_size=6)
    assert split.ids[1] not in set(one["image_id"])
    pd.testing.assert_frame_equal(one, many, check_exact=False, atol=1e-4)


# ---- the image's way through layers and heads


@torch.no_grad()
def by_hand_route(vlm, features, blank, question, answer, at, layer, heads):
    """log p of one token, minus the same with some heads' outputs taken from the blank picture's run."""
    kept = {}
    with read_heads(vlm, kept.__setitem__, [layer]):
        b = vlm.encode(blank, question, [answer])
        vlm.hidden(vlm.embed(b), b.mask)

    def change(_, o):
        o = o.clone()
        o[:, :, heads] = kept[layer][:, :, heads]
        return o

    whole = log_p(vlm, features, question, answer, at)
    with replaced_heads(vlm, change, [layer]):
        return whole - log_p(vlm, features, question, answer, at)


def test_routes_by_hand(tiny, seen, scene, told):
    split, truth = scene
    found = counterfactual_heads(tiny, split, seen, said(split, told), truth, "careful", batch_size=4)
    assert set(found["head"]) == {-1, *range(tiny.n_heads)} and set(found["layer"]) == set(range(tiny.n_layers))
    blank = blank_features(tiny, split)[None]
    for i, layer, head in ((0, 0, 1), (2, 3, 0), (4, 1, -1), (4, 2, 3)):
        heads = list(range(tiny.n_heads)) if head == -1 else [head]
        ask = (tiny.prompt("careful"), told[i])
        want: dict = {}
        for category, at in object_tokens(tiny, told[i]):
            setting = "grounded" if category in truth[split.ids[i]] else "hallucinated"
            effect = by_hand_route(tiny, seen[i : i + 1], blank, *ask, at, layer, heads)
            want[setting] = want.get(setting, 0.0) + effect
        mine = found[(found["image_id"] == split.ids[i]) & (found["layer"] == layer) & (found["head"] == head)]
        assert mine.set_index("setting")["num"].to_dict() == pytest.approx(want, abs=1e-4)


# ---- attention by head


def test_shares_of_heads_average_to_the_variants(tiny, seen, told):
    table = pd.DataFrame({"image_id": range(6), "caption": told})
    ids, heads, last_max = attention_heads(tiny, seen, table, batch_size=4)
    assert ids == list(range(6)) and heads.shape == (6, tiny.n_layers, tiny.n_heads)
    assert ((heads > 0) & (heads < 1)).all()
    wide = attention_share(tiny, seen, table).pivot(index="image_id", columns="metric", values="num")
    assert wide["attn_all_mean"].to_numpy() == pytest.approx(heads.mean((1, 2)).numpy(), abs=1e-5)
    assert wide["attn_last_mean"].to_numpy() == pytest.approx(heads[:, -1].mean(1).numpy(), abs=1e-5)
    assert wide["attn_last_max"].to_numpy() == pytest.approx(last_max.numpy(), abs=1e-5)


# ---- ability


def test_nll_and_kl_by_hand(tiny, seen, told):
    name = tiny.address("down_proj", 1)
    weight = tiny.model.get_submodule(name).weight.detach()
    delta = delta_of(tiny, {name: weight * 1.5}, {})
    table = pd.DataFrame({"image_id": range(6), "caption": told})
    found = ability(tiny, seen, table, delta, "careful", batch_size=4).set_index(["metric", "image_id"])
    plain = ability(tiny, seen, table, None, "careful").set_index(["metric", "image_id"])
    assert set(plain.index.get_level_values(0)) == {"nll_grounded"}
    for i in (0, 3):
        batch = tiny.encode(seen[i : i + 1], tiny.prompt("careful"), [told[i]])
        base = tiny.answer_logits(batch).log_softmax(-1)
        with replaced_linear(tiny, {name: weight * 1.5}):
            now = tiny.answer_logits(batch).log_softmax(-1)
        wanted = batch.labels[batch.labels != -100]
        nll = [-p[range(len(wanted)), wanted].sum().item() for p in (base, now)]
        assert plain.loc[("nll_grounded", i), "num"] == pytest.approx(nll[0], abs=1e-3)
        assert found.loc[("nll_grounded", i), "num"] == pytest.approx(nll[1], abs=1e-3)
        kl = (base.exp() * (base - now)).sum().item()
        assert found.loc[("kl_clean", i), "num"] == pytest.approx(kl, abs=1e-3) and kl > 0.01
        assert found.loc[("kl_clean", i), "den"] == len(wanted)


def test_first_references_in_the_order_of_the_split(tiny_world):
    split = tiny_world.split("test").take(5).find(tiny_world.split("test").ids[4:1:-1])
    found = first_references(split)
    rows = json.loads(split.captions.read_text())["annotations"]
    assert found["image_id"].tolist() == split.ids
    assert found["caption"].tolist() == [next(r["caption"] for r in rows if r["image_id"] == i) for i in split.ids]


def test_a_missing_reference_is_named(tiny_world, tmp_path):
    split = tiny_world.split("test").take(3)
    data = json.loads(split.captions.read_text())
    data["annotations"] = [r for r in data["annotations"] if r["image_id"] != split.ids[1]]
    short = tmp_path / "captions.json"
    short.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"no caption for 1 images, e.g. \\[{split.ids[1]}\\]"):
        first_references(type(split)(split.name, split.ids, split.files, split.instances, short))
