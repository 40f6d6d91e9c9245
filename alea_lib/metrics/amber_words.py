"""AMBER's comparison of words: which object words a description uses, and what each of them stands for."""

from __future__ import annotations

import functools
import unicodedata

from ..core.files import DataError
from .parse import HYPHEN, TOKEN, merged, singular

SIMILARITIES = ("exact", "spacy")
VECTORS = "en_core_web_lg"  # the official program's


class Words:
    """The vocabulary of one benchmark, and the rule by which two words mean the same."""

    def __init__(self, relation: dict[str, tuple[str, ...]], safe: frozenset[str], similarity: str, threshold: float):
        if similarity not in SIMILARITIES:
            raise DataError(f"unknown similarity {similarity!r}; choose one of {', '.join(SIMILARITIES)}")
        self.relation, self.safe, self.threshold = relation, safe, threshold
        self.vocabulary = {*relation, *(w for more in relation.values() for w in more)}
        self.pairs = {tuple(w.split(" ")) for w in self.vocabulary if w.count(" ") == 1}
        self.parts = {part for pair in self.pairs for part in pair}
        self.alike = _cosine(VECTORS) if similarity == "spacy" else None
        self._base: dict[str, str] = {}
        self._judged: dict[tuple, tuple] = {}

    def named(self, text: str) -> list[str]:
        """The object words of a description, in base form, in reading order."""
        tokens = [(self._base_form(m.group()), m.start(), m.end()) for m in TOKEN.finditer(text)]
        return [word for word, _, _ in merged(text, tokens, self.pairs) if word in self.vocabulary]

    def _base_form(self, token: str) -> str:
        if token not in self._base:
            word = unicodedata.normalize("NFKC", token).lower()
            plain = HYPHEN.sub("-", word)
            known = plain in self.vocabulary or plain in self.parts
            self._base[token] = plain if known else singular(plain)
        return self._base[token]

    def judge(self, word: str, truth: tuple[str, ...], hallu: tuple[str, ...]) -> tuple[str, str, bool]:
        """(annotated object that the word names or "", hallucination target or "", whether the word is wrong)."""
        key = (word, truth, hallu)
        if key not in self._judged:
            if word in self.safe:
                self._judged[key] = ("", "", False)
            else:
                covered = self._find(word, truth)
                self._judged[key] = (covered, "" if covered else self._find(word, hallu), not covered)
        return self._judged[key]

    def _find(self, word: str, objects: tuple[str, ...]) -> str:
        if word in objects:
            return word
        for name in objects:
            if word in self.relation.get(name, ()):
                return name
        if self.alike is not None:
            for name in objects:
                if any(self.alike(word, other) > self.threshold for other in (name, *self.relation.get(name, ()))):
                    return name
        return ""


@functools.cache
def _cosine(vectors: str):
    """Cosine of two words' vectors; DataError that says what to install when spaCy or the vectors are missing."""
    install = f"pip install spacy, then python -m spacy download {vectors}; or take similarity 'exact'"
    try:
        import spacy
    except ImportError as error:
        raise DataError(f"the similarity 'spacy' needs spaCy: {install}") from error
    try:
        model = spacy.load(vectors)
    except OSError as error:
        raise DataError(f"the similarity 'spacy' needs the word vectors {vectors}: {install}") from error
    docs = functools.cache(lambda word: model(word))

    @functools.cache
    def cosine(a: str, b: str) -> float:
        first, second = docs(a), docs(b)
        return first.similarity(second) if first.vector_norm and second.vector_norm else 0.0

    return cosine
