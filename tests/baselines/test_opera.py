"""OPERA: its penalty by hand, its limit, in batches, going back, and undone."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from tiny_families import build

from alea_lib.adversary.prefix import PrefixSettings, random_prefix
from alea_lib.baselines.opera import OperaSettings, Past, Watch, at_length, column_scores, opera
from alea_lib.baselines.registry import baseline
from alea_lib.models.hooks import read_attention

QUESTIONS = [
    "Is there a cup?",
    "Please describe this image in detail.",
    "Please describe only what is clearly visible.",
]
# so that the tiny model's answers of a few tokens go back
RETURNING = OperaSettings(beams=2, candidates=3, scale=50, first=0, threshold=1, times=2)


def write(vlm, features, questions, settings, n=8, **options):
    return [
        a.text
        for a in vlm.generate(features, questions, n, decoding=contextmanager(partial(opera, settings)), **options)
    ]


@pytest.fixture
def returns(monkeypatch):
    """Whether each wish to go back was granted."""
    told, own = [], Past.goes_back
    monkeypatch.setattr(Past, "goes_back", lambda *given: told.append(own(*given)) or told[-1])
    return told


# ---- penalty


def test_column_products_by_hand():
    """Two triangles; what is above the diagonal does not count."""
    first = [[0.5, 9.0, 9.0], [0.25, 0.5, 9.0], [1.0, 0.25, 0.25]]  # doubled: 1 * 0.5 * 2, 1 * 0.5, 0.5
    second = [[0.5, 9.0, 9.0], [0.0, 0.5, 9.0], [0.5, 1.0, 0.75]]  # 0, 1 * 2, 1.5
    got, column = column_scores(torch.tensor([first, second]), 2.0, 0.1)
    assert got.tolist() == pytest.approx([0.1, 0.2]) and column.tolist() == [0, 1]
    assert column_scores(torch.tensor([first, second]), 0.0, 0.1)[0].tolist() == [0.0, 0.0]
    long = column_scores(torch.full((900, 900), 0.9), 50.0, 1e-7)
    assert long[0].isfinite() and long[1] == 0


def test_constants_for_shorter_captions():
    short = at_length(OperaSettings(words=25))
    assert (short.first, short.threshold) == (2, 4) and short.damping == pytest.approx(10**-1.75)
    assert short.scale == 50 and at_length(OperaSettings()) == OperaSettings()


@torch.no_grad()
def test_the_penalty_is_that_of_whole_passes(tiny, seen, monkeypatch):
    """What tried tokens look at, in beams that changed places, against passes without a cache."""
    tried, given, own = [], [], Watch.tried
    monkeypatch.setattr(Watch, "tried", lambda self, tokens: tried.append((tokens, own(self, tokens))) or tried[-1][1])
    rows, penalty = [], Watch.penalty
    monkeypatch.setattr(Watch, "penalty", lambda self, looks: given.append(penalty(self, looks)) or given[-1])
    call = Watch.__call__
    monkeypatch.setattr(Watch, "__call__", lambda self, ids, scores: rows.append(ids) or call(self, ids, scores))
    s = OperaSettings(beams=2, candidates=3, scale=5, first=2, times=0)
    write(tiny, seen[:2], QUESTIONS[:2], s, 5)
    batch = tiny.encode(seen[:2], QUESTIONS[:2], side="left")
    prompt, image = tiny.embed(batch), batch.ids == tiny.image_id
    for step, row, c in ((1, 0, 1), (4, 1, 2), (4, 2, 0)):
        ids = torch.cat([rows[step][row], tried[step][0][row, c : c + 1]])
        embeds = torch.cat([prompt[row // 2], tiny.model.get_input_embeddings()(ids)])[None]
        mask = torch.nn.functional.pad(batch.mask[row // 2][None], (0, len(ids)), value=1)
        where, found = torch.arange(prompt.shape[1], embeds.shape[1])[None], {}
        with read_attention(tiny, found.__setitem__, where):
            tiny.hidden(embeds, mask, batch)
        attention = found[tiny.n_layers - 1][0].amax(0)
        attention = attention / attention.sum(-1, keepdim=True)
        torch.testing.assert_close(tried[step][1][row, c], attention[-1], atol=1e-5, rtol=1e-4)
        triangle = attention[:, prompt.shape[1] :]
        products = [1e-7 * (5.0 * triangle[j:, j]).prod().item() for j in range(len(ids))]
        on_image = attention[-1, : prompt.shape[1]][image[row // 2]].sum().item()
        want = -on_image if step + 1 <= 2 else max(products)
        assert given[step][0][row, c].item() == pytest.approx(want, rel=1e-3)
        assert given[step][1][row, c].item() == products.index(max(products))


def test_without_penalty_it_is_beam_search(tiny, seen):
    """Where as many tokens are tried as are allowed, and the answer never goes back."""
    allowed = torch.arange(20, 32)

    def only(ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])

    s = OperaSettings(beams=3, candidates=12, scale=0, first=0, times=0)
    got = write(tiny, seen[:3], QUESTIONS, s, logits_processor=[only])
    plain = tiny.generate(seen[:3], QUESTIONS, 8, num_beams=3, logits_processor=[only])
    assert got == [a.text for a in plain]
    assert got != [a.text for a in tiny.generate(seen[:3], QUESTIONS, 8, logits_processor=[only])]


# ---- going back


def test_where_an_answer_goes_back_to():
    """Behind token 2, then, when that is used up, to token 2, then no more."""
    past, said = Past(), [[[]], [[7]], [[7, 8]], [[7, 8, 9]], [[7, 8, 9, 5]], [[7, 8, 9, 5, 6]]]
    assert past.goes_back(2, said, 1) and past.banned == {(7, 8, 9, 5)}
    assert past.goes_back(2, said, 1) and past.banned == {(7, 8, 9, 5), (7, 8, 9)}
    assert not past.goes_back(2, said, 1)
    assert past.ruled_out([[7, 8], [7, 9], [7, 8, 9]]) == [(0, 9), (2, 5)]
    assert not Past().goes_back(5, said, 1) and not Past().goes_back(2, said, 0)


def test_an_answer_goes_back_and_says_another_word(tiny, seen, monkeypatch, returns):
    """With column 2 always the largest and one beam: token 3 again, then token 2, then no more."""

    def always(self, looks):
        return torch.zeros(looks.shape[:2]), torch.full(looks.shape[:2], 2)

    def greedy(banned=()):
        def forbidden(ids, scores):
            if ids.shape[1] == 2:
                scores = scores.clone()
                scores[range(len(banned)), list(banned)] = -torch.inf
            return scores

        told = []
        rows = tiny.generate(seen[:2], QUESTIONS[1], 9, logits_processor=[forbidden, lambda i, s: told.append(i) or s])
        return [a.text for a in rows], told[-1]

    monkeypatch.setattr(Watch, "penalty", always)
    plain, ids = greedy()
    s = OperaSettings(beams=1, first=2, threshold=5, times=1)
    assert write(tiny, seen[:2], QUESTIONS[1], s, 9) == greedy(ids[:, 2].tolist())[0] != plain
    assert returns == [True, True, True, True, False, False, *returns[6:]] and not any(returns[6:])
    for never in ({"times": 0}, {"threshold": 9}, {"first": 3}):
        changed = OperaSettings(**{"beams": 1, "first": 2, "threshold": 5, "times": 1, **never})
        assert write(tiny, seen[:2], QUESTIONS[1], changed, 9) == plain


def test_all_beams_must_agree(tiny, seen):
    """The column of all beams that is largest most often, more than ``threshold`` times in each of them."""
    batch = tiny.encode(seen[:2], QUESTIONS[1], side="left")
    s = OperaSettings(beams=2, first=1, threshold=1, times=1)
    watch = Watch(s, tiny, batch, batch.mask, [Past(), Past()])
    watch.said = [[[[]] * 2, [[1]] * 2, [[1, 2], [1, 3]], [[1, 2, 4], [1, 3, 5]]] for _ in range(2)]
    watch.cache.columns = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    watch.note(torch.tensor([[1, 1, 0], [1, 1, 2], [1, 1, 1], [1, 1, 1]]))
    assert watch.back == {0} and watch.pasts[0].banned == {(1, 2, 4), (1, 3, 5)} and not watch.pasts[1].banned


@pytest.mark.parametrize("settings", [OperaSettings(words=25), RETURNING], ids=["published", "returning"])
def test_a_padded_batch_equals_one_by_one(tiny, seen, returns, settings):
    together = write(tiny, seen[:3], QUESTIONS, settings)
    assert any(returns) == (settings is RETURNING)
    assert together == [write(tiny, seen[i : i + 1], q, settings)[0] for i, q in enumerate(QUESTIONS)]
    assert together != [a.text for a in tiny.generate(seen[:3], QUESTIONS, 8, num_beams=settings.beams)]


def test_a_soft_prefix_stands_in_the_prompt(tiny, seen):
    prefix = random_prefix(tiny, PrefixSettings(length=3))
    together = write(tiny, seen[:2], QUESTIONS[:2], RETURNING, 6, prefix=prefix)
    assert together == [write(tiny, seen[i : i + 1], QUESTIONS[i], RETURNING, 6, prefix=prefix)[0] for i in range(2)]


@pytest.mark.parametrize("family", ["llava-next-mistral", "qwen2.5-vl", "paligemma", "instructblip"])
def test_every_family_writes_under_it(family, returns, monkeypatch):
    """Also where a part of the batch is written again. What a tried token looks at is what it looks at once taken."""
    import numpy as np
    from PIL import Image

    vlm, rng = build(family)[0], np.random.default_rng(0)
    features = vlm.features([Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(2)])
    questions, s = ["Is there a cat?", vlm.prompt("plain")], OperaSettings(beams=2, first=0, threshold=1, times=1)
    tries, own = [], Watch.tried

    def tried(self, tokens):
        taken, looks = self.newest, own(self, tokens)
        if self.cache.rows.shape[1]:
            for item, (new, old) in enumerate(zip(taken.unflatten(0, (-1, 2)), tries[-1].unflatten(0, (-1, 2)))):
                assert item in self.back or all((row - old).abs().amax(-1).min() < 1e-4 for row in new)
        tries.append(looks)
        return looks

    monkeypatch.setattr(Watch, "tried", tried)
    together = write(vlm, features, questions, s, 5)
    assert any(returns)
    assert together == [write(vlm, features[i : i + 1], questions[i], s, 5)[0] for i in range(2)]


# ---- harness


def test_all_is_undone_after_an_exception(tiny, seen, monkeypatch):
    plain = [a.text for a in tiny.generate(seen[:2], QUESTIONS[1], 4)]

    def fails(*given):
        raise ZeroDivisionError

    monkeypatch.setattr(Watch, "note", fails)
    with pytest.raises(ZeroDivisionError):
        write(tiny, seen[:2], QUESTIONS[1], OperaSettings(), 4)
    assert tiny.model.config.get_text_config()._attn_implementation == "sdpa"
    assert [a.text for a in tiny.generate(seen[:2], QUESTIONS[1], 4)] == plain  # hooks: the fixture of conftest looks


def test_settings_are_checked_and_registered(tiny, seen):
    for wrong in ({"candidates": 0}, {"damping": 0.0}, {"scale": -1}):
        with pytest.raises(ValueError, match="scale at least 0"):
            write(tiny, seen[:1], QUESTIONS[0], OperaSettings(**wrong))
    row = baseline("opera")
    assert row.settings == OperaSettings(5, 5, 50.0, 1e-7, 10, 15, 5) and {} in row.grid
    assert len(write(tiny, seen[:1], QUESTIONS[0], row.settings, 2)) == 1
