"""The NF4 path on a CPU: what is quantised, gradients that stay right, and edits beside packed weights."""

import dataclasses
import warnings

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")

from conftest import build_tiny  # noqa: E402

from alea_lib.adversary.objectives import attacked_logits  # noqa: E402
from alea_lib.adversary.prefix import Prefix, PrefixSettings, fit_prefix, random_prefix  # noqa: E402
from alea_lib.edit.export import export_adapter, export_checkpoint  # noqa: E402
from alea_lib.edit.fit import fit_edit  # noqa: E402
from alea_lib.edit.losses import answer_nll  # noqa: E402
from alea_lib.edit.settings import EditSettings  # noqa: E402
from alea_lib.models.delta import applied, delta_of, load_delta, save_delta  # noqa: E402
from alea_lib.models.hooks import full_weight, replaced_linear  # noqa: E402
from alea_lib.models.loading import load  # noqa: E402

SETTINGS = EditSettings(layers=(1, 2), prefix_share=0.5, epochs=1, batch=3, lr=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny, path = build_tiny(), tmp_path_factory.mktemp("model") / "tiny"
    tiny.model.save_pretrained(path)
    tiny.processor.save_pretrained(path)
    return path


def fresh(folder):
    return load(str(folder), four_bit=True, edited_layers=(1, 2), device="cpu")


@pytest.fixture(scope="module")
def small(folder):
    return fresh(folder)


def packed(vlm):
    """Every stored tensor, quantisation states included, as bytes."""
    out = {}
    for name, parameter in vlm.model.named_parameters():
        out[name] = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            out[f"{name}.absmax"] = state.absmax.contiguous().view(torch.uint8).numpy().tobytes()
    return out


def linear(vlm):
    return {n: m for n, m in vlm.model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_what_is_quantised(small):
    full = {small.address("down_proj", i) for i in (1, 2)}
    for name, module in linear(small).items():
        in_decoder = "language_model.layers" in name
        assert (module.weight.dtype == torch.uint8) == (in_decoder and name not in full), name
    assert sum(m.weight.dtype == torch.uint8 for m in linear(small).values()) == 4 * 7 - 2


def test_full_weight_dequantises(small, folder):
    plain = load(str(folder), device="cpu")
    for layer in (0, 1):
        name = small.address("down_proj", layer)
        want, got = plain.model.get_submodule(name).weight, full_weight(small, name)
        assert got.shape == want.shape and got.dtype == torch.float32
        error = ((got - want).norm() / want.norm()).item()
        assert error == 0 if layer == 1 else 0.01 < error < 0.2


def prefix_gradient(vlm, features, text):
    rows = random_prefix(vlm, PrefixSettings(length=3)).rows.clone().requires_grad_(True)
    batch = vlm.encode(features, vlm.prompt("plain"), text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backward without a kernel only warns
        logits, labels = attacked_logits(vlm, batch, Prefix(rows))
        loss = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
        (grad,) = torch.autograd.grad(loss, [rows])
    return grad


def test_gradients_survive_an_evaluation(folder, seen, told):
    """bitsandbytes may repack weights in a forward without gradient: later gradients are wrong then."""
    vlm = fresh(folder)
    before = prefix_gradient(vlm, seen[:2], told[:2])
    weights = packed(vlm)
    with torch.no_grad():
        vlm.generate(seen[:2], vlm.prompt("plain"), 3)
        answer_nll(vlm, vlm.encode(seen[:2], vlm.prompt("plain"), told[:2]))
    assert packed(vlm) == weights
    after = prefix_gradient(vlm, seen[:2], told[:2])
    assert before.norm() > 1e-6 and torch.equal(before, after)
    layers = [m for m in vlm.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)


def test_the_prefix_gradient_is_that_of_the_dequantised_model(folder, small, seen, told):
    plain = load(str(folder), device="cpu")
    for name in linear(small):
        plain.model.get_submodule(name).weight.data = full_weight(small, name)
    want, got = (prefix_gradient(v, seen[:2], told[:2]) for v in (plain, small))
    torch.testing.assert_close(got, want, atol=1e-6 + 1e-2 * want.abs().max().item(), rtol=1e-2)


def test_an_edit_beside_packed_weights(small, seen, told):
    before = packed(small)
    prefix, _ = fit_prefix(small, seen, told, PrefixSettings(length=3, steps=2, batch=3))
    delta, curve = fit_edit(small, seen, told, prefix, SETTINGS)
    assert packed(small) == before
    assert len(curve) == 2 and all(w.norm() > 0 for w in delta.weights.values())
    batch = small.encode(seen, small.prompt("plain"), told)
    with torch.no_grad():
        base = answer_nll(small, batch)
        with applied(small, delta):
            assert answer_nll(small, batch) != base
        assert answer_nll(small, batch) == base
    assert packed(small) == before


def test_a_delta_fits_the_full_precision_model(small, folder, seen, told):
    """What was computed beside packed weights belongs to the same matrices unquantised."""
    delta, _ = fit_edit(small, seen, told, None, dataclasses.replace(SETTINGS, prefix_share=0.0, epochs=1))
    with applied(load(str(folder), device="cpu"), delta):
        pass


def test_packed_modules_take_no_delta(small):
    name = small.address("down_proj", 0)
    delta = delta_of(small, {name: full_weight(small, name) + 1}, {})
    before = packed(small)
    with pytest.raises(RuntimeError, match="4 bits.*edited_layers"), applied(small, delta):
        pass
    assert packed(small) == before


def test_a_packed_module_can_be_replaced_in_a_forward(small, seen, told):
    name = small.address("down_proj", 0)
    own = full_weight(small, name)
    batch = small.encode(seen[:1], small.prompt("plain"), told[:1])
    with torch.no_grad():
        base = small.answer_logits(batch)
        with replaced_linear(small, {name: own}):
            torch.testing.assert_close(small.answer_logits(batch), base, atol=2e-3, rtol=1e-3)
        with replaced_linear(small, {name: own * 0}):
            assert (small.answer_logits(batch) - base).abs().max() > 1e-2


def captions(vlm, seen):
    return [a.text for a in vlm.generate(seen, vlm.prompt("plain"), 20)]


def test_an_edit_over_4_bits_is_handed_over(folder, small, seen, told, tmp_path):
    """Saved, loaded, exported as adapter and as checkpoint: the captions are those in memory."""
    from peft import PeftModel

    settings = dataclasses.replace(SETTINGS, prefix_share=0.0, epochs=6, kl=0.0)
    delta, _ = fit_edit(small, seen, told, None, settings)
    with applied(small, delta):
        want = captions(small, seen)
    assert want != captions(small, seen)
    save_delta(delta, tmp_path / "delta.safetensors")
    again = fresh(folder)
    with applied(again, load_delta(tmp_path / "delta.safetensors")):
        assert captions(again, seen) == want
    export_adapter(delta, tmp_path / "adapter", str(folder))
    PeftModel.from_pretrained(again.model, tmp_path / "adapter")
    assert captions(again, seen) == want
    export_checkpoint(delta, folder, tmp_path / "whole")
    assert captions(load(str(tmp_path / "whole"), four_bit=True, edited_layers=(1, 2), device="cpu"), seen) == want
    for name, change in delta.weights.items():
        own, new = (load(str(p), device="cpu").model.get_submodule(name).weight for p in (folder, tmp_path / "whole"))
        assert torch.equal(new, own + change)


def test_low_rank_over_packed_modules(folder, small, seen, told, tmp_path):
    """A 4-bit module takes no delta, but an adapter beside it: what was trained is what peft computes."""
    from peft import PeftModel

    settings = EditSettings(layers=(0,), rank=2, prefix_share=0.0, kl=0.0, epochs=6, batch=3, lr=5e-2)
    before = packed(small)
    delta, _ = fit_edit(small, seen, told, None, settings)
    assert packed(small) == before
    batch = small.encode(seen, small.prompt("plain"), told)
    with torch.no_grad():
        base = answer_nll(small, batch).item()
        with replaced_linear(small, {n: full_weight(small, n) + w for n, w in delta.weights.items()}):
            want = answer_nll(small, batch).item()
        export_adapter(delta, tmp_path / "adapter", str(folder))
        again = fresh(folder)
        PeftModel.from_pretrained(again.model, tmp_path / "adapter")
        found = answer_nll(again, batch).item()
    assert want < base - 0.02 and found == pytest.approx(want, abs=2e-3)


def test_frozen_reuse_over_4_bits(small, seen, told):
    """Capturing is a forward without gradient, where bitsandbytes would repack: the edit is the plain loop's."""
    for layers in ((2,), (1, 2)):
        settings = dataclasses.replace(SETTINGS, layers=layers, prefix_share=0.0, optimiser="sgd", lr=0.1)
        fast, plain = (
            fit_edit(small, seen, told, None, dataclasses.replace(settings, fast=fast))[0] for fast in (True, False)
        )
        for name, change in plain.weights.items():
            torch.testing.assert_close(
                fast.weights[name], change, atol=1e-6 + 1e-4 * change.abs().max().item(), rtol=1e-3
            )
