"""AMBER (Wang et al. 2023): hallucination in free descriptions, and yes/no questions scored for their "no".

Fractions 0-1: ``amber_chair`` wrong words / object words, ``amber_cover`` annotated objects named / annotated
objects, ``amber_hal`` descriptions with a wrong word, ``amber_cog`` hallucination targets (objects that people
would expect there too) named / targets, as the official program counts it. Two more ratios go by that name:
``amber_cog_paper`` = words for targets / object words, and ``amber_cog_share`` = words for targets / wrong words.
``amber_accuracy``, and with "no" as the positive class ``amber_precision, amber_recall, amber_f1``: over all
questions, and by type (``amber_existence_f1``, attribute, relation); ``unparsed``.
``amber_score`` = (100 - 100 chair + 100 f1) / 2 is in points, 0-100. It is a sum of ratios of two benchmarks on the
same images (``alea_lib.core.stats``), so its interval resamples both together, by image.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..core.files import DataError, PathLike, numbered_lines, read_json, read_text
from ..core.stats import ratio_items, sum_by_image
from .answers import image_numbers, judged, labels, match, read_records, refuse_doubled, unparsed, yes_no_ratios
from .parse import HYPHEN, TOKEN, merged, singular

GENERATIVE = "generative"
TYPES = {
    "generative": GENERATIVE,
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",  # the published file uses both
}
SIMILARITIES = ("exact", "spacy")
VECTORS, ALIKE = "en_core_web_lg", 0.8  # the official program's
POSITIVE = "no"  # the answer that denies a hallucination


@dataclass(frozen=True)
class Amber:
    """The benchmark. ``queries``: id, image, text, image_id, type (generative, existence, attribute or relation), label
    (yes, no; "" when generative). ``truth`` and ``hallu``: id of a generative query to the different objects that
    are there, and to those that people would wrongly expect. ``relation``: object to associated words."""

    queries: pd.DataFrame
    truth: dict[int, tuple[str, ...]]
    hallu: dict[int, tuple[str, ...]]
    relation: dict[str, tuple[str, ...]]
    safe_words: frozenset[str]

    def questions(self) -> pd.DataFrame:
        """The yes/no questions in POPE's columns: question_id, setting (the type), image, text, label, image_id."""
        asked = self.queries[self.queries["type"] != GENERATIVE]
        named = asked.rename(columns={"id": "question_id", "type": "setting"})
        return named[["question_id", "setting", "image", "text", "label", "image_id"]].reset_index(drop=True)


def read_amber(folder: PathLike) -> Amber:
    """The files of AMBER's folder ``data``: ``annotations.json`` (id, type, truth, hallu), ``relation.json``,
    ``safe_words.txt``, and the queries (id, image, query) of ``query_all.json``, or else of all ``query_*.json``,
    in the folder or in ``query``. DataError for a missing or malformed file, and a query without annotation."""
    folder = Path(folder)
    queries = _queries(folder)
    needed = [folder / name for name in ("annotations.json", "relation.json", "safe_words.txt")]
    for path in needed:
        if not path.is_file():
            raise DataError(f"{path}: is missing; AMBER's folder data holds it")
    notes = {n["id"]: n for n in read_records(needed[0], ("id", "type", "truth"))}
    if lost := [i for i in queries["id"] if i not in notes]:
        raise DataError(
            f"{folder}: {len(lost)} queries have no annotation, e.g. id {lost[:3]}; take both of one version"
        )
    queries["type"] = [TYPES.get(str(notes[i]["type"])) for i in queries["id"]]
    if unknown := sorted({str(notes[i]["type"]) for i in queries.loc[queries["type"].isna(), "id"]}):
        raise DataError(f"{folder}: annotations of the unknown type {unknown}; known are {', '.join(TYPES)}")
    asked = queries["type"] != GENERATIVE
    truths = queries.loc[asked, "id"].map(lambda i: notes[i]["truth"])
    queries["label"] = labels(truths, queries["id"][asked], str(folder)).reindex(queries.index, fill_value="")
    generative = {i: notes[i] for i in queries.loc[~asked, "id"]}
    truth, hallu = ({i: _words(n.get(key, [])) for i, n in generative.items()} for key in ("truth", "hallu"))
    relation = {w.lower(): _words(more) for w, more in read_json(needed[1]).items()}
    safe = frozenset(w.strip().lower() for _, w in numbered_lines(read_text(needed[2])))
    return Amber(queries, truth, hallu, relation, safe)


