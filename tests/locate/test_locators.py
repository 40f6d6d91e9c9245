"""LOCATE: which tokens are meant, what is pooled, errors before any work, and the choice."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from alea_lib.core.files import DataError
from alea_lib.locate.causal import Probed
from alea_lib.locate.choose import choose_heads, choose_layers, stability
from alea_lib.locate.evidence import Evidence, Work, layer_locator
from alea_lib.locate.run import locate_heads, locate_layers
from alea_lib.locate.settings import OFFICIAL, LocateSettings
from alea_lib.locate.tokens import contrast_weights, encode, pooling_weights, suspects
from alea_lib.models.families import FAMILIES
from alea_lib.models.vlm import VLM, object_tokens

PAIRS = pd.DataFrame(
    {
        "positive": ["There is a cup and an apple.", "There is a dog."],
        "negative": ["There is a cup, a car and a bus.", "There are two cats with a dog. There is a cat."],
        "wrong": [["bus", "car"], np.array(["cat"])],
        "image_id": [4, 2],
    }
)


def words(vlm, answer, tokens):
    ids = vlm.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    return [vlm.tokenizer.decode([ids[t]]).strip() for t in tokens]


# ---- object tokens


def test_object_tokens_of_whole_words(tiny):
    answer = "There are two cups with an apple. There is a traffic light."
    found = object_tokens(tiny, answer)
    assert [o.category for o in found] == ["cup", "apple", "traffic light"]
    assert words(tiny, answer, [o.token for o in found]) == ["cups", "apple", "traffic"]
    assert object_tokens(tiny, "There is a background.") == []


class Reader:
    """As much of a model as the helper looks at: its tokenizer, and what stands before an answer."""

    row, answer_text = FAMILIES["llava"], VLM.answer_text

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def byte_pairs():
    """A byte-level BPE tokenizer of 300 pieces: most words are several tokens, and a blank belongs to its word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["There is a giraffe and a dog. There is a", "with the of light"] * 9,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def metaspace():
    """Pieces that write a blank as a mark of its own kind, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace()
    text = ["There is a giraffe and a dog, with the traffic light. Skateboards umbrella"] * 9
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_pairs, metaspace])
def test_object_tokens_of_pieces(make):
    vlm = Reader(make())
    answer = "There is a giraffe with two skateboards, a traffic light, and an umbrella. There is a dog."
    ids = vlm.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    assert len(ids) > len(answer.split()) + 6  # words are cut to pieces
    found = object_tokens(vlm, answer)
    assert [o.category for o in found] == ["giraffe", "skateboard", "traffic light", "umbrella", "dog"]
    for o, word in zip(found, ("giraffe", "skateboards", "traffic", "umbrella", "dog")):
        before = vlm.tokenizer.decode(ids[: o.token]).rstrip()
        assert f" {answer}".split(word)[0].rstrip().endswith(before.lstrip()[-9:])
        rest = vlm.tokenizer.decode(ids[o.token :]).lstrip()
        assert rest.startswith(word), (rest, word)


def test_suspects(tiny):
    want = [(["cup", "apple"], ["car", "bus"], ["cup"]), (["dog"], ["cats", "cat"], ["dog"])]
    for i, named in enumerate(want):
        p, n, w = PAIRS.loc[i, ["positive", "negative", "wrong"]]
        got = suspects(tiny, p, n, w)
        assert tuple(words(tiny, text, at) for text, at in zip((p, n, n), got)) == named
    with pytest.raises(DataError, match="names none of .'zebra'"):
        suspects(tiny, "There is a cup.", "There is a dog.", ["zebra"])


# ---- batches and weights


def texts_of(vlm, batch):
    ids = [row[m == 1].tolist() for row, m in zip(batch.ids, batch.mask)]
    image = vlm.model.config.image_token_id
    return [(vlm.tokenizer.decode([i for i in row if i != image]), row.count(image)) for row in ids]


@pytest.mark.parametrize("prompt", ["careful", None])
@pytest.mark.parametrize("image", [True, False])
def test_what_the_model_sees(tiny, seen, prompt, image):
    answers = ["There is a cup.", "There are two cups with an apple."]
    batch = encode(tiny, seen[:2], answers, LocateSettings(prompt=prompt, image=image))
    chat = tiny.row.ask(tiny.prompt(prompt)).replace("<image>", "") if prompt else ""
    assert texts_of(tiny, batch) == [(f"<s>{chat} {a}", 36 * image) for a in answers]
    for i, answer in enumerate(answers):
        own = batch.ids[i][batch.labels[i] != -100]
        assert tiny.tokenizer.decode(own) == f" {answer}" and (batch.labels[i] != -100).nonzero()[0] == batch.answer[i]
    assert batch.mask[0].sum() < batch.mask[1].sum() == batch.ids.shape[1]
    assert torch.isfinite(tiny.hidden(tiny.embed(batch), batch.mask)).all()


def weighed(tiny, seen, s):
    texts = [PAIRS[c].tolist() for c in ("positive", "negative", "wrong")]
    batch = encode(tiny, seen[[0, 1, 0, 1]], texts[0] + texts[1], s)
    return batch, texts


def test_pooled_objects(tiny, seen):
    batch, texts = weighed(tiny, seen, s := LocateSettings(pooling="object"))
    weight, want = pooling_weights(tiny, batch, *texts, s), [["cup", "apple"], ["dog"], ["car", "bus"], ["cats", "cat"]]
    for ids, w, named in zip(batch.ids, weight, want):
        assert [tiny.tokenizer.decode([t]).strip() for t in ids[w.nonzero()[:, 0]]] == named
        assert w.sum().item() == pytest.approx(1) and w[w > 0].unique().numel() == 1


def test_pooled_means(tiny, seen):
    batch, texts = weighed(tiny, seen, s := LocateSettings())
    weight = pooling_weights(tiny, batch, *texts, s)
    assert torch.equal(weight > 0, batch.labels != -100)
    torch.testing.assert_close(weight.sum(1), torch.ones(4))
    batch, texts = weighed(tiny, seen, OFFICIAL)
    assert pooling_weights(tiny, batch, *texts, OFFICIAL).unique().numel() == 1  # padding counts like any token


def test_contrast_weights(tiny, seen):
    for grounded, named in (("positive", {0: {"cup": -0.5, "apple": -0.5}, 2: {"car": 0.5, "bus": 0.5}}),
                            ("negative", {2: {"cup": -1.0, "car": 0.5, "bus": 0.5}})):  # fmt: skip
        batch, texts = weighed(tiny, seen, s := LocateSettings(grounded=grounded))
        weight = contrast_weights(tiny, batch, *texts, s)
        for row in (0, 2):
            at = weight[row].nonzero()[:, 0]
            got = {tiny.tokenizer.decode([batch.labels[row, t]]).strip(): weight[row, t].item() for t in at}
            assert got == named.get(row, {})


def test_states_are_means_over_the_answers_own_tokens(tiny, seen):
    states = Evidence(tiny, seen[:2], PAIRS, LocateSettings())["states"]
    normed = Evidence(tiny, seen[:2], PAIRS, LocateSettings(final_norm=True))["states"]
    assert states["positive"].shape == (2, 4, 64) and states["geometry"].shape == (2, 5, 3)
    for column in ("positive", "negative"):
        for i, text in enumerate(PAIRS[column]):
            batch = tiny.encode(seen[i : i + 1], tiny.prompt("plain"), [text], eos=False)
            with torch.no_grad():
                out = tiny.language_model(inputs_embeds=tiny.embed(batch), output_hidden_states=True)
            start = batch.answer.item()
            want = torch.stack([h[0, start:].mean(0) for h in out.hidden_states[1:]]).numpy()
            np.testing.assert_allclose(states[column][i, :3], want[:3], atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(normed[column][i], want, atol=1e-4, rtol=1e-4)
            assert np.abs(states[column][i, 3] - want[3]).max() > 0.1  # the library's default is before the norm


def test_states_depend_on_the_image_and_the_prompt(tiny, seen):
    def states(features, **options):
        return Evidence(tiny, features, PAIRS, LocateSettings(**options))["states"]["positive"]

    base = states(seen[:2])
    assert np.abs(states(seen[2:4]) - base).max() > 1e-3
    assert np.abs(states(seen[:2], prompt="careful") - base).max() > 1e-3
    np.testing.assert_array_equal(states(seen[:2], image=False), states(seen[2:4], image=False))


# ---- passes from a layer on


@torch.no_grad()
def test_tail_passes_over_the_answer_alone_equal_whole_ones(tiny, seen):
    """With the prompt's keys and values kept, three copies of a batch at once, with padding."""
    for sites in ("all", "answer"):
        work = Work(Evidence(tiny, seen[:2], PAIRS, LocateSettings(sites=sites)), np.arange(2))
        probed = Probed(work)
        inputs, final = probed.inputs(probed.embeds)
        whole = tiny.hidden(probed.embeds, probed.mask)[:, probed.cut :]
        assert (probed.cut > 0) == (sites == "answer") and final.shape == whole.shape
        real = probed.mask[:, probed.cut :].bool()
        torch.testing.assert_close(final[real], whole[real], atol=1e-5, rtol=1e-5)
        for layer in (0, 2, 3):
            for _ in range(2):  # the cache does not grow
                tail = probed.tail(layer, inputs[layer].repeat(3, 1, 1)).unflatten(0, (3, -1))
                for copy in tail:
                    torch.testing.assert_close(copy[real], whole[real], atol=1e-5, rtol=1e-5)
            spoilt = probed.tail(layer, inputs[layer].flip(0))
            assert (spoilt[real] - whole[real]).abs().max() > 1e-2


