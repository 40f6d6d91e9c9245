"""The scorer alone: ``python -m alea_lib.measures chair --captions answers.jsonl --coco annotations/``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from alea_lib.stats import paired_difference, summarise
from alea_lib.tables import DataError, read_jsonl, replacing

from .chair import FAMILIES, chair, read_truth
from .frontier import frontier, frontier_gap
from .pope import PARSERS, pope, read_pope


def read_records(path: str) -> list[dict]:
    """Records of a JSON-lines file, of a JSON list, or of COCO's ``{"annotations": [...]}``."""
    text = Path(path).read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            return read_jsonl(path)
        return data["annotations"] if isinstance(data.get("annotations"), list) else [data]
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); is the file cut short?") from error


def _table(path: str, columns: tuple[str, ...]) -> pd.DataFrame:
    table = pd.DataFrame(read_records(path))
    missing = [c for c in columns if c not in table]
    if missing:
        what = "is empty" if table.empty else f"lacks {missing}"
        raise DataError(f"{path}: {what}; each record needs {' and '.join(columns)}")
    return table


def _coco_file(folder: str, kind: str, split: str) -> Path:
    found = sorted(p for p in Path(folder).glob(f"{kind}*.json") if split in p.name)
    if len(found) != 1:
        seen = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{folder}: one file {kind}*.json is needed, found {seen}; choose by --split, e.g. val2014")
    return found[0]


def _run_chair(args: argparse.Namespace) -> dict[str, pd.DataFrame | dict]:
    files = [_coco_file(args.coco, kind, args.split) for kind in ("instances", "captions")]
    truth = read_truth(*files, family=args.family, cache=args.cache)
    captions = _table(args.captions, ("image_id", "caption"))
    scored = chair(captions, truth, args.family)
    report = {"scores": summarise(scored.items), "frontier": frontier(captions, truth, args.family)}
    if args.base:
        base = _table(args.base, ("image_id", "caption"))
        report["difference to the base"] = paired_difference(scored.items, chair(base, truth, args.family).items)
        report["frontier gap"] = frontier_gap(base, captions, truth, args.family)
    return report


def _run_pope(args: argparse.Namespace) -> dict[str, pd.DataFrame | dict]:
    questions = read_pope(args.questions, args.instances)
    answers = _table(args.answers, ("question_id", "answer"))
    return {"scores": summarise(pope(answers, questions, args.parser).items)}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alea_lib.measures", description="CHAIR and POPE with intervals.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("chair", help="hallucinated objects in captions")
    one.add_argument("--captions", required=True, help="JSON lines or list with image_id and caption")
    one.add_argument("--coco", required=True, help="folder with instances*.json and captions*.json")
    one.add_argument("--split", default="", help="part of the file names, e.g. val2014, when there are several")
    one.add_argument("--family", default="singularise", choices=FAMILIES)
    one.add_argument("--base", help="captions of the base model, for paired differences and the frontier gap")
    one.add_argument("--cache", help="folder that keeps the parsed ground truth")
    one.set_defaults(run=_run_chair, scorer="family")
    two = commands.add_parser("pope", help="yes/no questions about objects")
    two.add_argument("--answers", required=True, help="JSON lines or list with question_id and answer")
    two.add_argument("--questions", required=True, help="POPE file (JSON lines)")
    two.add_argument("--instances", help="COCO instances file, when file names do not end in the image id")
    two.add_argument("--parser", default="official", choices=list(PARSERS))
    two.set_defaults(run=_run_pope, scorer="parser")
    for command in (one, two):
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
                temporary.write_text(json.dumps(head | plain, indent=1) + "\n", encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.command}, {args.scorer} {getattr(args, args.scorer)}, 95 % intervals by image")
    for title, rows in report.items():
        table = pd.DataFrame([rows]) if isinstance(rows, dict) else rows
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4f}'.format)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
