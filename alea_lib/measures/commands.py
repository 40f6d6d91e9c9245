"""What the scorer's commands do: read the files, score, and return the tables to print, title -> table."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from alea_lib.stats import paired_difference, summarise
from alea_lib.tables import DataError

from .amber import amber, read_amber
from .chair import chair, read_truth
from .frontier import frontier, frontier_gap
from .mme import mme, read_mme, read_mme_answers
from .pope import pope, read_pope
from .records import read_table

Report = dict[str, pd.DataFrame | dict]


def run_chair(args: argparse.Namespace) -> Report:
    """CHAIR, the truncation frontier, and with ``--base`` the gap to it."""
    files = [_coco_file(args.coco, kind, args.split) for kind in ("instances", "captions")]
    truth = read_truth(*files, family=args.family, cache=args.cache)
    captions = read_table(args.captions, ("image_id", "caption"))
    base = read_table(args.base, ("image_id", "caption")) if args.base else None
    report = _compare(args, lambda table: chair(table, truth, args.family).items, captions, base)
    report["frontier"] = frontier(captions, truth, args.family)
    if base is not None:
        report["frontier gap"] = frontier_gap(base, captions, truth, args.family)
    return report


def run_pope(args: argparse.Namespace) -> Report:
    """POPE, and which edition of its file was used."""
    questions = read_pope(args.questions, args.instances)
    answers, base = _answers(args, lambda path: read_table(path, ("question_id", "answer")))
    used = {
        "edition": questions.attrs["edition"],
        "questions": len(questions),
        "images": questions["image_id"].nunique(),
    }
    return {"questions": used} | _compare(args, lambda table: pope(table, questions, args.parser).items, answers, base)


def run_mme(args: argparse.Namespace) -> Report:
    """MME's hallucination subset."""
    questions = read_mme(args.questions)
    answers, base = _answers(args, read_mme_answers)
    return _compare(args, lambda table: mme(table, questions, args.parser).items, answers, base)


def run_amber(args: argparse.Namespace) -> Report:
    """AMBER: what of it was answered."""
    benchmark = read_amber(args.data)
    answers, base = _answers(args, lambda path: read_table(path, ("id", "response")))
    return _compare(args, lambda t: amber(t, benchmark, args.parser, args.similarity).items, answers, base)


def _answers(args: argparse.Namespace, read: Callable) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    return read(args.answers), read(args.base) if args.base else None


def _compare(args: argparse.Namespace, score: Callable, answers: pd.DataFrame, base: pd.DataFrame | None) -> Report:
    """Scores, and the paired difference to the base model if there is one."""
    items = score(answers)
    report: Report = {"scores": summarise(items, method=args.interval)}
    if base is not None:
        report["difference to the base"] = paired_difference(items, score(base), method=args.interval)
    return report


def _coco_file(folder: str, kind: str, split: str) -> Path:
    found = sorted(p for p in Path(folder).glob(f"{kind}*.json") if split in p.name)
    if len(found) != 1:
        seen = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder}: one file {kind}*.json is needed, found {seen}; choose by --split, e.g. val2014")
    return found[0]
