"""Reading and replacing inside a model: right values, and always undone."""

import pytest
import torch

from alea_lib.taps import SilentTap, full_weight, read_attention, read_layers, replaced_linear


def forward(tiny, batch, **options):
    return tiny.language_model(inputs_embeds=tiny.embed(batch), attention_mask=batch.mask, use_cache=False, **options)


@pytest.fixture(scope="module")
def batch(tiny, seen, told):
    return tiny.encode(seen, tiny.prompt("plain"), told)


def ours(model):
    """Hooks that this library set and has not taken away, and forwards it replaced."""
    found = [h for m in model.modules() for h in m._forward_hooks.values() if h.__module__.startswith("alea_lib")]
    return found + [m for m in model.modules() if "forward" in m.__dict__]


# ---- layers


@torch.no_grad()
def test_layers_are_the_models_hidden_states(tiny, batch):
    got = {}
    with read_layers(tiny, lambda layer, h: got.setdefault(layer, h.clone())):
        out = forward(tiny, batch, output_hidden_states=True)
    assert sorted(got) == [0, 1, 2, 3]
    for layer in range(3):
        assert torch.equal(got[layer], out.hidden_states[layer + 1])
    assert torch.equal(tiny.language_model.norm(got[3]), out.last_hidden_state)  # the last is before the norm
    assert not torch.equal(got[3], out.hidden_states[-1])


@torch.no_grad()
def test_chosen_layers_alone(tiny, batch):
    got = []
    with read_layers(tiny, lambda layer, h: got.append(layer), [2]):
        forward(tiny, batch)
    assert got == [2]


def test_reading_is_undone(tiny, batch):
    with pytest.raises(RuntimeError, match="amid"), read_layers(tiny, lambda layer, h: None):
        assert len(ours(tiny.model)) == 4
        raise RuntimeError("amid")
    assert ours(tiny.model) == []

    def fails(layer, h):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), read_layers(tiny, fails):
        forward(tiny, batch)
    assert ours(tiny.model) == []
    with pytest.raises(ValueError, match="out of range"), read_layers(tiny, fails, [0, 9]):
        pass
    assert ours(tiny.model) == []


def test_a_silent_tap_is_an_error(tiny):
    with pytest.raises(SilentTap, match="forward pass"), read_layers(tiny, lambda layer, h: None):
        pass
    rows = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(SilentTap, match="forward pass"), read_attention(tiny, lambda layer, p: None, rows):
        pass
    assert ours(tiny.model) == []


# ---- linear modules


def test_replaced_weights_are_used(tiny, batch, bits):
    name, before = tiny.address("down_proj", 2), bits(tiny)
    new = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    with torch.no_grad():
        base = forward(tiny, batch).last_hidden_state
    with replaced_linear(tiny, {name: new}):
        got = forward(tiny, batch).last_hidden_state
        (grad,) = torch.autograd.grad(got.square().mean(), [new])
    assert bits(tiny) == before and ours(tiny.model) == []
    module = tiny.model.get_submodule(name)
    own = module.weight.data
    module.weight.data = new.detach().clone()
    try:
        with torch.no_grad():
            want = forward(tiny, batch).last_hidden_state
    finally:
        module.weight.data = own
    torch.testing.assert_close(got.detach(), want)
    assert (want - base).abs().max() > 1e-2 and grad.norm() > 0
    with torch.no_grad():
        assert torch.equal(forward(tiny, batch).last_hidden_state, base)
    assert all(p.grad is None for p in tiny.model.parameters())


def test_gradient_is_that_of_the_weight(tiny, batch):
    """Against a finite difference in one direction."""
    name = tiny.address("down_proj", 1)
    weight = full_weight(tiny, name).requires_grad_(True)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(64, generator=torch.Generator().manual_seed(2))

    def loss(w):
        with replaced_linear(tiny, {name: w}):
            return (forward(tiny, batch).last_hidden_state @ probe).double().square().mean()

    (grad,) = torch.autograd.grad(loss(weight), [weight])
    with torch.no_grad():
        step = 1e-2
        slope = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((grad * direction).sum().item(), rel=2e-2)


