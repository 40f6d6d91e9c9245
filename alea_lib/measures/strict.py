"""The family ``strict``: is a word that may be an object plainly used as one?

The lexicon's own phrases ("car seat", "coffee table") are merged by the parser. What is left to context:
a colour or an adjective ("an orange bus", "a remote beach"), a verb ("ties his shoes"), and a denial ("no
people"). The rules look at one or two neighbouring words and know no grammar; where in doubt the word
counts.
"""

from __future__ import annotations

import re

from alea_lib.worlds.lexicon import load_lexicon

from .parse import Mention

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


def plainly_named(caption: str, mention: Mention) -> bool:
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
