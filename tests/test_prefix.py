"""The adversary: where its rows stand, its budget, what it learns, and that the model stays as it was."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.prefix import (
    Prefix,
    PrefixSettings,
    _adversary_loss,
    blind_logits,
    embedding_scale,
    fit_prefix,
    load_prefix,
    prefix_evidence,
    random_prefix,
    save_prefix,
)  # fmt: skip
from alea_lib.vlm import scored

QUESTIONS = [
    "Please describe this image in detail.", "Is there a cup in the image?", "Is the background blue?",
    "Please describe only what is clearly visible.", "Is there a dog in the image?",
    "Is there a bus in the image?",
]  # fmt: skip


def marked(tiny, place, k=3):
    """A prefix whose rows can be told from every embedding."""
    width = tiny.model.get_input_embeddings().weight.shape[1]
    return Prefix(torch.arange(k)[:, None] + 1000.0 + torch.zeros(k, width), place)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("place", ["answer", "question"])
def test_rows_stand_in_their_place_in_every_item(tiny, seen, told, place, side):
    batch = tiny.encode(seen, QUESTIONS, told, side=side)
    assert len(set(batch.answer.tolist())) > 2  # the batch is ragged
    plain = tiny.embed(batch)
    prefix = marked(tiny, place)
    embeds, mask, labels = prefix.insert(batch, plain)
    assert embeds.shape[1] == mask.shape[1] == labels.shape[1] == plain.shape[1] + 3
    image, row_ids = tiny.model.config.image_token_id, batch.ids.tolist()
    for i, row in enumerate(row_ids):
        tail = tiny._answer_ids(told[i], True)
        if place == "answer":  # directly before the first token of the answer
            start = len(row) - len(tail) if side == "left" else int(batch.mask[i].sum()) - len(tail)
        else:  # directly after the last image token
            start = len(row) - row[::-1].index(image)
        assert torch.equal(embeds[i, start : start + 3], prefix.rows)
        assert torch.equal(torch.cat([embeds[i, :start], embeds[i, start + 3 :]]), plain[i])
        assert mask[i, start : start + 3].tolist() == [1, 1, 1] and mask[i].sum() == batch.mask[i].sum() + 3
        assert labels[i, start : start + 3].tolist() == [-100] * 3
        assert labels[i][labels[i] != -100].tolist() == tail
        if place == "answer":  # the last row of the prefix predicts the answer's first token
            assert scored(labels)[i].nonzero()[0].item() == start + 2


@torch.no_grad()
def test_padding_does_not_change_what_a_prefix_does(tiny, seen, told):
    prefix = random_prefix(tiny, PrefixSettings())
    batch = tiny.encode(seen, QUESTIONS, told)
    embeds, mask, labels = prefix.insert(batch, tiny.embed(batch))
    together = tiny.answer_logits(batch, embeds, mask, scored(labels))
    alone = []
    for i in range(len(told)):
        one = tiny.encode(seen[i : i + 1], QUESTIONS[i], told[i : i + 1])
        e, m, lab = prefix.insert(one, tiny.embed(one))
        alone.append(tiny.answer_logits(one, e, m, scored(lab)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_generation_sees_the_prefix(tiny, seen):
    prompt = tiny.prompt("plain")
    plain = tiny.generate(seen, prompt, 6)
    strong = Prefix(random_prefix(tiny, PrefixSettings()).rows * 5)
    under = tiny.generate(seen, prompt, 6, prefix=strong)
    assert plain != under
    batch = tiny.encode(seen[:1], prompt, side="left")
    embeds, mask, _ = strong.insert(batch, tiny.embed(batch))
    with torch.no_grad():
        logits = tiny.model(inputs_embeds=embeds, attention_mask=mask).logits[0, -1]
    logits[tiny.model.config.image_token_id] = -torch.inf
    first = tiny.tokenizer.decode([logits.argmax().item()]).strip()
    assert under[0].text.startswith(first)


# ---- tuning


@pytest.fixture(scope="module")
def tuned(tiny, seen, told):
    return fit_prefix(tiny, seen, told, PrefixSettings(steps=25, batch=6, lr=0.05, norm=1.5))


def test_tuning_lowers_its_loss(tiny, seen, told, tuned):
    prefix, curve = tuned
    settings = PrefixSettings(batch=6, neglect=0.5)
    batch = tiny.encode(seen, tiny.prompt("plain"), told)

    def loss(which):
        with torch.no_grad():
            nll, neglect = _adversary_loss(tiny, batch, which, settings.neglect)
        return (nll + settings.neglect * neglect).item()

    before = loss(random_prefix(tiny, settings))
    assert loss(prefix) < 0.97 * before
    assert list(curve.columns) == ["step", "nll", "neglect"] and len(curve) == 25
    assert curve["nll"][0] + 0.5 * curve["neglect"][0] == pytest.approx(before, rel=1e-4)


def test_the_norm_budget_is_kept(tiny, seen, told, tuned):
    limit = embedding_scale(tiny)
    assert (tuned[0].rows.norm(dim=-1) <= 1.5 * limit * (1 + 1e-5)).all()
    tight, _ = fit_prefix(tiny, seen, told, PrefixSettings(steps=3, batch=6, lr=5.0, norm=0.5))
    torch.testing.assert_close(tight.rows.norm(dim=-1), torch.full((5,), 0.5 * limit), rtol=1e-4, atol=0)
    weights = tiny.model.get_input_embeddings().weight
    assert limit == pytest.approx(weights.norm(dim=1).mean().item(), rel=1e-5)


def test_tuning_leaves_the_model_bit_equal(tiny, seen, told, bits):
    before = bits(tiny)
    fit_prefix(tiny, seen, told, PrefixSettings(steps=2, batch=4))
    assert bits(tiny) == before
    assert all(p.grad is None and not p.requires_grad for p in tiny.model.parameters())


def test_tuning_depends_on_the_seed_alone(tiny, seen, told):
    first, again, else_ = (
        fit_prefix(tiny, seen, told, PrefixSettings(steps=2, batch=3, seed=s))[0].rows for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, else_)


def test_neglect_pulls_towards_the_blind_answer(tiny, seen, told):
    """With a large weight, the output under the prefix comes nearer to the output without an image."""
    curves = {
        w: fit_prefix(tiny, seen, told, PrefixSettings(steps=25, batch=6, lr=0.05, neglect=w))[1]["neglect"]
        for w in (0.01, 20.0)
    }
    assert curves[20.0].iloc[-1] < 0.9 * curves[20.0].iloc[0]
    assert curves[20.0].iloc[-1] < curves[0.01].iloc[-1]


def test_without_neglect_it_is_not_computed(tiny, seen, told):
    _, curve = fit_prefix(tiny, seen, told, PrefixSettings(steps=2, batch=3, neglect=0.0))
    assert (curve["neglect"] == 0).all() and (curve["nll"] > 0).all()


def test_a_loss_that_is_not_finite_stops_the_tuning(tiny, seen, told):
    with pytest.raises(FloatingPointError, match="step 0.*lr"):
        fit_prefix(tiny, seen * float("nan"), told, PrefixSettings(steps=2, neglect=0.0))


def test_unknown_place(tiny):
    with pytest.raises(ValueError, match="unknown prefix place 'front'.*answer"):
        random_prefix(tiny, PrefixSettings(place="front"))


def test_no_negatives_is_said(tiny, seen):
    with pytest.raises(ValueError, match="no negative|no pairs"):
        fit_prefix(tiny, seen[:0], [], PrefixSettings(steps=1))


# ---- blindness


@torch.no_grad()
def test_blind_logits_do_not_depend_on_the_image(tiny, seen, told):
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    embeds = tiny.embed(batch)
    swapped = replace(batch, features=seen.flip(0) * 3)
    other = tiny.embed(swapped)
    assert not torch.equal(embeds, other)
    blind = blind_logits(tiny, batch, embeds)
    assert torch.equal(blind, blind_logits(tiny, swapped, other))
    seeing, else_ = tiny.answer_logits(batch), tiny.answer_logits(swapped)
    assert (seeing - else_).abs().max() > 1e-2 and (seeing - blind).abs().max() > 1e-2


@torch.no_grad()
def test_neglect_is_kl_from_the_blind_to_the_attacked(tiny, seen, told):
    prefix = random_prefix(tiny, PrefixSettings())
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    embeds, mask, labels = prefix.insert(batch, tiny.embed(batch))
    now = tiny.answer_logits(batch, embeds, mask, scored(labels)).log_softmax(-1)
    blind = blind_logits(tiny, batch, tiny.embed(batch)).log_softmax(-1)
    want = (blind.exp() * (blind - now)).sum(-1).mean().item()
    nll, neglect = _adversary_loss(tiny, batch, prefix, 0.5)
    assert neglect.item() == pytest.approx(want, rel=1e-4)
    picked = now.gather(1, labels[labels != -100][:, None])
    assert nll.item() == pytest.approx(-picked.mean().item(), rel=1e-5)


# ---- evidence and files


def test_evidence_by_hand(tiny, seen, told, tuned):
    pairs = pd.DataFrame({"negative": told, "positive": told[::-1]})
    table = prefix_evidence(tiny, seen, pairs, tuned[0], PrefixSettings(), batch_size=4)
    assert table.index.tolist() == ["none", "random", "tuned"] and (table["n"] == 6).all()
    with torch.no_grad():
        batch = tiny.encode(seen, tiny.prompt("plain"), told)
        logp = tiny.answer_logits(batch).log_softmax(-1)
        nll = -logp.gather(1, batch.labels[batch.labels != -100][:, None]).mean().item()
        batch = tiny.encode(seen, tiny.prompt("plain"), told[::-1])
        logp = tiny.answer_logits(batch).log_softmax(-1)
        blind = blind_logits(tiny, batch, tiny.embed(batch)).log_softmax(-1)
    assert table.loc["none", "nll_negative"] == pytest.approx(nll, rel=1e-4)
    effect = (logp.exp() * (logp - blind)).sum(-1).mean().item()
    assert table.loc["none", "image_effect"] == pytest.approx(effect, rel=1e-3)
    assert table.loc["tuned", "nll_negative"] < table.loc[["none", "random"], "nll_negative"].min()
    assert table.loc["random", "nll_positive"] != table.loc["none", "nll_positive"]


def test_evidence_without_pairs_is_empty(tiny, seen, tuned):
    empty = pd.DataFrame({"negative": [], "positive": []})
    table = prefix_evidence(tiny, seen[:0], empty, tuned[0], PrefixSettings())
    assert table.index.tolist() == ["none", "random", "tuned"] and table.columns.empty


def test_random_prefix_has_the_scale_of_the_embeddings(tiny):
    rows = random_prefix(tiny, PrefixSettings(length=7)).rows
    assert rows.shape == (7, 64)
    np.testing.assert_allclose(rows.norm(dim=-1), embedding_scale(tiny), rtol=1e-5)


def test_prefix_round_trip(tiny, tmp_path):
    prefix = Prefix(random_prefix(tiny, PrefixSettings()).rows, "question")
    save_prefix(prefix, tmp_path / "p.safetensors")
    again = load_prefix(tmp_path / "p.safetensors")
    assert torch.equal(again.rows, prefix.rows) and again.place == "question"
    with pytest.raises(FileNotFoundError):
        load_prefix(tmp_path / "none.safetensors")
