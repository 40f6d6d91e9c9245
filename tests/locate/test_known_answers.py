"""Every locator against a case whose answer is known by construction: hand-made states, and hand-made models."""

from types import SimpleNamespace

import handmade as hm
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alea_lib.locate.causal import robust_mean
from alea_lib.locate.evidence import geometry
from alea_lib.locate.layers import left_out, outlying, shrinkage
from alea_lib.locate.registry import HEAD_LOCATORS, LAYER_LOCATORS
from alea_lib.locate.run import locate_heads, locate_layers
from alea_lib.locate.settings import LocateSettings

PAIR = pd.DataFrame({"positive": [hm.POSITIVE], "negative": [hm.NEGATIVE], "wrong": [["dog"]], "image_id": [1]})


class Collected(SimpleNamespace):
    """Evidence that was not collected but given."""

    def __getitem__(self, need: str) -> dict:
        return self.needs[need]


def score(name, p, n):
    """A locator of states on states [N,L,D]; the input embeddings of both answers are all ones."""
    ones = torch.ones_like(p[:, :1])
    shapes = geometry(torch.cat([ones, p], 1), torch.cat([ones, n], 1)).numpy()
    states = {"positive": p.numpy(), "negative": n.numpy(), "geometry": shapes}
    evidence = Collected(settings=LocateSettings(), needs={"states": states})
    return LAYER_LOCATORS[name].function(evidence)


# ---- distances between states

P = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [0.0, 1.0]]])  # norms 5, 50, 1
N = torch.tensor([[[3.0, 0.0], [30.0, 30.0], [1.0, 0.0]]])  # differences 4, 10, sqrt 2


def test_distances_by_hand():
    np.testing.assert_allclose(score("raw-l2", P, N), [[4, 10, 2**0.5]], rtol=1e-6)
    relative = np.array([4 / ((5 + 3) / 2), 10 / ((50 + 1800**0.5) / 2), 2**0.5])
    np.testing.assert_allclose(score("relative-l2", P, N)[0], relative, rtol=1e-6)
    np.testing.assert_allclose(score("cosine", P, N)[0], [1 - 9 / 15, 1 - 2100 / (50 * 1800**0.5), 1], rtol=1e-5)
    np.testing.assert_allclose(score("increment", P, N)[0], np.diff([0, *relative]), rtol=1e-6)
    # raw distance follows the norms to layer 1; by direction layer 2 is the one
    assert score("raw-l2", P, N).argmax() == 1
    assert score("relative-l2", P, N).argmax() == score("cosine", P, N).argmax() == 2


@pytest.mark.parametrize("name", ["raw-l2", "relative-l2", "cosine", "whitened", "svd-energy", "increment"])
def test_equal_states_have_no_distance(name):
    a = torch.randn(7, 5, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(score(name, a, a), 0, atol=2e-7)
    assert np.isfinite(score(name, a * 0, a * 0)).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=5), st.integers(0, 1000))
def test_free_of_scale(scales, seed):
    a, b = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(seed))
    s = torch.tensor(scales)[None, :, None]
    for name in ("relative-l2", "cosine", "whitened", "svd-energy", "probe"):
        np.testing.assert_allclose(score(name, a * s, b * s), score(name, a, b), rtol=1e-3, atol=1e-5)


