"""Baselines that change attention while writing: against their definitions, their limits, in batches, and undone."""

import dataclasses
from contextlib import contextmanager
from functools import partial

import pandas as pd
import pytest
import torch
from tiny_families import build

from alea_lib.adversary.prefix import PrefixSettings, random_prefix
from alea_lib.baselines.adhh import AdhhSettings, adhh, learn_heads
from alea_lib.baselines.common import Columns, Stream, without_image
from alea_lib.baselines.pai import PaiSettings, guided, pai, raised
from alea_lib.baselines.registry import baseline
from alea_lib.baselines.spin import SpinSettings, head_scales, spin
from alea_lib.baselines.vhr import VhrSettings, chosen_heads, turned_up, vhr, vision_aware
from alea_lib.locate.run import locate_heads
from alea_lib.locate.settings import LocateSettings
from alea_lib.models.hooks import read_attention, read_heads, replaced_heads

QUESTIONS = [
    "Is there a cup?",
    "Please describe this image in detail.",
    "Please describe only what is clearly visible.",
]
HEADS = ((1, 0), (1, 3), (2, 2))


def decoding(apply, settings):
    """As the registry gives it to ``generate``."""
    return contextmanager(partial(apply, settings))


# each so strong that the tiny model's answers change
STRONG = {
    "pai": decoding(pai, PaiSettings(alpha=1.0, gamma=2.0, first=0)),
    "spin": decoding(spin, SpinSettings(kept=0.5)),
    "adhh": decoding(adhh, AdhhSettings(heads=HEADS, threshold=0.01)),
    "vhr": decoding(vhr, VhrSettings(alpha=4.0)),
}
# each without any effect
LIMITS = {
    "pai": decoding(pai, PaiSettings(alpha=0.0, gamma=1.0)),
    "pai without guidance, weights rewritten": decoding(pai, PaiSettings(alpha=1e-12, gamma=1.0)),
    "spin, all kept": decoding(spin, SpinSettings(kept=1.0)),
    "spin, scale 1": decoding(spin, SpinSettings(kept=0.5, scale=1.0)),
    "adhh, no heads": decoding(adhh, AdhhSettings(heads=())),
    "adhh, threshold never met": decoding(adhh, AdhhSettings(heads=HEADS, threshold=1.1)),
    "vhr": decoding(vhr, VhrSettings(alpha=1.0)),
}


@pytest.fixture(scope="module")
def left(tiny, seen):
    """Three prompts of three lengths, padded on the left."""
    return tiny.encode(seen[:3], QUESTIONS, side="left")


def write(vlm, features, questions, how=None, n=10, **options):
    return [a.text for a in vlm.generate(features, questions, n, decoding=how, **options)]


def first_logits(vlm, batch, method):
    """Logits [B,V] of the first new token under a method, its logits processors applied."""
    embeds = vlm.embed(batch)
    with method(vlm, batch, embeds, batch.mask) as how:
        scores = vlm.head(vlm.hidden(embeds, batch.mask, batch)[:, -1])
        for process in how.get("logits_processor", []):
            scores = process(batch.ids[:, :0], scores)
    return scores


# ---- promises of all of them


@pytest.mark.parametrize("name", LIMITS)
def test_without_effect_it_is_greedy_decoding(tiny, seen, name):
    assert write(tiny, seen[:3], QUESTIONS, LIMITS[name]) == write(tiny, seen[:3], QUESTIONS)


@pytest.mark.parametrize("name", STRONG)
def test_a_padded_batch_equals_one_by_one(tiny, seen, name):
    """And the answers are others than the base's: the method is at work."""
    together = write(tiny, seen[:3], QUESTIONS, STRONG[name])
    assert together == [write(tiny, seen[i : i + 1], q, STRONG[name])[0] for i, q in enumerate(QUESTIONS)]
    assert together != write(tiny, seen[:3], QUESTIONS)


@pytest.mark.parametrize("name", STRONG)
def test_all_is_undone_after_an_exception(tiny, seen, left, name):
    plain = write(tiny, seen[:3], QUESTIONS)
    with pytest.raises(RuntimeError, match="amid"):
        with STRONG[name](tiny, left, tiny.embed(left), left.mask):
            raise RuntimeError("amid")

    def fails(ids, scores):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(tiny, seen[:3], QUESTIONS, STRONG[name] if name != "pai" else decoding(pai, PaiSettings(gamma=1.0)),
              stopping_criteria=[fails])  # fmt: skip
    assert tiny.model.config.get_text_config()._attn_implementation == "sdpa"
    assert write(tiny, seen[:3], QUESTIONS) == plain  # hooks: the fixture of conftest looks


