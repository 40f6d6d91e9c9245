"""The model wrapper: what is fed, what is scored, what is written, and clear errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alea_lib.models import loading as module
from alea_lib.models.families import FAMILIES, PROMPTS, PROMPTS_SMALL, Family, family
from alea_lib.models.layout import opened
from alea_lib.models.loading import load, model_path
from alea_lib.models.vlm import VLM

QUESTIONS = ["Please describe this image in detail.", "Is there a cup in the image?", "Is the background blue?"]


def test_generation_equals_the_processor_and_plain_generate(tiny, tiny_world):
    files = tiny_world.split("activate").files[:3]
    images = [Image.open(f).convert("RGB") for f in files]
    ours = tiny.generate(tiny.features(files), QUESTIONS, 10)
    inputs = tiny.processor(images=images, text=[tiny.row.ask(q) for q in QUESTIONS], return_tensors="pt", padding=True)
    out = tiny.model.generate(
        **inputs, do_sample=False, max_new_tokens=10, suppress_tokens=[tiny.model.config.image_token_id]
    )
    new = out[:, inputs["input_ids"].shape[1] :]
    texts = [tiny.tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    assert [a.text for a in ours] == texts and len(set(texts)) > 1


def test_prompt_ids_are_those_of_the_processor(tiny, tiny_world, seen):
    image = Image.open(tiny_world.split("activate").files[0])
    for question in (*QUESTIONS, *PROMPTS_SMALL.values()):
        theirs = tiny.processor(images=image, text=tiny.row.ask(question))["input_ids"]
        assert tiny.encode(seen[:1], question).ids[0].tolist() == np.array(theirs).ravel().tolist()


def test_features_equal_the_models_own(tiny, tiny_world):
    """Composed arrays, PIL images and files give the same features, and the model's embeddings hold them."""
    files = tiny_world.split("activate").files[:2]
    images = [Image.open(f).convert("RGB") for f in files]
    features = tiny.features(files)
    torch.testing.assert_close(tiny.features(images), features)
    torch.testing.assert_close(tiny.features(files, batch_size=1), features, atol=1e-5, rtol=1e-5)
    pixels = tiny.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    inputs = tiny.processor(
        images=images, text=[tiny.row.ask(q) for q in QUESTIONS[:2]], return_tensors="pt", padding=True
    )
    theirs = tiny.model(**{**inputs, "pixel_values": pixels}).logits[:, -1]
    batch = tiny.encode(features, QUESTIONS[:2], side="left")
    with torch.no_grad():
        position = (batch.mask.cumsum(1) - 1).clamp(min=0)
        ours = tiny.model(inputs_embeds=tiny.embed(batch), attention_mask=batch.mask, position_ids=position).logits
    torch.testing.assert_close(ours[:, -1], theirs, atol=1e-4, rtol=1e-4)


