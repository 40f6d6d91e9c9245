"""python -m alea_lib.pipeline plan | study | execute | collect | publish | book | pdf | colab"""

from __future__ import annotations

import argparse
import os
import sys

from ..core.paths import RunError, read_yaml, root


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
    top = argparse.ArgumentParser(prog="python -m alea_lib.pipeline", description="Run the study or a part of it.")
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, about: str, profile: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about)
        if profile:
            sub.add_argument("--profile", default="scenes")
        return sub

    study = add("study", "everything that is missing, then the book")
    study.add_argument("--jobs", type=int, default=2)
    study.add_argument("--target", default="all", help="a rule or file of notebooks/Snakefile, e.g. collect")
    one = add("execute", "one notebook")
    one.add_argument("notebook")
    one.add_argument("--variant", default="")
    one.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    one.add_argument("--needed", action="store_true", help="first the stages that it reads, where they are missing")
    add("collect", "join the tables of finished stages")
    add("book", "build the book from finished stages")
    publish = add("publish", "copy the joined tables to data/results, to be committed")
    add("pdf", "the book as one PDF, printed by Chromium")
    add("plan", "say what a study would do and need, and start nothing")
    for sub in (study, publish):
        sub.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="these stages alone, all variants")
    add("colab", "write the cell that prepares Colab into every notebook", profile=False)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if os.environ.get("ALEA_WATCH"):  # end when the make that called is gone
        from .study import end_with

        end_with(int(os.environ["ALEA_WATCH"]))
    try:
        return act(args) or 0
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def act(args: argparse.Namespace) -> int | None:
    """One command; each imports only what it needs. Returns an exit status, None for 0."""
    if args.command == "plan":
        from .preview import preview, text

        found = preview(args.profile)
        print(text(found))
        return int(not all(check.ok for check in found.checks))
    if args.command == "study":
        from .study import study

        return study(args.profile, args.jobs, args.target, tuple(args.only))
    if args.command == "execute":
        from .execute import execute, execute_needed

        if args.needed:
            execute_needed(args.notebook, args.profile, args.variant)
        bar = sys.stderr.isatty() and not args.quiet
        execute(args.notebook, args.profile, args.variant, assignments(args.set), bar)
    elif args.command == "collect":
        from .collect import collect

        collect(args.profile)
    elif args.command == "publish":
        from .collect import publish

        print(f"tables copied to {publish(args.profile, tuple(args.only))}")
    elif args.command == "colab":
        from .colab import write_cells

        for path in write_cells(sorted((root() / "notebooks").glob("*.ipynb"))):
            print(f"{path.name}: cell written")
    else:
        from . import book, pdf

        {"book": book.build, "pdf": pdf.build}[args.command](args.profile)
    return None


if __name__ == "__main__":
    sys.exit(main())