def _queries(folder: Path) -> pd.DataFrame:
    files = sorted([*folder.glob("query_*.json"), *folder.glob("query/query_*.json")])
    whole = [f for f in files if f.name == "query_all.json"]
    if not files:
        raise DataError(f"{folder}: no query_*.json, here or in the folder query; is it AMBER's folder data?")
    records = [r for f in whole[:1] or files for r in read_records(f, ("id", "image", "query"))]
    table = pd.DataFrame(records)[["id", "image", "query"]].rename(columns={"query": "text"}).drop_duplicates()
    refuse_doubled(table, ["id"], "queries")
    table = table.sort_values("id", kind="stable", ignore_index=True)
    return table.assign(image_id=table["image"].map(image_numbers(table["image"])))


def _words(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(w.lower() for w in words))


class Words:
    """Which object words a description uses, and what each of them stands for.

    An object word is a word of the description whose base form is in the vocabulary: the objects of ``relation.json``
    and their associated words, two-word ones first. The base form is the word itself when the vocabulary has it, else
    its singular. No tagger is used: the official program keeps what NLTK takes for nouns, so figures may differ a
    little. A word names the annotated object of that name, else the first one whose associated words hold it; with the
    similarity "spacy", else the first one that it is like (cosine of the vectors above 0.8, as the official program
    has it). Safe words count as object words, and are neither wrong nor covering.
    """

    def __init__(self, relation: dict[str, tuple[str, ...]], safe: frozenset[str], similarity: str = "exact"):
        if similarity not in SIMILARITIES:
            raise DataError(f"unknown similarity {similarity!r}; choose one of {', '.join(SIMILARITIES)}")
        self.relation, self.safe = relation, safe
        self.vocabulary = {*relation, *(w for more in relation.values() for w in more)}
        self.pairs = {tuple(w.split(" ")) for w in self.vocabulary if w.count(" ") == 1}
        self.known = self.vocabulary | {part for pair in self.pairs for part in pair}
        self.alike = _cosine() if similarity == "spacy" else None

    def named(self, text: str) -> list[str]:
        """The object words of a description, in base form, in reading order."""
        tokens = [(self._base_form(m.group()), m.start(), m.end()) for m in TOKEN.finditer(text)]
        return [word for word, _, _ in merged(text, tokens, self.pairs) if word in self.vocabulary]

    def _base_form(self, token: str) -> str:
        word = HYPHEN.sub("-", unicodedata.normalize("NFKC", token).lower())
        return word if word in self.known else singular(word)

    def judge(self, word: str, truth: tuple[str, ...], hallu: tuple[str, ...]) -> tuple[str, str, bool]:
        """(annotated object that the word names or "", hallucination target or "", whether the word is wrong)."""
        if word in self.safe:
            return "", "", False
        covered = self._find(word, truth)
        return covered, "" if covered else self._find(word, hallu), not covered

    def _find(self, word: str, objects: tuple[str, ...]) -> str:
        if word in objects:
            return word
        for name in objects:
            if word in self.relation.get(name, ()):
                return name
        if self.alike is not None:
            for name in objects:
                if any(self.alike(word, other) > ALIKE for other in (name, *self.relation.get(name, ()))):
                    return name
        return ""


@functools.cache
def _cosine() -> Callable[[str, str], float]:
    """Cosine of two words' vectors; DataError that says what to install when spaCy or the vectors are missing."""
    install = f"pip install spacy, then python -m spacy download {VECTORS}; or take similarity 'exact'"
    try:
        import spacy

        docs = functools.cache(spacy.load(VECTORS))
    except ImportError as error:
        raise DataError(f"the similarity 'spacy' needs spaCy: {install}") from error
    except OSError as error:
        raise DataError(f"the similarity 'spacy' needs the word vectors {VECTORS}: {install}") from error

    @functools.cache
    def cosine(a: str, b: str) -> float:
        first, second = docs(a), docs(b)
        return first.similarity(second) if first.vector_norm and second.vector_norm else 0.0

    return cosine


def amber_responses(captions: pd.DataFrame, answers: pd.DataFrame | None, benchmark: Amber) -> pd.DataFrame:
    """Responses (id, response) from captions (image_id, caption) and answers (question_id, answer) of a model.

    Captions of images that the benchmark does not ask about are left aside, so those of a whole split serve.
    """
    generative = benchmark.queries[benchmark.queries["type"] == GENERATIVE]
    own = captions[captions["image_id"].isin(generative["image_id"])].rename(columns={"caption": "response"})
    described = match(own, generative, ["image_id"], "response")[["id", "response"]]
    if answers is None:
        return described
    answered = answers.rename(columns={"question_id": "id", "answer": "response"})[["id", "response"]]
    return pd.concat([described, answered], ignore_index=True)