def test_first_order_agrees_with_exact_ablation(tiny, seen):
    """<gradient, output> is the slope of what zero-ablation measures: they agree in the limit of weak heads."""
    agreement, error = {}, {}
    for strength in (1.0, 0.01, 0.003):
        weights = [tiny.module("o_proj", i).weight for i in range(4)]
        own = [w.data for w in weights]
        try:
            for w in weights:
                w.data = w.data * strength
            table = locate_heads(tiny, seen[:2], PAIRS, ["zero-ablation", "gradient"]).scores
        finally:
            for w, data in zip(weights, own):
                w.data = data
        a, b = (table.loc[table["locator"] == n, "score"].to_numpy() for n in ("zero-ablation", "gradient"))
        agreement[strength], error[strength] = np.corrcoef(a, b)[0, 1], np.abs(a - b).max() / np.abs(a).max()
    assert agreement[0.003] > 0.99 and error[0.003] < 0.05, (agreement, error)
    assert error[0.003] < 0.5 * error[0.01]  # the error shrinks with the heads
    assert error[1.0] > 0.3  # in a model as it is, the first-order form is a lead, not a measurement


# ---- errors come before the work


@pytest.mark.parametrize("locate, name", [(locate_layers, "relative-l2"), (locate_heads, "zero-ablation")])
def test_unknown_names(tiny, seen, locate, name):
    with pytest.raises(KeyError, match=f"'nearest'.*{name}"):
        locate(tiny, seen[:2], PAIRS, ["nearest"])


