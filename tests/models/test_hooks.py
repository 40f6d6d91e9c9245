"""Reading and replacing inside a model: right values, and always undone."""

import pytest
import torch

from alea_lib.models.hooks import (
    SilentHook,
    counted,
    full_weight,
    read_attention,
    read_heads,
    read_layers,
    read_outputs,
    read_parts,
    replaced_heads,
    replaced_linear,
    replaced_outputs,
    started_at,
)


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


def test_a_silent_hook_is_an_error(tiny):
    with pytest.raises(SilentHook, match="forward pass"), read_layers(tiny, lambda layer, h: None):
        pass
    rows = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(SilentHook, match="forward pass"), read_attention(tiny, lambda layer, p: None, rows):
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


def test_replacements_nest(tiny, batch):
    """The inner weight counts where both name a module, the outer one is back after it, also after an exception."""
    first, second = (tiny.address("down_proj", i) for i in (1, 2))
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(64, 128, generator=generator) for _ in range(3))

    @torch.no_grad()
    def run():
        return forward(tiny, batch).last_hidden_state

    def alone(weights):
        with replaced_linear(tiny, weights):
            return run()

    outer, both, inner = alone({first: a}), alone({first: a, second: b}), alone({first: c, second: b})
    base = run()
    with replaced_linear(tiny, {first: a}):
        with replaced_linear(tiny, {second: b}):
            assert torch.equal(run(), both)
        assert torch.equal(run(), outer)
        with replaced_linear(tiny, {first: c, second: b}):
            assert torch.equal(run(), inner)
        assert torch.equal(run(), outer)
        with pytest.raises(KeyboardInterrupt), replaced_linear(tiny, {first: c}):
            raise KeyboardInterrupt
        assert torch.equal(run(), outer)
    assert torch.equal(run(), base) and ours(tiny.model) == []
    assert not torch.equal(outer, inner) and not torch.equal(outer, base)


