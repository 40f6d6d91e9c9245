"""The edit: what is learnt from what, that the model stays as it was, and the delta's life on disk."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny
from safetensors import safe_open

from alea_lib.adversary.prefix import Prefix, PrefixSettings, random_prefix
from alea_lib.edit import fit
from alea_lib.edit.fit import fit_edit, schedule
from alea_lib.edit.losses import CachedForward, Reference, answer_nll, kl_divergence
from alea_lib.edit.settings import EditSettings, preset
from alea_lib.edit.trained import trained
from alea_lib.models import checkpoint
from alea_lib.models.delta import Delta, WrongBase, applied, delta_of, load_delta, save_delta
from alea_lib.models.hooks import replaced_linear
from alea_lib.models.identity import weight_hash

SHORT = EditSettings(layers=(1, 3), prefix_share=0.5, epochs=2, batch=3, lr=1e-2)


@pytest.fixture(scope="module")
def prefix(tiny):
    return random_prefix(tiny, PrefixSettings(length=3))


@pytest.fixture(scope="module")
def edited(tiny, seen, told, prefix):
    return fit_edit(tiny, seen, told, prefix, SHORT)


def down(vlm, layer):
    return vlm.address("down_proj", layer)


def equal(a: Delta, b: Delta) -> bool:
    same = [torch.equal(a.weights[n], b.weights[n]) for n in a.weights]
    return a.weights.keys() == b.weights.keys() and all(same) and a.base == b.base


# ---- the model stays as it was


def test_computing_an_edit_leaves_the_model_bit_equal(tiny, seen, told, prefix, bits):
    before = bits(tiny)
    delta, curve = fit_edit(tiny, seen, told, prefix, SHORT)
    assert bits(tiny) == before
    assert all(w.norm() > 0 for w in delta.weights.values())  # it did learn something
    assert list(curve.columns) == fit.CURVE and len(curve) == 4


def test_an_edit_that_raises_leaves_the_model_bit_equal(tiny, seen, told, prefix, bits, monkeypatch):
    before, good = bits(tiny), fit.kl_divergence

    def fails(*args):
        good(*args)
        raise RuntimeError("power cut")

    monkeypatch.setattr(fit, "kl_divergence", fails)
    with pytest.raises(RuntimeError, match="power cut"):
        fit_edit(tiny, seen, told, prefix, SHORT)
    assert bits(tiny) == before
    assert not any("forward" in m.__dict__ for m in tiny.model.modules())


def test_the_edit_lowers_its_own_loss(tiny, seen, told, prefix):
    settings = dataclasses.replace(SHORT, prefix_share=0.0, epochs=12, batch=6, kl=0.0)
    delta, curve = fit_edit(tiny, seen, told, None, settings)
    assert curve["nll"].iloc[-1] < 0.8 * curve["nll"].iloc[0]
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    base = answer_nll(tiny, batch).item()
    with applied(tiny, delta):
        assert answer_nll(tiny, batch).item() < 0.8 * base


def test_only_the_named_layers_change(tiny, edited):
    assert set(edited[0].weights) == {down(tiny, 1), down(tiny, 3)}


# ---- applied and undone


def test_applied_keeps_modules_shapes_and_dtypes(tiny, edited, bits):
    def outline():
        named = list(tiny.model.named_parameters()) + list(tiny.model.named_buffers())
        modules = [(n, type(m)) for n, m in tiny.model.named_modules()]
        return modules, [(n, tuple(t.shape), t.dtype, t.device) for n, t in named]

    before, shape = bits(tiny), outline()
    with applied(tiny, edited[0]):
        assert outline() == shape
        now = bits(tiny)
        assert {n for n in now if now[n] != before[n]} == {f"{n}.weight" for n in edited[0].weights}
    assert bits(tiny) == before


def test_applied_adds_the_delta(tiny, edited):
    name = down(tiny, 1)
    base = tiny.model.get_submodule(name).weight.detach().clone()
    with applied(tiny, edited[0]):
        assert torch.equal(tiny.model.get_submodule(name).weight, base + edited[0].weights[name])


def test_applied_is_undone_bit_equal_after_an_exception(tiny, bits):
    # a delta for which (w + d) - d is not w: subtracting it again would not give the weights back
    weight = tiny.model.get_submodule(down(tiny, 0)).weight.detach().clone()
    torch.manual_seed(0)
    change = torch.randn_like(weight) * 3
    assert not torch.equal((weight + change) - change, weight)
    delta = delta_of(tiny, {down(tiny, 0): weight + change}, {})
    before = bits(tiny)
    with pytest.raises(KeyboardInterrupt), applied(tiny, delta):
        assert bits(tiny) != before
        raise KeyboardInterrupt
    assert bits(tiny) == before


def test_applied_nothing_is_the_base(tiny, bits):
    before = bits(tiny)
    with applied(tiny, None) as vlm:
        assert vlm is tiny and bits(tiny) == before


def test_a_delta_belongs_to_its_model(other, edited, bits):
    before = bits(other)
    with pytest.raises(WrongBase, match="is not the weight"), applied(other, edited[0]):
        pass
    assert bits(other) == before


def test_a_delta_whose_second_module_is_wrong_changes_nothing(tiny, edited, bits):
    names = list(edited[0].weights)
    wrong = dataclasses.replace(edited[0], base={**edited[0].base, names[1]: "0" * 16})
    before = bits(tiny)
    with pytest.raises(WrongBase), applied(tiny, wrong):
        pass
    assert bits(tiny) == before


def test_an_edit_is_not_applied_twice(tiny, edited, bits):
    before = bits(tiny)
    with applied(tiny, edited[0]):
        with pytest.raises(WrongBase), applied(tiny, edited[0]):
            pass
    assert bits(tiny) == before


def test_unknown_module_is_a_wrong_base(tiny, edited):
    weight = next(iter(edited[0].weights.values()))
    odd = Delta({"model.language_model.layers.9.mlp.down_proj": weight}, {}, {"model": "bigger"})
    with pytest.raises(WrongBase, match="bigger"), applied(tiny, odd):
        pass


# ---- schedule


@pytest.mark.parametrize("share", [0.0, 0.25, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("n", [7, 100])
def test_schedule_meets_the_share_and_covers_every_item_each_epoch(n, share):
    settings = EditSettings(prefix_share=share, epochs=5, batch=5, seed=3)
    order = schedule(n, settings)
    per_epoch = len(order) // 5
    assert len(order) == 5 * per_epoch == 5 * max(1, round(n / 5))
    for epoch in range(5):
        picks = np.concatenate([p for p, _ in order[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(picks) == list(range(n))
    marks = np.array([prefixed for _, prefixed in order])
    assert marks.sum() == int(share * len(order) + 1e-9)
    # spread evenly: no stretch has more or fewer than its share by one step or more
    due = share * np.arange(1, len(order) + 1)
    assert (np.abs(marks.cumsum() - due) < 1 + 1e-9).all()


def test_schedule_depends_on_the_seed_alone():
    first, again, else_ = (schedule(20, EditSettings(seed=s, batch=5)) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, else_, strict=True))
    epochs = [np.concatenate([p for p, _ in first[i * 4 : i * 4 + 4]]) for i in range(2)]
    assert not np.array_equal(*epochs)


# ---- losses by hand


def by_hand(vlm, features, question, answer):
    """Log-probabilities [n, V] that one unpadded item gives to its answer and EOS, and those tokens."""
    image, space = vlm.model.config.image_token_id, features.shape[1]
    before, after = f"USER: <image>\n{question} ASSISTANT:".split("<image>")
    prompt = vlm.tokenizer(before)["input_ids"] + [image] * space
    prompt += vlm.tokenizer(after, add_special_tokens=False)["input_ids"]
    tail = vlm.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [vlm.tokenizer.eos_token_id]
    ids = torch.tensor([prompt + tail])
    embeds = vlm.model.get_input_embeddings()(ids)
    embeds[ids == image] = features.reshape(-1, embeds.shape[-1])
    logits = vlm.model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits
    return logits[0, len(prompt) - 1 : -1].log_softmax(-1), torch.tensor(tail)


@torch.no_grad()
def test_nll_is_that_of_the_answer_and_its_end_alone(tiny, seen, told):
    total, n = 0.0, 0
    for i, answer in enumerate(told[:3]):
        logp, tail = by_hand(tiny, seen[i : i + 1], tiny.prompt("plain"), answer)
        total -= logp.gather(1, tail[:, None]).sum().item()
        n += len(tail)
    batch = tiny.encode(seen[:3], tiny.prompt("plain"), told[:3])
    assert answer_nll(tiny, batch).item() == pytest.approx(total / n, rel=1e-5)


@torch.no_grad()
def test_nll_under_a_prefix_by_hand(tiny, seen, prefix):
    batch = tiny.encode(seen[:1], tiny.prompt("plain"), ["There is a cup."])
    at, embeds = batch.answer.item(), tiny.embed(batch)
    rows = torch.cat([embeds[:, :at], prefix.rows[None], embeds[:, at:]], 1)
    logits = tiny.model(inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2])).logits[0]
    tail = batch.ids[0, at:]
    k = len(prefix.rows)
    want = F.cross_entropy(logits[at + k - 1 : at + k + len(tail) - 1], tail)
    assert answer_nll(tiny, batch, prefix).item() == pytest.approx(want.item(), rel=1e-5)
    assert answer_nll(tiny, batch).item() != pytest.approx(want.item(), rel=1e-4)


@torch.no_grad()
def test_kl_is_that_of_two_models(tiny, seen, told, edited):
    """Mean over answer tokens of sum base * (log base - log edited), in that order."""
    settings = EditSettings(layers=(1, 3), kl_prompt="careful")
    passes = CachedForward(tiny, seen, {"positive": told}, settings, trained(tiny, settings))
    reference = Reference(passes)(np.arange(6))
    batch = tiny.encode(seen, tiny.prompt("careful"), told)
    assert kl_divergence(tiny.answer_logits(batch), reference).item() == pytest.approx(0, abs=1e-6)
    base = [by_hand(tiny, seen[i : i + 1], tiny.prompt("careful"), t)[0] for i, t in enumerate(told)]
    with applied(tiny, edited[0]):
        now = [by_hand(tiny, seen[i : i + 1], tiny.prompt("careful"), t)[0] for i, t in enumerate(told)]
        found = kl_divergence(tiny.answer_logits(batch), reference).item()
    base, now = torch.cat(base), torch.cat(now)
    want = (base.exp() * (base - now)).sum(-1).mean().item()
    back = (now.exp() * (now - base)).sum(-1).mean().item()
    assert abs(want - back) > 1e-2 * want  # the two directions differ here, so a swap would show
    assert found == pytest.approx(want, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["states", "logits"])
def test_references_of_the_kl_agree(tiny, seen, told, kind):
    """Whatever is kept of the base, and whichever items are asked for first, the log-probabilities are the same."""
    settings = EditSettings(kl_reference=kind, kl_prompt="careful")
    reference = Reference(CachedForward(tiny, seen, {"positive": told}, settings, trained(tiny, settings)))
    want = [by_hand(tiny, seen[i : i + 1], tiny.prompt("careful"), told[i])[0] for i in range(6)]
    for pick in ([4], [5, 0, 2], [0, 1, 2, 3, 4, 5]):
        torch.testing.assert_close(reference(np.array(pick)), torch.cat([want[i] for i in pick]), atol=1e-4, rtol=1e-4)
    width = {"states": 64, "logits": tiny.head.out_features}
    assert [item.states.shape[1] for item in reference.kept.near.values()] == [width[kind]] * 6


def test_gradients_are_reset_each_step(tiny, seen, told, prefix):
    """Two steps by hand with a fresh gradient each give the same weights as the library's."""
    settings = dataclasses.replace(SHORT, layers=(2,), prefix_share=1.0, epochs=2, batch=6, nll=0.7, kl=0.3)
    delta, _ = fit_edit(tiny, seen, told, prefix, settings)
    name = down(tiny, 2)
    weight = tiny.model.get_submodule(name).weight.detach().clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([weight], lr=settings.lr, weight_decay=0.0)
    plain = tiny.encode(seen, tiny.prompt("plain"), told)
    careful = tiny.encode(seen, tiny.prompt("careful"), told)
    with torch.no_grad():
        base = tiny.answer_logits(careful).log_softmax(-1)
    for _ in range(2):
        with replaced_linear(tiny, {name: weight}):
            embeds, mask, labels = prefix.insert(plain, tiny.embed(plain))
            logits = tiny.model(inputs_embeds=embeds, attention_mask=mask).logits
            nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            now = tiny.answer_logits(careful).log_softmax(-1)
            loss = 0.7 * nll + 0.3 * (base.exp() * (base - now)).sum(-1).mean()
            (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimiser.step()
    change = weight.detach() - tiny.model.get_submodule(name).weight
    torch.testing.assert_close(delta.weights[name], change, atol=2e-4, rtol=1e-3)


# ---- prefix


def test_share_zero_needs_no_prefix(tiny, seen, told, prefix):
    settings = dataclasses.replace(SHORT, prefix_share=0.0)
    without, curve = fit_edit(tiny, seen, told, None, settings)
    with_one, _ = fit_edit(tiny, seen, told, prefix, settings)
    assert equal(without, with_one) and not curve["prefixed"].any()
    with pytest.raises(ValueError, match="no prefix"):
        fit_edit(tiny, seen, told, None, SHORT)


def test_share_one_uses_the_prefix_in_every_step(tiny, seen, told, prefix):
    settings = dataclasses.replace(SHORT, prefix_share=1.0, epochs=1, batch=6, kl=0.0)
    first, curve = fit_edit(tiny, seen, told, prefix, settings)
    other, _ = fit_edit(tiny, seen, told, Prefix(-prefix.rows, prefix.place), settings)
    assert curve["prefixed"].all() and not equal(first, other)
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    with torch.no_grad():
        assert curve["nll"][0] == pytest.approx(answer_nll(tiny, batch, prefix).item(), rel=1e-4)


# ---- stopped and resumed


def test_killed_and_resumed_ends_in_the_same_delta(tiny, seen, told, prefix, tmp_path, monkeypatch):
    settings = dataclasses.replace(SHORT, epochs=3)  # two steps an epoch
    whole, _ = fit_edit(tiny, seen, told, prefix, settings)
    path, step, calls = tmp_path / "edit.safetensors", fit._Run.step, []

    def cut_off(*args):
        if len(calls) == 3:  # amid the second epoch
            raise KeyboardInterrupt
        calls.append(1)
        return step(*args)

    monkeypatch.setattr(fit._Run, "step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        fit_edit(tiny, seen, told, prefix, settings, path)
    monkeypatch.setattr(fit._Run, "step", lambda *args: calls.append(1) or step(*args))
    calls.clear()
    resumed, _ = fit_edit(tiny, seen, told, prefix, settings, path)
    assert len(calls) == 4  # the first epoch's two steps were not done again
    assert equal(resumed, whole)
    calls.clear()
    assert equal(fit_edit(tiny, seen, told, prefix, settings, path)[0], whole) and not calls


def test_the_curve_of_a_resumed_run_has_its_columns(tiny, seen, told, prefix, tmp_path):
    """A run that was cut off after its last checkpoint still has a table that can be drawn."""
    path = tmp_path / "edit.safetensors"
    fit_edit(tiny, seen, told, prefix, SHORT, path)
    _, curve = fit_edit(tiny, seen, told, prefix, SHORT, path)
    assert list(curve.columns) == fit.CURVE and curve["step"].tolist() == [0, 1, 2, 3]


def test_a_checkpoint_of_other_settings_is_not_resumed(tiny, seen, told, prefix, tmp_path):
    path, changed = tmp_path / "edit.safetensors", dataclasses.replace(SHORT, lr=2e-2)
    fit_edit(tiny, seen, told, prefix, SHORT, path)
    fresh, _ = fit_edit(tiny, seen, told, prefix, changed)
    assert equal(fit_edit(tiny, seen, told, prefix, changed, path)[0], fresh)


def test_a_broken_checkpoint_write_keeps_the_old_one(tmp_path, monkeypatch):
    weight = torch.ones(2, requires_grad=True)
    optimiser = torch.optim.AdamW([weight])
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, 1, {"w": weight}, optimiser)

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")  # not by its number: passed on as it is

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, 2, {"w": weight}, optimiser)
    assert checkpoint.resume(path, {"w": weight}, optimiser) == 1


