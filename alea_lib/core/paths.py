"""Where things are, whatever the working directory; errors that a user can repair; YAML. Knows nothing of profiles."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import yaml


class RunError(RuntimeError):
    """Something a user can repair: the message says what and how."""


class MissingStage(RunError):
    """An upstream stage has no finished run: the message names the command that makes one."""


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number (plain YAML 1.1 wants 1.0e-3 and hands out a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str):
    """Parse YAML text, numbers like 1e-3 included."""
    return yaml.load(text, Loader=_Loader)


def read_data(name: str):
    """data/<name>.yaml, parsed; None without such a file, RunError for one that is no YAML. The suffix is added here: a
    module that wrote it out would make the file a source of every notebook that imports it (see ``imports``)."""
    path = root() / "data" / f"{name}.yaml"
    try:
        return read_yaml(path.read_text(encoding="utf-8")) if path.exists() else None
    except yaml.YAMLError as error:
        raise RunError(f"data/{name}.yaml is no YAML: {' '.join(str(error).split())}") from None


def root() -> Path:
    """The repository: $ALEA_ROOT, else the folder with a _config.yml above the cwd, else above this file."""
    if os.environ.get("ALEA_ROOT"):
        return Path(os.environ["ALEA_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_config.yml").exists() and (folder / "notebooks").is_dir():
                return folder.resolve()
    raise RunError("no repository found above this folder: cd into it, or set ALEA_ROOT to its path")


def run_dir(profile: str, stage: str, variant: str = "") -> Path:
    """The folder of one run."""
    return root() / "data" / "runs" / profile / (f"{stage}-{variant}" if variant else stage)


def results_dir(profile: str) -> Path:
    """The folder of the joined tables."""
    return root() / "data" / "runs" / profile / "results"


def nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """`; did you mean ...?` with the most similar known names, or nothing."""
    found = [name for text in unknown for name in difflib.get_close_matches(str(text), [str(k) for k in known], 1)]
    return f"; did you mean {', '.join(found)}?" if found else ""
