"""Which tokens of an answer are its objects."""

from __future__ import annotations

from typing import NamedTuple

from ..metrics.parse import mentions
from .vlm import VLM


class ObjectToken(NamedTuple):
    """An object that an answer names and the index of its word's first token among the answer's tokens."""

    category: str
    token: int


def object_tokens(vlm: VLM, answer: str, family: str = "singularise") -> list[ObjectToken]:
    """The objects of an answer in reading order, with the first token of each one's word.

    The tokens are those of ``VLM.encode``; words of several tokens (byte pairs, "hot dog") are met at their first. A
    fast tokenizer's offsets say where a token lies; without them the lengths of growing beginnings of the text do.
    """
    text, before = vlm.answer_text(answer)
    found = mentions(text, family)
    if not found:
        return []
    if vlm.tokenizer.is_fast:
        spans = vlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        first = [next(i for i, (_, end) in enumerate(spans) if end > m.start) for m in found]
    else:  # a blank belongs to the word after it
        texts = [text[: m.start].rstrip() for m in found]
        first = [len(vlm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    return [ObjectToken(m.category, at - before) for m, at in zip(found, first)]
