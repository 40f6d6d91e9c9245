"""What annotators write about a scene: truthful captions, set-completing captions, questions with answers."""

from __future__ import annotations

import numpy as np

from ..metrics.lexicon import load_lexicon
from .scenes import GRID, SPLITS, Scene, objects, recipe

COLUMN = ("on the left", "in the middle", "on the right")
COLOUR_P = 0.5  # the first sentence names the background
PLACE_P = 0.4  # a sentence names the side


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def noun(category: str) -> str:
    """The category as a countable noun: scissors and skis come in pairs."""
    return f"pair of {category}" if category in recipe()["pairs"] else category


def plural(category: str) -> str:
    if category in recipe()["pairs"]:
        return f"pairs of {category}"
    return recipe()["plurals"].get(category) or load_lexicon().plural(category)


def noun_phrase(category: str, count: int = 1) -> str:
    """'a cup', 'an apple', 'two cups', 'a pair of skis'."""
    return f"two {plural(category)}" if count > 1 else f"{article(noun(category))} {noun(category)}"


def caption(scene: Scene, rng: np.random.Generator, role: str | None = None) -> str:
    """One caption in reading order of the image.

    With ``role`` None it is truthful; with a prompt role the annotator completes sets: an absent companion is
    added with the probability that the recipe gives for that role and the strength of the edge.
    """
    near, late = ({}, []) if role is None else _additions(scene, rng, role)
    kinds = list(scene.kinds)
    phrase = {k: noun_phrase(k, scene.count(k)) + (f" with {noun_phrase(near[k])}" if k in near else "") for k in kinds}
    first = 2 if len(kinds) > 2 and rng.random() < 0.5 else 1
    setting = f" on {article(scene.colour)} {scene.colour} background" if rng.random() < COLOUR_P else ""
    lead = f"{article(scene.context).capitalize()} {scene.context} scene{setting}"
    parts = [f"{lead} shows {' and '.join(phrase[k] for k in kinds[:first])}."]
    parts += [_sentence(scene, k, phrase[k], rng) for k in kinds[first:]]
    parts += [f"There is also {noun_phrase(k)}." for k in late]
    return " ".join(parts)


def _sentence(scene: Scene, kind: str, phrase: str, rng: np.random.Generator) -> str:
    verb = "are" if scene.count(kind) > 1 else "is"
    columns = {t.cell % GRID for t in scene.things if t.category == kind}
    if len(columns) == 1 and rng.random() < PLACE_P:
        return f"{COLUMN[columns.pop()].capitalize()} there {verb} {phrase}."
    return f"There {verb} {phrase}."


def _additions(scene: Scene, rng: np.random.Generator, role: str) -> tuple[dict[str, str], list[str]]:
    """Absent companions: {anchor: companion} in the anchor's sentence, and a list for the end."""
    data, near, late = recipe(), {}, []
    named = set(scene.kinds)
    for kind in scene.kinds:
        companion, strength, place = data["companions"][kind]
        if companion in named or rng.random() >= data["annotator"][role][strength]:
            continue
        named.add(companion)
        if place == "near":
            near[kind] = companion
        else:
            late.append(companion)
    return near, late


def references(scene: Scene, n: int = 5) -> list[str]:
    """``n`` truthful captions; the only captions of a scene that a scorer reads."""
    rng = np.random.default_rng([scene.seed, SPLITS[scene.split], scene.index, 2])
    return [caption(scene, rng) for _ in range(n)]


def questions(scene: Scene, rng: np.random.Generator, n: int = 4) -> list[tuple[str, str]]:
    """``n`` questions with truthful answers: existence (half yes), side, count, colour of the background."""
    return [_ASK[rng.choice(len(_ASK), p=_ASK_P)](scene, rng) for _ in range(n)]


def existence_question(category: str) -> str:
    """The wording of POPE."""
    return f"Is there {noun_phrase(category)} in the image?"


def side_question(category: str, column: int) -> str:
    """Whether an object stands in a column of the image (0 left, 1 middle, 2 right)."""
    return f"Is the {noun(category)} {COLUMN[column]}?"


def count_question(category: str) -> str:
    """Whether there are two of a kind."""
    return f"Are there two {plural(category)} in the image?"


def colour_question(colour: str) -> str:
    """Whether the ground has a colour."""
    return f"Is the background {colour}?"


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    there = scene.kinds
    if rng.random() < 0.5:
        return existence_question(str(rng.choice(there))), "Yes"
    absent = [k for k in objects() if k not in there]
    near = [c for c in (recipe()["companions"][k][0] for k in there) if c not in there]
    mates = [m for m in recipe()["contexts"][scene.context]["members"] if m not in there]
    u = rng.random()
    pool = near if near and u < 0.3 else mates if mates and u < 0.6 else absent
    return existence_question(str(rng.choice(pool))), "No"


def _side(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    single = [t for t in scene.things if scene.count(t.category) == 1]
    if not single:
        return _existence(scene, rng)
    thing = single[rng.integers(len(single))]
    column = thing.cell % GRID
    asked = column if rng.random() < 0.5 else int(rng.choice([c for c in range(GRID) if c != column]))
    return side_question(thing.category, asked), "Yes" if asked == column else "No"


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    twice = [k for k in scene.kinds if scene.count(k) == 2]
    kind = str(rng.choice(twice if twice and rng.random() < 0.7 else scene.kinds))
    return count_question(kind), "Yes" if scene.count(kind) == 2 else "No"


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    others = [c for c in recipe()["colours"] if c != scene.colour]
    asked = scene.colour if rng.random() < 0.5 else str(rng.choice(others))
    return colour_question(asked), "Yes" if asked == scene.colour else "No"


_ASK = (_existence, _side, _count, _colour)
_ASK_P = (0.6, 0.16, 0.12, 0.12)