@pytest.mark.parametrize("name", STRONG)
def test_a_soft_prefix_stands_in_the_prompt(tiny, seen, name):
    """Its rows lengthen the prompt; the image's columns stay where they are."""
    prefix = random_prefix(tiny, PrefixSettings(length=3))
    together = write(tiny, seen[:3], QUESTIONS, STRONG[name], prefix=prefix)
    alone = [write(tiny, seen[i : i + 1], q, STRONG[name], prefix=prefix)[0] for i, q in enumerate(QUESTIONS)]
    assert together == alone != write(tiny, seen[:3], QUESTIONS, STRONG[name])


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("family", ["llava-next-mistral", "qwen2.5-vl", "paligemma", "instructblip"])
def test_every_family_writes_under_it(family, name):
    """Shared keys and values, other masks and positions: in a batch as one by one."""
    import numpy as np
    from PIL import Image

    vlm = build(family)[0]
    rng = np.random.default_rng(0)
    features = vlm.features([Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(2)])
    questions = ["Is there a cat?", vlm.prompt("plain")]
    together = write(vlm, features, questions, STRONG[name], n=5)
    assert together == [write(vlm, features[i : i + 1], questions[i], STRONG[name], n=5)[0] for i in range(2)]


@pytest.mark.parametrize("name", ["pai", "spin", "adhh", "vhr"])
def test_the_registered_settings_write(tiny, seen, told, name):
    pairs = pd.DataFrame({"positive": told, "negative": told[1:] + told[:1]})
    wrong = [["knife"], ["dog"], ["car"], ["bus"], ["scissors"], ["cup"]]
    row = baseline(name).fitted(tiny, seen, pairs.assign(wrong=wrong))
    assert len(row.grid) >= 3 and len(write(tiny, seen, QUESTIONS * 2, row.decoding)) == 6


# ---- columns


