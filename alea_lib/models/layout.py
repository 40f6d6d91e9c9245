"""How families differ in what goes into the language model: small functions that the rows of ``families`` point to.

Three kinds, each called by ``VLM`` with itself first:

* *vision_features* (``vlm, inputs -> list``): what the vision side makes of the image processor's output, one [P,D] an
  image;
* *project* (``vlm, batch -> [B,P,D]``): features as they are put into the embeddings;
* *decoder_inputs* (``vlm, mask, batch, start -> dict``): what the decoder needs beside the embeddings of positions
  ``start`` on. ``mask`` [B,T+k] is the batch's, with ones for the ``k`` rows of a soft prefix, which never stands
  before the image.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path

import torch
from PIL import Image, ImageOps

# ---- what the vision side gives --------------------------------------------------------------------------------------


def opened(image, canvas: int):
    """An image as RGB, in the middle of a grey square of ``canvas`` pixels (0: as it is)."""
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise FileNotFoundError(f"{image}: no such image; the world is incomplete: build stage 01_world again")
        with Image.open(image) as file:
            image = file.convert("RGB")
    if not canvas:
        return image
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return ImageOps.pad(image.convert("RGB"), (canvas, canvas), color=(128, 128, 128))


@contextmanager
def fp32_convolutions() -> Iterator[None]:
    """Convolutions on a GPU in full fp32: TF32, cuDNN's default, would give other captions than a CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def projected(vlm, inputs: dict) -> list[torch.Tensor]:
    """The model's own image features, after its projector."""
    return list(vlm.model.get_image_features(**inputs).pooler_output)


def before_query(vlm, inputs: dict) -> list[torch.Tensor]:
    """The vision encoder's states alone: a Q-Former reads the question too, so it runs when the question is known."""
    return list(vlm.model.vision_model(**inputs).last_hidden_state)


# ---- what is put into the embeddings ---------------------------------------------------------------------------------


def as_they_are(vlm, batch) -> torch.Tensor:
    """The features themselves."""
    return batch.features


def queried(vlm, batch) -> torch.Tensor:
    """The Q-Former's answer to image and question (InstructBLIP), projected."""
    model, features = vlm.model, batch.features.to(vlm.device, vlm.model.dtype)
    # positions are absolute: padding on the left would shift the question
    question = vlm.processor.qformer_tokenizer(
        list(batch.questions), padding=True, padding_side="right", return_tensors="pt"
    ).to(features.device)
    mask, queries = question["attention_mask"], model.query_tokens.expand(len(features), -1, -1)
    states = model.qformer(
        input_ids=question["input_ids"],
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], 1),
        query_embeds=queries,
        encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
    ).last_hidden_state
    return model.language_projection(states[:, : queries.shape[1]])


# ---- what the decoder takes beside embeddings ------------------------------------------------------------------------


def causal(vlm, mask: torch.Tensor, batch, start: int = 0) -> dict[str, torch.Tensor]:
    """Nothing but the mask: causal attention, positions that count on."""
    return {"attention_mask": mask}


def grid_positions(vlm, mask: torch.Tensor, batch, start: int = 0) -> dict[str, torch.Tensor]:
    """M-RoPE (Qwen2.5-VL): time, row and column [3,B,T]. An image of P positions is a square of side sqrt(P) and takes
    as many numbers as its side; before and after it the three count on together. Padding has 0."""
    at = torch.arange(mask.shape[1], device=mask.device)
    image = batch.ids == vlm.image_id
    left = batch.mask.argmax(1, keepdim=True)  # padding on the left
    n = int(image[0].sum())
    if not n:
        return {"attention_mask": mask, "position_ids": (at - left).clamp(min=0).expand(3, -1, -1)[..., start:]}
    side, first = isqrt(n), image.long().argmax(1, keepdim=True)
    if side * side != n:
        raise ValueError(f"{vlm.key} was given {n} image positions, which make no square: use VLM.features")
    inside = (at - first).clamp(0, n - 1)
    text = torch.where(at < first, at, at - n + side)
    image = (at >= first) & (at < first + n)
    grid = [torch.where(image, first + step, text) for step in (0, inside // side, inside % side)]
    return {"attention_mask": mask, "position_ids": (torch.stack(grid) - left).clamp(min=0)[..., start:]}


def prefix_mask(vlm, mask: torch.Tensor, batch, start: int = 0) -> dict[str, torch.Tensor]:
    """A prefix language model (PaliGemma): image and prompt see each other both ways, the answer is causal. Positions
    count from 1. The mask is additive, [B,1,T - start,T]."""
    at = torch.arange(mask.shape[1], device=mask.device)
    prompt = at < batch.answer[:, None] + mask.shape[1] - batch.ids.shape[1]
    visible = (at <= at[:, None]) | (prompt[:, :, None] & prompt[:, None, :])
    dtype = vlm.model.dtype
    allowed = torch.zeros(visible.shape, dtype=dtype, device=mask.device)
    allowed = allowed.masked_fill(~(visible & (mask[:, None, :] != 0)), torch.finfo(dtype).min)
    return {"attention_mask": allowed[:, None, start:], "position_ids": (at + 1).expand(len(mask), -1)[:, start:]}


def prompt_types(vlm, mask: torch.Tensor, batch, start: int = 0) -> dict[str, torch.Tensor]:
    """The same for writing: the model makes its mask itself, when it knows that all it was given is prompt."""
    return {"attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


@contextmanager
def reading_embeddings(writer) -> Iterator[None]:
    """Let ``generate`` take embeddings from a class that could use them but does not name them (PaliGemma)."""
    own = writer.prepare_inputs_for_generation
    if "inputs_embeds" in inspect.signature(own).parameters:
        yield
        return

    def named(input_ids, inputs_embeds=None, **kwargs):
        return own(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    writer.prepare_inputs_for_generation = named
    try:
        yield
    finally:
        del writer.prepare_inputs_for_generation