def test_a_forward_of_its_own_is_back_afterwards(tiny, batch):
    """Of a quantised layer, or one that another library has wrapped."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    tiny.model.nested, own = layer, layer.forward
    try:
        with replaced_linear(tiny, {"nested": torch.zeros(64, 128)}):
            with replaced_linear(tiny, {"nested": torch.ones(64, 128)}):
                assert layer(torch.ones(1, 128)).eq(128).all()
            assert layer(torch.ones(1, 128)).eq(0).all()
        assert "forward" not in layer.__dict__ and layer.forward == own
        layer.forward = wrapped = lambda x: own(x)
        with replaced_linear(tiny, {"nested": torch.zeros(64, 128)}):
            pass
        assert layer.forward is wrapped
    finally:
        del tiny.model.nested


def test_full_weight_is_a_detached_copy(tiny):
    name = tiny.address("down_proj", 0)
    copy, own = full_weight(tiny, name), tiny.model.get_submodule(name).weight
    assert torch.equal(copy, own) and copy.dtype == torch.float32 and not copy.requires_grad
    assert copy.data_ptr() != own.data_ptr()


# ---- outputs and heads


@torch.no_grad()
def test_outputs_of_a_part(tiny, batch):
    got = {}
    with (
        read_outputs(tiny, "down_proj", got.__setitem__),
        read_outputs(tiny, "o_proj", lambda i, x: got.update({-1: x})),
    ):
        forward(tiny, batch)
    assert sorted(got) == [-1, 0, 1, 2, 3] and got[3].shape == (*batch.ids.shape, 64)
    with replaced_linear(tiny, {tiny.address("down_proj", 2): torch.zeros(64, 128)}):
        want = forward(tiny, batch).last_hidden_state
    with replaced_outputs(tiny, "down_proj", lambda layer, x: x * 0, [2]):
        assert torch.equal(forward(tiny, batch).last_hidden_state, want)
    with replaced_outputs(tiny, "layer", lambda layer, h: h, [0, 3]):
        assert torch.equal(forward(tiny, batch).last_hidden_state, forward(tiny, batch).last_hidden_state)
    assert ours(tiny.model) == []


@torch.no_grad()
def test_heads_add_up_to_the_attentions_output(tiny, batch):
    heads, outputs = {}, {}
    with read_heads(tiny, heads.__setitem__), read_outputs(tiny, "o_proj", outputs.__setitem__):
        forward(tiny, batch)
    assert heads[1].shape == (*batch.ids.shape, 4, 16)
    columns = tiny.module("o_proj", 1).weight.unflatten(1, (4, 16))
    torch.testing.assert_close(torch.einsum("bthd,nhd->btn", heads[1], columns), outputs[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_silenced_head_equals_zeroed_columns(tiny, batch):
    def silence(layer, o):
        return o * (torch.arange(4) != 2)[:, None]

    with replaced_heads(tiny, silence, [1]):
        got = forward(tiny, batch).last_hidden_state
    weight = full_weight(tiny, tiny.address("o_proj", 1))
    weight[:, 32:48] = 0
    with replaced_linear(tiny, {tiny.address("o_proj", 1): weight}):
        torch.testing.assert_close(got, forward(tiny, batch).last_hidden_state)
    assert (got - forward(tiny, batch).last_hidden_state).abs().max() > 1e-2


@torch.no_grad()
def test_started_at_a_layer(tiny, batch):
    """Whatever goes in below, the rest of the model runs as it would have."""
    got = {}
    with read_layers(tiny, got.__setitem__):
        whole = forward(tiny, batch).last_hidden_state
    for layer in (1, 3):
        with started_at(tiny, layer, got[layer - 1]), counted(tiny) as count:
            rest = tiny.hidden(torch.zeros_like(whole), batch.mask)
        assert torch.equal(rest, whole) and count.forwards == pytest.approx(6 * (4 - layer) / 4)
        assert ours(tiny.model) == []
    with pytest.raises(RuntimeError, match="amid"), started_at(tiny, 2, whole):
        raise RuntimeError("amid")
    assert ours(tiny.model) == []


def test_passes_are_counted(tiny, batch):
    with counted(tiny) as count:
        with torch.no_grad():
            forward(tiny, batch)
        assert (count.forwards, count.backwards) == (pytest.approx(6), 0)
        seen = {}
        with replaced_outputs(tiny, "layer", lambda i, h: seen.setdefault(i, h.detach().requires_grad_(True)), [1]):
            forward(tiny, batch).last_hidden_state.square().sum().backward()
    assert count.forwards == pytest.approx(12) and count.backwards == pytest.approx(6 * 2 / 4)  # layers 2 and 3
    assert ours(tiny.model) == []


@torch.no_grad()
def test_hooks_on_parts_are_errors_when_silent(tiny):
    def nothing(layer, x):
        return x

    hooks = [
        read_heads(tiny, nothing),
        replaced_heads(tiny, nothing, [1]),
        replaced_outputs(tiny, "layer", nothing, [0]),
    ]
    for block in [*hooks, read_parts(tiny, nothing, torch.ones(1, 1))]:
        with pytest.raises(SilentHook, match="forward pass"), block:
            pass
    assert ours(tiny.model) == []


# ---- attention


@torch.no_grad()
def test_parts_of_the_heads_outputs(tiny, batch):
    """What image positions and the others add makes up the whole; each part is attention times value."""
    image = batch.ids == tiny.model.config.image_token_id
    heads, parts, rows = {}, [{}, {}], torch.arange(batch.ids.shape[1]).expand(6, -1)
    for part, keys in zip(parts, (image, ~image)):
        with read_heads(tiny, heads.__setitem__), read_parts(tiny, part.__setitem__, keys):
            forward(tiny, batch)
    real = batch.mask.bool()
    for layer in range(4):
        torch.testing.assert_close((parts[0][layer] + parts[1][layer])[real], heads[layer][real], atol=1e-5, rtol=1e-4)
    attention, values = {}, {}
    name = tiny.address("o_proj", 2).replace("o_proj", "v_proj")
    handle = tiny.model.get_submodule(name).register_forward_hook(lambda m, a, out: values.update(v=out))
    with read_attention(tiny, attention.__setitem__, rows):
        forward(tiny, batch)
    handle.remove()
    want = torch.einsum("bhtk,bkhd->bthd", attention[2] * image[:, None, None], values["v"].unflatten(-1, (4, 16)))
    torch.testing.assert_close(parts[0][2][real], want[real], atol=1e-5, rtol=1e-4)


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
