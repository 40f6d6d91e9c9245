"""The adversary: where its rows stand, its budget, what it learns, and that the model stays as it was."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.adversary.objectives import AdversaryLoss, NoImageReference, PromptKVCache, attacked_logits
from alea_lib.adversary.prefix import (  # fmt: skip
    Prefix,
    PrefixSettings,
    adversary_preset,
    embedding_scale,
    fit_prefix,
    load_prefix,
    official_index,
    prefix_evidence,
    random_like,
    random_prefix,
    save_prefix,
)
from alea_lib.metrics.truth import read_truth
from alea_lib.models.batch import target_mask

QUESTIONS = [
    "Please describe this image in detail.", "Is there a cup in the image?", "Is the background blue?",
    "Please describe only what is clearly visible.", "Is there a dog in the image?",
    "Is there a bus in the image?",
]  # fmt: skip


def marked(tiny, place, k=3):
    """A prefix whose rows can be told from every embedding."""
    width = tiny.model.get_input_embeddings().weight.shape[1]
    return Prefix(torch.arange(k)[:, None] + 1000.0 + torch.zeros(k, width), place)


def loss(tiny, seen, told, prefix, settings, positives=None):
    return AdversaryLoss(tiny, seen, (told, positives), settings)(prefix, np.arange(len(told)))


def without_image(tiny, batch):
    return tiny.answer_logits(batch, tiny.embed(batch), batch.mask * (batch.ids != tiny.image_id))


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
        tail = tiny.answer_ids(told[i], True)
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
            assert target_mask(labels)[i].nonzero()[0].item() == start + 2


@torch.no_grad()
def test_padding_does_not_change_what_a_prefix_does(tiny, seen, told):
    prefix = random_prefix(tiny, PrefixSettings())
    batch = tiny.encode(seen, QUESTIONS, told)
    embeds, mask, labels = prefix.insert(batch, tiny.embed(batch))
    together = tiny.answer_logits(batch, embeds, mask, target_mask(labels))
    alone = []
    for i in range(len(told)):
        one = tiny.encode(seen[i : i + 1], QUESTIONS[i], told[i : i + 1])
        e, m, lab = prefix.insert(one, tiny.embed(one))
        alone.append(tiny.answer_logits(one, e, m, target_mask(lab)))
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
    with torch.no_grad():
        before = loss(tiny, seen, told, random_prefix(tiny, settings), settings)[0].item()
        assert loss(tiny, seen, told, prefix, settings)[0].item() < 0.97 * before
    assert list(curve.columns) == ["step", "nll", "contrast", "neglect"] and len(curve) == 25
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


# ---- objectives, places, starts


@torch.no_grad()
def test_contrast_is_between_whole_answers(tiny, seen, told):
    prefix, settings = random_prefix(tiny, PrefixSettings()), PrefixSettings(neglect=0.0, contrast=0.3, margin=4.0)
    positives = told[::-1]

    def each(texts):
        out = []
        for i, text in enumerate(texts):
            batch = tiny.encode(seen[i : i + 1], tiny.prompt("plain"), [text])
            embeds, mask, labels = prefix.insert(batch, tiny.embed(batch))
            logp = tiny.answer_logits(batch, embeds, mask, target_mask(labels)).log_softmax(-1)
            out.append(logp.gather(1, labels[labels != -100][:, None]).sum())
        return torch.stack(out)

    want = torch.log1p((4.0 - each(told) + each(positives)).exp()).mean()
    total, terms = loss(tiny, seen, told, prefix, settings, positives)
    assert terms["contrast"] == pytest.approx(want.item(), rel=1e-4)
    assert total.item() == pytest.approx(terms["nll"] + 0.3 * terms["contrast"], rel=1e-5)


def test_contrast_needs_positives(tiny, seen, told):
    with pytest.raises(ValueError, match="contrast is 0.5.*positives"):
        fit_prefix(tiny, seen, told, PrefixSettings(contrast=0.5, steps=1))


def test_contrast_goes_beyond_imitation(tiny, seen, told):
    """The negative becomes likely against the positive, more than by its own likelihood alone."""
    positives = told[::-1]
    settings = PrefixSettings(steps=30, batch=6, lr=0.05, neglect=0.0)
    margins = []
    for weight in (0.0, 1.0):
        each = replace(settings, contrast=weight, margin=20.0)
        prefix, _ = fit_prefix(tiny, seen, told, each, positives)
        with torch.no_grad():
            margins.append(loss(tiny, seen, told, prefix, replace(each, contrast=1.0), positives)[1]["contrast"])
    assert margins[1] < margins[0] - 0.5


@pytest.mark.parametrize("room", [0, 2**29])
def test_what_stands_before_the_prefix_is_read_without_gradient(tiny, seen, told, room, monkeypatch):
    """Logits and the prefix's gradient equal those of a whole pass, whether or not keys and values are kept."""
    monkeypatch.setattr("alea_lib.adversary.objectives.ROOM", room)
    pick = np.array([4, 1, 3])
    texts = [told[i] for i in pick] + [told[i][:9] for i in pick]
    batch = tiny.encode(seen[pick].repeat(2, 1, 1), tiny.prompt("plain"), texts)
    start, cache = random_prefix(tiny, PrefixSettings()), PromptKVCache(tiny, seen, "plain", "answer")
    cache(np.array([1, 2]))  # some items are known already
    found = []
    for past in (cache(pick, 2), cache(pick, 2), None):
        rows = start.rows.clone().requires_grad_(True)
        logits, labels = attacked_logits(tiny, batch, Prefix(rows), past)
        found.append((logits.detach(), torch.autograd.grad(logits.logsumexp(-1).sum(), rows)[0], labels))
    for each in found[:2]:
        torch.testing.assert_close(each[0], found[2][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(each[1], found[2][1], atol=1e-5, rtol=1e-5)
        assert torch.equal(each[2], found[2][2])
    assert set(cache.kept) == ({1, 2, 3, 4} if room else set())


def test_an_attack_runs_prefix_and_answer_alone(tiny, seen, told):
    """Once image and prompt are known; a prefix before the question needs whole passes."""
    lengths = []
    hidden = tiny.language_model.register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    at, width = batch.answer[0].item(), batch.ids.shape[1] + 5
    try:
        for place, expected in (("answer", [at, width - at, width - at]), ("question", [width, width])):
            settings, prefix = (
                PrefixSettings(place=place, neglect=0.0),
                random_prefix(tiny, PrefixSettings(place=place)),
            )
            objective = AdversaryLoss(tiny, seen, (told, None), settings)
            lengths.clear()
            for _ in range(2):
                objective(prefix, np.arange(len(told)))
            assert lengths == expected
    finally:
        hidden.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_absolute_index_is_counted_from_the_first_token(tiny, seen, told, side):
    """Inside long items, at the end of short ones; padding is not counted."""
    batch = tiny.encode(seen, tiny.prompt("plain"), told, side=side)
    lengths = batch.mask.sum(1)
    index = int(lengths.median())
    plain, prefix = tiny.embed(batch), replace(marked(tiny, "index"), index=index)
    embeds, mask, _ = prefix.insert(batch, plain)
    for i, length in enumerate(lengths.tolist()):
        real = embeds[i][mask[i].bool()]
        at = min(index, length)
        assert torch.equal(real[at : at + 3], prefix.rows) and len(real) == length + 3


def test_the_official_index_falls_inside_the_answer_of_59_percent(tiny, seen):
    answers = [" ".join(["There is a cup."] * n) for n in range(1, 101)]
    index = official_index(tiny, answers, seen.shape[1])
    start = len(tiny.prompt_ids(tiny.prompt("plain"), seen.shape[1]))
    ends = [start + len(tiny.answer_ids(a, True)) for a in answers]
    assert sum(start < index < end for end in ends) == 59 and index > start


def test_starts(tiny):
    normal = random_prefix(tiny, PrefixSettings(init="normal", length=100)).rows
    assert normal.std().item() == pytest.approx(1.0, abs=0.05) and normal.mean().item() == pytest.approx(0, abs=0.05)


def test_gradients_that_are_never_reset_pile_up(tiny, seen, told):
    """Official: two equal batches give twice the gradient in the second step. Adam's second moment shows it."""
    settings = PrefixSettings(steps=2, batch=6, neglect=0.0, norm=0.0, lr=1e-9)
    rows = {}
    for reset in (True, False):
        kept = []
        adam = torch.optim.AdamW.step

        def step(self, kept=kept, adam=adam):
            kept.append(self.param_groups[0]["params"][0].grad.clone())
            return adam(self)

        torch.optim.AdamW.step, before = step, torch.optim.AdamW.step
        try:
            fit_prefix(tiny, seen, told, replace(settings, reset=reset))
        finally:
            torch.optim.AdamW.step = before
        rows[reset] = kept
    torch.testing.assert_close(rows[True][1], rows[True][0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(rows[False][1], 2 * rows[False][0], atol=1e-5, rtol=1e-3)


def test_the_authors_adversary(tiny, seen, told):
    settings = adversary_preset("official", index=official_index(tiny, told, seen.shape[1]), steps=3)
    prefix, curve = fit_prefix(tiny, seen, told, settings)
    assert prefix.place == "index" and prefix.index == settings.index and (curve["neglect"] == 0).all()
    assert (prefix.rows.norm(dim=-1) > 1.5 * embedding_scale(tiny)).all()  # nothing bounds its norm
    assert not settings.reset and settings.prompt == "plain"
    with pytest.raises(KeyError, match="contrast.*imitation"):
        adversary_preset("strong")


# ---- blindness


@torch.no_grad()
def test_the_reference_does_not_depend_on_the_image(tiny, seen, told):
    batch, pick = tiny.encode(seen, tiny.prompt("plain"), told), np.arange(6)
    swapped = replace(batch, features=seen.flip(0) * 3)
    assert not torch.equal(tiny.embed(batch), tiny.embed(swapped))
    blind = NoImageReference(tiny, seen, told, "plain")(pick)
    assert torch.equal(blind, NoImageReference(tiny, seen.flip(0) * 3, told, "plain")(pick))
    seeing, else_ = (tiny.answer_logits(b).log_softmax(-1) for b in (batch, swapped))
    assert (seeing - else_).abs().max() > 1e-2 and (seeing - blind).abs().max() > 1e-2


@torch.no_grad()
def test_neglect_is_kl_from_the_blind_to_the_attacked(tiny, seen, told):
    prefix = random_prefix(tiny, PrefixSettings())
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    embeds, mask, labels = prefix.insert(batch, tiny.embed(batch))
    now = tiny.answer_logits(batch, embeds, mask, target_mask(labels)).log_softmax(-1)
    blind = without_image(tiny, batch).log_softmax(-1)
    want = (blind.exp() * (blind - now)).sum(-1).mean().item()
    total, terms = loss(tiny, seen, told, prefix, PrefixSettings(neglect=0.5))
    assert terms["neglect"] == pytest.approx(want, rel=1e-4)
    picked = now.gather(1, labels[labels != -100][:, None])
    assert terms["nll"] == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert total.item() == pytest.approx(terms["nll"] + 0.5 * terms["neglect"], rel=1e-5)


# ---- evidence and files


@pytest.fixture(scope="module")
def judged(tiny_world, told):
    """Pairs with their images' truth."""
    split = tiny_world.split("activate")
    pairs = pd.DataFrame({"image_id": split.ids, "negative": told, "positive": told[::-1]})
    return pairs, read_truth(split.instances, split.captions)


def test_evidence_by_hand(tiny, seen, told, tuned, judged):
    prefixes = {"none": None, "random": random_like(tiny, tuned[0], PrefixSettings()), "tuned": tuned[0]}
    table = prefix_evidence(tiny, seen, judged[0], prefixes, "plain", judged[1], 4, batch_size=4)
    assert table.index.tolist() == ["none", "random", "tuned"] and (table["n"] == 6).all()
    with torch.no_grad():
        batch = tiny.encode(seen, tiny.prompt("plain"), told)
        logp = tiny.answer_logits(batch).log_softmax(-1)
        nll = -logp.gather(1, batch.labels[batch.labels != -100][:, None]).mean().item()
        batch = tiny.encode(seen, tiny.prompt("plain"), told[::-1])
        logp = tiny.answer_logits(batch).log_softmax(-1)
        blind = without_image(tiny, batch).log_softmax(-1)
    assert table.loc["none", "nll_negative"] == pytest.approx(nll, rel=1e-4)
    effect = (logp.exp() * (logp - blind)).sum(-1).mean().item()
    assert table.loc["none", "image_effect"] == pytest.approx(effect, rel=1e-3)
    assert table.loc["tuned", "nll_negative"] < table.loc[["none", "random"], "nll_negative"].min()
    assert table.loc["random", "nll_positive"] != table.loc["none", "nll_positive"]


def test_evidence_of_what_is_written(tiny, seen, tuned, judged):
    pairs, truth = judged
    table = prefix_evidence(tiny, seen, pairs, {"none": None, "tuned": tuned[0]}, "careful", truth, max_new_tokens=8)
    under = tiny.generate(seen, tiny.prompt("careful"), 8, prefix=tuned[0])
    assert table.loc["tuned", "words"] == pytest.approx(np.mean([len(a.text.split()) for a in under]), abs=0.5)
    assert table[["chair_s", "recall"]].apply(lambda c: c.between(0, 1)).all(axis=None)
    for name in ("chair_s", "recall"):
        assert (table[f"{name}_lo"] <= table[name]).all() and (table[name] <= table[f"{name}_hi"]).all()


def test_evidence_of_captions_that_name_nothing(tiny, seen, tuned, judged, monkeypatch):
    (pairs, truth), write = judged, tiny.generate

    def lost(*given, **how):
        return [replace(a, text="blue blue") for a in write(*given, **how)]

    monkeypatch.setattr(tiny, "generate", lost)
    row = prefix_evidence(tiny, seen, pairs, {"tuned": tuned[0]}, "plain", truth, max_new_tokens=4).loc["tuned"]
    assert (row["chair_s"], row["recall"], row["words"]) == (0, 0, 2) and np.isnan(row["chair_i"])


def test_the_control_has_the_norms_and_the_place_of_the_tuned(tiny, tuned):
    moved = replace(tuned[0], place="question")
    control = random_like(tiny, moved, PrefixSettings(length=9, init="normal"))
    torch.testing.assert_close(control.rows.norm(dim=1), moved.rows.norm(dim=1))
    assert control.place == "question" and not torch.allclose(control.rows, moved.rows, atol=1e-3)


def test_random_prefix_has_the_scale_of_the_embeddings(tiny):
    rows = random_prefix(tiny, PrefixSettings(length=7)).rows
    assert rows.shape == (7, 64)
    np.testing.assert_allclose(rows.norm(dim=-1), embedding_scale(tiny), rtol=1e-5)


def test_prefix_round_trip(tiny, tmp_path):
    prefix = Prefix(random_prefix(tiny, PrefixSettings()).rows, "index", 12)
    save_prefix(prefix, tmp_path / "p.safetensors")
    again = load_prefix(tmp_path / "p.safetensors")
    assert torch.equal(again.rows, prefix.rows) and (again.place, again.index) == ("index", 12)
    with pytest.raises(FileNotFoundError):
        load_prefix(tmp_path / "none.safetensors")