def test_a_loss_that_is_not_finite_stops_the_run(tiny, seen, told, prefix, tmp_path, bits):
    before, path = bits(tiny), tmp_path / "edit.safetensors"
    settings = dataclasses.replace(SHORT, epochs=3, prefix_share=0.0, kl=0.0)
    good, _ = fit_edit(tiny, seen, told, None, dataclasses.replace(settings, epochs=1))
    broken = Prefix(torch.full_like(prefix.rows, float("nan")))
    with pytest.raises(FloatingPointError, match="step 0.*lr"):
        fit_edit(tiny, seen, told, broken, dataclasses.replace(settings, prefix_share=1.0), path)
    assert not path.exists() and bits(tiny) == before and good.norm() > 0


def test_the_checkpoint_keeps_the_last_good_weights(tiny, seen, told, prefix, tmp_path, monkeypatch):
    path, kl, calls = tmp_path / "edit.safetensors", fit.kl_divergence, []

    def spoilt(*args):
        calls.append(1)
        return kl(*args) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(fit, "kl_divergence", spoilt)
    with pytest.raises(FloatingPointError, match="step 3"):
        fit_edit(tiny, seen, told, prefix, SHORT, path)
    weight = torch.zeros(64, 128, requires_grad=True)
    masters = {down(tiny, 1): weight, down(tiny, 3): torch.zeros(64, 128, requires_grad=True)}
    with safe_open(path, "pt") as kept:
        tag = kept.metadata()["tag"]
    done = checkpoint.resume(path, masters, torch.optim.AdamW(masters.values()), tag)
    assert done == 2 and weight.isfinite().all() and weight.norm() > 0