def test_whitened_finds_a_small_step_in_a_quiet_direction():
    """Both layers differ by a step of 1: in layer 0 along a direction in which states vary by 10, in layer 1 by 0.1."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 2, 4, generator=g) * torch.tensor([10.0, 10.0, 10.0, 0.1])
    p, n = noise, noise + torch.randn(60, 2, 4, generator=g) * 0.01
    n[:, 0, 0] += 1
    n[:, 1, 3] += 1
    assert np.abs(score("raw-l2", p, n)[:, 0] - score("raw-l2", p, n)[:, 1]).max() < 0.1
    assert (score("whitened", p, n)[:, 1] > 2 * score("whitened", p, n)[:, 0]).all()


def test_whitened_is_the_distance_under_the_shrunk_covariance():
    g = np.random.default_rng(1)
    p, n = g.normal(size=(2, 30, 5)) * np.array([1, 2, 3, 4, 5])
    x = np.concatenate([p, n]) - np.concatenate([p, n]).mean(0)
    cov = x.T @ x / len(x)
    share = shrinkage(x, np.linalg.eigvalsh(cov))
    each = np.mean([((np.outer(r, r) - cov) ** 2).sum() for r in x]) / len(x)  # Ledoit and Wolf, by definition
    assert share == pytest.approx(each / ((cov - np.trace(cov) / 5 * np.eye(5)) ** 2).sum(), rel=1e-9)
    inverse = np.linalg.inv((1 - share) * cov + share * np.trace(cov) / 5 * np.eye(5))
    want = [np.sqrt((a - b) @ inverse @ (a - b)) for a, b in zip(n, p)]
    got = score("whitened", torch.tensor(p)[:, None], torch.tensor(n)[:, None])[:, 0]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_svd_energy_is_the_share_of_the_top_singular_values(monkeypatch):
    g = torch.Generator().manual_seed(2)
    p = torch.randn(20, 3, 6, generator=g)
    n = p + torch.randn(20, 3, 6, generator=g)
    n[:, 1] = p[:, 1] + torch.randn(20, 1, generator=g) * torch.ones(6)  # one direction in layer 1
    monkeypatch.setattr("alea_lib.locate.layers.TOP", 2)
    got = score("svd-energy", p, n)
    for layer in range(3):
        values = np.linalg.svd((n - p)[:, layer].double().numpy())[1] ** 2
        assert got[:, layer].mean() == pytest.approx(values[:2].sum() / values.sum(), rel=1e-5)
    assert got.mean(0).argmax() == 1 and got[:, 1].mean() == pytest.approx(1)


def test_probe_finds_the_layer_that_tells_the_answers_apart():
    g = torch.Generator().manual_seed(3)
    p, n = torch.randn(2, 40, 3, 6, generator=g)
    n[:, 2, 0] += 4
    accuracy = score("probe", p, n).mean(0)
    assert accuracy[2] > 0.85 and (np.abs(accuracy[:2] - 0.5) < 0.25).all()
    assert set(np.unique(score("probe", p, n))) <= {0, 0.5, 1}


def test_a_pair_left_out_is_really_left_out():
    """Against training without it."""
    g = np.random.default_rng(4)
    p, n = g.normal(size=(2, 12, 5))
    n[:, 0] += 1
    x = np.concatenate([p, n])
    x -= x.mean(0)
    ridge, y = np.trace(x @ x.T) / 24, np.repeat([-1.0, 1.0], 12)
    for i, right in enumerate(left_out(p, n)):
        kept = ~np.isin(np.arange(24), [i, i + 12])
        w = np.linalg.solve(x[kept].T @ x[kept] + ridge * np.eye(5), x[kept].T @ y[kept])
        assert right == np.mean([x[i] @ w < 0, x[i + 12] @ w > 0])


def test_outliers():
    assert outlying(np.array([1.0, 1.0, 5.0, 1.2])).argmax() == 2
    np.testing.assert_allclose(outlying(np.array([[1.0, 2.0], [4.0, 8.0]])), [[3, 2], [2, 6]])
    x = torch.tensor([[[1.0], [1.1], [0.9], [50.0], [777.0]]])
    weight = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]])  # the last position is not compared at all
    assert robust_mean(x, weight, 3.0).item() == pytest.approx(1.0)
    assert robust_mean(x, weight, 1e9).item() == pytest.approx(53 / 4)
    assert robust_mean(x * 0 + 2, weight, 3.0).item() == pytest.approx(2)


# ---- a guilty MLP


def mean_scores(located):
    index = [c for c in ("layer", "head") if c in located.scores]
    return {n: t.groupby(index)["score"].mean() for n, t in located.scores.groupby("locator")}


CAUSAL = ["ablation", "gradient", "tracing"]


@pytest.mark.parametrize("layer", [1, 3])
def test_the_layer_that_writes_the_wrong_word(layer):
    """Attention in layer 0 carries the picture; one MLP turns it into the wrong word; another writes the right one."""
    vlm = hm.blank_model()
    hm.head_writes(vlm, 0, 2, reads=hm.IMAGE, writes=hm.CARRIED, strength=0.1)
    hm.mlp_writes(vlm, layer, reads=hm.CARRIED, writes=hm.WRONG, strength=0.1)
    hm.mlp_writes(vlm, 2, reads=hm.TEXT, writes=hm.RIGHT, strength=0.005)
    for options in ({}, {"sites": "answer"}, {"grounded": "negative"}):
        found = mean_scores(locate_layers(vlm, hm.picture(), PAIR, CAUSAL, LocateSettings(**options)))
        for name in CAUSAL:
            assert found[name].idxmax() == layer and found[name][layer] > 1e-3, (options, name)
            assert found[name][0] == 0, (options, name)  # an MLP that writes nothing has no effect


def test_ablation_by_hand():
    """The fall of log p(dog | negative) minus that of log p(cup | positive), from two whole passes."""
    vlm = hm.blank_model()
    hm.mlp_writes(vlm, 1, reads=hm.TEXT, writes=hm.WRONG, strength=0.02)

    def contrast():
        values = []
        for text, word in ((hm.NEGATIVE, " dog"), (hm.POSITIVE, " cup")):
            batch = vlm.encode(hm.picture(), vlm.prompt("plain"), [text], eos=False)
            token = vlm.tokenizer(word, add_special_tokens=False)["input_ids"][0]
            at = batch.ids[0].tolist().index(token) - 1
            with torch.no_grad():
                logits = vlm.head(vlm.hidden(vlm.embed(batch), batch.mask))[0, at]
            values.append(logits.log_softmax(-1)[token].item())
        return values[0] - values[1]

    with_it = contrast()
    got = mean_scores(locate_layers(vlm, hm.picture(), PAIR, ["ablation"]))["ablation"]
    with torch.no_grad():
        vlm.language_model.layers[1].mlp.down_proj.weight.zero_()
    assert got[1] == pytest.approx(with_it - contrast(), rel=1e-5) and got[1] > 0.5


def test_tracing_needs_the_picture():
    """Clean states bring back a wrong word that comes from the picture, and nothing where it comes from the text."""
    found = {}
    for source in (hm.IMAGE, hm.TEXT):
        vlm = hm.blank_model()
        hm.head_writes(vlm, 0, 0, reads=source, writes=hm.CARRIED, strength=0.1)
        hm.mlp_writes(vlm, 2, reads=hm.CARRIED, writes=hm.WRONG, strength=0.1)
        found[source] = mean_scores(locate_layers(vlm, hm.picture(), PAIR, ["tracing"]))["tracing"]
    assert found[hm.IMAGE].abs().idxmax() == 2 and abs(found[hm.IMAGE][2]) > 1e-3
    assert found[hm.TEXT].abs().max() < 1e-2 * abs(found[hm.IMAGE][2])


def test_tracing_restores_one_layer_alone():
    vlm = hm.blank_model()
    hm.head_writes(vlm, 0, 0, reads=hm.IMAGE, writes=hm.CARRIED, strength=4.0)
    hm.mlp_writes(vlm, 2, reads=hm.CARRIED, writes=hm.WRONG, strength=0.02)
    found = mean_scores(locate_layers(vlm, hm.picture(), PAIR, ["tracing"]))["tracing"]
    assert {i for i, x in found.items() if x > 1e-3} == {2}


def test_entropy_finds_the_layer_that_looks_around():
    """In layer 2 the positive's words look at the first patch; the negative's bad word looks everywhere."""
    vlm = hm.blank_model()
    with torch.no_grad():  # every text token asks, but for the bad word
        table = vlm.model.get_input_embeddings().weight
        table[:, 7] = 1.0
        table[table[:, hm.BAD] == 1, 7] = 0.0
    for head in range(4):
        hm.head_looks(vlm, 2, head, query=7, key=hm.FIRST, strength=1.0)
    found = mean_scores(locate_layers(vlm, hm.picture(), PAIR, ["attention-entropy"]))["attention-entropy"]
    assert found.idxmax() == 2 and found[2] > 0.1
    np.testing.assert_allclose(found.drop(2), 0, atol=1e-5)


# ---- guilty heads


@pytest.mark.parametrize("at", [(0, 1), (2, 3)])
def test_the_head_that_writes_the_wrong_word(at):
    vlm = hm.blank_model()
    hm.head_writes(vlm, *at, reads=hm.TEXT, writes=hm.WRONG, strength=0.5)
    hm.head_writes(vlm, 1, 0, reads=hm.TEXT, writes=hm.RIGHT, strength=0.5)
    for options in ({}, {"sites": "answer"}, {"max_rows": 3}):
        found = mean_scores(
            locate_heads(vlm, hm.picture(), PAIR, ["zero-ablation", "gradient"], LocateSettings(**options))
        )
        for name in ("zero-ablation", "gradient"):
            assert found[name].idxmax() == at and found[name].idxmin() == (1, 0), (options, name)
            assert (found[name].drop([at, (1, 0)]).abs() < 1e-9).all()


def test_zero_ablation_by_hand():
    """Against zeroed columns of o_proj and whole passes, for every head."""
    vlm = hm.blank_model()
    hm.head_writes(vlm, 1, 2, reads=hm.TEXT, writes=hm.WRONG, strength=0.3)
    hm.head_writes(vlm, 2, 0, reads=hm.IMAGE, writes=hm.WRONG, strength=0.3)
    token = {w: vlm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in (" dog", " cup")}

    @torch.no_grad()
    def contrast():
        values = []
        for text, word in ((hm.NEGATIVE, " dog"), (hm.POSITIVE, " cup")):
            batch = vlm.encode(hm.picture(), vlm.prompt("plain"), [text], eos=False)
            at = batch.ids[0].tolist().index(token[word]) - 1
            hidden = vlm.hidden(vlm.embed(batch), batch.mask)
            values.append(vlm.head(hidden)[0, at].softmax(-1)[token[word]].item())
        return values[0] - values[1]

    found = mean_scores(locate_heads(vlm, hm.picture(), PAIR, ["zero-ablation"]))["zero-ablation"]
    base = contrast()
    for layer, head in ((1, 2), (2, 0), (3, 3)):
        weight = vlm.module("o_proj", layer).weight.data
        own = weight.clone()
        weight[:, head * 16 : head * 16 + 16] = 0
        assert found[layer, head] == pytest.approx(base - contrast(), abs=1e-6), (layer, head)
        weight.copy_(own)
    assert found.nlargest(2).min() > 1e-4


def test_route_is_positive_for_the_signature_alone():
    """(1, 1) takes the wrong word from the text against the picture; (2, 2) takes it from the picture."""
    vlm, features = hm.blank_model(), hm.picture()
    features[..., hm.TEXT] = -0.5  # the picture speaks against what text says
    hm.head_writes(vlm, 1, 1, reads=hm.TEXT, writes=hm.WRONG, strength=0.5)
    hm.head_writes(vlm, 2, 2, reads=hm.IMAGE, writes=hm.WRONG, strength=0.5)
    found = mean_scores(locate_heads(vlm, features, PAIR, ["route"]))["route"]
    assert found.idxmax() == (1, 1) and found[1, 1] > 1e-5
    assert found[2, 2] < 0 and (found.drop((1, 1)) <= 0).all()


def test_heads_that_look_at_the_picture_and_heads_that_do_not():
    """(1, 2) looks at the picture and reports it; (2, 1) looks away; the others spread evenly and report nothing."""
    vlm = hm.blank_model()
    hm.head_looks(vlm, 1, 2, query=hm.TEXT, key=hm.IMAGE, strength=1.0)
    hm.head_writes(vlm, 1, 2, reads=hm.IMAGE, writes=9, strength=0.05)
    hm.head_looks(vlm, 2, 1, query=hm.TEXT, key=hm.TEXT, strength=1.0)
    found = mean_scores(locate_heads(vlm, hm.picture(), PAIR, ["image-attention", "vhd"]))
    mass = -found["image-attention"]
    assert mass.idxmax() == (1, 2) and mass[1, 2] > 0.95 and mass.idxmin() == (2, 1) and mass[2, 1] < 0.05
    assert found["vhd"].idxmin() == (1, 2) and found["vhd"][1, 2] < -1
    assert (found["vhd"].drop((1, 2)).abs() < 1e-5).all()


def test_the_head_whose_output_differs():
    vlm = hm.blank_model()
    hm.head_writes(vlm, 2, 1, reads=hm.BAD, writes=9)
    hm.head_writes(vlm, 0, 0, reads=hm.IMAGE, writes=10, strength=0.01)
    found = mean_scores(locate_heads(vlm, hm.picture(), PAIR, ["output-difference"]))["output-difference"]
    assert found.idxmax() == (2, 1) and found[2, 1] > 0.01
    assert found.drop((2, 1)).abs().max() < 0.1 * found[2, 1]


# ---- controls


def test_weight_norms_point_at_odd_weights():
    vlm = hm.blank_model()
    with torch.no_grad():
        vlm.module("down_proj", 2).weight[0, 0] = 5.0
        vlm.module("o_proj", 1).weight[0, 3 * 16] = 5.0
    layers = mean_scores(locate_layers(vlm, hm.picture(), PAIR, ["weight-norm"]))["weight-norm"]
    heads = mean_scores(locate_heads(vlm, hm.picture(), PAIR, ["weight-norm"]))["weight-norm"]
    assert layers.tolist() == pytest.approx([0, 0, 5, 0]) and heads.idxmax() == (1, 3) and heads.max() == 5


def test_controls_by_hand():
    evidence = SimpleNamespace(pairs=range(3), vlm=SimpleNamespace(n_layers=4, n_heads=2), settings=LocateSettings())
    assert (LAYER_LOCATORS["last"].function(evidence) == np.arange(4)).all()
    assert (LAYER_LOCATORS["first"].function(evidence) == -np.arange(4)).all()
    assert (
        LAYER_LOCATORS["all"].function(evidence).shape == (3, 4) and not LAYER_LOCATORS["all"].function(evidence).any()
    )
    for table, n in ((LAYER_LOCATORS, 4), (HEAD_LOCATORS, 8)):
        rows = table["random"].function(evidence).reshape(3, -1)
        assert sorted(rows[0]) == list(range(n)) and (rows == rows[0]).all()


def test_random_control_is_fair():
    """Over 600 seeds each of 5 layers comes first about 120 times (sd 9.8)."""
    vlm, first = SimpleNamespace(n_layers=5), np.zeros(5)
    for seed in range(600):
        evidence = SimpleNamespace(pairs=[0], vlm=vlm, settings=LocateSettings(seed=seed))
        first[LAYER_LOCATORS["random"].function(evidence)[0].argmax()] += 1
    assert (np.abs(first - 120) < 40).all()