def test_pixels_of_training_are_those_of_the_processor(tiny, tiny_world):
    from alea_lib.zoo.text import pixels

    image = np.asarray(Image.open(tiny_world.split("test").files[0]).convert("RGB"))
    theirs = tiny.processor.image_processor([Image.fromarray(image)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(image[None]), theirs, atol=1e-5, rtol=0)


def test_a_batch_equals_one_by_one(tiny, seen):
    questions = (QUESTIONS * 2)[: len(seen)]
    together = tiny.generate(seen, questions, 8)
    alone = [tiny.generate(seen[i : i + 1], [q], 8)[0] for i, q in enumerate(questions)]
    assert together == alone == tiny.generate(seen, questions, 8, batch_size=4)
    assert len({a.text for a in together}) > 1


def test_labels_cover_the_answer_and_its_end_alone(tiny, seen, told):
    batch = tiny.encode(seen, tiny.prompt("plain"), told)
    image, vocabulary = tiny.model.config.image_token_id, tiny.tokenizer
    for i, text in enumerate(told):
        chosen = batch.ids[i][batch.labels[i] != -100].tolist()
        assert chosen == batch.labels[i][batch.labels[i] != -100].tolist()
        assert vocabulary.decode(chosen[:-1]).strip() == text and chosen[-1] == vocabulary.eos_token_id
        kept_out = batch.ids[i][batch.labels[i] == -100].tolist()
        assert kept_out[0] == vocabulary.bos_token_id and kept_out.count(image) == seen.shape[1]
        prompt = vocabulary.decode([t for t in kept_out if t not in (image, vocabulary.pad_token_id)])
        assert prompt.endswith("ASSISTANT:") and tiny.prompt("plain") in prompt
        assert (batch.labels[i][batch.mask[i] == 0] == -100).all()
        first = (batch.labels[i] != -100).nonzero()[0].item()
        assert batch.answer[i] == first and batch.ids[i, batch.question[i] - 1] == image
        assert image not in batch.ids[i, batch.question[i] :].tolist()
        assert batch.target_mask[i].nonzero().ravel().tolist() == list(range(first - 1, first + len(chosen) - 1))


def test_without_an_end_nothing_is_added(tiny, seen):
    batch = tiny.encode(seen[:1], QUESTIONS[0], ["There is a cup."], eos=False)
    assert tiny.tokenizer.eos_token_id not in batch.ids[0].tolist()
    assert batch.labels[0][-1] == batch.ids[0][-1]


def test_answers_of_a_tokenizer_that_puts_a_blank_first():
    """Llama's own tokenizer puts a blank before whatever it reads; an answer must not begin with two."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    text = ["USER: hi ASSISTANT: There is a cup."] * 9
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"]))

    class Reader:
        tokenizer, row, end_id = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>"), FAMILIES["llava"], 0
        answer_text, answer_ids = VLM.answer_text, VLM.answer_ids

    read = Reader.tokenizer
    prompt, whole = (read(t)["input_ids"] for t in ("USER: hi ASSISTANT:", "USER: hi ASSISTANT: There is a cup."))
    assert prompt + Reader().answer_ids("There is a cup.", False) == whole
    assert prompt + read(" There is a cup.")["input_ids"] != whole


def test_both_sides_hold_the_same_tokens(tiny, seen, told):
    left, right = (tiny.encode(seen, QUESTIONS * 2, told, side=s) for s in ("left", "right"))
    for i in range(len(told)):
        assert left.ids[i][left.mask[i] == 1].tolist() == right.ids[i][right.mask[i] == 1].tolist()
        assert left.mask[i, -1] == 1 and right.mask[i, 0] == 1


@torch.no_grad()
def test_more_padding_changes_no_answer_logits(tiny, seen, told):
    short = tiny.encode(seen[:1], QUESTIONS[0], told[:1])
    n = len(tiny.answer_ids(told[0], True))
    long = tiny.encode(seen, QUESTIONS[0], told)  # padded to the longest of six
    assert long.ids.shape[1] > short.ids.shape[1] + 5
    alone = tiny.answer_logits(short)
    torch.testing.assert_close(tiny.answer_logits(long)[:n], alone, atol=1e-5, rtol=1e-5)
    assert alone.shape == (n, len(tiny.tokenizer))


@torch.no_grad()
def test_answer_logits_are_the_models_own(tiny, seen, told):
    batch = tiny.encode(seen, QUESTIONS[0], told)
    logits = tiny.model(inputs_embeds=tiny.embed(batch), attention_mask=batch.mask).logits
    torch.testing.assert_close(tiny.answer_logits(batch), logits[batch.target_mask], atol=1e-5, rtol=1e-5)


def test_what_an_answer_reports(tiny):
    eos, pad = tiny.tokenizer.eos_token_id, tiny.tokenizer.pad_token_id
    words = tiny.answer_ids("There is a cup.", eos=False)
    ended, cut = tiny._answer([*words, eos, pad, pad]), tiny._answer(words)
    assert (ended.text, ended.n_tokens, ended.eos) == ("There is a cup.", len(words) + 1, True)
    assert (cut.text, cut.n_tokens, cut.eos) == ("There is a cup.", len(words), False)
    assert tiny._answer([eos]).text == ""


def test_the_image_token_is_never_written(tiny, seen):
    """A model that would love to write <image> must not."""
    token, head = tiny.model.config.image_token_id, tiny.head
    bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    bias[token] = 1e4
    head.bias = bias
    try:
        raw = tiny.model.generate(
            inputs_embeds=tiny.embed(tiny.encode(seen[:1], QUESTIONS[0])), max_new_tokens=3, do_sample=False
        )
        assert token in raw[0].tolist()
        assert "<image>" not in tiny.generate(seen[:1], QUESTIONS[0], 3)[0].text
        new = tiny.answer_ids(tiny.generate(seen[:1], QUESTIONS[0], 3)[0].text, False)
        assert new and token not in new
    finally:
        head.register_parameter("bias", None)


def test_addresses(tiny):
    assert tiny.n_layers == 4 and tiny.n_heads == 4
    assert tiny.module("down_proj", 3) is tiny.model.get_submodule("model.language_model.layers.3.mlp.down_proj")
    assert tiny.module("o_proj", 0).weight.shape == (64, 64)


# ---- one clear error each


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_out_of_range(tiny, layer):
    with pytest.raises(ValueError, match="out of range.*0 to 3"):
        tiny.address("down_proj", layer)


def test_unknown_prompt_role(tiny):
    with pytest.raises(KeyError, match="'neutral'.*careful.*plain"):
        tiny.prompt("neutral")


def test_missing_image(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png.*01_world"):
        tiny.features([tmp_path / "none.png"])


def test_unknown_model(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no model 'scenes-unnatural' in data/models"):
        load("scenes-unnatural")


def test_as_many_answers_as_questions(tiny, seen):
    with pytest.raises(ValueError):
        tiny.encode(seen[:2], QUESTIONS[0], ["one", "two", "three"])


def test_unknown_family():
    with pytest.raises(KeyError, match="opt.*llava.*families.py"):
        family("opt", small=True)
    assert family("llava", small=True).prompts is PROMPTS_SMALL
    assert family("llava", small=False).prompts is PROMPTS
    assert {frozenset(r.prompts) for r in FAMILIES.values()} == {frozenset(("plain", "careful", "speculative"))}


@pytest.mark.parametrize(
    "model_type, text", [("instructblip", "t5"), ("paligemma", "gemma2"), ("llava_next", "qwen2"), ("mllama", "llama")]
)
def test_a_family_without_a_row_is_told_how_to_add_one(model_type, text):
    with pytest.raises(KeyError, match=f"{model_type}.*qwen2.5-vl.*families.py.*Add your model"):
        family(model_type, False, text)


def test_a_row_by_type_text_part_and_size():
    assert family("llava_next", False, "mistral").name == "llava-next-mistral"
    assert family("llava_next", False, "llama").name == "llava-next-vicuna"
    assert family("llava", True, "llama").name == "llava-small"
    assert family("smolvlm", True, "llama").name == "smolvlm"  # small models of a family without a small row


def test_the_page_lists_every_row():
    page = (Path(__file__).parents[2] / "book" / "add_model.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9.-]+)` \|", page.split("## What a row holds")[0], re.M) == list(FAMILIES)
    fields = page.split("## What a row holds")[1].split("\n- ")[0]
    assert set(Family.__dataclass_fields__) - {"name"} == set(re.findall(r"`(\w+)`(?=[,;: |])", fields)) - {"decoder"}


def test_positions_of_the_real_sizes():
    """What the page says of the larger models, from their image processors and their sizes."""
    from transformers import Qwen2VLImageProcessorPil
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    picture = opened(np.zeros((480, 640, 3), dtype=np.uint8), FAMILIES["qwen2.5-vl"].canvas)
    grid = Qwen2VLImageProcessorPil()(picture, return_tensors="pt")["image_grid_thw"][0]
    assert grid.tolist() == [1, 32, 32] and grid.prod() // 4 == 256
    side = FAMILIES["llava-next-mistral"].canvas
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert get_anyres_image_grid_shape((side, side), pinpoints, 336) == (2, 2)
    assert 24 * 24 + 48 * (48 + 1) == 2928


def test_saved_and_loaded_by_folder(tiny, seen, tmp_path):
    tiny.model.save_pretrained(tmp_path / "m")
    tiny.processor.save_pretrained(tmp_path / "m")
    again = load(str(tmp_path / "m"), device="cpu")
    assert again.row.name == "llava-small" and not again.model.training
    assert not any(p.requires_grad for p in again.model.parameters())
    assert again.generate(seen, QUESTIONS[0], 6) == tiny.generate(seen, QUESTIONS[0], 6)
    assert type(again.processor.image_processor).__name__ == "CLIPImageProcessorPil"


def test_a_model_in_the_repository_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "root", lambda: tmp_path)
    (tmp_path / "data" / "models" / "mine").mkdir(parents=True)
    assert model_path("mine") == tmp_path / "data" / "models" / "mine"
    assert model_path("org/theirs") == "org/theirs"


@pytest.mark.parametrize("allowed", [True, False])
def test_no_flag_of_torch_is_left_changed(tiny, tiny_world, tmp_path, monkeypatch, allowed):
    """Convolutions run in fp32 while the model looks at images, and whatever was set before is back afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    tiny.model.save_pretrained(tmp_path / "m")
    tiny.processor.save_pretrained(tmp_path / "m")
    again, found = load(str(tmp_path / "m"), device="cpu"), []
    assert torch.backends.cudnn.allow_tf32 is allowed
    conv = next(m for m in again.model.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(lambda *_: found.append(torch.backends.cudnn.allow_tf32))
    again.features(tiny_world.split("activate").files[:1])
    assert found == [False] and torch.backends.cudnn.allow_tf32 is allowed
