"""Captions to object mentions: the parser of CHAIR (Rohrbach et al. 2018), in named families.

Steps: lower-case, tokenise, singularise, merge two-word objects greedily from the left, keep the words of the
lexicon, map each to its COCO category. The families differ in how a word is brought to its base form:

``singularise``  default. inflect's singular, guarded: a word of the lexicon is singularised no further, so
                 "bus" stays a bus. "seat" is dropped in a sentence that also names a toilet.
``official``     the singulariser of the official code as TextBlob ports it, unguarded ("ties" is lost, and so
                 is "bus"); "seat" is dropped in any caption naming a toilet; hyphenated words are unknown.
``lemma``        singularise, and every form of a verb of the lexicon's list counts as the object ("seated" is
                 a chair, "tied" a tie), which is what lemmatising scorers do. A table of verb forms made by
                 the rules of English spelling, no WordNet: it needs no corpus, and stands in for WordNet on
                 these verbs only.
``strict``       singularise without the known traps: see ``alea_lib.measures.strict``.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import NamedTuple

from alea_lib.tables import DataError
from alea_lib.worlds.lexicon import load_lexicon

FAMILIES = ("singularise", "official", "lemma", "strict")
_TOKEN = re.compile(r"[^\W_]+(?:[-\u2010\u2011][^\W_]+)*")
_WORD = re.compile(r"[^\W_]+(?:[-\u2010\u2011'\u2019][^\W_]+)*")
_HYPHEN = re.compile(r"[-\u2010\u2011]")
_SENTENCE_END = re.compile(r"[.!?\n]")


class Mention(NamedTuple):
    """One object that a caption names: ``caption[start:end]`` as written, ``word`` in its base form."""

    category: str
    word: str
    start: int
    end: int


def mentions(caption: str, family: str = "singularise") -> list[Mention]:
    """The object mentions of a caption, in reading order.

    Raises DataError for an unknown family and for a caption that is not text.
    """
    if not isinstance(caption, str):
        raise DataError(f"a caption must be text, got {caption!r}; write '' for a model that said nothing")
    parser = _parser(family)
    found = parser.merge(caption, parser.known_tokens(caption))
    found = _drop_toilet_seats(caption, found, whole=family == "official")
    if family == "strict":
        from .strict import plainly_named

        found = [m for m in found if plainly_named(caption, m)]
    return found


def count_words(caption: str) -> int:
    """Length in words; a hyphenated or apostrophised word is one, punctuation is none."""
    return len(_WORD.findall(caption))


class _Parser:
    """The tables of one family, and the base form of every token met so far."""

    def __init__(self, family: str):
        lexicon = load_lexicon()
        self.family, self.words = family, lexicon.word_to_category
        self.phrases = dict(lexicon.phrases["every"])
        if family == "strict":
            self.phrases.update(lexicon.phrases["strict"])
        self.singular = _textblob_singular if family == "official" else _inflect_singular
        if family == "official":  # the unguarded singulariser also changes words inside phrases: "wine glas"
            self.phrases |= {(self.singular(a), self.singular(b)): c for (a, b), c in self.phrases.items()}
        self.parts = {part for pair in self.phrases for part in pair}
        self.forms = _verb_forms(lexicon.verbs) if family == "lemma" else {}
        self.base: dict[str, str] = {}

    def known_tokens(self, caption: str) -> list[tuple[str, int, int]]:
        """(base form, start, end) of the tokens that can be an object or a part of one."""
        base, out = self.base, []
        for match in _TOKEN.finditer(caption):
            token = match.group()
            word = base.get(token)
            if word is None:
                word = base[token] = self._base_form(token)
            if word:
                out.append((word, match.start(), match.end()))
        return out

    def _base_form(self, token: str) -> str:
        """Base form of a token; empty when no object and no phrase holds it."""
        word = unicodedata.normalize("NFKC", token).lower()
        if _HYPHEN.search(word):
            return "" if self.family == "official" else self._compound(_HYPHEN.split(word))
        word = self._singular_word(word)
        return word if word in self.words or word in self.parts else ""

    def _singular_word(self, word: str) -> str:
        if self.family == "official":
            return self.singular(word)
        if word in self.words or word in self.parts:
            return word
        return self.forms.get(word) or self.singular(word)

    def _compound(self, parts: list[str]) -> str:
        """A hyphenated word is the two-word or closed form of an object ("hot-dog"), or unknown."""
        last = self._singular_word(parts[-1])
        for joined in (" ".join([*parts[:-1], last]), "".join([*parts[:-1], last])):
            if joined in self.words:
                return joined
        return ""

    def merge(self, caption: str, tokens: list[tuple[str, int, int]]) -> list[Mention]:
        """Mentions, two-word phrases first; words merge only when nothing but blanks stands between them."""
        out, i = [], 0
        while i < len(tokens):
            word, start, end = tokens[i]
            if i + 1 < len(tokens):
                second, start2, end2 = tokens[i + 1]
                pair = (word, second)
                if pair in self.phrases and caption[end:start2].strip(" \t") == "":
                    if self.phrases[pair]:
                        out.append(Mention(self.phrases[pair], f"{word} {second}", start, end2))
                    i += 2
                    continue
            if word in self.words:
                out.append(Mention(self.words[word], word, start, end))
            i += 1
        return out


@functools.cache
def _parser(family: str) -> _Parser:
    if family not in FAMILIES:
        raise DataError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    return _Parser(family)


@functools.cache
def _inflect_engine():
    import inflect

    return inflect.engine()


@functools.cache
def _inflect_singular(word: str) -> str:
    return _inflect_engine().singular_noun(word) or word


@functools.cache
def _textblob_singular(word: str) -> str:
    try:
        from textblob.en.inflect import singularize
    except ImportError as error:
        raise DataError("the family 'official' needs TextBlob: pip install textblob") from error
    return singularize(word)


def _verb_forms(verbs: frozenset[str]) -> dict[str, str]:
    """Past, participle and -ing forms of the verbs, by the rules of English spelling."""
    forms = {}
    for verb in verbs:
        stem = verb[:-1] if verb.endswith("e") else verb
        if re.search(r"[^aeiou][aeiou][bdgmnprt]$", verb) and verb not in _UNDOUBLED:
            stem = verb + verb[-1]
        past = verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else stem + "ed"
        gerund = verb[:-2] + "ying" if verb.endswith("ie") else stem + "ing"
        forms |= {past: verb, gerund: verb}
    return {form: verb for form, verb in forms.items() if form not in load_lexicon().word_to_category}


_UNDOUBLED = frozenset({"bottle", "mother", "father", "monitor", "pilot"})


def _drop_toilet_seats(caption: str, found: list[Mention], whole: bool) -> list[Mention]:
    """Drop every "seat" named with a toilet, in the same sentence or (``whole``) in the same caption."""
    toilets = [m.start for m in found if m.category == "toilet"]
    if not toilets or all(m.word != "seat" for m in found):
        return found

    def together(a: int, b: int) -> bool:
        return whole or not _SENTENCE_END.search(caption, min(a, b), max(a, b))

    return [m for m in found if m.word != "seat" or not any(together(m.start, t) for t in toilets)]