def test_bad_pairs(tiny, seen):
    with pytest.raises(DataError, match="2 pairs and features of 3 images"):
        locate_layers(tiny, seen[:3], PAIRS, ["raw-l2"])
    with pytest.raises(DataError, match="lack the columns .'wrong'"):
        locate_layers(tiny, seen[:2], PAIRS.drop(columns="wrong"), ["raw-l2"])
    with pytest.raises(DataError, match="pair 1 has an empty positive"):
        locate_layers(tiny, seen[:2], PAIRS.assign(positive=["There is a cup.", " "]), ["raw-l2"])
    spoilt, passes = PAIRS.assign(wrong=[["bus"], ["zebra"]]), []
    handle = tiny.language_model.register_forward_hook(lambda *a: passes.append(1))
    try:
        for names, s in ((["raw-l2", "ablation"], LocateSettings()), (["raw-l2"], LocateSettings(pooling="object"))):
            with pytest.raises(DataError, match="names none of .'zebra'"):
                locate_layers(tiny, seen[:2], spoilt, names, replace(s, batch_size=1))
        assert not passes  # before any work
    finally:
        handle.remove()


def test_bad_settings(tiny, seen):
    with pytest.raises(ValueError, match="pooling='median': choose one of mean, object"):
        LocateSettings(pooling="median")
    with pytest.raises(ValueError, match="attention-entropy look at the image"):
        locate_layers(tiny, seen[:2], PAIRS, ["raw-l2", "attention-entropy"], LocateSettings(image=False))
    with pytest.raises(ValueError, match="a new name"):
        layer_locator("raw-l2", symmetry="even", formula="", source="")(len)


