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
``strict``       singularise without the known traps: the lexicon's longer list of phrases ("car seat"), and no
                 colour or adjective ("an orange bus"), verb ("ties his shoes") or denial ("no people"). The rules
                 look at one or two neighbouring words and know no grammar; where in doubt the word counts.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Container
from typing import NamedTuple

from ..core.files import DataError
from .lexicon import load_lexicon

FAMILIES = ("singularise", "official", "lemma", "strict")
TOKEN = re.compile(r"[^\W_]+(?:[-\u2010\u2011][^\W_]+)*")
_WORD = re.compile(r"[^\W_]+(?:[-\u2010\u2011'\u2019][^\W_]+)*")
HYPHEN = re.compile(r"[-\u2010\u2011]")
_SENTENCE_END = re.compile(r"[.!?\n]")
_UNDOUBLED = frozenset({"bottle", "mother", "father", "monitor", "pilot"})


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
    found = _drop_toilet_seats(caption, _parser(family).mentions(caption), whole=family == "official")
    return [m for m in found if _plainly_named(caption, m)] if family == "strict" else found


def count_words(caption: str) -> int:
    """Length in words; a hyphenated or apostrophised word is one, punctuation is none."""
    return len(_WORD.findall(caption))


def merged(text: str, tokens: list[tuple[str, int, int]], pairs: Container) -> list[tuple[str, int, int]]:
    """Tokens (word, start, end), of which two that make a pair are one: "hot dog". Greedily from the left, and only
    where nothing but blanks stands between them."""
    out, i = [], 0
    while i < len(tokens):
        token, i = tokens[i], i + 1
        if i < len(tokens):
            second, start, end = tokens[i]
            if (token[0], second) in pairs and not text[token[2] : start].strip(" \t"):
                token, i = (f"{token[0]} {second}", token[1], end), i + 1
        out.append(token)
    return out


class _Parser:
    """The tables of one family, and the base form of every token met so far."""

    def __init__(self, family: str):
        lexicon = load_lexicon()
        self.family, self.words = family, lexicon.word_to_category
        self.phrases = lexicon.phrases["every"] | (lexicon.phrases["strict"] if family == "strict" else {})
        self.singular = _textblob_singular if family == "official" else singular
        if family == "official":  # the unguarded singulariser also changes words inside phrases: "wine glas"
            self.phrases |= {(self.singular(a), self.singular(b)): c for (a, b), c in self.phrases.items()}
        self.named: dict[str, str | None] = {**self.words, **{" ".join(p): c for p, c in self.phrases.items()}}
        self.parts = {part for pair in self.phrases for part in pair}
        self.forms = _verb_forms(lexicon.verbs) if family == "lemma" else {}
        self.base: dict[str, str] = {}

    def known_tokens(self, caption: str) -> list[tuple[str, int, int]]:
        """(base form, start, end) of the tokens that can be an object or a part of one."""
        base, out = self.base, []
        for match in TOKEN.finditer(caption):
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
        if HYPHEN.search(word):
            return "" if self.family == "official" else self._compound(HYPHEN.split(word))
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

    def mentions(self, caption: str) -> list[Mention]:
        """The objects named, before context is looked at."""
        words = merged(caption, self.known_tokens(caption), self.phrases)
        named = [(self.named.get(word), word, start, end) for word, start, end in words]
        return [Mention(category, *rest) for category, *rest in named if category]


@functools.cache
def _parser(family: str) -> _Parser:
    if family not in FAMILIES:
        raise DataError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    return _Parser(family)


@functools.cache
def _inflect_engine():
    import inflect  # takes a second or two

    return inflect.engine()


@functools.cache
def singular(word: str) -> str:
    """The singular of a noun by inflect; a word that is none stays as it is."""
    return _inflect_engine().singular_noun(word) or word


@functools.cache
def _textblob_singular(word: str) -> str:
    try:
        from textblob.en.inflect import singularize
    except ImportError as error:
        raise DataError("the family 'official' needs TextBlob: pip install textblob") from error
    return singularize(word)


def forget() -> None:
    """Empty the tables of words met so far, so that every family is timed from the same start."""
    for table in (_parser, singular, _textblob_singular):
        table.cache_clear()


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


