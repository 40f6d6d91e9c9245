"""A tiny random model of each family: the real class of transformers, its own processor classes, no hub."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ..models.families import FAMILIES
from ..models.vlm import VLM

TEXT = [
    "USER: Please describe this image in detail. ASSISTANT: There is a cup with a dog.",
    "<|im_start|>user system assistant You are a helpful assistant. Is there a cat? Yes No User: Assistant:",
    "A kitchen scene shows a knife and a spoon. There is also a bowl on a blue background.",
]
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
QWEN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


def tokenizer(special=SPECIAL, bos=True, eos="</s>"):
    """Byte pairs; a beginning-of-text token is added where the family's tokenizer adds one."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    first = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=first, initial_alphabet=alphabet)
    made.train_from_iterator(TEXT * 9, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    if eos != "</s>":
        fast.eos_token = eos
    return fast


def text_config(kind: str, tokens, **changes):
    """A decoder of 3 layers of width 64; two of its four query heads share a key-value head."""
    shape = {
        "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1,
        "eos_token_id": tokens.eos_token_id, "pad_token_id": 3, "initializer_range": 0.15, **changes,
    }  # fmt: skip
    return hf.AutoConfig.for_model(kind, **shape)


def vision(size: int, patch: int = 14, **changes) -> dict:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": size, "patch_size": patch, "initializer_range": 0.15, **changes,
    }  # fmt: skip


def llava():
    tokens = tokenizer()
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision(42)), text_config=text_config("llama", tokens),
        image_token_index=tokens.convert_tokens_to_ids("<image>"), image_seq_length=9, vision_feature_layer=-2,
    )  # fmt: skip
    return config, hf.LlavaProcessor(images, tokens, 14, "default", num_additional_image_tokens=1), 9


def llava_next(kind, **changes):
    tokens, grid = tokenizer(), [[28, 56], [56, 28], [56, 56]]
    side = {"height": 28, "width": 28}
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=side, image_grid_pinpoints=grid)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**vision(28)), text_config=text_config(kind, tokens, **changes),
        image_token_index=tokens.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    # one tile of 2 x 2, then 4 x 4 with a mark at the end of each line
    return config, hf.LlavaNextProcessor(images, tokens, 14, "default", num_additional_image_tokens=1), 4 + 4 * 5


def idefics(config_class, images_class, *special, **changes):
    """SmolVLM's processor also takes videos and needs torchvision; Idefics3's writes the same words around an image."""
    tokens = tokenizer([*special, *SPECIAL], **changes)
    images = images_class(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    config = config_class(
        vision_config=vision(32, 8), text_config=text_config("llama", tokens).to_dict(), scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"), pad_token_id=3,
    )  # fmt: skip
    return config, hf.Idefics3Processor(images, tokens, image_seq_len=4), 4


def qwen():
    """Its processor also takes videos and needs torchvision: tokenizer and image processor alone."""
    tokens = tokenizer(QWEN, bos=False, eos="<|im_end|>")
    images = hf.Qwen2VLImageProcessorPil(size={"shortest_edge": 56**2, "longest_edge": 112**2})
    see = vision(0, depth=2, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1], window_size=56)
    for name in ("image_size", "num_hidden_layers", "num_attention_heads"):
        del see[name]
    text = text_config("qwen2_5_vl_text", tokens, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]})
    ids = {f"{n}_token_id": tokens.convert_tokens_to_ids(f"<|{n}|>") for n in ("vision_start", "vision_end")}
    config = hf.Qwen2_5_VLConfig(
        vision_config=see, text_config=text.to_dict(), image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=0, **ids,
    )  # fmt: skip
    return config, SimpleNamespace(tokenizer=tokens, image_processor=images), 16


def instructblip():
    tokens, asked = tokenizer(), tokenizer([], bos=False)
    asked.padding_side = "right"
    images = hf.BlipImageProcessorPil(size={"height": 28, "width": 28})
    asks = {**vision(28), "vocab_size": len(asked), "pad_token_id": 3, "cross_attention_frequency": 1}
    asks = {k: v for k, v in asks.items() if k not in ("image_size", "patch_size")}
    config = hf.InstructBlipConfig(
        vision_config=vision(28), qformer_config=asks, text_config=text_config("llama", tokens).to_dict(),
        num_query_tokens=5, image_token_index=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, hf.InstructBlipProcessor(images, tokens, asked, num_query_tokens=5), 5


def paligemma():
    tokens = tokenizer(["<image>"])
    images: Any = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tokens)  # adds tokens
    see = vision(28, model_type="siglip_vision_model", vision_use_head=False, projection_dim=64)
    config = hf.PaliGemmaConfig(
        vision_config=see,
        text_config=text_config("gemma", tokens, head_dim=24, num_key_value_heads=1).to_dict(), projection_dim=64,
        hidden_size=64, image_token_index=tokens.convert_tokens_to_ids("<image>"), vocab_size=len(tokens),
    )  # fmt: skip
    return config, processor, 4


BUILDERS = {
    "llava": llava,
    "llava-next-mistral": partial(llava_next, "mistral", sliding_window=None),
    "llava-next-vicuna": partial(llava_next, "llama"),
    "smolvlm": partial(
        idefics, hf.SmolVLMConfig, hf.SmolVLMImageProcessorPil, "<|im_start|>", bos=False, eos="<end_of_utterance>"
    ),
    "idefics3": partial(idefics, hf.Idefics3Config, hf.Idefics3ImageProcessorPil),
    "qwen2.5-vl": qwen,
    "instructblip": instructblip,
    "paligemma": paligemma,
}


def build(name: str):
    """The model of a row, and the number of positions that its image takes."""
    torch.set_num_threads(1)
    if name not in BUILDERS:
        known = ", ".join(BUILDERS)
        raise KeyError(f"no tiny model of {name!r}: write a builder in alea_lib/zoo/tiny.py; there are {known}")
    config, processor, places = BUILDERS[name]()
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for each, p in model.named_parameters():
            if "query_tokens" in each:
                p.normal_()
    vlm = VLM(model, processor, FAMILIES[name], f"tiny-{name}")
    for each in (model, vlm.writer):
        each.generation_config.pad_token_id, each.generation_config.eos_token_id = 3, vlm.end_id
    return vlm, places
