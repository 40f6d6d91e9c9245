"""Writing attention: the newest position attends as told, batched, with cache and padding, and all is undone."""

import pytest
import torch
from tiny_families import build

from alea_lib.models.hooks import SilentHook, read_attention, read_heads, weighed_attention


@pytest.fixture(scope="module")
def left(tiny, seen):
    """Six prompts of three lengths, padded on the left."""
    questions = ["Is there a cup?", tiny.prompt("plain"), tiny.prompt("careful")] * 2
    return tiny.encode(seen, questions, side="left")


def softmax(layer, scores):
    return scores.softmax(-1)


def forward(vlm, batch):
    return vlm.hidden(vlm.embed(batch), batch.mask, batch)


@torch.no_grad()
def test_the_softmax_of_the_scores_changes_nothing(tiny, left):
    with weighed_attention(tiny, softmax):
        got = forward(tiny, left)
    torch.testing.assert_close(got[:, -1], forward(tiny, left)[:, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_weights_leave_the_pass_bit_equal(tiny, left):
    with weighed_attention(tiny, lambda layer, scores: None):
        assert torch.equal(forward(tiny, left), forward(tiny, left))
    with weighed_attention(tiny, softmax, [9]):
        assert torch.equal(forward(tiny, left), forward(tiny, left))


@torch.no_grad()
def test_scores_are_those_of_the_attention(tiny, left):
    scores, read = {}, {}
    last = torch.full((6, 1), left.ids.shape[1] - 1)
    take = scores.__setitem__  # gives None: the pass stays as it is
    with weighed_attention(tiny, take), read_attention(tiny, read.__setitem__, last):
        forward(tiny, left)
    for layer in range(4):
        torch.testing.assert_close(scores[layer].softmax(-1), read[layer][:, :, 0])
        assert (scores[layer].softmax(-1) * (left.mask == 0)[:, None]).sum() < 1e-6


@torch.no_grad()
def test_weights_by_hand(tiny, left):
    """The newest position's head outputs are the weighted values; those of the others stay."""
    values, heads, plain = {}, {}, {}
    weights = torch.rand(6, 4, left.ids.shape[1], generator=torch.Generator().manual_seed(0))
    name = tiny.address("o_proj", 2).replace("o_proj", "v_proj")
    handle = tiny.model.get_submodule(name).register_forward_hook(lambda m, a, out: values.update(v=out))
    with read_heads(tiny, plain.__setitem__):
        forward(tiny, left)
    with weighed_attention(tiny, lambda layer, scores: weights, [2]), read_heads(tiny, heads.__setitem__):
        forward(tiny, left)
    handle.remove()
    want = torch.einsum("bhk,bkhd->bhd", weights, values["v"].unflatten(-1, (4, 16)))
    torch.testing.assert_close(heads[2][:, -1], want, atol=1e-5, rtol=1e-4)
    assert torch.equal(heads[2][:, :-1], plain[2][:, :-1]) and torch.equal(heads[1], plain[1])
    assert (heads[3][:, -1] - plain[3][:, -1]).abs().max() > 1e-2


def doubled(vlm, batch):
    """Twice the weight on the image, in all layers."""
    image = batch.ids == vlm.image_id

    def weigh(layer, scores):
        seen = torch.nn.functional.pad(image, (0, scores.shape[-1] - image.shape[1]))[:, None]
        return scores.softmax(-1) * (1 + seen)

    return weigh


@pytest.mark.parametrize("padded", [True, False])  # without padding no mask is built
@torch.no_grad()
def test_a_cached_step_equals_a_whole_pass(tiny, left, seen, padded):
    """The newest position alone is weighed, whether those before it come from a cache or from the same pass."""
    from transformers import DynamicCache

    left = left if padded else tiny.encode(seen[:2], tiny.prompt("plain"), side="left")
    cache, embeds, mask = DynamicCache(), tiny.embed(left), left.mask
    tiny.hidden(embeds[:, :-1], mask[:, :-1], left, cache)
    with weighed_attention(tiny, doubled(tiny, left)):
        whole = tiny.hidden(embeds, mask, left)[:, -1]
        step = tiny.hidden(embeds[:, -1:], mask, left, cache, embeds.shape[1] - 1)[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
    assert (whole - forward(tiny, left)[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llava-next-mistral", "qwen2.5-vl", "paligemma", "instructblip", "smolvlm"])
@torch.no_grad()
def test_every_family(family):
    """Shared keys, other masks, other positions: the softmax changes nothing, blindness does."""
    import numpy as np
    from PIL import Image

    vlm = build(family)[0]
    rng = np.random.default_rng(0)
    features = vlm.features([Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(2)])
    batch = vlm.encode(features, ["Is there a cat?", "Please describe this image in detail."], side="left")
    plain = forward(vlm, batch)
    with weighed_attention(vlm, softmax):
        same = forward(vlm, batch)
    torch.testing.assert_close(same[:, -1], plain[:, -1], atol=1e-4, rtol=1e-4)
    with weighed_attention(vlm, doubled(vlm, batch)):
        assert (forward(vlm, batch)[:, -1] - plain[:, -1]).abs().max() > 1e-2
    own = vlm.generate(features, vlm.prompt("plain"), max_new_tokens=6)
    with weighed_attention(vlm, softmax):
        assert vlm.generate(features, vlm.prompt("plain"), max_new_tokens=6) == own


def test_blocks_are_undone_and_silence_is_an_error(tiny, left):
    config = tiny.model.config.get_text_config()
    with pytest.raises(RuntimeError, match="amid"), weighed_attention(tiny, softmax):
        with weighed_attention(tiny, softmax):
            assert config._attn_implementation == "alea_alea_sdpa"
            forward(tiny, left)
        assert config._attn_implementation == "alea_sdpa"
        raise RuntimeError("amid")
    assert config._attn_implementation == "sdpa"
    with pytest.raises(SilentHook, match="forward pass"), weighed_attention(tiny, softmax):
        pass
