"""AMBER (Wang et al. 2023): hallucination in free descriptions, and yes/no questions scored for their "no".

Fractions 0-1: ``amber_chair`` wrong words / object words, ``amber_cover`` annotated objects named / annotated
objects, ``amber_hal`` descriptions with a wrong word, ``amber_cog`` hallucination targets (objects that people
would expect there too) named / targets, as the official program counts it. Two more ratios go by that name:
``amber_cog_paper`` = words for targets / object words, and ``amber_cog_share`` = words for targets / wrong words.
``amber_accuracy``, and with "no" as the positive class ``amber_precision, amber_recall, amber_f1``: over all
questions, and by type (``amber_existence_f1``, attribute, relation); ``unparsed``.
``amber_score`` = (100 - 100 chair + 100 f1) / 2 is in points, 0-100. It is a sum of ratios of two benchmarks on the
same images (``alea_lib.stats``), so its interval resamples both together, by image.

**Object words.** Every word of the description whose base form is in the vocabulary, i.e. the words of
``relation.json``, keys and associated ones (two-word ones first). The base form is the word itself when the
vocabulary has it, else its singular (inflect). No tagger is used: the official program keeps what NLTK takes
for nouns, so figures may differ a little. A word names the annotated object of that name, else the first one whose
associated words hold it. Words of ``safe_words.txt`` count as object words, and are neither wrong nor covering.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from alea_lib.tables import DataError

from .amber_read import TYPES, Amber, read_amber
from .amber_words import SIMILARITIES, Words
from .pope import check_parser, read_answers
from .records import match, refuse_doubled

__all__ = ["Amber", "AmberResult", "SIMILARITIES", "TYPES", "amber", "amber_responses", "read_amber"]


@dataclass(frozen=True)
class AmberResult:
    """``items``: image_id, metric, num, den, scorer ("parser, similarity"). ``per_description``: id, image_id,
    response, named (object words), wrong, covered (annotated objects), targets. ``per_question``: id, type,
    image_id, label, response, said, parsed, correct. Either table is empty when that part was not answered."""

    items: pd.DataFrame
    per_description: pd.DataFrame
    per_question: pd.DataFrame
    scorer: str


def amber(
    responses: pd.DataFrame,
    benchmark: Amber,
    parser: str = "strict",
    similarity: str = "exact",
    threshold: float = 0.8,
) -> AmberResult:
    """Score responses (id, response), matched by id whatever the order.

    A type of query (generative, existence, attribute, relation) is scored when it was answered, and must then be
    answered completely; the overall figures need all yes/no questions, the score needs everything. ``parser``:
    how yes and no are read ("exact" is the official program's). ``similarity``: "exact" compares words, "spacy"
    also takes two words for one when their vectors' cosine is above ``threshold`` (the official program: 0.8).
    DataError naming missing, doubled or unknown ids.
    """
    check_parser(parser)
    words = Words(benchmark.relation, benchmark.safe_words, similarity, threshold)
    answered = _answered(responses, benchmark)
    told = answered[answered["type"] == TYPES[0]]
    asked = answered[answered["type"] != TYPES[0]].reset_index(drop=True)
    descriptions = _describe(told, benchmark, words)
    questions = _judge(asked, parser)
    everything = set(benchmark.queries["type"])
    complete = everything - {TYPES[0]} == set(asked["type"]) != set()
    parts = [*_generative(descriptions), *_discriminative(questions, complete)]
    if complete and TYPES[0] in everything and len(told):
        parts += _score(descriptions, questions)
    items = pd.concat(parts, ignore_index=True).groupby(["metric", "image_id"], sort=False, as_index=False).sum()
    scorer = f"{parser}, {similarity}"
    return AmberResult(
        items[["image_id", "metric", "num", "den"]].assign(scorer=scorer), descriptions, questions, scorer
    )


def amber_responses(captions: pd.DataFrame | None, answers: pd.DataFrame | None, benchmark: Amber) -> pd.DataFrame:
    """Responses (id, response) from captions (image_id, caption) and answers (question_id, answer) of a model.

    Captions of images that the benchmark does not ask about are left aside, so those of a whole split serve.
    """
    parts = []
    if captions is not None:
        generative = benchmark.queries[benchmark.queries["type"] == TYPES[0]]
        told = captions[captions["image_id"].isin(generative["image_id"])].rename(columns={"caption": "response"})
        found = match(told, generative, ["image_id"], "response")
        parts.append(found[["id", "response"]])
    if answers is not None:
        parts.append(answers.rename(columns={"question_id": "id", "answer": "response"})[["id", "response"]])
    return pd.concat(parts, ignore_index=True)


def _answered(responses: pd.DataFrame, benchmark: Amber) -> pd.DataFrame:
    """The queries that were answered, with the responses; whole types only."""
    missing = [c for c in ("id", "response") if c not in responses.columns]
    if missing or responses.empty:
        raise DataError(
            f"the responses {'lack ' + str(missing) if missing else 'are empty'}; needed are id and response"
        )
    refuse_doubled(responses, ["id"], "responses")
    types = benchmark.queries.set_index("id")["type"]
    unknown = [i for i in responses["id"] if i not in types.index]
    if unknown:
        raise DataError(
            f"{len(unknown)} responses belong to no query, e.g. id {unknown[:3]}; is it the same benchmark?"
        )
    wanted = benchmark.queries[benchmark.queries["type"].isin(set(types[responses["id"]]))]
    return match(responses, wanted, ["id"], "response")


def _describe(told: pd.DataFrame, benchmark: Amber, words: Words) -> pd.DataFrame:
    rows = []
    for row in told.itertuples(index=False):
        truth, hallu = benchmark.truth[row.id], benchmark.hallu[row.id]
        named = words.named(row.response)
        judged = [(w, *words.judge(w, truth, hallu)) for w in named]
        covered = tuple(dict.fromkeys(c for _, c, _, _ in judged if c))
        wrong = tuple(w for w, _, _, bad in judged if bad)
        targets = tuple(t for _, _, t, bad in judged if bad and t)
        rows.append((row.id, row.image_id, row.response, tuple(named), wrong, covered, targets, len(truth), len(hallu)))
    columns = ["id", "image_id", "response", "named", "wrong", "covered", "targets", "n_truth", "n_hallu"]
    return pd.DataFrame(rows, columns=columns)


def _generative(told: pd.DataFrame) -> list[pd.DataFrame]:
    if told.empty:
        return []
    n = {c: told[c].map(len).to_numpy(float) for c in ("named", "wrong", "covered", "targets")}
    distinct = told["targets"].map(lambda t: len(set(t))).to_numpy(float)
    ratios = {
        "amber_chair": (n["wrong"], n["named"]),
        "amber_cover": (n["covered"], told["n_truth"]),
        "amber_hal": (n["wrong"] > 0, 1.0),
        "amber_cog": (distinct, told["n_hallu"]),
        "amber_cog_paper": (n["targets"], n["named"]),
        "amber_cog_share": (n["targets"], n["wrong"]),
    }
    return [_rows(told["image_id"], metric, *ratio) for metric, ratio in ratios.items()]


def _judge(asked: pd.DataFrame, parser: str) -> pd.DataFrame:
    columns = ["id", "type", "image_id", "label", "response", "said", "parsed", "correct"]
    if asked.empty:
        return pd.DataFrame(columns=columns)
    found = asked.join(read_answers(asked["response"], parser))
    return found.assign(correct=found["said"] == found["label"])[columns]


def _discriminative(questions: pd.DataFrame, complete: bool) -> list[pd.DataFrame]:
    if questions.empty:
        return []
    parts = [_rows(questions["image_id"], "unparsed", 1.0 - questions["parsed"].astype(float), 1.0)]
    groups = {f"amber_{kind}": rows for kind, rows in questions.groupby("type", sort=False)}
    if complete:
        groups["amber"] = questions
    for name, rows in groups.items():
        said, label = ((rows[c] == "no").to_numpy(float) for c in ("said", "label"))
        hit = said * label
        ratios = {"accuracy": (rows["correct"], 1.0), "precision": (hit, said), "recall": (hit, label)}
        ratios["f1"] = (2 * hit, said + label)
        parts += [_rows(rows["image_id"], f"{name}_{metric}", *ratio) for metric, ratio in ratios.items()]
    return parts


def _score(told: pd.DataFrame, questions: pd.DataFrame) -> list[pd.DataFrame]:
    """50 - 50 CHAIR + 50 F1, as three ratios."""
    said, label = ((questions[c] == "no").to_numpy(float) for c in ("said", "label"))
    wrong, named = (told[c].map(len).to_numpy(float) for c in ("wrong", "named"))
    return [
        _rows(told["image_id"], "amber_score|half", 50.0, 1.0),
        _rows(told["image_id"], "amber_score|chair", -50 * wrong, named),
        _rows(questions["image_id"], "amber_score|f1", 100 * said * label, said + label),
    ]


def _rows(image_ids: pd.Series, metric: str, num, den) -> pd.DataFrame:
    numbers = {c: np.broadcast_to(np.asarray(x, float), len(image_ids)) for c, x in (("num", num), ("den", den))}
    return pd.DataFrame({"image_id": image_ids.to_numpy(), "metric": metric, **numbers})