def test_replacing_is_undone_after_an_exception(tiny):
    name = tiny.address("down_proj", 0)
    with pytest.raises(KeyboardInterrupt), replaced_linear(tiny, {name: torch.zeros(64, 128)}):
        assert "forward" in tiny.model.get_submodule(name).__dict__
        raise KeyboardInterrupt
    assert "forward" not in tiny.model.get_submodule(name).__dict__


def test_replacing_what_is_not_there(tiny):
    good = {tiny.address("down_proj", 0): torch.zeros(64, 128)}
    with (
        pytest.raises(KeyError, match="no module 'nowhere'.*down_proj"),
        replaced_linear(tiny, {**good, "nowhere": good}),
    ):
        pass
    wrong = {tiny.address("down_proj", 1): torch.zeros(128, 64)}
    with pytest.raises(ValueError, match="64 x 128.*128, 64"), replaced_linear(tiny, {**good, **wrong}):
        pass
    assert ours(tiny.model) == []


def test_full_weight_is_a_detached_copy(tiny):
    name = tiny.address("down_proj", 0)
    copy, own = full_weight(tiny, name), tiny.model.get_submodule(name).weight
    assert torch.equal(copy, own) and copy.dtype == torch.float32 and not copy.requires_grad
    assert copy.data_ptr() != own.data_ptr()


# ---- attention


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_attention_is_that_of_the_eager_kernel(tiny, seen, told, side):
    batch = tiny.encode(seen, tiny.prompt("plain"), told, side=side)
    ends = batch.mask.shape[1] - 1 - batch.mask.flip(1).argmax(1)  # last real token
    rows = torch.stack([batch.answer, (batch.answer + ends) // 2, ends], 1)
    got = {}
    with read_attention(tiny, lambda layer, p: got.setdefault(layer, p.clone()), rows):
        fused = forward(tiny, batch).last_hidden_state
    torch.testing.assert_close(fused, forward(tiny, batch).last_hidden_state)
    tiny.model.set_attn_implementation({"text_config": "eager"})
    try:
        eager = forward(tiny, batch, output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation({"text_config": "sdpa"})
    assert sorted(got) == [0, 1, 2, 3] and got[0].shape == (6, 4, 3, batch.ids.shape[1])
    for layer in range(4):
        for i in range(len(told)):
            want = eager[layer][i][:, rows[i]]
            torch.testing.assert_close(got[layer][i], want, atol=1e-5, rtol=0)
            assert got[layer][i][..., batch.mask[i] == 0].sum().item() < 1e-6  # padding is not looked at
    torch.testing.assert_close(got[3].sum(-1), torch.ones(6, 4, 3))


@torch.no_grad()
def test_attention_without_padding(tiny, seen):
    """No mask is built then: the causal rule alone must hold."""
    batch = tiny.encode(seen[:2], tiny.prompt("plain"), ["There is a cup."] * 2)
    rows = batch.answer[:, None]
    got = {}
    with read_attention(tiny, lambda layer, p: got.setdefault(layer, p), rows):
        forward(tiny, batch)
    later = torch.arange(batch.ids.shape[1])[None] > rows
    assert got[2].masked_select(later[:, None, None].expand_as(got[2])).abs().max() == 0
    torch.testing.assert_close(got[2].sum(-1), torch.ones(2, 4, 1))


def test_reading_attention_is_undone(tiny, batch):
    rows = batch.answer[:, None]
    with pytest.raises(RuntimeError, match="amid"), read_attention(tiny, lambda layer, p: None, rows):
        assert tiny.model.config.get_text_config()._attn_implementation != "sdpa"
        raise RuntimeError("amid")
    assert tiny.model.config.get_text_config()._attn_implementation == "sdpa"
