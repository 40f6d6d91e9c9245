"""Baselines that edit weights: each against its definition, its limit, and that the model stays as it was."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny

from alea_lib.adversary.prefix import adversary_preset, fit_prefix, random_like
from alea_lib.baselines import dpo
from alea_lib.baselines.common import at_depth, head_count
from alea_lib.baselines.dpo import DpoSettings, fit_dpo, preference_loss
from alea_lib.baselines.edits import WHAT, SupervisedSettings, fit_supervised
from alea_lib.baselines.nullu import NulluSettings, fit_nullu
from alea_lib.baselines.registry import baseline
from alea_lib.edit.fit import fit_edit
from alea_lib.edit.methods import EditRequest, fit_method, located_heads
from alea_lib.experiments.edits import EditBench, EditCase, EditTrialSettings
from alea_lib.locate.choose import choose_heads
from alea_lib.locate.run import locate_heads, locate_layers
from alea_lib.models.batch import Limits
from alea_lib.models.delta import applied, load_delta, save_delta
from alea_lib.models.hooks import full_weight, read_layers, replaced_linear

SHORT = DpoSettings(epochs=2, batch=3, lr=1e-3)


@pytest.fixture(scope="module")
def pairs(told):
    wrong = [["knife"], ["cup"], ["car"], ["bus"], ["scissors"], ["cup"]]
    return pd.DataFrame({"positive": told, "negative": told[1:] + told[:1], "wrong": wrong})


def log_p(vlm, seen, texts):
    """Log-probability of each answer, one at a time, from the model's logits at all positions."""
    rows = []
    for image, text in zip(seen, texts):
        batch = vlm.encode(image[None], vlm.prompt("plain"), [text])
        logp = vlm.head(vlm.hidden(vlm.embed(batch), batch.mask, batch)).log_softmax(-1)[0]
        at = (batch.labels[0] != -100).nonzero().ravel()
        rows.append(logp[at - 1, batch.ids[0, at]].sum())
    return torch.stack(rows)


# ---- constants of a model of 32 layers


def test_constants_keep_their_share():
    assert [at_depth(layer, 32) for layer in (0, 2, 16, 31)] == [0, 2, 16, 31]
    assert [at_depth(layer, 6) for layer in (0, 2, 16, 18, 31)] == [0, 0, 3, 3, 5]  # 31 of 32 is the last
    assert head_count(20, 32, 32) == 20 and head_count(20, 40, 40) == 31
    assert head_count(20, 6, 6) == 1 and head_count(100, 6, 6) == 4 and head_count(0, 6, 6) == 0


# ---- Nullu


@torch.no_grad()
def test_nullu_by_hand(tiny, seen, told, pairs):
    """The down-projections write nothing in the chosen directions, and the rest as before."""
    found, texts = {}, (told, pairs["negative"].tolist())
    for side, answers in zip(("p", "n"), texts):
        rows = []
        for image, text in zip(seen, answers):
            batch, states = tiny.encode(image[None], tiny.prompt("plain"), [text], eos=False), {}
            with read_layers(tiny, states.__setitem__):
                tiny.hidden(tiny.embed(batch), batch.mask, batch)
            rows.append(states[3][0, batch.labels[0] != -100].mean(0))
        found[side] = torch.stack(rows)
    _, _, rows = torch.linalg.svd(found["n"] - found["p"], full_matrices=False)
    v = rows[:2]
    delta = fit_nullu(tiny, seen, pairs, NulluSettings(rank=2))
    assert sorted(delta.weights) == [tiny.address("down_proj", i) for i in (2, 3)]  # the upper half
    name = tiny.address("down_proj", 3)
    weight = full_weight(tiny, name)
    new = weight + delta.weights[name]
    assert (v @ new).abs().max() < 1e-4 * weight.abs().max() < (v @ weight).abs().max()
    torch.testing.assert_close(new, weight - v.T @ (v @ weight), atol=1e-4, rtol=1e-3)
    assert torch.linalg.matrix_rank(delta.weights[name]) == 2


def test_nullu_takes_the_directions_of_most_energy(tiny, seen, pairs):
    """The share of energy that the locator reports is that of what an edit of this rank removes."""
    scores = locate_layers(tiny, seen, pairs, ["svd-energy"]).scores
    share = scores[scores["layer"] == 3]["score"].mean()
    factor = fit_nullu(tiny, seen, pairs, NulluSettings(rank=4)).factors[tiny.address("down_proj", 3)][0]
    assert factor.shape == (64, 4) and 0.7 < share <= 1
    torch.testing.assert_close(factor.T @ factor, torch.eye(4), atol=1e-5, rtol=0)


def test_rank_zero_changes_nothing(tiny, seen, pairs, bits, tmp_path):
    before = bits(tiny)
    delta = fit_nullu(tiny, seen, pairs, NulluSettings(rank=0))
    assert delta.weights == {} and bits(tiny) == before
    save_delta(delta, tmp_path / "d.safetensors")
    with applied(tiny, load_delta(tmp_path / "d.safetensors")):
        assert bits(tiny) == before
    with pytest.raises(ValueError, match="rank is 7: 6 pairs"):
        fit_nullu(tiny, seen, pairs, NulluSettings(rank=7))


