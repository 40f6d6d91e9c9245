"""The scorer alone: ``python -m alea_lib.measures chair --captions answers.jsonl --coco annotations/``."""

from __future__ import annotations

import argparse
import json
import sys

import pandas as pd

from alea_lib.stats import METHODS
from alea_lib.tables import DataError, replacing

from .amber import SIMILARITIES
from .commands import run_amber, run_chair, run_mme, run_pope
from .parse import FAMILIES
from .pope import PARSERS

RECORDS = 'JSON lines, a JSON list or {"annotations": [...]}'


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m alea_lib.measures", description="CHAIR, POPE, MME and AMBER with intervals."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("chair", help="hallucinated objects in captions")
    one.add_argument("--captions", required=True, help=f"{RECORDS} with image_id and caption")
    one.add_argument("--coco", required=True, help="folder with instances*.json and captions*.json")
    one.add_argument("--split", default="", help="part of the file names, e.g. val2014, when there are several")
    one.add_argument("--family", default="singularise", choices=FAMILIES)
    one.add_argument("--cache", help="folder that keeps the parsed ground truth")
    one.set_defaults(run=run_chair, scorer="family")
    two = commands.add_parser("pope", help="yes/no questions about objects")
    two.add_argument("--answers", required=True, help=f"{RECORDS} with question_id and answer")
    two.add_argument("--questions", required=True, help="POPE file (JSON lines or list)")
    two.add_argument("--instances", help="COCO instances file, when file names do not end in the image id")
    two.set_defaults(run=run_pope)
    three = commands.add_parser("mme", help="MME's hallucination subset: existence, count, position, color")
    three.add_argument(
        "--answers",
        required=True,
        help="folder of <task>.txt as MME's tool has them, one such file, or records with answer and question_id, or"
        " task, image and question (or question_index)",
    )
    three.add_argument("--questions", required=True, help="folder with one folder a task, as MME has it")
    three.set_defaults(run=run_mme)
    four = commands.add_parser("amber", help="AMBER: descriptions, yes/no questions, or both")
    four.add_argument("--answers", required=True, help=f"{RECORDS} with id and response")
    four.add_argument("--data", required=True, help="AMBER's folder data: annotations.json, relation.json, query/ ...")
    four.add_argument("--similarity", default="exact", choices=SIMILARITIES, help="how words are compared")
    four.set_defaults(run=run_amber)
    for command, default in ((two, "official"), (three, "mme"), (four, "strict")):
        command.add_argument("--parser", default=default, choices=list(PARSERS), help="how yes and no are read")
        command.set_defaults(scorer="parser")
    for command in (one, two, three, four):
        command.add_argument("--base", help="the same of the base model, for paired differences (and the frontier gap)")
        command.add_argument("--interval", default="percentile", choices=METHODS, help="of all but the frontier")
        command.add_argument("--json", help="write the result to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 2 and one line on stderr when the input is not usable."""
    args = _parse(argv)
    try:
        report = args.run(args)
        plain = {k: v if isinstance(v, dict) else v.to_dict("records") for k, v in report.items()}
        if args.json:
            with replacing(args.json) as temporary:
                head = {"measure": args.command, "scorer": getattr(args, args.scorer), "level": 0.95}
                head |= {name: getattr(args, name) for name in ("interval", "similarity") if name in args}
                temporary.write_text(json.dumps(head | plain, indent=1) + "\n", encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.command}, {args.scorer} {getattr(args, args.scorer)}, 95 % {args.interval} intervals by image")
    for title, rows in report.items():
        table = pd.DataFrame([rows]) if isinstance(rows, dict) else rows
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4f}'.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
