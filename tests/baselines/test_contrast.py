"""Baselines that contrast: each against its formula, by hand without a cache; their limits; batches; cleanliness."""

from math import exp

import pytest
import torch

from alea_lib.adversary.prefix import PrefixSettings, random_prefix
from alea_lib.baselines.common import Stream, plausible, with_features, without_image
from alea_lib.baselines.dola import candidates, farthest
from alea_lib.baselines.nucleus import in_nucleus
from alea_lib.baselines.registry import baseline
from alea_lib.baselines.vcd import noised_share

QUESTION = "Please describe this image in detail."
MIXED = ["Please describe this image in detail.", "Is there a dog?", "Is there a dining table in the image?"]
CONTRASTS = ("vcd", "m3id", "dola", "nucleus")


@pytest.fixture(scope="module")
def noisy(tiny, tiny_world, seen):
    return baseline("vcd").with_views(tiny, tiny_world.split("activate").files, seen)


def ready(name, noisy, **changes):
    return noisy.changed(**changes).decoding if name == "vcd" else baseline(name, **changes).decoding


def logits_after(vlm, features, question, ids, prefix=None, drop_image=False):
    """Logits of the next token [V], read without a cache."""
    batch = vlm.encode(features[None], question, side="left")
    embeds, mask = vlm.embed(batch), batch.mask
    if prefix is not None:
        embeds, mask, _ = prefix.insert(batch, embeds)
    if drop_image:
        kept = [i for i in range(embeds.shape[1]) if i >= batch.ids.shape[1] or batch.ids[0, i] != vlm.image_id]
        embeds, mask = embeds[:, kept], mask[:, kept]
    embeds = torch.cat([embeds, vlm.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))], 1)
    h = vlm.hidden(embeds, torch.ones(embeds.shape[:2], dtype=torch.long), batch)
    return vlm.head(h[0, -1])


def chosen(vlm, scores):
    """The likeliest of the contrasted scores: (own, contrasted) -> token id."""
    own, away = scores
    p = own.softmax(-1)
    away = away.masked_fill(p < 0.1 * p.max(), -torch.inf)
    away[vlm.image_id] = -torch.inf
    return away.argmax().item()


def by_hand(vlm, features, question, steps, score, **reading):
    ids = []
    with torch.no_grad():
        for _ in range(steps):
            ids.append(chosen(vlm, score(ids)))
            if ids[-1] == vlm.end_id:
                return vlm.tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()
    return vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("with_prefix", [False, True])
def test_vcd_by_hand(tiny, seen, noisy, with_prefix):
    prefix = random_prefix(tiny, PrefixSettings(length=3)) if with_prefix else None
    others = noisy.views.of(seen)

    def score(row):
        def of(ids):
            own = logits_after(tiny, seen[row], QUESTION, ids, prefix)
            return own, 2.5 * own - 1.5 * logits_after(tiny, others[row], QUESTION, ids, prefix)

        return of

    told = tiny.generate(seen[:3], QUESTION, 8, prefix=prefix, decoding=ready("vcd", noisy, alpha=1.5))
    plain = tiny.generate(seen[:3], QUESTION, 8, prefix=prefix)
    assert [a.text for a in told] == [by_hand(tiny, seen[r], QUESTION, 8, score(r)) for r in range(3)]
    assert [a.text for a in told] != [a.text for a in plain]


def test_m3id_by_hand(tiny, seen):
    prefix = random_prefix(tiny, PrefixSettings(length=2))

    def score(row):
        def of(ids):
            own = logits_after(tiny, seen[row], QUESTION, ids, prefix).log_softmax(-1)
            prior = logits_after(tiny, seen[row], QUESTION, ids, prefix, drop_image=True).log_softmax(-1)
            return own, own + (exp(0.3 * (len(ids) + 1)) - 1) * (own - prior)

        return of

    told = tiny.generate(seen[:3], QUESTION, 8, prefix=prefix, decoding=baseline("m3id", rate=0.3).decoding)
    plain = tiny.generate(seen[:3], QUESTION, 8, prefix=prefix)
    assert [a.text for a in told] == [by_hand(tiny, seen[r], QUESTION, 8, score(r)) for r in range(3)]
    assert [a.text for a in told] != [a.text for a in plain]


@pytest.mark.parametrize("normed", [False, True])
def test_dola_by_hand(tiny, seen, normed):
    norm = tiny.model.get_submodule(tiny.row.norm)

    def score(ids):
        batch = tiny.encode(seen[:1], QUESTION, side="left")
        more = tiny.model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        embeds = torch.cat([tiny.embed(batch), more], 1)
        out = tiny.language_model(inputs_embeds=embeds, output_hidden_states=True)
        own = tiny.head(out.last_hidden_state[0, -1]).log_softmax(-1)
        early = [out.hidden_states[i + 1][0, -1] for i in candidates(baseline("dola").settings, 4)]
        early = torch.stack([tiny.head(norm(h) if normed else h) for h in early]).log_softmax(-1)
        return own, own - farthest(own[None], early[:, None])[0]

    told = tiny.generate(seen[:1], QUESTION, 6, decoding=baseline("dola", normed=normed).decoding)
    assert told[0].text == by_hand(tiny, seen[0], QUESTION, 6, score)