def test_a_nullu_edit_is_kept_as_factors(tiny, seen, pairs, bits, tmp_path):
    before = bits(tiny)
    delta = fit_nullu(tiny, seen, pairs, NulluSettings(first=0))
    save_delta(delta, tmp_path / "d.safetensors")
    same = load_delta(tmp_path / "d.safetensors")
    assert len(delta.factors) == 4 and all(torch.equal(same.weights[n], w) for n, w in delta.weights.items())
    with applied(tiny, same):
        assert bits(tiny) != before
    assert bits(tiny) == before


# ---- DPO


def test_preference_loss_by_hand():
    change = torch.tensor([[1.0, -2.0], [-3.0, 1.0]])  # margins 4 and -3
    want = (np.log1p(np.exp(-0.4)) + np.log1p(np.exp(0.3))) / 2
    assert preference_loss(change, 0.1).item() == pytest.approx(want, rel=1e-6)
    assert preference_loss(change * 0, 0.1).item() == pytest.approx(np.log(2), rel=1e-6)


@pytest.fixture
def losses(monkeypatch):
    """The loss of each step."""
    met, loss = [], dpo.preference_loss
    monkeypatch.setattr(dpo, "preference_loss", lambda *given: met.append(loss(*given)) or met[-1])
    return met


@pytest.mark.parametrize("changes", [{}, {"modules": "decoder", "rank": 4}])
def test_dpo_starts_at_the_base(tiny, seen, pairs, bits, changes, losses):
    before = bits(tiny)
    delta = fit_dpo(tiny, seen, pairs, dataclasses.replace(SHORT, **changes))
    assert bits(tiny) == before and all(w.norm() > 0 for w in delta.weights.values())
    assert len(losses) == 4 and losses[0].item() == pytest.approx(np.log(2), abs=1e-6)
    assert len(delta.weights) == (4 * 7 if changes else 4)


def test_dpo_prefers_the_positive(tiny, seen, told, pairs, losses):
    delta = fit_dpo(tiny, seen, pairs, dataclasses.replace(SHORT, epochs=6, batch=6))
    with torch.no_grad():
        base = log_p(tiny, seen, told) - log_p(tiny, seen, pairs["negative"])
        with applied(tiny, delta):
            now = log_p(tiny, seen, told) - log_p(tiny, seen, pairs["negative"])
    assert (now > base).all() and losses[-1] < 0.9 * losses[0]


def test_one_step_of_dpo_is_that_of_its_gradient(tiny, seen, told, pairs):
    """The change after one step has the gradient's signs (AdamW's first step is lr times the sign)."""
    name = tiny.address("down_proj", 3)
    weight = full_weight(tiny, name).requires_grad_(True)
    with replaced_linear(tiny, {name: weight}):
        new = torch.stack([log_p(tiny, seen, told), log_p(tiny, seen, pairs["negative"])])
    loss = -F.logsigmoid(0.1 * ((new - new.detach())[0] - (new - new.detach())[1])).mean()
    (grad,) = torch.autograd.grad(loss, [weight])
    change = fit_dpo(tiny, seen, pairs, DpoSettings(epochs=1, batch=6, lr=1e-4)).weights[name]
    clear = grad.abs() > grad.abs().median() / 10
    assert torch.equal(change[clear].sign(), -grad[clear].sign())
    torch.testing.assert_close(change[clear].abs(), torch.full_like(change[clear], 1e-4), atol=0, rtol=1e-2)


