"""python -m alea_lib.runs plan | study | execute | collect | publish | book | pdf | guard | colab"""

import argparse
import os
import sys
from pathlib import Path

from alea_lib.runs.places import RunError, read_yaml, root


def assignments(texts: list[str]) -> dict:
    """NAME=VALUE texts as parameters; values are YAML, so 3, 1e-3, [1, 2] and null mean what they say."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RunError(f"'{text}' is no parameter: write NAME=VALUE")
        found[name] = read_yaml(value)
    return found


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m alea_lib.runs", description="Run the study or a part of it.")
    commands = top.add_subparsers(dest="command", required=True)
    study = commands.add_parser("study", help="everything that is missing, then the book")
    study.add_argument("--jobs", type=int, default=2)
    study.add_argument("--target", default="all", help="a rule or file of notebooks/Snakefile, e.g. collect")
    one = commands.add_parser("execute", help="one notebook")
    one.add_argument("notebook")
    one.add_argument("--variant", default="")
    one.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    one.add_argument("--needed", action="store_true", help="first the stages that it reads, where they are missing")
    collect = commands.add_parser("collect", help="join the tables of finished stages")
    book = commands.add_parser("book", help="build the book from finished stages")
    publish = commands.add_parser("publish", help="copy the joined tables to data/results, to be committed")
    pdf = commands.add_parser("pdf", help="the book as one PDF, printed by Chromium")
    ahead = commands.add_parser("plan", help="say what a study would do and need, and start nothing")
    for sub in (study, publish):
        sub.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="these stages alone, all variants")
    for sub in (ahead, study, one, collect, book, pdf, publish):
        sub.add_argument("--profile", default="scenes")
    guard = commands.add_parser("guard", help="refuse notebooks that were not executed to their end")
    guard.add_argument("notebooks", nargs="+", type=Path)
    commands.add_parser("colab", help="write the cell that prepares Colab into every notebook")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.command in ("study", "execute", "collect", "book") and os.environ.get("ALEA_WATCH"):
        from alea_lib.runs.study import end_with

        end_with(int(os.environ["ALEA_WATCH"]))
    try:
        return act(args)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def act(args: argparse.Namespace) -> int:
    """One command; each imports only what it needs."""
    if args.command == "plan":
        from alea_lib.runs.preview import preview, text

        found = preview(args.profile)
        print(text(found))
        return 0 if all(check.ok for check in found.checks) else 1
    if args.command == "study":
        from alea_lib.runs.study import study

        return study(args.profile, args.jobs, args.target, tuple(args.only))
    if args.command == "execute":
        from alea_lib.runs.execute import execute, execute_needed

        if args.needed:
            execute_needed(args.notebook, args.profile, args.variant)
        bar = sys.stderr.isatty() and not args.quiet
        execute(args.notebook, args.profile, args.variant, assignments(args.set), bar)
    elif args.command == "collect":
        from alea_lib.runs.collect import collect

        collect(args.profile)
    elif args.command == "publish":
        from alea_lib.runs.collect import publish

        print(f"tables copied to {publish(args.profile, tuple(args.only))}")
    elif args.command == "book":
        from alea_lib.runs.book import build

        build(args.profile)
    elif args.command == "pdf":
        from alea_lib.runs.pdf import build

        build(args.profile)
    elif args.command == "colab":
        from alea_lib.runs.colab import write_cells

        for path in write_cells(sorted((root() / "notebooks").glob("*.ipynb"))):
            print(f"{path.name}: cell written")
    else:
        from alea_lib.runs.guard import guard

        for path in args.notebooks:
            guard(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
