"""Each choice of the edit does what its name says: the official code's, the corrected ones, and the controls."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alea_lib.adversary.prefix import Prefix, PrefixSettings, random_prefix
from alea_lib.edit import fit
from alea_lib.edit.fit import fit_edit, schedule
from alea_lib.edit.losses import answer_nll, dropped, unlikelihood
from alea_lib.edit.settings import CONTROLS, EditSettings, control_layers, preset
from alea_lib.edit.trained import head_columns, trained
from alea_lib.models.delta import Delta, applied
from alea_lib.models.hooks import full_weight, replaced_linear

SHORT = EditSettings(layers=(1, 3), prefix_share=0.5, epochs=2, batch=3, lr=1e-2)
ONE = dataclasses.replace(SHORT, layers=(2,), prefix_share=0.0, kl=0.0, optimiser="sgd", lr=0.5, batch=6)


@pytest.fixture(scope="module")
def prefix(tiny):
    return random_prefix(tiny, PrefixSettings(length=3))


def equal(a: Delta, b: Delta) -> bool:
    return a.weights.keys() == b.weights.keys() and all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def gradient(vlm, weight, name, seen, told, **how):
    """Of the mean NLL of all items, by a whole pass."""
    batch = vlm.encode(seen, vlm.prompt("plain"), told, **how)
    with replaced_linear(vlm, {name: weight.requires_grad_(True)}):
        loss = F.cross_entropy(vlm.answer_logits(batch), batch.labels[batch.labels != -100])
    return torch.autograd.grad(loss, weight)[0]


# ---- official choices


def test_gradients_kept_over_an_epoch_are_a_momentum_of_one(tiny, seen, told):
    """SGD by hand: v += g, w -= lr v, v forgotten at the end of each epoch."""
    settings = dataclasses.replace(ONE, reset="epoch", batch=3, epochs=2)
    delta, _ = fit_edit(tiny, seen, told, None, settings)
    name = tiny.address("down_proj", 2)
    weight, order, speed = full_weight(tiny, name), schedule(6, settings), 0
    for step, (pick, _) in enumerate(order):
        speed = (step % 2) * speed + gradient(tiny, weight, name, seen[torch.as_tensor(pick)], [told[i] for i in pick])
        weight = (weight.detach() - 0.5 * speed).detach()
    torch.testing.assert_close(delta.weights[name], weight - full_weight(tiny, name), atol=1e-5, rtol=1e-3)
    fresh, _ = fit_edit(tiny, seen, told, None, dataclasses.replace(settings, reset="step"))
    assert not torch.allclose(fresh.weights[name], delta.weights[name], rtol=0.1)


def test_half_precision_masters_lose_small_steps(tiny, seen, told):
    tiny_steps = dataclasses.replace(ONE, lr=1e-7)
    half, _ = fit_edit(tiny, seen, told, None, dataclasses.replace(tiny_steps, master_dtype="fp16"))
    full, _ = fit_edit(tiny, seen, told, None, tiny_steps)
    name = tiny.address("down_proj", 2)
    own = full_weight(tiny, name)
    assert torch.equal(half.weights[name] + own, (half.weights[name] + own).half().float())
    assert full.weights[name].norm() > 0 and torch.equal(half.weights[name], own.half().float() - own)


def test_start_token_is_a_target_and_the_end_is_not(tiny, seen, told):
    batch = tiny.encode(seen[:1], tiny.prompt("plain"), told[:1], bos=True, eos=False)
    labels = batch.labels[batch.labels != -100].tolist()
    assert labels == [tiny.tokenizer.bos_token_id, *tiny.answer_ids(told[0], eos=False)]
    assert batch.ids[0, batch.answer[0]] == tiny.tokenizer.bos_token_id
    delta, _ = fit_edit(tiny, seen, told, None, dataclasses.replace(ONE, epochs=1, bos=True, eos=False))
    name = tiny.address("down_proj", 2)
    want = -0.5 * gradient(tiny, full_weight(tiny, name), name, seen, told, bos=True, eos=False)
    torch.testing.assert_close(delta.weights[name], want, atol=1e-6, rtol=1e-3)


def test_the_official_preset(tiny, seen, told):
    s = preset("alea-official", layers=(3,))
    assert (s.nll, s.kl, s.prompt, s.kl_prompt) == (0.2, 1.0, "speculative", "careful")
    assert (s.optimiser, s.reset, s.master_dtype, s.lr, s.batch, s.epochs) == ("sgd", "epoch", "fp16", 1e-3, 2, 5)
    assert s.bos and not s.eos and s.prefix_share == 1.0 and s.kl_reference == "logits"
    inside = Prefix(torch.randn(5, 64), "index", 60)
    delta, curve = fit_edit(tiny, seen, told, inside, s)
    assert len(curve) == 15 and curve["prefixed"].all() and delta.norm() > 0


# ---- what is trained


def test_low_rank_starts_from_the_base_and_has_its_rank(tiny, seen, told):
    settings = dataclasses.replace(SHORT, rank=2)
    start = trained(tiny, settings)
    for name, weight in start.weights().items():
        assert torch.equal(weight, full_weight(tiny, name)) and start.parameters[f"{name}.A"].norm() > 0
    delta, _ = fit_edit(tiny, seen, told, random_prefix(tiny, PrefixSettings()), settings)
    assert all(b.shape == (64, 2) and a.shape == (2, 128) for b, a in delta.factors.values())
    assert all(
        torch.equal(delta.weights[n], b @ a) and w.norm() > 0 for n, (b, a) in delta.factors.items() for w in [b]
    )
    with pytest.raises(ValueError, match="rank 65 is more"):
        trained(tiny, dataclasses.replace(SHORT, rank=65))


def test_sft_trains_every_matrix_of_the_decoder(tiny, seen, told):
    settings = preset("sft", layers=control_layers("all-layers", 4), epochs=1)
    delta, curve = fit_edit(tiny, seen, told, None, settings)
    assert len(delta.weights) == 4 * 7 and all(w.norm() > 0 for w in delta.weights.values())
    assert (curve["kl"] == 0).all() and not curve["prefixed"].any()


def test_columns_of_heads(tiny):
    columns = head_columns(tiny, ((2, 1), (2, 3), (0, 0)))
    assert columns[tiny.address("o_proj", 2)].tolist() == [*range(16, 32), *range(48, 64)]
    assert columns[tiny.address("o_proj", 0)].tolist() == [*range(16)]
    with pytest.raises(ValueError, match="head 4 is out of range.*0 to 3"):
        head_columns(tiny, ((0, 4),))


def test_controls_of_the_place():
    assert control_layers("last-layer", 6) == (5,) and control_layers("first", 6, k=3) == (0, 1, 2)
    assert control_layers("all-layers", 3) == (0, 1, 2)
    drawn = {control_layers("random-layers", 32, k=2, seed=s) for s in range(20)}
    assert len(drawn) > 10 and all(len(set(d)) == 2 and max(d) < 32 for d in drawn)
    assert control_layers("random-layers", 32, seed=1) == control_layers("random-layers", 32, seed=1)
    with pytest.raises(KeyError, match=CONTROLS[0]):
        control_layers("middle", 4)


# ---- terms


def test_unlikelihood_by_hand(tiny):
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 0, 1])
    p = logits.softmax(-1)
    want = -(torch.log(1 - p[0, 2]) + torch.log(1 - p[2, 1])) / 2
    found = unlikelihood(logits, labels, torch.tensor([True, False, True]))
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    assert unlikelihood(logits, labels, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_unlikelihood_makes_unsaid_words_unlikely(tiny, seen, told):
    negatives = [t.replace("There is", "There is a fork. There is", 1) for t in told]
    settings = dataclasses.replace(SHORT, prefix_share=0.0, epochs=6, nll=0.0, kl=0.0, unlikelihood=1.0)
    _, curve = fit_edit(tiny, seen, told, None, settings, negatives=negatives)
    assert curve["unlikelihood"].iloc[-1] < 0.9 * curve["unlikelihood"].iloc[0]
    with pytest.raises(ValueError, match="unlikelihood is 1.0.*negatives"):
        fit_edit(tiny, seen, told, None, settings)


# ---- the prefix in training


def test_rows_are_left_out_by_chance(prefix):
    settings = dataclasses.replace(SHORT, prefix_dropout=0.5)
    sizes = [len(dropped(prefix, settings, step).rows) for step in range(300)]
    assert set(sizes) == {1, 2, 3} and 1.3 < np.mean(sizes) < 1.9
    rows = dropped(prefix, settings, 3).rows
    assert all((row == prefix.rows).all(1).any() for row in rows)
    assert dropped(prefix, SHORT, 3) is prefix


def test_rounds_tune_the_adversary_against_the_edited_model(tiny, seen, told, prefix, monkeypatch):
    met = []
    tune = fit.fit_prefix

    def watched(vlm, *args):
        batch = vlm.encode(seen, vlm.prompt("plain"), told)
        with torch.no_grad():
            met.append((answer_nll(vlm, batch).item(), args[2].seed))
        return tune(vlm, *args)

    monkeypatch.setattr(fit, "fit_prefix", watched)
    settings = dataclasses.replace(SHORT, epochs=4, rounds=2, prefix_share=1.0)
    adversary = PrefixSettings(steps=2, batch=3, length=3)
    run = [fit_edit(tiny, seen, told, prefix, settings, None, told[::-1], adversary)[0] for _ in range(2)]
    with torch.no_grad():
        base = answer_nll(tiny, tiny.encode(seen, tiny.prompt("plain"), told)).item()
    assert len(met) == 2 and met[0] == met[1] and met[0][1] == 1 and abs(met[0][0] - base) > 1e-3
    assert equal(*run) and not equal(
        run[0], fit_edit(tiny, seen, told, prefix, dataclasses.replace(settings, rounds=1))[0]
    )
    with pytest.raises(ValueError, match="rounds is 2: give negatives"):
        fit_edit(tiny, seen, told, prefix, settings)


# ---- stopped, and out of range


ALL = {
    "adamw": {},
    "sgd, reset once an epoch, fp16": {"optimiser": "sgd", "reset": "epoch", "master_dtype": "fp16"},
    "lora": {"rank": 2},
    "heads": {"modules": "o_proj", "heads": ((1, 0),)},
    "rounds": {"rounds": 2},
    "dropout": {"prefix_dropout": 0.4},
    "plain": {"fast": False, "unlikelihood": 0.1},
    "last": {"layers": (3,), "kl_reference": "logits"},
}


@pytest.mark.parametrize("name", ALL)
def test_killed_at_any_step_ends_in_the_same_delta(tiny, seen, told, prefix, name, tmp_path, monkeypatch):
    settings = dataclasses.replace(SHORT, epochs=3, **ALL[name])
    more = (told[::-1], PrefixSettings(steps=2, batch=3, length=3))
    whole, curve = fit_edit(tiny, seen, told, prefix, settings, None, *more)
    step = fit._Run.step
    for cut in range(len(curve)):
        path, calls = tmp_path / f"{cut}.safetensors", []

        def cut_off(self, number, cut=cut, calls=calls):
            if len(calls) == cut:
                raise KeyboardInterrupt
            calls.append(1)
            return step(self, number)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(fit._Run, "step", cut_off)
            fit_edit(tiny, seen, told, prefix, settings, path, *more)
        again, rows = fit_edit(tiny, seen, told, prefix, settings, path, *more)
        assert equal(again, whole) and rows.equals(curve)


@pytest.mark.parametrize(
    "change",
    [{"modules": "mlp"}, {"optimiser": "adam"}, {"reset": "never"}, {"master_dtype": "bf16"}, {"kl_reference": "top"},
     {"prefix_dropout": 1.0}, {"rounds": 5}, {"modules": "o_proj"}, {"rounds": 0}],
)  # fmt: skip
def test_values_out_of_range(tiny, seen, told, change):
    with pytest.raises(ValueError, match="must|nothing to edit|rounds is"):
        preset("no-prefix", **change)
    with pytest.raises(ValueError, match="must|nothing to edit|rounds is"):
        fit_edit(tiny, seen, told, None, dataclasses.replace(EditSettings(prefix_share=0.0), **change))


def test_a_layer_out_of_range(tiny, seen, told):
    with pytest.raises(ValueError, match="layer 4 is out of range.*0 to 3"):
        fit_edit(tiny, seen, told, None, dataclasses.replace(ONE, layers=(4,)))


def test_weights_that_are_not_finite_stop_the_run(tiny, seen, told, tmp_path):
    path = tmp_path / "edit.safetensors"
    with pytest.raises(FloatingPointError, match=r"not finite at step \d.*lower lr.*edit.safetensors"):
        fit_edit(tiny, seen, told, None, dataclasses.replace(ONE, lr=float("inf"), epochs=4), path)


def test_the_edited_model_is_what_was_trained(tiny, seen, told, prefix):
    """The delta applied gives the loss that the last step's weights have."""
    settings = dataclasses.replace(
        SHORT, modules="o_proj", heads=((1, 2),), prefix_share=0.0, lr=5e-2, epochs=8, kl=0.0
    )
    delta, curve = fit_edit(tiny, seen, told, None, settings)
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    with torch.no_grad(), applied(tiny, delta):
        after = answer_nll(tiny, batch).item()
    assert after < curve["nll"].iloc[:2].mean() and after < answer_nll(tiny, batch).item()