def test_dpo_repeats_and_refuses(tiny, seen, pairs, monkeypatch):
    a, b = (fit_dpo(tiny, seen, pairs, SHORT).weights for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    other = fit_dpo(tiny, seen, pairs, dataclasses.replace(SHORT, seed=1)).weights
    assert not all(torch.equal(a[n], other[n]) for n in a)
    with pytest.raises(ValueError, match="no pairs"):
        fit_dpo(tiny, seen[:0], pairs[:0], SHORT)
    with pytest.raises(ValueError, match="epochs 0"):
        fit_dpo(tiny, seen, pairs, DpoSettings(epochs=0))
    monkeypatch.setattr(dpo, "preference_loss", lambda change, beta: change.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="lower lr"):
        fit_dpo(tiny, seen, pairs, SHORT)


@pytest.mark.parametrize("most", [1, 2])
def test_dpo_in_pieces_is_the_same_and_no_pass_is_larger(seen, pairs, most):
    vlm, widths = build_tiny(), []
    want = fit_dpo(vlm, seen, pairs, dataclasses.replace(SHORT, batch=6))
    vlm.limits = Limits(train=most)
    hook = vlm.module("layer", 0).register_forward_hook(lambda m, args, out: widths.append(len(args[0])))
    found = fit_dpo(vlm, seen, pairs, dataclasses.replace(SHORT, batch=6))
    hook.remove()
    assert max(widths) == most
    for name, weight in want.weights.items():
        assert torch.nn.functional.cosine_similarity(weight.ravel(), found.weights[name].ravel(), 0) > 0.98


def test_dpo_scales_its_loss_where_gradients_are_small(tiny, seen, pairs, monkeypatch):
    want = fit_dpo(tiny, seen, pairs, SHORT)
    met, loss = [], dpo.preference_loss

    def watched(change, beta):
        value = loss(change, beta)
        value.register_hook(lambda g: met.append(g.item()))
        return value

    monkeypatch.setattr(dpo, "loss_scale", lambda dtype: 1024.0)
    monkeypatch.setattr(dpo, "preference_loss", watched)
    found = fit_dpo(tiny, seen, pairs, SHORT)
    assert met == [1024.0] * 4
    for name, weight in want.weights.items():
        torch.testing.assert_close(found.weights[name], weight, atol=1e-6, rtol=1e-3)


# ---- supervised


@pytest.mark.parametrize("rank", [0, 4])
def test_supervised_edits_touch_all_linear_matrices_of_the_decoder(tiny, seen, pairs, bits, rank):
    before = bits(tiny)
    delta = fit_supervised(tiny, seen, pairs, SupervisedSettings(rank=rank, epochs=2))
    assert bits(tiny) == before and len(delta.weights) == 4 * 7
    assert len(delta.factors) == (4 * 7 if rank else 0)
    base = log_p(tiny, seen, pairs["positive"]).sum()
    with applied(tiny, delta):
        assert log_p(tiny, seen, pairs["positive"]).sum() > base


# ---- the edits of this study


@pytest.mark.parametrize("name", sorted(WHAT))
def test_edits_of_the_study_are_made_where_and_how_their_names_say(tiny, seen, pairs, bits, name):
    before, last = bits(tiny), tiny.n_layers - 1
    short = baseline(name, prefix_steps=1, epochs=1).placed((0, 1))
    assert short.settings.layers == (0, 1)
    delta = short.fitted(tiny, seen, pairs).delta
    assert bits(tiny) == before and all(w.abs().max() > 0 for w in delta.weights.values())
    at = {layer: tiny.address("down_proj", layer) for layer in range(tiny.n_layers)}
    if name == "heads":
        assert 1 <= len(delta.weights) <= 2 and all(n.endswith("o_proj") for n in delta.weights)
        assert all((w != 0).any(0).sum() <= 2 * w.shape[1] // tiny.n_heads for w in delta.weights.values())
        return
    places = {"last-layer": {at[last]}, "all-layers": set(at.values())}
    if name in ("alea-official", "random-layers"):
        assert set(delta.weights) <= set(at.values())
        assert name != "random-layers" or len(delta.weights) == 2
    else:
        assert set(delta.weights) == places.get(name, {at[0], at[1]})
    assert bool(delta.factors) == (name == "lora")


def test_rows_of_the_study_differ_by_their_adversary_and_place_alone(tiny, seen, pairs):
    """Each equals the edit that the trial of notebook 10 makes of the same settings."""
    changes = {"epochs": 1, "lr": 1e-3, "kl": 0.2}
    for name in ("no-prefix", "random-prefix"):
        edit = EditRequest(name, (1,), seed=3, changes=changes).settings(tiny.n_layers)
        how_tuned = adversary_preset("contrast", length=5, steps=2, seed=3)
        answers = pairs["negative"].tolist(), pairs["positive"].tolist()
        tuned, _ = fit_prefix(tiny, seen, answers[0], how_tuned, answers[1])
        prefix = random_like(tiny, tuned, how_tuned) if name == "random-prefix" else None
        want, _ = fit_edit(tiny, seen, pairs["positive"].tolist(), prefix, edit)
        found = baseline(name, prefix_steps=2, epochs=1).placed((1,)).seeded(3).fitted(tiny, seen, pairs).delta
        assert all(torch.equal(found.weights[n], w) for n, w in want.weights.items())


def test_the_label_heads_is_one_edit(tiny, tiny_world, seen, pairs, tmp_path):
    """The baseline, the trial and a request that names no heads change the same columns in the same way."""
    row = baseline("heads", epochs=1).seeded(2)
    want = row.fitted(tiny, seen, pairs).delta
    split = tiny_world.split("activate")
    own, changes = pairs.assign(image_id=split.ids), {"epochs": 1, "lr": 1e-3, "kl": 0.2}
    test, heads = tiny_world.split("test").take(2), located_heads(tiny, seen, pairs)
    scores = locate_heads(tiny, seen, pairs, ["gradient"]).scores  # as in the published tables: two, by gradient
    assert heads == tuple(choose_heads(scores, 2))
    bench = EditBench(tiny, own, own, split, test, None, EditTrialSettings((1,), epochs=1), tmp_path)
    found = (
        bench.fit(EditCase("heads", 2)),
        fit_method(tiny, seen, pairs, EditRequest("heads", seed=2, changes=changes))[0],
    )
    given = fit_method(tiny, seen, pairs, EditRequest("heads", heads=heads, seed=2, changes=changes))[0]
    for other in (*found, given):
        assert other.weights.keys() == want.weights.keys()
        assert all(torch.equal(other.weights[n], w) for n, w in want.weights.items())
