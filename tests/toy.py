"""A toy repository for the runner's tests: a chain of tiny notebooks over a tiny library."""

import json
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
NO_CACHE = shutil.ignore_patterns("__pycache__")

PROFILE = """\
world: toys
seed: 3
stages:
  01_make: {SIZE: 4}
  02_edit: {LR: 1e-3}
  03_measure: {}
  04_holds: {}
variants:
  02_edit: {weak: {}, strong: {LR: 0.5}}
  03_measure: [base, weak, strong]
page_variant: {02_edit: strong, 03_measure: base}
"""
STAGES = """\
01_make: []
02_edit: [01_make]
03_measure: [01_make, 02_edit, "03_measure:base"]
04_holds: [collect]
"""
SCORE_COLUMNS = ["run_id", "profile", "method", "metric", "value"]
TABLES = f"""\
import pandas as pd

METRIC_COLUMNS = {SCORE_COLUMNS}


def check_metrics(table):
    assert not table.duplicated(METRIC_COLUMNS[:-1]).any()


def write_csv(table, path):
    table.to_csv(path, index=False, lineterminator="\\n")


def write_metrics(table, path, declared_only=True):
    check_metrics(table)
    write_csv(table.sort_values(METRIC_COLUMNS[:-1]), path)


def read_csv(path):
    return pd.read_csv(path)
"""
BEGIN = "from alea_lib.pipeline import begin\nrun = begin(STAGE, PROFILE, VARIANT, {names})\nrun.table()"


def notebook(parameters: str, *cells: str) -> dict:
    """A notebook as a dict: a title, a parameters cell, and code cells."""

    def code(text: str, tags=()) -> dict:
        return {
            "cell_type": "code",
            "id": f"c{abs(hash(text)) % 10**9}",
            "metadata": {"tags": list(tags)},
            "source": text,
            "outputs": [],
            "execution_count": None,
        }

    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# A toy"}
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": metadata,
        "cells": [title, code(parameters, ["parameters"]), *(code(cell) for cell in cells)],
    }


def write_notebook(folder: Path, stage: str, parameters: str, *cells: str) -> Path:
    """Write notebooks/<stage>.ipynb of a toy repository; STAGE, VARIANT and PROFILE are always there."""
    head = f'PROFILE = "toy"  # the profile\nVARIANT = ""  # the variant\n{parameters}'
    first = f'STAGE = "{stage}"\n'
    path = folder / "notebooks" / f"{stage}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook(head, first + cells[0], *cells[1:])), encoding="utf-8")
    return path


def begin(*names: str) -> str:
    """The cell that begins a stage with these parameters."""
    return BEGIN.format(names=", ".join(f"{name}={name}" for name in names)).replace(", )", ")")


def small_repository(folder: Path) -> Path:
    """Profile, stages and configuration, without notebooks."""
    for name, text in {
        "_config.yml": "title: Toy\n",
        "data/profiles/toy.yaml": PROFILE,
        "notebooks/stages.yaml": STAGES,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def whole_repository(folder: Path) -> Path:
    """A repository with the real engine, a toy library, four toy notebooks and a book."""
    small_repository(folder)
    for room in ("core", "pipeline"):
        shutil.copytree(HERE / "alea_lib" / room, folder / "alea_lib" / room, ignore=NO_CACHE)
    for name in ("__init__", "hub", "memory"):
        (folder / "alea_lib" / "models").mkdir(exist_ok=True)
        shutil.copyfile(HERE / "alea_lib" / "models" / f"{name}.py", folder / "alea_lib" / "models" / f"{name}.py")
    shutil.copyfile(HERE / "notebooks" / "Snakefile", folder / "notebooks" / "Snakefile")
    shutil.copyfile(HERE / "_config.yml", folder / "_config.yml")
    library = {
        "__init__": "",
        "toys/__init__": '"""Toys."""\nfrom .editing import edit\nfrom .making import make\n',
        "toys/making": "def make(n):\n    return list(range(n))\n",
        "toys/editing": "def edit(values, lr):\n    return [v * lr for v in values]\n",
        "report/__init__": "from . import figures\n",
        "report/figures": "def shown():\n    return 'drawn once'\n",
        "core/tables": TABLES,
    }
    for name, text in library.items():
        (folder / "alea_lib" / name).parent.mkdir(exist_ok=True)
        (folder / "alea_lib" / f"{name}.py").write_text(text, encoding="utf-8")
    score = 'import pandas as pd\nrun.finish(pd.DataFrame({"method": [VARIANT], "metric": ["sum"], "value": [total]}))'
    write_notebook(
        folder,
        "01_make",
        "SIZE = None  # how many\nWORLD = None  # which world",
        begin("SIZE", "WORLD"),
        'from alea_lib.toys import make\n(run.dir / "made.txt").write_text(str(make(run.p.SIZE)))',
        "run.finish()",
    )
    write_notebook(
        folder,
        "02_edit",
        "LR = None  # step",
        begin("LR"),
        'from alea_lib.toys import edit\nmade = eval((run.input("01_make") / "made.txt").read_text())',
        '(run.dir / "edited.txt").write_text(str(edit(made, run.p.LR)))',
        "run.finish()",
    )
    write_notebook(
        folder,
        "03_measure",
        "",
        begin(),
        'made = eval((run.input("01_make") / "made.txt").read_text())\n'
        'if VARIANT != "base":\n    run.input("03_measure", "base")\n'
        '    made = eval((run.input("02_edit", VARIANT) / "edited.txt").read_text())\ntotal = sum(made)',
        score,
    )
    write_notebook(
        folder,
        "04_holds",
        "",
        begin(),
        'print((run.results() / "metrics.csv").read_text())',
        "run.finish()",
    )
    chapters = "".join(f"  - file: notebooks/{name}\n" for name in ("01_make", "02_edit", "03_measure", "04_holds"))
    pages = {
        "_toc.yml": f"format: jb-book\nroot: intro\nchapters:\n{chapters}  - file: status\n",
        "intro.md": "# Toy\n",
        "references.bib": "",
        "status.md": "# Status\n\n```{include} generated/status.md\n```\n",
    }
    shutil.copytree(HERE / "book" / "_ext", folder / "book" / "_ext", ignore=NO_CACHE)
    for name, text in pages.items():
        (folder / "book" / name).write_text(text, encoding="utf-8")
    return folder
