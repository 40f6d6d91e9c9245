"""The scorer alone: ``python -m alea_lib.metrics chair --captions answers.jsonl --coco annotations/``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ..core.files import DataError, write_json
from ..core.stats import LEVEL, paired_difference, summarise
from .amber import SIMILARITIES, amber, read_amber
from .answers import PARSERS, read_table
from .chair import chair
from .frontier import frontier, frontier_gap
from .mme import mme, read_mme, read_mme_answers
from .parse import FAMILIES
from .pope import pope, read_pope
from .truth import read_truth

RECORDS = 'JSON lines, a JSON list or {"annotations": [...]}'
Report = dict[str, pd.DataFrame | dict]  # title -> table


def run_chair(args: argparse.Namespace) -> Report:
    """CHAIR, the truncation frontier, and with ``--base`` the gap to it."""
    instances, references = (_coco_file(args.coco, kind, args.split) for kind in ("instances", "captions"))
    truth = read_truth(instances, references, args.family, args.cache)
    captions, base = _read(args.captions, args.base, lambda path: read_table(path, "image_id", "caption"))
    report = _compare(lambda table: chair(table, truth, args.family).items, captions, base)
    report["frontier"] = frontier(captions, truth, args.family)
    if base is not None:
        report["frontier gap"] = frontier_gap(base, captions, truth, args.family)
    return report


def run_pope(args: argparse.Namespace) -> Report:
    """POPE, and which edition of its file was used."""
    asked = read_pope(args.questions)
    tables = _read(args.answers, args.base, lambda path: read_table(path, "question_id", "answer"))
    used = {"edition": asked.attrs["edition"], "questions": len(asked), "images": asked["image_id"].nunique()}
    return {"questions": used} | _compare(lambda table: pope(table, asked, args.parser).items, *tables)


def run_mme(args: argparse.Namespace) -> Report:
    """MME's hallucination subset."""
    asked = read_mme(args.questions)
    tables = _read(args.answers, args.base, lambda path: read_mme_answers(path, asked))
    return _compare(lambda table: mme(table, asked, args.parser), *tables)


def run_amber(args: argparse.Namespace) -> Report:
    """AMBER: what of it was answered."""
    benchmark = read_amber(args.data)
    tables = _read(args.answers, args.base, lambda path: read_table(path, "id", "response"))
    return _compare(lambda table: amber(table, benchmark, args.parser, args.similarity), *tables)


def _read(answers: str, base: str | None, read: Callable) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    return read(answers), read(base) if base else None


def _compare(score: Callable, answers: pd.DataFrame, base: pd.DataFrame | None) -> Report:
    """Scores, and the paired difference to the base model if there is one."""
    items = score(answers)
    report: Report = {"scores": summarise(items)}
    if base is not None:
        report["difference to the base"] = paired_difference(items, score(base))
    return report


def _coco_file(folder: str, kind: str, split: str) -> Path:
    found = sorted(p for p in Path(folder).glob(f"{kind}*.json") if split in p.name)
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder}: one file {kind}*.json is needed, found {names}; choose by --split, e.g. val2014")
    return found[0]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alea_lib.metrics", description="CHAIR, POPE, MME and AMBER with intervals."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("chair", help="hallucinated objects in captions")
    one.add_argument("--captions", required=True, help=f"{RECORDS} with image_id and caption")
    one.add_argument("--coco", required=True, help="folder with instances*.json and captions*.json")
    one.add_argument("--split", default="", help="part of the file names, e.g. val2014, when there are several")
    one.add_argument("--family", default="singularise", choices=FAMILIES)
    one.add_argument("--cache", help="folder that keeps the parsed ground truth")
    two = commands.add_parser("pope", help="yes/no questions about objects")
    two.add_argument("--answers", required=True, help=f"{RECORDS} with question_id and answer")
    two.add_argument("--questions", required=True, help="POPE file (JSON lines or list)")
    three = commands.add_parser("mme", help="MME's hallucination subset: existence, count, position, color")
    form = f"folder of <task>.txt as MME's tool has them, one such file, or {RECORDS} with answer and question_id"
    three.add_argument("--answers", required=True, help=form)
    three.add_argument("--questions", required=True, help="folder with one folder a task, as MME has it")
    four = commands.add_parser("amber", help="AMBER: descriptions, yes/no questions, or both")
    four.add_argument("--answers", required=True, help=f"{RECORDS} with id and response")
    four.add_argument("--data", required=True, help="AMBER's folder data: annotations.json, relation.json, query/ ...")
    four.add_argument("--similarity", default="exact", choices=SIMILARITIES, help="how words are compared")
    for command, default in ((two, "official"), (three, "mme"), (four, "strict")):
        command.add_argument("--parser", default=default, choices=list(PARSERS), help="how yes and no are read")
    for command, run in ((one, run_chair), (two, run_pope), (three, run_mme), (four, run_amber)):
        command.add_argument("--base", help="the same of the base model, for paired differences (and the frontier gap)")
        command.add_argument("--json", help="write the result to this file too")
        command.set_defaults(run=run, scorer="family" if command is one else "parser")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 2 and one line on stderr when the input is not usable."""
    args = _parse(argv)
    scorer = getattr(args, args.scorer)
    try:
        report = args.run(args)
        if args.json:
            head = {"measure": args.command, "scorer": scorer, "level": LEVEL}
            head |= {"similarity": args.similarity} if "similarity" in args else {}
            plain = {k: v if isinstance(v, dict) else v.to_dict("records") for k, v in report.items()}
            write_json(args.json, head | plain, sort_keys=False)
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.command}, {args.scorer} {scorer}, 95 % percentile intervals by image")
    for title, rows in report.items():
        table = pd.DataFrame([rows]) if isinstance(rows, dict) else rows
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4f}'.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
