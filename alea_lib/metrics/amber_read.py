"""AMBER's files: queries, annotations, associated words, safe words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..core.files import DataError, PathLike, numbered_lines, read_json, read_text
from .records import image_numbers, read_records, refuse_doubled
from .yes_no import labels

TYPES = ("generative", "existence", "attribute", "relation")
_TYPE_NAMES = {
    "generative": "generative",
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "attribute",
    "discriminative-attribute-number": "attribute",
    "discriminative-attribute-action": "attribute",
    "discriminative-relation": "relation",
    "relation": "relation",  # the published file uses both
}


@dataclass(frozen=True)
class Amber:
    """The benchmark. ``queries``: id, image, text, image_id, type (one of ``TYPES``), label (yes, no; "" when
    generative). ``truth`` and ``hallu``: id of a generative query to the different objects that are there, and
    to those that people would wrongly expect. ``relation``: object to associated words. ``safe_words``."""

    queries: pd.DataFrame
    truth: dict[int, tuple[str, ...]]
    hallu: dict[int, tuple[str, ...]]
    relation: dict[str, tuple[str, ...]]
    safe_words: frozenset[str]

    def questions(self) -> pd.DataFrame:
        """The yes/no questions in POPE's columns: question_id, setting (the type), image, text, label, image_id."""
        asked = self.queries[self.queries["type"] != TYPES[0]]
        named = asked.rename(columns={"id": "question_id", "type": "setting"})
        return named[["question_id", "setting", "image", "text", "label", "image_id"]].reset_index(drop=True)


def read_amber(folder: PathLike) -> Amber:
    """The files of AMBER's folder ``data``: ``annotations.json`` (id, type, truth, hallu), ``relation.json``,
    ``safe_words.txt``, and the queries (id, image, query) of ``query_all.json``, or else of all ``query_*.json``,
    in the folder or in ``query``. DataError for a missing or malformed file, and an id that only one file has."""
    folder = Path(folder)
    queries = _queries(folder)
    notes = {note["id"]: note for note in read_records(_need(folder / "annotations.json"), ("id", "type", "truth"))}
    lost = [i for i in queries["id"] if i not in notes]
    if lost:
        raise DataError(
            f"{folder}: {len(lost)} queries have no annotation, e.g. id {lost[:3]}; take both of one version"
        )
    notes = {i: notes[i] for i in queries["id"]}
    unknown = sorted({str(n["type"]) for n in notes.values()} - set(_TYPE_NAMES))
    if unknown:
        raise DataError(f"{folder}: annotations of the unknown type {unknown}; known are {', '.join(_TYPE_NAMES)}")
    queries["type"] = [_TYPE_NAMES[notes[i]["type"]] for i in queries["id"]]
    generative = {i: n for i, n in notes.items() if n["type"] == TYPES[0]}
    asked = queries["type"] != TYPES[0]
    truths = queries.loc[asked, "id"].map(lambda i: notes[i]["truth"])
    queries["label"] = labels(truths, queries["id"][asked], str(folder)).reindex(queries.index, fill_value="")
    truth, hallu = ({i: _words(n.get(key, [])) for i, n in generative.items()} for key in ("truth", "hallu"))
    relation = {w.lower(): _words(more) for w, more in read_json(_need(folder / "relation.json")).items()}
    safe = frozenset(w.strip().lower() for _, w in numbered_lines(read_text(_need(folder / "safe_words.txt"))))
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


def _need(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: is missing; AMBER's folder data holds it")
    return path