def test_equal_deltas_are_equal_files(tiny, seen, told, prefix, tmp_path):
    delta, _ = fit_edit(tiny, seen, told, prefix, SHORT)
    written = set()
    for i in range(6):
        save_delta(delta, tmp_path / f"{i}.safetensors")
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1


def test_no_pairs(tiny, seen):
    with pytest.raises(ValueError, match="no pairs"):
        fit_edit(tiny, seen[:0], [], None, dataclasses.replace(SHORT, prefix_share=0.0))


# ---- settings and files


def test_presets_differ_in_the_share_alone():
    names = ("no-prefix", "alea-corrected", "alea-mixed")
    made = {name: dataclasses.asdict(preset(name, layers=(4, 5))) for name in names}
    shares = {name: made[name].pop("prefix_share") for name in made}
    assert shares == {"no-prefix": 0.0, "alea-corrected": 1.0, "alea-mixed": 0.5}
    assert len({str(m) for m in made.values()}) == 1 and made["no-prefix"]["layers"] == (4, 5)


@pytest.mark.parametrize("change", [{"prefix_share": 1.1}, {"layers": ()}, {"epochs": 0}, {"batch": 0}])
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match="must lie|nothing to edit"):
        preset("alea-mixed", **change)
    with pytest.raises(KeyError, match="alea-mixed"):
        preset("alea-mixd")


