"""The contract of a family row: one test a promise, for every row, on a tiny random model of the family's real class.

A new row gets a builder in ``alea_lib.zoo.tiny``; then run ``pytest tests/models/test_families.py -k name``.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from alea_lib.adversary.objectives import AdversaryLoss, NoImageReference
from alea_lib.adversary.prefix import Prefix, PrefixSettings, embedding_scale, random_prefix
from alea_lib.edit.fit import fit_edit
from alea_lib.edit.losses import answer_nll
from alea_lib.edit.settings import EditSettings
from alea_lib.locate.run import locate_heads, locate_layers
from alea_lib.locate.settings import OFFICIAL, LocateSettings
from alea_lib.models.batch import Batch
from alea_lib.models.delta import applied, load_delta, save_delta
from alea_lib.models.hooks import read_attention, read_heads, read_layers, started_at
from alea_lib.models.layout import causal, opened, reading_embeddings
from alea_lib.models.loading import load
from alea_lib.zoo.tiny import BUILDERS, build

QUESTIONS = ["Is there a cat?", "Please describe this image in detail.", "Is the cup red or blue?"]
ANSWERS = ["There is a dog with a cup.", "A kitchen scene shows a knife.", "There is also a bowl, and a spoon."]
PAIRS = pd.DataFrame(
    {
        "positive": ["There is a cup.", "A kitchen scene shows a knife.", "There is a bowl with a spoon."],
        "negative": ["There is a dog.", "There is a cat. There is also a knife.", "There is a bus and a spoon."],
        "wrong": [["dog"], ["cat"], ["bus"]],
        "image_id": [5, 2, 9],
    }
)


@pytest.fixture(scope="module", params=BUILDERS)
def made(request):
    return build(request.param)


@pytest.fixture(scope="module")
def vlm(made):
    return made[0]


@pytest.fixture(scope="module")
def images():
    """Three pictures of different shapes."""
    rng = np.random.default_rng(0)
    shapes = ((96, 96, 3), (60, 96, 3), (120, 80, 3))
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def features(vlm, images):
    return vlm.features(images)


@pytest.fixture(autouse=True)
def _unchanged(vlm, bits):
    before = bits(vlm)
    yield
    assert bits(vlm) == before, "this test left the model changed"


def pixels(vlm, images):
    """What the image processor makes of the pictures, as the row says that they are given to it."""
    shown = [opened(i, vlm.row.canvas) for i in images]
    shown = [[i] for i in shown] if vlm.row.nested else shown
    return dict(vlm.processor.image_processor(shown, return_tensors="pt", **dict(vlm.row.image_options)))


def own_inputs(vlm, batch, images):
    """The model's own inputs for the tokens of a batch: ids and pixels, and what its processor gives besides."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, **pixels(vlm, images)}
    kind = vlm.row.model_type
    if kind == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (batch.ids == vlm.image_id).int()
    if kind == "paligemma":
        inputs["token_type_ids"] = (torch.arange(batch.ids.shape[1]) >= batch.answer[:, None]).long()
    if kind == "instructblip":
        asked = vlm.processor.qformer_tokenizer(QUESTIONS, padding=True, return_tensors="pt")
        inputs |= {f"qformer_{k}": asked[k] for k in ("input_ids", "attention_mask")}
    return inputs


# ---- what is read


def test_prompts_are_those_of_the_processor(made, images, features):
    """Token for token. Processors that also take videos need torchvision; they repeat the image token in the text."""
    vlm, places = made
    for question, image in zip(QUESTIONS, images):
        text = vlm.row.ask(question)
        if callable(vlm.processor):
            # some processors write image, first token and line end themselves
            text = text.removeprefix("<image>").removesuffix("\n") if text.startswith("<image>") else text
            shown = opened(image, vlm.row.canvas)
            theirs = vlm.processor(images=shown, text=text, **dict(vlm.row.image_options))["input_ids"]
        else:
            theirs = vlm.tokenizer(text.replace(vlm.row.image_token, vlm.row.image_token * places))["input_ids"]
        ours = vlm.encode(features[:1], question).ids[0].tolist()
        assert ours == np.array(theirs).ravel().tolist(), question


def test_the_image_span(made, features):
    """As many placeholders as the family has positions, in one piece, before the question."""
    vlm, places = made
    batch = vlm.encode(features, QUESTIONS, ANSWERS)
    for i in range(3):
        at = (batch.ids[i] == vlm.image_id).nonzero().ravel()
        assert len(at) == places and at[-1] - at[0] == places - 1
        assert batch.question[i] == at[-1] + 1 < batch.answer[i]
        asked = vlm.tokenizer.decode(batch.ids[i, batch.question[i] : batch.answer[i]])
        assert QUESTIONS[i] in asked
        answer = batch.ids[i][batch.labels[i] != -100]
        assert vlm.tokenizer.decode(answer[:-1]).strip() == ANSWERS[i] and answer[-1] == vlm.end_id