def test_dola_takes_the_farthest_layer_for_each_item():
    own = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    early = torch.tensor([[[0.8, 0.2], [0.8, 0.2]], [[0.2, 0.8], [0.2, 0.8]]]).log()
    assert torch.equal(farthest(own, early), torch.stack([early[1, 0], early[0, 1]]))
    impossible = torch.tensor([[0.0, 1.0]]).log()
    assert torch.equal(farthest(impossible, early[:, :1]), early[0, :1])
    assert candidates(baseline("dola").settings, 32) == list(range(0, 16, 2))
    assert candidates(baseline("dola", low=False).settings, 32) == list(range(16, 31, 2))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vcd", {"alpha": 0.0}),
        ("m3id", {"rate": 0.0}),
        ("dola", {"weight": 0.0}),
        ("nucleus", {"p": 1e-9}),
    ],
)
def test_the_limit_is_plain_decoding(tiny, seen, noisy, name, changes):
    told = tiny.generate(seen, QUESTION, 12, decoding=ready(name, noisy, **changes))
    assert told == tiny.generate(seen, QUESTION, 12)


@pytest.mark.parametrize("name", CONTRASTS)
def test_a_batch_equals_one_by_one_and_differs_from_plain(tiny, seen, noisy, name):
    decoding = ready(name, noisy)
    together = tiny.generate(seen[:3], MIXED, 8, decoding=decoding)
    alone = [tiny.generate(seen[i : i + 1], MIXED[i : i + 1], 8, decoding=decoding)[0] for i in range(3)]
    assert together == alone
    assert together != tiny.generate(seen[:3], MIXED, 8)


@pytest.mark.parametrize("name", CONTRASTS)
def test_nothing_is_left_behind_after_an_exception(tiny, seen, noisy, name):
    def breaks(ids, scores):
        if ids.shape[1] == 2:
            raise RuntimeError("broken")
        return scores

    decoding = ready(name, noisy)

    class Broken:
        def __init__(self, *given):
            self.inner = decoding(*given)

        def __enter__(self):
            how = self.inner.__enter__()
            return {**how, "logits_processor": [*how["logits_processor"], breaks]}

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    plain = tiny.generate(seen, QUESTION, 6)
    with pytest.raises(RuntimeError, match="broken"):
        tiny.generate(seen, QUESTION, 6, decoding=Broken)
    assert tiny.generate(seen, QUESTION, 6) == plain  # and the fixture looks for hooks


def test_noise_is_that_of_the_picture(tiny, tiny_world, seen, noisy):
    files = tiny_world.split("activate").files
    assert noised_share(500) == pytest.approx(0.7448, abs=1e-4)  # the product, computed apart
    assert noised_share(0) > 0.999 > noised_share(500) > noised_share(999)
    still = baseline("vcd", step=0).with_views(tiny, files, seen).views.of(seen)
    whole = noisy.views.of(seen)
    assert (still - seen).norm() < 0.3 * (whole - seen).norm()
    assert torch.equal(tiny.features(files, change=lambda index, pixels: pixels), seen)
    with pytest.raises(ValueError, match="it must be 0 to 999"):
        noised_share(1000)


def test_vcd_says_what_it_lacks(tiny, seen, noisy):
    with pytest.raises(ValueError, match=r"call baseline\.with_views"):
        tiny.generate(seen, QUESTION, 2, decoding=baseline("vcd").decoding)
    with pytest.raises(ValueError, match="one beam"):
        tiny.generate(seen, QUESTION, 2, decoding=noisy.decoding, num_beams=2)


def test_a_stream_of_the_same_prompt_says_the_same(tiny, seen):
    batch = tiny.encode(seen[:3], MIXED, side="left")
    embeds = tiny.embed(batch)
    own = Stream(tiny, *with_features(tiny, batch, embeds, batch.mask, batch.features))
    ids = torch.tensor([[20, 21, 22]] * 3)
    for step in range(3):
        got = own(ids[:, :step])
        wanted = torch.stack([logits_after(tiny, seen[i], MIXED[i], ids[i, :step].tolist()) for i in range(3)])
        assert torch.allclose(got, wanted, atol=1e-4)


def test_without_image_only_the_image_is_missing(tiny, seen):
    batch = tiny.encode(seen[:3], MIXED, side="left")
    blind, embeds, mask = without_image(tiny, batch, tiny.embed(batch), batch.mask)
    n = seen.shape[1]
    assert blind.ids.shape == mask.shape == embeds.shape[:2] == (3, batch.ids.shape[1] - n)
    assert not (blind.ids == tiny.image_id).any() and torch.equal(mask.sum(1), batch.mask.sum(1) - n)
    assert torch.equal(embeds, tiny.model.get_input_embeddings()(blind.ids))


def test_plausible_and_nucleus_by_hand():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert plausible(torch.tensor([[0.5, 0.3, 0.16, 0.04]]).log(), torch.ones(1, 4)).tolist() == [
        [1, 1, 1, -torch.inf]
    ]  # below a tenth of the likeliest
    assert in_nucleus(scores, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert in_nucleus(scores, 0.01).isfinite().tolist() == [[True, False, False, False]]


def test_nucleus_samples_by_its_seed_and_in_proportion(tiny, seen):
    first, again, other = (
        tiny.generate(seen, QUESTION, 8, decoding=baseline("nucleus", seed=s).decoding) for s in (1, 1, 2)
    )
    assert first == again != other
    batch = tiny.encode(seen[:1], QUESTION, side="left")
    scores = torch.tensor([[0.6, 0.3, 0.1]]).log()
    drawn = []
    for seed in range(400):
        sampler = baseline("nucleus", seed=seed, p=0.85).decoding
        with sampler(tiny, batch, None, None) as how:
            drawn.append(how["logits_processor"][0](batch.ids[:, :0], scores).argmax().item())
    counts = [drawn.count(i) for i in range(3)]
    assert counts[2] == 0 and abs(counts[0] / 400 - 2 / 3) < 0.08
