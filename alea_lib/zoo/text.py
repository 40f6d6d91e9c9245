"""The word-level tokenizer and processor of the small models: the same classes and chat format as LLaVA-1.5's."""

from __future__ import annotations

import re

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from ..datasets.describe import COLUMN, noun, plural
from ..datasets.scenes import SIZE, objects, recipe
from ..models.families import PROMPTS_SMALL, chat

PIECE = r" ?[A-Za-z]+|[^A-Za-z]"  # a word keeps the space before it, so text survives the round trip
IMAGE = "<image>"


def words() -> list[str]:
    """Every piece that captions, questions and prompts of the scenes world can contain, sorted."""
    data = recipe()
    names = " ".join([*objects(), *map(plural, objects()), *map(noun, objects()), *data["contexts"], *data["colours"]])
    asked = [*PROMPTS_SMALL.values(), "Is there a image?", "Are there two in the image?", "Is the background?"]
    texts = [text for q in asked for text in (chat(q), f" {q}")]
    texts += [" ".join(COLUMN), " ".join(c.capitalize() for c in COLUMN), f" {names}", " Answer with yes or no"]
    texts += [" A An a an two and with on scene shows There there is are also background Yes No . ,"]
    return sorted({p for t in texts for p in re.findall(PIECE, t.replace(IMAGE, ""))})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A ``PreTrainedTokenizerFast`` with <unk> <s> </s> <pad> <image>; left padding, BOS added."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {t: i for i, t in enumerate(special + words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    fast.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return fast


def build_processor(patch: int) -> LlavaProcessor:
    """LlavaProcessor over the PIL image processor (no torchvision), images of SIZE pixels."""
    crop = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=crop, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(images, build_tokenizer(), patch, "default", num_additional_image_tokens=1)


def pixels(images) -> torch.Tensor:
    """uint8 [B, SIZE, SIZE, 3] -> float32 [B, 3, SIZE, SIZE], the numbers that the processor makes."""
    return (torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