def test_an_answer_is_tokenised_as_after_its_prompt(vlm, features):
    """Prompt and answer tokenised apart are what they are together, blank or line end between them."""
    batch = vlm.encode(features, QUESTIONS, ANSWERS, eos=False)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        whole = vlm.tokenizer(f"{vlm.row.ask(question)}{vlm.row.lead}{answer}", add_special_tokens=False)["input_ids"]
        ours = batch.ids[i][batch.mask[i] == 1].tolist()
        assert ours[-20:] == whole[-20:] and whole[-20:].index(vlm.answer_ids(answer, False)[0]) < 20


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_the_models_own(vlm, images, features, side):
    """Teacher-forced logits on our embeddings are those of the class's own forward on ids and pixels."""
    batch = vlm.encode(features, QUESTIONS, ANSWERS, side=side)
    theirs = vlm.model(**own_inputs(vlm, batch, images)).logits[batch.target_mask]
    ours = vlm.answer_logits(batch)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_moves_its_own_row_alone(vlm, features):
    """One position of one image: exactly its embedding moves (with a Q-Former, all of its row), and its logits."""
    batch = vlm.encode(features, QUESTIONS, ANSWERS)
    other = vlm.encode(features.clone(), QUESTIONS, ANSWERS)
    other.features[1, 2] += 1.0
    moved = (vlm.embed(batch) != vlm.embed(other)).any(-1)
    image = batch.ids[1] == vlm.image_id
    expected = torch.zeros_like(moved)
    expected[1] = image if vlm.row.queries else image & (image.cumsum(0) == 3)
    assert torch.equal(moved, expected)
    row = batch.target_mask.nonzero()[:, 0]
    change = (vlm.answer_logits(batch) - vlm.answer_logits(other)).abs().amax(-1)
    assert (change[row == 1] > 1e-4).all() and (change[row != 1] < 1e-5).all()


@torch.no_grad()
def test_padding_changes_no_logits(vlm, features):
    together = vlm.encode(features, QUESTIONS, ANSWERS)
    rows = together.target_mask.nonzero()[:, 0]
    for i in range(3):
        alone = vlm.answer_logits(vlm.encode(features[i : i + 1], QUESTIONS[i : i + 1], ANSWERS[i : i + 1]))
        torch.testing.assert_close(vlm.answer_logits(together)[rows == i], alone, atol=1e-4, rtol=1e-4)


# ---- what is written