def test_columns_of_image_and_text(tiny, left):
    columns, scores = Columns(tiny, left), torch.zeros(6, 4, left.ids.shape[1] + 2)  # two beams, two new tokens
    image, text = columns.of_image(scores)[:, 0], columns.of_text(scores)[:, 0]
    for row in range(6):
        ids = left.ids[row // 2]
        assert image[row].nonzero().ravel().tolist() == (ids == tiny.image_id).nonzero().ravel().tolist()
        assert text[row].nonzero().ravel().tolist() == list(range(int(left.question[row // 2]), len(ids) + 2))
    blind = dataclasses.replace(left, ids=torch.where(left.ids == tiny.image_id, 5, left.ids))
    with pytest.raises(ValueError, match="no image"):
        Columns(tiny, blind)


# ---- PAI


def test_raised_logits_by_hand():
    scores = torch.tensor([[[2.0, -2.0, 1.0, -1.0]]])
    got = raised(scores, torch.tensor([[[True, True, False, False]]]), 0.5)
    assert got.tolist() == [[[3.0, -1.0, 1.0, -1.0]]]


def test_guidance_by_hand():
    p, blind = torch.tensor([[0.6, 0.36, 0.04]]), torch.tensor([[0.3, 0.6, 0.1]])
    got = guided(p.log() + 7, blind.log(), 2.0)[0]
    assert got[:2].exp().tolist() == pytest.approx([0.6**2 / 0.3, 0.36**2 / 0.6], rel=1e-5)
    assert got[2] == -torch.inf  # below a tenth of 0.6


@torch.no_grad()
def test_pai_in_one_layer_by_hand(tiny, left):
    """The last layer's head outputs: softmax of the raised logits times the values."""
    last, image = torch.full((3, 1), left.ids.shape[1] - 1), left.ids == tiny.image_id
    plain, values, heads = {}, {}, {}
    name = tiny.address("o_proj", 3).replace("o_proj", "v_proj")
    handle = tiny.model.get_submodule(name).register_forward_hook(lambda m, a, out: values.update(v=out))
    with read_attention(tiny, plain.__setitem__, last):
        tiny.hidden(tiny.embed(left), left.mask, left)
    handle.remove()
    q, k = (projected(tiny, left, 3, part) for part in ("q_proj", "k_proj"))
    scores = torch.einsum("bhd,bhkd->bhk", q[:, :, -1], k) / 16**0.5
    scores = scores.masked_fill(left.mask[:, None] == 0, -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), plain[3][:, :, 0], atol=1e-5, rtol=1e-4)
    weights = torch.where(image[:, None], scores + 0.5 * scores.abs(), scores).softmax(-1)
    want = torch.einsum("bhk,bkhd->bhd", weights, values["v"].unflatten(-1, (4, 16)))
    with contextmanager(pai)(PaiSettings(first=24, gamma=1.0), tiny, left, tiny.embed(left), left.mask), read_heads(
        tiny, heads.__setitem__, [3]
    ):  # fmt: skip
        tiny.hidden(tiny.embed(left), left.mask, left)
    torch.testing.assert_close(heads[3][:, -1], want, atol=1e-5, rtol=1e-4)


def projected(vlm, batch, layer, part):
    """Queries or keys [B,H,T,D/H] of a layer, turned by their positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    kept, name = {}, vlm.address("o_proj", layer).replace("o_proj", part)
    handle = vlm.model.get_submodule(name).register_forward_hook(lambda m, a, out: kept.update(x=out))
    vlm.hidden(vlm.embed(batch), batch.mask, batch)
    handle.remove()
    x = kept["x"].unflatten(-1, (4, 16)).transpose(1, 2)
    cos, sin = vlm.language_model.rotary_emb(x, torch.arange(x.shape[2])[None])
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@torch.no_grad()
def test_guidance_of_the_first_token(tiny, left):
    """With attention as it is, scores are those of the two prompts, put together by the formula."""
    own = tiny.head(tiny.hidden(tiny.embed(left), left.mask, left)[:, -1])
    blind = Stream(tiny, *without_image(tiny, left, tiny.embed(left), left.mask))(left.ids[:, :0])
    got = first_logits(tiny, left, decoding(pai, PaiSettings(alpha=0.0, gamma=1.5)))
    torch.testing.assert_close(got, guided(own, blind, 1.5), atol=1e-4, rtol=1e-4)
    # the stream without image is read with its attention as it is
    both = first_logits(tiny, left, decoding(pai, PaiSettings(alpha=1.0, gamma=1.5, first=0)))
    alone = first_logits(tiny, left, decoding(pai, PaiSettings(alpha=1.0, gamma=1.0, first=0)))
    torch.testing.assert_close(both, guided(alone, blind, 1.5), atol=1e-4, rtol=1e-4)


# ---- SPIN


def test_head_scales_by_hand():
    """Heads 0 to 3; the image is columns 0 and 1."""
    scores = torch.tensor([[[1.0, 1.0, 9.0], [3.0, 1.0, 9.0], [0.0, 0.5, -9.0], [-1.0, 0.0, -9.0]]])
    image = torch.tensor([[[True, True, False]]])
    keep = {"kept": 0.5, "scale": 0.08}
    assert head_scales(scores, image, SpinSettings(**keep))[0].tolist() == pytest.approx([1, 1, 0.08, 0.08])
    by_share = head_scales(scores, image, SpinSettings(**keep, ranked_by="attention"))
    assert by_share[0].tolist() == pytest.approx([0.08, 0.08, 1, 1])
    assert head_scales(scores, image, SpinSettings())[0].tolist() == pytest.approx([1, 1, 1, 0.08])  # 3 of 4


@torch.no_grad()
def test_spin_scales_the_newest_positions_heads(tiny, left):
    heads, plain, seen_by = {}, {}, {}
    last, image = torch.full((3, 1), left.ids.shape[1] - 1), left.ids == tiny.image_id
    with read_heads(tiny, plain.__setitem__, [0]), read_attention(tiny, seen_by.__setitem__, last):
        tiny.hidden(tiny.embed(left), left.mask, left)
    s = SpinSettings(kept=0.5, scale=0.25, ranked_by="attention")
    with contextmanager(spin)(s, tiny, left, tiny.embed(left), left.mask), read_heads(tiny, heads.__setitem__, [0]):
        tiny.hidden(tiny.embed(left), left.mask, left)
    share = (seen_by[0][:, :, 0] * image[:, None]).sum(-1)
    factor = torch.where(share >= share.sort(dim=1).values[:, 2:3], 1.0, 0.25)
    torch.testing.assert_close(heads[0][:, -1], plain[0][:, -1] * factor[..., None], atol=1e-5, rtol=1e-4)
    assert torch.equal(heads[0][:, :-1], plain[0][:, :-1])


# ---- AD-HH


@pytest.mark.parametrize("off", ["head", "text"])
@torch.no_grad()
def test_adhh_by_hand(tiny, left, off):
    """A chosen head is silent, or takes nothing from the text, in the items where it looks at the text enough."""
    last, plain, shares, values, heads = torch.full((3, 1), left.ids.shape[1] - 1), {}, {}, {}, {}
    name = tiny.address("o_proj", 1).replace("o_proj", "v_proj")
    handle = tiny.model.get_submodule(name).register_forward_hook(lambda m, a, out: values.update(v=out))
    with read_heads(tiny, plain.__setitem__, [1]), read_attention(tiny, shares.__setitem__, last):
        tiny.hidden(tiny.embed(left), left.mask, left)
    handle.remove()
    text = torch.arange(left.ids.shape[1]) >= left.question[:, None]
    attention = shares[1][:, 2, 0]
    on_text = (attention * text).sum(-1)
    s = AdhhSettings(heads=((1, 2),), threshold=on_text.median().item(), off=off)
    with contextmanager(adhh)(s, tiny, left, tiny.embed(left), left.mask), read_heads(tiny, heads.__setitem__, [1]):
        tiny.hidden(tiny.embed(left), left.mask, left)
    met, own = on_text >= s.threshold, plain[1][:, -1]
    assert met.tolist().count(True) == 2
    rest = torch.einsum("bk,bkd->bd", attention * ~text, values["v"].unflatten(-1, (4, 16))[:, :, 2])
    want = torch.where(met[:, None], rest if off == "text" else 0.0, own[:, 2])
    torch.testing.assert_close(heads[1][:, -1, 2], want, atol=1e-5, rtol=1e-4)
    for head in (0, 1, 3):
        torch.testing.assert_close(heads[1][:, -1, head], own[:, head], atol=1e-5, rtol=1e-4)


def test_heads_are_those_of_zero_ablation(tiny, seen, told):
    """The share of 20 in 1,024, at least one; objects of the same answer are compared."""
    wrong = [["knife"], ["dog"], ["car"], ["bus"], ["scissors"], ["cup"]]
    pairs = pd.DataFrame({"positive": told, "negative": told[1:] + told[:1], "wrong": wrong})
    table = locate_heads(tiny, seen, pairs, ["zero-ablation"], LocateSettings(grounded="negative")).scores
    mean = table.groupby(["layer", "head"])["score"].mean().sort_values(ascending=False)
    assert learn_heads(tiny, seen, pairs, AdhhSettings()).heads == (mean.index[0],)
    row = baseline("adhh", top=192).fitted(tiny, seen, pairs)
    assert row.settings.heads == tuple(sorted(mean.index[:3]))
    assert baseline("adhh", heads=HEADS).fitted(tiny, seen, pairs).settings.heads == HEADS


def test_adhh_refuses(tiny, left):
    for s, why in ((AdhhSettings(heads=((0, 4),)), "out of range"), (AdhhSettings(off="layer"), "one of")):
        with pytest.raises(ValueError, match=why), contextmanager(adhh)(s, tiny, left, tiny.embed(left), left.mask):
            pass


# ---- VHR


def test_vision_aware_heads_by_hand():
    """Divergences 1, 3, 2, 5; without the image the last head's output is far the longest: it is out."""
    blind = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [9.0, 0.0]]])
    seeing = blind - torch.tensor([[[1.0, 0.0], [0.0, 3.0], [0.0, 2.0], [0.0, 5.0]]])
    assert vision_aware(seeing, blind, 0.5)[0].tolist() == [False, True, True, False]
    assert vision_aware(seeing, blind, 0.01)[0].tolist() == [False, True, False, False]
    assert not vision_aware(blind, blind, 0.5).any()


def test_heads_are_turned_up_at_the_last_position():
    o, heads = torch.ones(2, 3, 2, 1), torch.tensor([[True, False], [False, False]])
    got = turned_up(o, heads, 3.0)
    assert got[0, -1].ravel().tolist() == [3, 1] and got.sum() == 12 + 2
    assert turned_up(torch.ones(4, 1, 2, 1), heads, 3.0)[:, 0, 0, 0].tolist() == [3, 3, 1, 1]  # two beams


@torch.no_grad()
def test_heads_are_judged_layer_by_layer(tiny, left):
    """Each layer with those below turned up; against runs of the two prompts apart."""
    s, embeds, found, image = VhrSettings(alpha=3.0), tiny.embed(left), {}, left.ids == tiny.image_id
    got = chosen_heads(tiny, left, embeds, left.mask, [0, 2, 3], s)
    for layer in (0, 2, 3):
        seeing, blind = {}, {}
        up = partial(lambda below, i, o: turned_up(o, below[i], 3.0), dict(found))
        with replaced_heads(tiny, up, list(found)), read_heads(
            tiny, seeing.__setitem__, [layer]
        ):  # fmt: skip
            tiny.hidden(embeds, left.mask, left)
        with read_heads(tiny, blind.__setitem__, [layer]):
            tiny.hidden(embeds, left.mask * ~image, left)
        found[layer] = vision_aware(seeing[layer][:, -1], blind[layer][:, -1], s.share)
        assert torch.equal(got[layer], found[layer]) and got[layer].sum() == 6
