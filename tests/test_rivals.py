"""The harness of the rivals, and those that need no second look at the picture."""

from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import pytest
import torch

from alea_lib import captions, rival, rival_table
from alea_lib.adversary.prefix import PrefixSettings, random_prefix
from alea_lib.rivals import registry
from alea_lib.rivals.registry import Rival, Views, register

QUESTION = "Please describe this image in detail."


@dataclass(frozen=True)
class NoSettings:
    word: str = "cup"


@contextmanager
def only_word(s, vlm, batch, embeds, mask):
    wanted = vlm.tokenizer(f" {s.word}", add_special_tokens=False)["input_ids"][0]

    def forced(ids, scores):
        return scores.index_fill(1, torch.tensor([wanted]), 1e4)

    yield {"logits_processor": [forced]}


def texts(vlm, features, decoding=None, **options):
    return [a.text for a in vlm.generate(features, QUESTION, 12, decoding=decoding, **options)]


def test_a_decoding_method_is_entered_once_a_batch_and_left(tiny, seen):
    told = []

    @contextmanager
    def spy(vlm, batch, embeds, mask):
        told.append((tuple(batch.ids.shape), tuple(embeds.shape[:2]), tuple(mask.shape)))
        yield {}
        told.append("left")

    prefix = random_prefix(tiny, PrefixSettings(length=3))
    tiny.generate(seen, QUESTION, 2, batch_size=4, prefix=prefix, decoding=spy)
    wide = told[0][0][1]
    first, second = (((n, wide), (n, wide + 3), (n, wide + 3)) for n in (4, 2))
    assert told == [first, "left", second, "left"]


def test_options_of_a_decoding_method_reach_generate(tiny, seen):
    said = texts(tiny, seen[:2], lambda *given: only_word(NoSettings(), *given))
    assert said == [" ".join(["cup"] * 12)] * 2


def test_captions_pass_the_decoding_method_on(tiny, tiny_world, seen):
    split = tiny_world.split("activate")
    table = captions(tiny, split, seen, max_new_tokens=3, decoding=lambda *given: only_word(NoSettings(), *given))
    assert set(table["caption"]) == {"cup cup cup"}


def test_names_and_settings_are_checked():
    with pytest.raises(KeyError, match="unknown rival 'vdc'; there are .*beam.*truncation"):
        rival("vdc")
    with pytest.raises(ValueError, match=r"beam has no settings \['width'\]; it has \['beams'\]"):
        rival("beam", width=3)
    with pytest.raises(ValueError, match="rival 'beam' already"):
        register(Rival("beam", "decoding", only_word, NoSettings()))
    with pytest.raises(ValueError, match="must be one of"):
        register(Rival("mine", "magic", only_word, NoSettings()))


def test_a_registered_rival_is_found_with_its_changes(monkeypatch):
    monkeypatch.setattr(registry, "ROWS", dict(registry.ROWS))
    register(Rival("mine", "decoding", only_word, NoSettings(), grid=({"word": "dog"},)))
    assert rival("mine", word="bus").settings == NoSettings("bus")
    assert "mine" in set(rival_table()["method"])


@pytest.mark.parametrize("method", rival_table()["method"])
def test_rows_say_what_they_are(method):
    row = rival(method)
    assert row.description and row.source and row.grid and row.kind in registry.KINDS
    assert (row.decoding is not None) == (row.kind == "decoding")


def test_views_are_found_by_features(seen):
    other = torch.randn_like(seen)
    views = Views(seen, other)
    assert torch.equal(views.of(seen[[4, 1, 1]]), other[[4, 1, 1]])
    with pytest.raises(KeyError, match=r"call rival\.seeing"):
        views.of(seen + 1)


def test_one_beam_and_no_lift_are_greedy_decoding(tiny, seen):
    plain = texts(tiny, seen)
    assert texts(tiny, seen, rival("beam", beams=1).decoding) == plain
    assert texts(tiny, seen, rival("stop-early", strength=0.0).decoding) == plain


def test_beams_find_a_likelier_answer(tiny, seen):
    found = tiny.generate(seen, QUESTION, 4, decoding=rival("beam", beams=5).decoding, length_penalty=0.0)
    greedy = tiny.generate(seen, QUESTION, 4)

    def likelihood(answers):
        batch = tiny.encode(seen, QUESTION, [a.text for a in answers], eos=False)
        scores = tiny.answer_logits(batch).log_softmax(-1)
        return scores.gather(1, batch.labels[batch.labels != -100][:, None]).sum()

    assert [a.text for a in found] != [a.text for a in greedy]
    assert likelihood(found) > likelihood(greedy)


def test_the_end_is_raised_by_the_strength(tiny, seen):
    """The gap between the first token and the end is what it takes."""
    batch = tiny.encode(seen, QUESTION, side="left")
    first = tiny.head(tiny.hidden(tiny.embed(batch), batch.mask, batch)[:, -1])
    first[:, tiny.image_id] = -torch.inf
    gap = first.max(1).values - first[:, tiny.end_id]
    middle = gap.median().item()
    told = tiny.generate(seen, QUESTION, 1, decoding=rival("stop-early", strength=middle + 1e-3).decoding)
    assert [a.eos for a in told] == [bool(g <= middle) for g in gap]


def test_truncation_and_careful_prompt():
    table = pd.DataFrame({"image_id": [1], "caption": ["A cup. A dog."], "n_tokens": [6], "eos": [True]})
    cut = rival("truncation")
    assert cut.act(cut.settings, table)["caption"].tolist() == ["A cup."]
    assert rival("careful-prompt").prompt == "careful" and rival("beam").prompt == "plain"