def _drop_toilet_seats(caption: str, found: list[Mention], whole: bool) -> list[Mention]:
    """Drop every "seat" named with a toilet, in the same sentence or (``whole``) in the same caption."""
    toilets = [m.start for m in found if m.category == "toilet"]
    if not toilets or all(m.word != "seat" for m in found):
        return found

    def together(a: int, b: int) -> bool:
        return whole or not _SENTENCE_END.search(caption, min(a, b), max(a, b))

    return [m for m in found if m.word != "seat" or not any(together(m.start, t) for t in toilets)]


# ---- the family `strict`: is a word that may be an object plainly used as one?

_BEFORE = re.compile(r"([^\W_]+)?([^\w]*)$")
_AFTER = re.compile(r"([^\w]*)([^\W_]+)?")
_COLOURS = frozenset("black white red blue green yellow brown grey gray pink purple orange silver gold".split())
_FUNCTION_WORDS = frozenset(
    "and or nor but is are was were has have had sits sit lies lie stands stand rests hangs in on at by "
    "of to from for with without near next beside behind under over above below between against that "
    "which who while as along among around inside outside there then it also too here placed sitting "
    "lying".split()
)
_DETERMINERS = frozenset(
    "a an the one this that another each every some any single half whole fresh ripe peeled sliced".split()
)
_PIECES = re.compile(r"\b(?:slices?|pieces?|segments?|wedges?|halves|half|peel)\s+of\s+$", re.I)
_AUXILIARIES = frozenset("to can could will would must should may might cannot".split())
_OBJECT_MARKS = frozenset("a an the his her its their my your our him them it up down off across".split())
_DENIAL = re.compile(r"\b(?:no|without(?:\s+(?:a|an|any|the))?)\s+$", re.I)


def _plainly_named(caption: str, mention: Mention) -> bool:
    """False when the mention is an adjective, a verb or a denial rather than an object that is there."""
    if _DENIAL.search(caption, max(0, mention.start - 16), mention.start):
        return False
    surface = caption[mention.start : mention.end].lower()
    if surface == "orange":
        return _is_fruit(caption, mention)
    if surface == "remote":
        return _noun_follows_not(caption, mention)
    if mention.word in load_lexicon().verbs or mention.word == "skis":
        return not _is_verb(caption, mention, surface)
    return True


def _neighbours(caption: str, m: Mention) -> tuple[str, str, str, str]:
    """Word before, what stands between, what stands between, word after; words in lower case."""
    before = _BEFORE.search(caption, max(0, m.start - 40), m.start)
    after = _AFTER.match(caption, m.end)
    word_before, word_after = before.group(1) or "", after.group(2) or ""
    return word_before.lower(), before.group(2), after.group(1), word_after.lower()


def _noun_follows_not(caption: str, m: Mention) -> bool:
    """True at the end of a phrase: punctuation, a function word or nothing comes next."""
    _, _, gap, word = _neighbours(caption, m)
    return not word or bool(gap.strip()) or word in _FUNCTION_WORDS


def _is_fruit(caption: str, m: Mention) -> bool:
    """'an orange', 'slices of orange', 'apple, orange and pear'; not 'orange and black', 'painted orange'."""
    if not _noun_follows_not(caption, m):
        return False
    if _PIECES.search(caption, max(0, m.start - 24), m.start):
        return True
    before, gap_before, gap_after, after = _neighbours(caption, m)
    listed = "," in gap_before or before in ("and", "or")
    beside = re.findall(r"[^\W_]+", caption[max(0, m.start - 20) : m.start].lower())[-2:]
    beyond = re.findall(r"[^\W_]+", caption[m.end : m.end + 20].lower())[:2]
    if (listed and _COLOURS & set(beside)) or (after in ("and", "or") and _COLOURS & set(beyond)):
        return False
    return listed or before in _DETERMINERS


def _is_verb(caption: str, m: Mention, surface: str) -> bool:
    """'to train', 'can book'; or an -s form before an object or a direction: 'ties his', 'skis down'."""
    before, gap_before, gap_after, after = _neighbours(caption, m)
    goes_on = gap_after.isspace() and bool(after) and after not in _FUNCTION_WORDS
    if gap_before.isspace() and before in _AUXILIARIES and surface == m.word:
        return before != "to" or goes_on  # "next to a bench", "close to train and bus" are no verbs
    third_person = surface != m.word or surface == "skis"
    return third_person and surface.endswith("s") and gap_after.isspace() and after in _OBJECT_MARKS
