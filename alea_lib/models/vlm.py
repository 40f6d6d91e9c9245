"""A vision-language model of a known family that reads, scores and writes in batches."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn
from tqdm import tqdm

from ..metrics.parse import mentions
from .batch import Batch, Limits
from .families import Family
from .feature_cache import cached_features
from .layout import causal, fp32_convolutions, opened, reading_embeddings


@dataclass(frozen=True)
class Answer:
    """One generated answer: text, number of new tokens, and whether the model ended it by itself."""

    text: str
    n_tokens: int
    eos: bool


class VLM:
    """A model with its processor and family row. ``key`` is what it was loaded by, ``revision`` the hub's commit."""

    def __init__(self, model, processor, row: Family, key: str):
        self.model, self.processor, self.row, self.key = model.eval().requires_grad_(False), processor, row, key
        self.revision, self.limits = getattr(model.config, "_commit_hash", None) or "", Limits()
        self.cache: Path | None = None  # folder of image features
        text = model.config.get_text_config()
        self.n_layers: int = text.num_hidden_layers
        self.n_heads: int = text.num_attention_heads
        self.tokenizer = processor.tokenizer
        self.image_id: int = model.config.image_token_id  # the placeholder token of an image position
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(row.end) if row.end else self.tokenizer.eos_token_id
        self.language_model: nn.Module = model.get_submodule(row.language_model)
        self.head: nn.Module = model.get_submodule(row.head)
        self.writer: nn.Module = model.get_submodule(row.writer)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def address(self, part: str, layer: int) -> str:
        """Dotted name of ``layer``, ``down_proj`` or ``o_proj`` of a decoder layer. ValueError if out of range."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is out of range: {self.key} has layers 0 to {self.n_layers - 1}")
        return getattr(self.row, part).format(i=layer)

    def module(self, part: str, layer: int) -> nn.Module:
        return self.model.get_submodule(self.address(part, layer))

    # ---- reading ---------------------------------------------------------------------------------------------
    def prompt(self, role: str) -> str:
        """The wording of a prompt role in this family. KeyError names the roles."""
        if role not in self.row.prompts:
            raise KeyError(f"unknown prompt role {role!r}; there are {sorted(self.row.prompts)}")
        return self.row.prompts[role]

    def features(self, images: list, batch_size: int = 64, change=None) -> torch.Tensor:
        """Image features [N,P,D] of PIL images, arrays or files. FileNotFoundError names a missing file.

        With a ``cache`` folder those of files are kept there and read in batches (:mod:`.feature_cache`).
        ``change(index, pixels)`` gives other pixel values for those that the model would see of images ``index``;
        such features are never kept.
        """
        batch_size = self.limits.of("see", batch_size)
        if self.cache is not None and change is None and images and all(isinstance(i, (str, Path)) for i in images):
            return cast(torch.Tensor, cached_features(self, images, self.cache, batch_size))  # used like one
        return self.compute_features(images, batch_size, change)

    @torch.no_grad()
    def compute_features(self, images: list, batch_size: int = 64, change=None) -> torch.Tensor:
        """Image features [N,P,D], computed; see :meth:`features`."""
        out, options = [], {"return_tensors": "pt", **dict(self.row.image_options)}
        for start in range(0, len(images), batch_size):
            opened_images = [opened(i, self.row.canvas) for i in images[start : start + batch_size]]
            given = [[i] for i in opened_images] if self.row.nested else opened_images
            inputs = self.processor.image_processor(given, **options)
            inputs = dict(inputs.to(self.device, self.model.dtype))  # integers keep their type
            if change is not None:
                inputs["pixel_values"] = change(range(start, start + len(given)), inputs["pixel_values"])
            with fp32_convolutions():
                out += [p.reshape(1, -1, p.shape[-1]) for p in self.row.vision_features(self, inputs)]
        return torch.cat(out)

    def encode(
        self,
        features: torch.Tensor,
        questions: list[str] | str,
        answers: list[str] | None = None,
        side: str = "right",
        eos: bool = True,
        bos: bool = False,
    ) -> Batch:
        """Tokenise image + question (+ answer + EOS), padded on one side.

        ``bos``: a start token before each answer, itself a target (the official code's labels)."""
        questions = [questions] * len(features) if isinstance(questions, str) else questions
        if len(questions) != len(features):
            raise ValueError(f"{len(features)} images, {len(questions)} questions: one an image, or one for all")
        places = getattr(self.model.config, self.row.queries) if self.row.queries else features.shape[1]
        prompts = [self.prompt_ids(q, places) for q in questions]
        start = [self.tokenizer.bos_token_id] * bos
        tails = [[] for _ in prompts] if answers is None else [start + self.answer_ids(a, eos) for a in answers]
        rows = [p + t for p, t in zip(prompts, tails, strict=True)]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        answer, question = torch.zeros(2, len(rows), dtype=torch.int64)
        for i, (row, prompt) in enumerate(zip(rows, prompts)):
            at = 0 if side == "right" else width - len(row)
            ids[i, at : at + len(row)] = torch.tensor(row)
            mask[i, at : at + len(row)] = 1
            labels[i, at + len(prompt) : at + len(row)] = torch.tensor(row[len(prompt) :], dtype=ids.dtype)
            answer[i] = at + len(prompt)
            question[i] = answer[i] - prompt[::-1].index(self.image_id)
        ids, mask, labels, features, question, answer = (
            t.to(self.device) for t in (ids, mask, labels, features, question, answer)
        )
        return Batch(ids, mask, labels, features, question, answer, tuple(questions))

    def prompt_ids(self, question: str, n_image: int) -> list[int]:
        """Tokens of the whole prompt at once; an image that opens it stands even before the beginning of the text."""
        text, image = self.row.ask(question), self.row.image_token
        if text.startswith(image):
            ids = self.tokenizer(text.removeprefix(image), add_special_tokens=False)["input_ids"]
            ids = [self.image_id, self.tokenizer.bos_token_id, *ids]
        else:
            ids = self.tokenizer(text.replace(image, self.row.span.replace("{image}", image)))["input_ids"]
        at = ids.index(self.image_id)
        return ids[:at] + [self.image_id] * n_image + ids[at + 1 :]

    def answer_text(self, answer: str) -> tuple[str, int]:
        """The answer as it is tokenised, after the last sign of a prompt, and how many tokens that sign has."""
        sign = "." if self.row.chat.endswith("}") else self.row.chat[-1]
        return f"{sign}{self.row.lead}{answer.strip()}", len(
            self.tokenizer(sign, add_special_tokens=False)["input_ids"]
        )

    def answer_ids(self, answer: str, eos: bool) -> list[int]:
        """Tokens of an answer after its prompt, with the end token if ``eos``."""
        text, before = self.answer_text(answer)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][before:]
        return ids + [self.end_id] * eos

    def answer_length(self, answer: str, eos: bool = True, bos: bool = False) -> int:
        """Tokens of an answer that a loss counts."""
        return len(self.answer_ids(answer, eos)) + bos

    def embed(self, batch: Batch) -> torch.Tensor:
        """What the language model sees, [B,T,D]: token embeddings with the image features in their places."""
        embeds = self.model.get_input_embeddings()(batch.ids)
        where = (batch.ids == self.image_id).unsqueeze(-1)
        if not where.any():
            return embeds
        return embeds.masked_scatter(where, self.row.project(self, batch).to(embeds))

    # ---- scoring ---------------------------------------------------------------------------------------------
    def hidden(
        self, embeds: torch.Tensor, mask: torch.Tensor, batch: Batch | None = None, cache=None, start: int = 0
    ) -> torch.Tensor:
        """Final hidden states [B,T,D], after the last norm. The mask is always passed (padding is never counted).

        ``batch`` says where image and answer are; a family whose mask or positions depend on it raises ValueError
        without. With a ``cache`` of the positions before ``start``, ``embeds`` are those from there on.
        """
        if batch is None and self.row.decoder_inputs is not causal:
            raise ValueError(f"{self.row.name} needs to know where the image is: call hidden(embeds, mask, batch)")
        given = self.row.decoder_inputs(self, mask, batch, start)
        given |= {"past_key_values": cache, "use_cache": cache is not None}
        return self.language_model(inputs_embeds=embeds, **given).last_hidden_state

    def answer_logits(
        self,
        batch: Batch,
        embeds: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [n,V] at the scored positions only, in row order; they predict ``batch.labels`` != -100 in order."""
        embeds = self.embed(batch) if embeds is None else embeds
        h = self.hidden(embeds, batch.mask if mask is None else mask, batch)
        return self.head(h[batch.target_mask if targets is None else targets])

    # ---- writing ---------------------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        features: torch.Tensor,
        questions: list[str] | str,
        max_new_tokens: int = 64,
        batch_size: int = 100,
        prefix=None,
        progress: str = "",
        decoding=None,
        **options,
    ) -> list[Answer]:
        """Greedy answers (unless ``options`` say otherwise), batched with left padding; greedy is greedy.

        ``prefix``: a ``Prefix`` (:mod:`alea_lib.adversary`) whose rows are put into the embeddings. ``decoding(vlm,
        batch, embeds, mask)``: a context manager around each batch that gives more options
        (:mod:`alea_lib.baselines.registry`).
        """
        questions = [questions] * len(features) if isinstance(questions, str) else questions
        settings = {"do_sample": False, "num_beams": 1, **options}
        batch_size = self.limits.of("write", batch_size)
        out: list[Answer] = []
        for start in tqdm(range(0, len(features), batch_size), desc=progress, disable=not progress):
            part = slice(start, start + batch_size)
            batch = self.encode(features[part], questions[part], side="left")
            embeds, mask = self.embed(batch), batch.mask
            if prefix is not None:
                embeds, mask, _ = prefix.insert(batch, embeds)
            given = (self.row.generate_inputs or self.row.decoder_inputs)(self, mask, batch)
            decided = decoding(self, batch, embeds, mask) if decoding else nullcontext({})
            with reading_embeddings(self.writer), decided as how:
                new = self.writer.generate(
                    inputs_embeds=embeds,
                    **given,
                    max_new_tokens=max_new_tokens,
                    suppress_tokens=[self.image_id],
                    eos_token_id=self.end_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                    **{**settings, **how},
                )
            out += [self._answer(row.tolist()) for row in new]
        return out

    def _answer(self, ids: list[int]) -> Answer:
        eos = self.end_id in ids
        ids = ids[: ids.index(self.end_id)] if eos else ids
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), len(ids) + eos, eos)


class ObjectToken(NamedTuple):
    """An object that an answer names and the index of its word's first token among the answer's tokens."""

    category: str
    token: int


def object_tokens(vlm: VLM, answer: str, family: str = "singularise") -> list[ObjectToken]:
    """The objects of an answer in reading order, with the first token of each one's word ("hot dog": of its first).

    Tokens are those of ``VLM.encode``, found by the offsets of the (fast) tokenizer.
    """
    text, before = vlm.answer_text(answer)
    spans = vlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = [(m.category, next(i for i, (_, end) in enumerate(spans) if end > m.start)) for m in mentions(text, family)]
    return [ObjectToken(category, at - before) for category, at in first]