def test_located_tables(tiny, seen):
    located = locate_heads(tiny, seen[:2], PAIRS, ["image-attention", "random"])
    assert located.scores.columns.tolist() == ["locator", "pair", "layer", "head", "score"]
    assert len(located.scores) == 2 * 2 * 4 * 4
    assert located.costs.columns.tolist() == ["locator", "forwards", "backwards", "seconds"]
    assert located.costs["locator"].tolist() == ["image-attention", "random"]
    one = locate_layers(tiny, seen[:2], PAIRS, ["raw-l2"]).scores
    states = Evidence(tiny, seen[:2], PAIRS, LocateSettings())["states"]
    want = np.linalg.norm(states["positive"] - states["negative"], axis=-1)
    for row in one.itertuples():
        assert row.score == pytest.approx(want[row.pair, row.layer], rel=1e-5)


# ---- choice


def table(rows):
    return pd.DataFrame(
        [(p, layer, s) for p, row in enumerate(rows) for layer, s in enumerate(row)], columns=["pair", "layer", "score"]
    )


def test_vote_and_mean_differ():
    scores = table([[1, 2, 0], [1, 2, 0], [90, 0, 91]])  # votes: 0, 2, 1; sums: 92, 4, 91
    assert choose_layers(scores, 1, "vote") == [1]
    assert choose_layers(scores, 1, "mean") == [0]
    assert choose_layers(scores, 2, "vote") == [1, 2]
    assert choose_layers(scores, 2, "mean") == [0, 2]
    assert choose_layers(scores.sample(frac=1, random_state=0), 2, "mean") == [0, 2]


def test_ties_of_votes_go_to_the_higher_mean():
    scores = table([[5, 0, 0, 1], [0, 0, 9, 1]])  # one vote each for layers 0 and 2; means 2.5, 0, 4.5, 1
    assert choose_layers(scores, 1, "vote") == [2]
    assert choose_layers(scores, 3, "vote") == [0, 2, 3]  # layers without votes follow by their mean
    assert choose_layers(table([[1, 1, 1]]), 2, "mean") == [0, 1]


def test_all_layers_and_errors():
    scores = table([[3, 1, 2]])
    assert choose_layers(scores, 3) == [0, 1, 2]
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match="the model has 3"):
            choose_layers(scores, k)
    with pytest.raises(ValueError, match="unknown rule 'median'.*vote.*mean.*union"):
        choose_layers(scores, 1, "median")


def test_stability_counts_resamples():
    sure = table([[0, 1, 5]] * 6).assign(locator="sure")
    split = table([[9, 0, 0]] * 3 + [[0, 9, 0]] * 3).assign(locator="split")
    share = stability(pd.concat([sure, split]), k=1, resamples=200)
    assert share.loc["sure"].tolist() == pytest.approx([0, 0, 1])
    assert share.loc["split"].sum() == pytest.approx(1) and share.loc["split", 2] == 0
    assert 0.3 < share.loc["split", 0] < 0.8
    pd.testing.assert_frame_equal(share, stability(pd.concat([sure, split]), k=1, resamples=200))


def test_union_is_every_pairs_best():
    scores = table([[5, 0, 0, 1], [0, 0, 9, 1], [6, 0, 1, 1]])
    assert choose_layers(scores, rule="union") == [0, 2]
    assert choose_layers(table([[0, 0, 1]] * 5), 3, "union") == [2]


def test_one_locator_at_a_time():
    two = pd.concat([table([[1, 2]]).assign(locator=name) for name in ("a", "b")])
    with pytest.raises(ValueError, match="2 locators .a, b"):
        choose_layers(two, 1)


def test_heads_are_chosen_by_layer_and_head():
    scores = pd.DataFrame(
        [(p, i, h, s) for p in range(2) for (i, h), s in {(0, 0): 1, (0, 1): 4, (1, 0): 3, (1, 1): p * 9}.items()],
        columns=["pair", "layer", "head", "score"],
    )
    assert choose_heads(scores, 2, "mean") == [(0, 1), (1, 1)] and choose_heads(scores, 1) == [(1, 1)]
    assert choose_heads(scores, 3, "vote") == [(0, 1), (1, 0), (1, 1)]
    assert choose_heads(scores, rule="union") == [(0, 1), (1, 1)]
    with pytest.raises(ValueError, match="5 heads asked for, the model has 4"):
        choose_heads(scores, 5)
    share = stability(scores.assign(locator="a"), k=1, rule="mean", resamples=200)
    assert share.loc["a"].sum() == pytest.approx(1) and share.loc["a", (0, 1)] == pytest.approx(0.25, abs=0.1)