@torch.no_grad()
def test_answers_equal_plain_generate(vlm, images, features):
    """Greedy tokens on our embeddings are those of the class's own generate on ids and pixels."""
    batch = vlm.encode(features, QUESTIONS, side="left")
    options = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": [vlm.image_id], "eos_token_id": vlm.end_id}
    raw = vlm.model.generate(**own_inputs(vlm, batch, images), pad_token_id=3, **options)
    theirs = [vlm._answer(row.tolist()) for row in raw[:, batch.ids.shape[1] :]]
    ours = vlm.generate(features, QUESTIONS, 8)
    assert ours == theirs and len({a.text for a in ours}) == 3
    assert ours == [vlm.generate(features[i : i + 1], QUESTIONS[i], 8)[0] for i in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("place", ["answer", "question"])
def test_answers_under_a_prefix_are_the_best_tokens(vlm, features, place):
    """Each written token is the likeliest of the teacher-forced pass in which the prefix stands in the same place."""
    prefix = Prefix(random_prefix(vlm, PrefixSettings(length=3)).rows, place)
    batch = vlm.encode(features, QUESTIONS, side="left")
    embeds, mask, _ = prefix.insert(batch, vlm.embed(batch))
    given = (vlm.row.generate_inputs or vlm.row.decoder_inputs)(vlm, mask, batch)
    with reading_embeddings(vlm.writer):
        new = vlm.writer.generate(
            inputs_embeds=embeds, **given, max_new_tokens=4, do_sample=False, suppress_tokens=[vlm.image_id]
        )
    plain = vlm.generate(features, QUESTIONS, 4)
    assert [vlm._answer(r.tolist()) for r in new] == vlm.generate(features, QUESTIONS, 4, prefix=prefix) != plain
    longer = torch.cat([embeds, vlm.model.get_input_embeddings()(new[:, :-1])], 1)
    after = torch.cat([mask, torch.ones_like(new[:, :-1])], 1)
    grown = gone_on(batch, new[:, :-1])
    logits = vlm.head(vlm.hidden(longer, after, grown)[:, -new.shape[1] :])
    logits[..., vlm.image_id] = -torch.inf
    ended = (new == vlm.end_id).cumsum(1) - (new == vlm.end_id).int() > 0
    assert (logits.argmax(-1) == new)[~ended].all()


def gone_on(batch, new):
    """A batch that goes on with the written tokens."""
    ids = torch.cat([batch.ids, new], 1)
    mask = torch.cat([batch.mask, torch.ones_like(new)], 1)
    return Batch(ids, mask, torch.full_like(ids, -100), batch.features, batch.question, batch.answer)


# ---- addresses


@torch.no_grad()
def test_addresses_and_head_shapes(vlm, features):
    batch, heads, states, shares = vlm.encode(features, QUESTIONS, ANSWERS), {}, {}, {}
    rows = batch.answer[:, None]
    with read_heads(vlm, heads.__setitem__), read_layers(vlm, states.__setitem__):
        final = vlm.hidden(vlm.embed(batch), batch.mask, batch)
    with read_attention(vlm, shares.__setitem__, rows):
        beside = vlm.hidden(vlm.embed(batch), batch.mask, batch)
    torch.testing.assert_close(beside[batch.mask == 1], final[batch.mask == 1], atol=1e-4, rtol=1e-4)
    b, t = batch.ids.shape
    width = vlm.module("o_proj", 0).in_features // 4
    assert vlm.n_layers == 3 and vlm.n_heads == 4 and sorted(heads) == sorted(states) == sorted(shares) == [0, 1, 2]
    for layer in range(3):
        assert heads[layer].shape == (b, t, 4, width) and shares[layer].shape == (b, 4, 1, t)
        torch.testing.assert_close(shares[layer].sum(-1), torch.ones(b, 4, 1))
        down = vlm.module("down_proj", layer)
        assert (down.in_features, down.out_features) == (128, 64)
    torch.testing.assert_close(vlm.model.get_submodule(vlm.row.norm)(states[2]), final)
    k = vlm.model.get_submodule(vlm.address("o_proj", 0).replace("o_proj", "k_proj"))
    assert k.out_features < 4 * width, "the tiny model should have grouped-query heads"


def test_the_scale_of_embeddings_is_that_of_what_is_read(vlm):
    table = vlm.model.get_input_embeddings().weight.norm(dim=-1).mean().item()
    scale = 64**0.5 if vlm.row.name == "paligemma" else 1.0
    assert embedding_scale(vlm) == pytest.approx(scale * table, rel=1e-5)


@torch.no_grad()
def test_a_pass_from_the_middle_equals_the_whole(vlm, features):
    """Mask and positions of a family hold for tail passes too, and are never left out."""
    batch, states = vlm.encode(features, QUESTIONS, ANSWERS), {}
    with read_layers(vlm, states.__setitem__):
        whole = vlm.hidden(vlm.embed(batch), batch.mask, batch)
    with started_at(vlm, 2, states[1]):
        torch.testing.assert_close(vlm.hidden(states[1], batch.mask, batch), whole)
    if vlm.row.decoder_inputs is not causal:
        with pytest.raises(ValueError, match="where the image is"):
            vlm.hidden(vlm.embed(batch), batch.mask)


# ---- locate, prefix, edit


def test_locators_run(vlm, features):
    """Distances and interventions; passes over the answers alone equal whole passes."""
    names = ["relative-l2", "ablation", "tracing", "attention-entropy"]
    scores = locate_layers(vlm, features, PAIRS, names, LocateSettings(sites="answer")).scores
    assert len(scores) == 4 * 3 * 3 and np.isfinite(scores["score"]).all()
    assert (scores.groupby("locator")["score"].std() > 1e-4).all()
    heads = locate_heads(vlm, features, PAIRS, ["zero-ablation", "gradient"], LocateSettings(sites="answer")).scores
    assert len(heads) == 2 * 3 * 3 * 4 and np.isfinite(heads["score"]).all()
    official = locate_layers(vlm, features, PAIRS, ["relative-l2"], OFFICIAL).scores
    assert np.isfinite(official["score"]).all()


def test_an_answer_site_ablation_by_hand(vlm, features):
    """The tail passes of the locator, which keep keys and values of the prompt, equal passes over all positions."""
    from alea_lib.locate.causal import Probed
    from alea_lib.locate.evidence import Evidence, Work

    work = Work(Evidence(vlm, features, PAIRS, LocateSettings(sites="answer")), np.arange(3))
    probed = Probed(work)
    assert probed.cut > 0
    with torch.no_grad():
        inputs, final = probed.inputs(probed.embeds)
        whole = vlm.hidden(probed.embeds, probed.mask, probed.batch)[:, probed.cut :]
        real = probed.mask[:, probed.cut :] == 1
        for got in (final, probed.tail(1, inputs[1])):
            torch.testing.assert_close(got[real], whole[real], atol=1e-4, rtol=1e-4)
        twice = probed.tail(2, inputs[2].repeat(2, 1, 1))
        torch.testing.assert_close(twice[len(real) :][real], whole[real], atol=1e-4, rtol=1e-4)


def test_a_prefix_step_has_a_gradient(vlm, features):
    for place in ("answer", "question"):
        settings = PrefixSettings(length=3, place=place, neglect=0.5)
        rows = random_prefix(vlm, settings).rows.clone().requires_grad_(True)
        objective = AdversaryLoss(vlm, features, (ANSWERS, None), settings)

        def lost(at, place=place, objective=objective):
            return objective(Prefix(at, place), np.arange(3))

        loss, terms = lost(rows)
        (grad,) = torch.autograd.grad(loss, [rows])
        assert (grad.norm(dim=-1) > 1e-5).all() and terms["neglect"] > 0
        step = 1e-2 * grad / grad.norm()
        with torch.no_grad():
            up, down = (lost(rows + s * step)[0] for s in (1, -1))
        assert (up - down).item() == pytest.approx(2 * (grad * step).sum().item(), rel=0.1, abs=1e-4)


@torch.no_grad()
def test_a_blind_pass_does_not_see_the_image(vlm, features):
    one, other = (vlm.encode(f, QUESTIONS, ANSWERS) for f in (features, features.flip(0)))
    assert (vlm.answer_logits(one) - vlm.answer_logits(other)).abs().max() > 1e-2
    blind = [NoImageReference(vlm, f, ANSWERS, "plain")(np.arange(3)) for f in (features, features.flip(0))]
    torch.testing.assert_close(*blind, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def edit(vlm, features):
    prefix = random_prefix(vlm, PrefixSettings(length=3))
    settings = EditSettings(layers=(1, 2), epochs=2, batch=3, lr=1e-2)
    return fit_edit(vlm, features, PAIRS["positive"].tolist(), prefix, settings)


def test_an_edit_lowers_the_answers_nll(vlm, features, edit, bits):
    delta, curve = edit
    assert len(curve) == 2 and (curve["kl"] >= -1e-6).all()
    batch, before = vlm.encode(features, vlm.prompt("plain"), PAIRS["positive"].tolist()), bits(vlm)
    with torch.no_grad():
        base = answer_nll(vlm, batch)
        with applied(vlm, delta):
            assert answer_nll(vlm, batch) < base - 1e-3
        assert answer_nll(vlm, batch) == base and bits(vlm) == before


def test_a_delta_is_saved_and_loaded(vlm, edit, tmp_path):
    save_delta(edit[0], tmp_path / "delta.safetensors")
    again = load_delta(tmp_path / "delta.safetensors")
    assert again.base == edit[0].base and again.info == json.loads(json.dumps(edit[0].info))
    assert all(torch.equal(again.weights[n], w) for n, w in edit[0].weights.items())
    with applied(vlm, again):
        pass


def test_an_edited_model_is_saved_and_loaded(vlm, features, images, edit, tmp_path, bits):
    """The edited checkpoint, loaded by ``load`` alone, finds its row and writes the same tokens."""
    with applied(vlm, edit[0]):
        vlm.model.save_pretrained(tmp_path)
        wanted = vlm.generate(features, QUESTIONS, 6)
    for part in [vlm.processor] if hasattr(vlm.processor, "save_pretrained") else vars(vlm.processor).values():
        part.save_pretrained(tmp_path)
    again = load(str(tmp_path), device="cpu")
    assert again.row.name == ("llava-small" if vlm.row.name == "llava" else vlm.row.name)  # it is small
    torch.testing.assert_close(again.features(images), features, atol=1e-5, rtol=1e-5)
    assert again.generate(features, QUESTIONS, 6) == wanted != vlm.generate(features, QUESTIONS, 6)


def test_what_four_bits_leave_alone(vlm, features, tmp_path):
    """Vision side, head and the edited matrices stay as they are; the rest of the decoder is packed."""
    pytest.importorskip("bitsandbytes")
    vlm.model.save_pretrained(tmp_path)
    for part in [vlm.processor] if hasattr(vlm.processor, "save_pretrained") else vars(vlm.processor).values():
        part.save_pretrained(tmp_path)
    small = load(str(tmp_path), four_bit=True, edited_layers=(1,), device="cpu")
    packed = {n for n, p in small.model.named_parameters() if p.dtype == torch.uint8}
    root = small.row.layer.split(".{i}")[0]
    assert len(packed) == 3 * 7 - 1 and all(n.startswith(root) for n in packed)
    assert torch.isfinite(small.answer_logits(small.encode(features, QUESTIONS, ANSWERS))).all()
