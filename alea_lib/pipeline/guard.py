"""What no page of the book may be: unfinished, failed, stale, mute or dependent on the network.

Each rule takes what it looks at and yields one sentence a fault. `guard` refuses a single executed notebook;
`book.build` asks all rules and refuses the book. Tables that were published by code that has changed since are marked,
not refused.
"""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

from ..core import paths
from ..core.paths import RunError
from .sources import Sources, cell_code, source_hashes, sources_id

EMBEDS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
LOADED = {"stylesheet", "preload", "icon", "shortcut icon", "modulepreload"}  # kinds of <link> that a page fetches


def read(path: Path) -> dict:
    """A notebook, the source of each cell as one text."""
    book = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in book["cells"]:
        cell["source"] = "".join(cell["source"])
    return book


def guard(path: Path) -> None:
    """Refuse a notebook that was not executed to its end without an error."""
    for fault in unfinished(read(path)):
        raise RunError(f"{Path(path).name} {fault}")


def unfinished(book: dict) -> Iterator[str]:
    """Cells that hold an error, or were not executed; papermill's own marks of failure."""
    state = book["metadata"].get("papermill", {})
    if not state or not state.get("end_time"):
        yield "was not executed to its end by papermill"
    for index, cell in enumerate(book["cells"]):
        if "papermill-error-cell-tag" in cell["metadata"].get("tags", []):
            yield f"failed: papermill left an error mark in cell {index}"
        if cell["cell_type"] != "code" or not cell["source"].strip():
            continue
        status = cell["metadata"].get("papermill", {}).get("status", "completed")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            yield f"failed: cell {index} holds an error"
        elif cell.get("execution_count") is None:
            yield f"is incomplete: cell {index} was not executed"
        elif status != "completed":
            yield f"is incomplete: cell {index} is {status}"
    if state.get("exception"):
        yield "failed: papermill recorded an exception"


def mute_figures(book: dict) -> Iterator[str]:
    """Figures without a name to refer to, a caption, or an alternative text."""
    for index, cell in enumerate(book["cells"]):
        if not any(kind.startswith("image/") for output in cell.get("outputs", ()) for kind in output.get("data", ())):
            continue
        shown = cell["metadata"].get("mystnb", {})
        said = {**shown.get("figure", {}), "alt": shown.get("image", {}).get("alt")}
        for what in ("name", "caption", "alt"):
            if not str(said.get(what) or "").strip():
                yield f"has a figure without {what} in cell {index} ({cell.get('id', '')})"


def stale(book: dict, source: dict, record: dict, today: Sources) -> Iterator[str]:
    """An executed copy of other code than its source's, or made by other library files than today's."""
    if _code(book) != _code(source):
        yield "is stale: its source has changed since it was executed"
    elif reason := changed(record, "sources", today.numbers) or changed(record, "page_sources", today.page):
        yield f"is stale: {reason}"


def _code(book: dict) -> list[str]:
    return [code for cell in book["cells"] if (code := cell_code(cell))]


def as_page(book: dict, source: dict) -> dict:
    """The source with the outputs of its executed copy, whose code is the same: text and captions are those of now."""
    ran = iter([cell for cell in book["cells"] if cell_code(cell)])
    cells = []
    for cell in source["cells"]:
        if cell_code(cell):
            done = next(ran)
            cell = {**cell, "outputs": done["outputs"], "execution_count": done["execution_count"]}
        cells.append(cell)
    return {**book, "cells": cells}


def changed(record: dict, group: str, today: dict[str, str]) -> str:
    """Why the code of a run is not today's ('' if it is): ``record`` a run.json, ``group`` its `sources` (``today``:
    the numbers of ``source_hashes``) or its `page_sources`."""
    if group not in record:
        return "its record does not say which code made it"
    differ = [name for name in sorted({*record[group], *today}) if record[group].get(name) != today.get(name)]
    return f"{differ[0]} has changed" if differ else ""


class _Page(HTMLParser):
    """The faults of one built page."""

    def __init__(self):
        super().__init__()
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = {name: value or "" for name, value in attrs}
        address = found.get(EMBEDS.get(tag, ""), "")
        if address.startswith(("http:", "https:", "//")) and (tag != "link" or found.get("rel") in LOADED):
            self.faults.append(f"loads {address} from the network")
        if tag == "img" and found.get("alt", "").strip() in ("", address, Path(address).name):
            hidden = found.get("role") == "presentation" or found.get("aria-hidden") == "true"
            if not hidden and "logo" not in found.get("class", ""):
                self.faults.append(f"shows {Path(address).name[:60]} without a text for those who do not see it")
        if tag == "div" and "traceback" in found.get("class", "").split():
            self.faults.append("shows a traceback")


def built(folder: Path) -> Iterator[str]:
    """Faults of the built pages: images without text, tracebacks, anything that a page would fetch."""
    for path in sorted(Path(folder).rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(folder).as_posix()} {fault}" for fault in dict.fromkeys(page.faults))


def page_faults(page: Path, source: Path, record: dict, today: Sources) -> list[str]:
    """All faults of the executed copy of a notebook."""
    book, original = read(page), read(source)
    found = list(stale(book, original, record, today))
    mute = [] if found else mute_figures(as_page(book, original))
    rules = (unfinished(book), mute, found)
    return [f"notebooks/{Path(source).name} {fault}" for rule in rules for fault in rule]


def published(profile: str) -> dict[str, str]:
    """State of each published run of a profile: `current`, `changed` (its code has changed since) or `unknown`.

    Compares the column sources_sha256 of data/results/<profile>/runs.csv with today's sources; without such a file
    nothing is known.
    """
    path = paths.root() / "data" / "results" / profile / "runs.csv"
    if not path.exists():
        return {"": "unknown"}
    runs = pd.read_csv(path, dtype=str, keep_default_na=False)
    notebooks = {path.stem: path for path in (paths.root() / "notebooks").glob("*.ipynb")}
    states = {}
    for row in runs.to_dict("records"):
        label = row["stage"]
        stage = next((stage for stage in notebooks if label == stage or label.startswith(f"{stage}-")), "")
        if not row.get("sources_sha256"):
            states[label] = "unknown"
        elif not stage:
            states[label] = "changed"
        else:
            params = json.loads(row["params_json"]) if row.get("params_json") else None
            today = source_hashes(notebooks[stage], params, label.removeprefix(stage).removeprefix("-"))
            states[label] = "current" if row["sources_sha256"] == sources_id(today.numbers) else "changed"
    return states


def published_mark(profile: str) -> str:
    """One sentence about the code behind the published tables of a profile."""
    states = published(profile)
    where = f"The tables of `data/results/{profile}`"
    if "changed" in states.values():
        stages = ", ".join(dict.fromkeys(run.split("-")[0] for run, state in states.items() if state == "changed"))
        return (
            f"{where} are **older than the code**: what {stages} read of the library has changed since, and they were "
            f"not computed again. `make publish PROFILE={profile}` does that (hours)."
        )
    if "unknown" in states.values():
        return f"{where} do not say which code made them, so whether it has changed since is not known."
    return f"{where} were made by the code as it is."