def amber(responses: pd.DataFrame, benchmark: Amber, parser: str = "strict", similarity: str = "exact") -> pd.DataFrame:
    """Items (image_id, metric, num, den, scorer) of responses (id, response), matched by id whatever the order.

    A type of query (generative, existence, attribute, relation) is scored when it was answered, and must then be
    answered completely; the overall figures need all yes/no questions, the score needs everything. ``parser``:
    how yes and no are read ("exact" is the official program's). ``similarity``: how words are compared (see ``Words``).
    DataError naming missing, doubled or unknown ids.
    """
    words = Words(benchmark.relation, benchmark.safe_words, similarity)
    answered = _answered(responses, benchmark)
    generative = answered["type"] == GENERATIVE
    descriptions, parts = describe(answered[generative], benchmark, words), []
    if len(descriptions):
        parts.append(_description_items(descriptions))
    if not generative.all():
        questions = judged(answered[~generative], "response", parser)
        parts.append(ratio_items(questions["image_id"], {"unparsed": unparsed(questions)}))
        groups = {f"amber_{kind}": rows for kind, rows in questions.groupby("type", sort=False)}
        if len(questions) == len(benchmark.questions()):
            groups["amber"] = questions
        for name, rows in groups.items():
            ratios = {f"{name}_{metric}": ratio for metric, ratio in yes_no_ratios(rows, POSITIVE).items()}
            parts.append(ratio_items(rows["image_id"], ratios))
        if "amber" in groups and len(descriptions):
            parts += _score(descriptions, questions)
    return sum_by_image(pd.concat(parts, ignore_index=True)).assign(scorer=f"{parser}, {similarity}")


def _answered(responses: pd.DataFrame, benchmark: Amber) -> pd.DataFrame:
    """The queries that were answered, with the responses; whole types only."""
    missing = [c for c in ("id", "response") if c not in responses.columns]
    if missing or responses.empty:
        raise DataError(
            f"the responses {'lack ' + str(missing) if missing else 'are empty'}; needed are id and response"
        )
    refuse_doubled(responses, ["id"], "responses")
    types = benchmark.queries.set_index("id")["type"]
    if unknown := [i for i in responses["id"] if i not in types.index]:
        raise DataError(
            f"{len(unknown)} responses belong to no query, e.g. id {unknown[:3]}; is it the same benchmark?"
        )
    wanted = benchmark.queries[benchmark.queries["type"].isin(set(types[responses["id"]]))]
    return match(responses, wanted, ["id"], "response")


def describe(described: pd.DataFrame, benchmark: Amber, words: Words) -> pd.DataFrame:
    """Of descriptions (id, image_id, response) the object words: named, wrong; the annotated objects: covered, targets;
    and how many are annotated: n_truth, n_hallu."""
    rows = []
    for row in described.itertuples(index=False):
        truth, hallu = benchmark.truth[row.id], benchmark.hallu[row.id]
        named = words.named(row.response)
        found = [(w, *words.judge(w, truth, hallu)) for w in named]
        covered = tuple(dict.fromkeys(c for _, c, _, _ in found if c))
        wrong = tuple(w for w, _, _, bad in found if bad)
        targets = tuple(t for _, _, t, _ in found if t)
        rows.append((row.id, row.image_id, tuple(named), wrong, covered, targets, len(truth), len(hallu)))
    columns = ["id", "image_id", "named", "wrong", "covered", "targets", "n_truth", "n_hallu"]
    return pd.DataFrame(rows, columns=columns)


def _description_items(descriptions: pd.DataFrame) -> pd.DataFrame:
    named, wrong, covered, targets = (
        descriptions[c].map(len).to_numpy(float) for c in ("named", "wrong", "covered", "targets")
    )
    ratios = {
        "amber_chair": (wrong, named),
        "amber_cover": (covered, descriptions["n_truth"]),
        "amber_hal": (wrong > 0, 1.0),
        "amber_cog": (descriptions["targets"].map(lambda t: len(set(t))), descriptions["n_hallu"]),
        "amber_cog_paper": (targets, named),
        "amber_cog_share": (targets, wrong),
    }
    return ratio_items(descriptions["image_id"], ratios)


def _score(descriptions: pd.DataFrame, questions: pd.DataFrame) -> list[pd.DataFrame]:
    """50 - 50 CHAIR + 50 F1, as three ratios."""
    wrong, named = (descriptions[c].map(len).to_numpy(float) for c in ("wrong", "named"))
    num, den = yes_no_ratios(questions, POSITIVE)["f1"]
    chair = {"amber_score|half": (50.0, 1.0), "amber_score|chair": (-50 * wrong, named)}
    return [
        ratio_items(descriptions["image_id"], chair),
        ratio_items(questions["image_id"], {"amber_score|f1": (50 * num, den)}),
    ]
