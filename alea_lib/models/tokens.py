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
    """The objects of an answer in reading order, with the first token of each one's word ("hot dog": of its first).

    Tokens are those of ``VLM.encode``, found by the offsets of the (fast) tokenizer.
    """
    text, before = vlm.answer_text(answer)
    spans = vlm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    first = [(m.category, next(i for i, (_, end) in enumerate(spans) if end > m.start)) for m in mentions(text, family)]
    return [ObjectToken(category, at - before) for category, at in first]