def test_delta_round_trip(tiny, edited, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_delta(edited[0], path)
    loaded = load_delta(path)
    assert equal(loaded, edited[0]) and loaded.info["edit"]["lr"] == SHORT.lr
    assert list(tmp_path.iterdir()) == [path]
    assert loaded.norm() == pytest.approx(sum(w.norm().item() ** 2 for w in loaded.weights.values()) ** 0.5)
    name = down(tiny, 1)
    want = loaded.weights[name].norm() / tiny.model.get_submodule(name).weight.norm()
    assert loaded.relative(tiny)[name] == pytest.approx(want.item(), rel=1e-5)


def test_a_truncated_delta_is_named(edited, tmp_path):
    path = tmp_path / "delta.safetensors"
    save_delta(edited[0], path)
    for size in (len(path.read_bytes()) - 100, 20, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="not a whole delta file"):
            load_delta(path)
    with pytest.raises(FileNotFoundError, match="05_edit"):
        load_delta(tmp_path / "none.safetensors")


def test_hash_tells_one_bit():
    weight = torch.ones(2, 2)
    nudged = weight.clone()
    nudged[0, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert weight_hash(weight) == weight_hash(weight.double()) != weight_hash(nudged)


def test_half_precision_model_keeps_fp32_masters(seen, told):
    half = build_tiny()
    half.model.bfloat16()
    settings = dataclasses.replace(SHORT, prefix_share=0.0, layers=(1,), epochs=1, batch=6, lr=1e-6)
    delta, _ = fit_edit(half, seen.bfloat16(), told, None, settings)
    change = delta.weights[down(half, 1)]
    assert change.dtype == torch.float32
    assert ((change.abs() > 0) & (change.abs() < 2e-6)).float().mean() > 0.9  # far below bf16's resolution
