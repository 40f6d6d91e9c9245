"""Model passes for measures: attention shares by hand, captions, and POPE answers by id."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from alea_lib.evaluate.answers import captions, yes_no_answers
from alea_lib.evaluate.grounding import ATTENTION, attention_share
from alea_lib.evaluate.kept_ability import ability
from alea_lib.metrics.pope import pope, read_pope
from alea_lib.models import delta
from alea_lib.models.delta import delta_of
from alea_lib.models.hooks import full_weight


def eager(tiny, features, question, answer):
    """The three shares of one item from the eager kernel's full attention matrices."""
    batch = tiny.encode(features, question, [answer])
    image = batch.ids[0] == tiny.model.config.image_token_id
    embeds, start = tiny.embed(batch), batch.answer.item()
    n = batch.ids.shape[1] - start
    tiny.model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            layers = tiny.language_model(inputs_embeds=embeds, output_attentions=True, use_cache=False).attentions
    finally:
        tiny.model.set_attn_implementation({"text_config": "sdpa"})
    rows = [a[0, :, start - 1 : start + n - 1] for a in layers]  # the positions that predict the answer
    last = rows[-1]
    top = last.amax(0)
    return {
        "attn_last_max": (top[:, image].sum(-1) / top.sum(-1)).mean().item(),
        "attn_last_mean": last[..., image].sum(-1).mean().item(),
        "attn_all_mean": torch.stack([r[..., image].sum(-1).mean() for r in rows]).mean().item(),
    }


def test_shares_by_hand(tiny, seen, told):
    table = pd.DataFrame({"image_id": range(6), "caption": told})
    found = attention_share(tiny, seen, table, "careful", batch_size=4)
    assert len(found) == 18 and (found["den"] == 1).all() and set(found["metric"]) == set(ATTENTION)
    wide = found.pivot(index="image_id", columns="metric", values="num")
    for i in (0, 1, 4):
        want = eager(tiny, seen[i : i + 1], tiny.prompt("careful"), told[i])
        assert wide.loc[i].to_dict() == pytest.approx(want, abs=1e-5)
    assert ((found["num"] > 0) & (found["num"] < 1)).all()


def test_empty_captions_are_left_out(tiny, seen, told):
    table = pd.DataFrame({"image_id": range(6), "caption": [told[0], "", told[2], "  ", told[4], told[5]]})
    found = attention_share(tiny, seen, table)
    assert sorted(set(found["image_id"])) == [0, 2, 4, 5]
    full = attention_share(tiny, seen, pd.DataFrame({"image_id": range(6), "caption": told}))
    both = found.merge(full, on=["image_id", "metric"])  # the others keep their own images
    assert both["num_x"].to_numpy() == pytest.approx(both["num_y"].to_numpy(), abs=1e-5)


def test_captions_of_a_split(tiny, tiny_world):
    split = tiny_world.split("activate")
    features = tiny.features(split.files)
    table = captions(tiny, split, features, "careful", 5)
    assert list(table.columns) == ["image_id", "caption", "n_tokens", "eos"] and table["image_id"].tolist() == split.ids
    alone = tiny.generate(features[2:3], tiny.prompt("careful"), 5)[0]
    assert tuple(table.loc[2, ["caption", "n_tokens", "eos"]]) == (alone.text, alone.n_tokens, alone.eos)
    assert (table["n_tokens"] <= 5).all()


def test_an_edit_is_verified_once_whatever_the_batches(tiny, seen, told, monkeypatch):
    name = tiny.address("down_proj", 1)
    edit = delta_of(tiny, {name: full_weight(tiny, name) * 1.1}, {})
    hashed, one = [], delta.weight_hash
    monkeypatch.setattr(delta, "weight_hash", lambda weight: hashed.append(1) or one(weight))
    table = pd.DataFrame({"image_id": range(6), "caption": told})
    whole = ability(tiny, seen, table, edit)
    assert len(hashed) == 1
    pieces = ability(tiny, seen, table, edit, batch_size=2)
    assert len(hashed) == 2 and pieces["num"].sum() == pytest.approx(whole["num"].sum(), rel=1e-4)
    wrong = replace(edit, base={name: "another"})
    with pytest.raises(delta.WrongBase):
        ability(tiny, seen, table, wrong)


# ---- POPE


@pytest.fixture(scope="module")
def questions(tiny_world):
    """All settings together, as the study asks them: ids made unique by their setting."""
    files = {s: read_pope(tiny_world.pope(s)) for s in ("random", "popular", "adversarial")}
    parts = [q.assign(setting=s, question_id=s + q["question_id"].astype(str)) for s, q in files.items()]
    return pd.concat(parts, ignore_index=True)


class Counting:
    """The tiny model, counting what it is asked."""

    def __init__(self, vlm):
        self.vlm, self.row, self.asked = vlm, vlm.row, []

    def generate(self, features, questions, **options):
        self.asked += list(questions)
        return self.vlm.generate(features, questions, **options)


def test_equal_questions_are_asked_once_and_keep_their_ids(tiny, tiny_world, questions):
    split = tiny_world.split("test")
    features = tiny.features(split.files)
    counting = Counting(tiny)
    shuffled = questions.sample(frac=1, random_state=0)
    answers = yes_no_answers(counting, split, features, shuffled)
    assert len(counting.asked) == len(questions.drop_duplicates(["image", "text"])) < len(questions)
    assert sorted(answers["question_id"]) == sorted(questions["question_id"])
    row = {f.name: i for i, f in enumerate(split.files)}
    by_id = questions.set_index("question_id")
    for answer in answers.head(4).itertuples():
        asked = by_id.loc[answer.question_id]
        one = tiny.generate(features[row[asked["image"]]][None], [asked["text"]], max_new_tokens=4)[0].text
        assert answer.answer == one


def test_answers_can_be_scored_by_setting(tiny, tiny_world, questions):
    split = tiny_world.split("test")
    answers = yes_no_answers(tiny, split, tiny.features(split.files), questions)
    found = pope(answers, questions)
    assert sorted(found.by_setting) == ["adversarial", "popular", "random"]


def test_images_that_the_split_lacks(tiny, tiny_world, seen, questions):
    with pytest.raises(ValueError, match="questions are about images that split 'activate' lacks.*scenes_test"):
        yes_no_answers(tiny, tiny_world.split("activate"), seen, questions)
