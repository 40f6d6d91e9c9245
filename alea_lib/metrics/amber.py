"""AMBER (Wang et al. 2023): hallucination in free descriptions, and yes/no questions scored for their "no".

Fractions 0-1: ``amber_chair`` wrong words / object words, ``amber_cover`` annotated objects named / annotated
objects, ``amber_hal`` descriptions with a wrong word, ``amber_cog`` hallucination targets (objects that people
would expect there too) named / targets, as the official program counts it. Two more ratios go by that name:
``amber_cog_paper`` = words for targets / object words, and ``amber_cog_share`` = words for targets / wrong words.
``amber_accuracy``, and with "no" as the positive class ``amber_precision, amber_recall, amber_f1``: over all
questions, and by type (``amber_existence_f1``, attribute, relation); ``unparsed``.
``amber_score`` = (100 - 100 chair + 100 f1) / 2 is in points, 0-100. It is a sum of ratios of two benchmarks on the
same images (``alea_lib.core.stats``), so its interval resamples both together, by image.

**Object words.** Every word of the description whose base form is in the vocabulary, i.e. the words of
``relation.json``, keys and associated ones (two-word ones first). The base form is the word itself when the
vocabulary has it, else its singular (inflect). No tagger is used: the official program keeps what NLTK takes
for nouns, so figures may differ a little. A word names the annotated object of that name, else the first one whose
associated words hold it. Words of ``safe_words.txt`` count as object words, and are neither wrong nor covering.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ..core.files import DataError
from ..core.stats import ratio_items, sum_by_image
from .amber_read import TYPES, Amber, read_amber
from .amber_words import SIMILARITIES, Words
from .records import match, refuse_doubled
from .yes_no import check_parser, judged, unparsed, yes_no_ratios

__all__ = ["Amber", "AmberResult", "SIMILARITIES", "TYPES", "amber", "amber_responses", "read_amber"]
POSITIVE = "no"  # the answer that denies a hallucination


@dataclass(frozen=True)
class AmberResult:
    """``items``: image_id, metric, num, den, scorer ("parser, similarity"). ``per_description``: id, image_id,
    response, named (object words), wrong, covered (annotated objects), targets. ``per_question``: id, type,
    image_id, label, response, said, parsed, correct. Either table is empty when that part was not answered."""

    items: pd.DataFrame
    per_description: pd.DataFrame
    per_question: pd.DataFrame


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
    generative = answered["type"] == TYPES[0]
    descriptions = _describe(answered[generative], benchmark, words)
    questions = _judge(answered[~generative], parser)
    everything = set(benchmark.queries["type"])
    complete = everything - {TYPES[0]} == set(questions["type"]) != set()
    parts = [*_generative(descriptions), *_discriminative(questions, complete)]
    if complete and TYPES[0] in everything and len(descriptions):
        parts += _score(descriptions, questions)
    items = sum_by_image(pd.concat(parts, ignore_index=True)).assign(scorer=f"{parser}, {similarity}")
    return AmberResult(items, descriptions, questions)


def amber_responses(captions: pd.DataFrame | None, answers: pd.DataFrame | None, benchmark: Amber) -> pd.DataFrame:
    """Responses (id, response) from captions (image_id, caption) and answers (question_id, answer) of a model.

    Captions of images that the benchmark does not ask about are left aside, so those of a whole split serve.
    """
    parts = []
    if captions is not None:
        generative = benchmark.queries[benchmark.queries["type"] == TYPES[0]]
        own = captions[captions["image_id"].isin(generative["image_id"])].rename(columns={"caption": "response"})
        parts.append(match(own, generative, ["image_id"], "response")[["id", "response"]])
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


def _describe(described: pd.DataFrame, benchmark: Amber, words: Words) -> pd.DataFrame:
    rows = []
    for row in described.itertuples(index=False):
        truth, hallu = benchmark.truth[row.id], benchmark.hallu[row.id]
        named = words.named(row.response)
        found = [(w, *words.judge(w, truth, hallu)) for w in named]
        covered = tuple(dict.fromkeys(c for _, c, _, _ in found if c))
        wrong = tuple(w for w, _, _, bad in found if bad)
        targets = tuple(t for _, _, t, bad in found if bad and t)
        rows.append((row.id, row.image_id, row.response, tuple(named), wrong, covered, targets, len(truth), len(hallu)))
    columns = ["id", "image_id", "response", "named", "wrong", "covered", "targets", "n_truth", "n_hallu"]
    return pd.DataFrame(rows, columns=columns)


def _generative(descriptions: pd.DataFrame) -> list[pd.DataFrame]:
    if descriptions.empty:
        return []
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
    return [ratio_items(descriptions["image_id"], ratios)]


def _judge(asked: pd.DataFrame, parser: str) -> pd.DataFrame:
    columns = ["id", "type", "image_id", "label", "response", "said", "parsed", "correct"]
    if asked.empty:
        return pd.DataFrame(columns=columns)
    return judged(asked.reset_index(drop=True), "response", parser)[columns]


def _discriminative(questions: pd.DataFrame, complete: bool) -> list[pd.DataFrame]:
    if questions.empty:
        return []
    parts = [ratio_items(questions["image_id"], {"unparsed": unparsed(questions)})]
    groups = {f"amber_{kind}": rows for kind, rows in questions.groupby("type", sort=False)}
    if complete:
        groups["amber"] = questions
    for name, rows in groups.items():
        ratios = {f"{name}_{metric}": ratio for metric, ratio in yes_no_ratios(rows, POSITIVE).items()}
        parts.append(ratio_items(rows["image_id"], ratios))
    return parts


def _score(descriptions: pd.DataFrame, questions: pd.DataFrame) -> list[pd.DataFrame]:
    """50 - 50 CHAIR + 50 F1, as three ratios."""
    wrong, named = (descriptions[c].map(len).to_numpy(float) for c in ("wrong", "named"))
    num, den = yes_no_ratios(questions, POSITIVE)["f1"]
    chair = {"amber_score|half": (50.0, 1.0), "amber_score|chair": (-50 * wrong, named)}
    return [
        ratio_items(descriptions["image_id"], chair),
        ratio_items(questions["image_id"], {"amber_score|f1": (50 * num, den)}),
    ]
