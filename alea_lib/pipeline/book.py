"""Build the book from executed notebooks: ask the guard, dress the pages, call jupyter-book, ask the guard again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from ..core import paths
from ..core.files import read_record
from ..core.formatting import markdown_table
from ..core.paths import RunError
from . import api_pages, guard, profiles
from .collect import finished, run_table
from .profiles import Job
from .sources import source_hashes


def pages(profile: str) -> dict[str, Job]:
    """Which job's notebook is shown for each `notebooks/...` entry of the table of contents."""
    jobs, shown = profiles.plan(profile), profiles.load_profile(profile)["page_variant"]
    toc = paths.read_yaml((paths.root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
    found = {}
    for name in [name for name in toc_files(toc) if name.startswith("notebooks/")]:
        stage = name.removeprefix("notebooks/")
        mine = [job for job in jobs if job.stage == stage and job.variant in (shown.get(stage, job.variant),)]
        if len(mine) != 1:
            raise RunError(
                f"book/_toc.yml lists {name}; profile {profile} runs it {len(mine)} times: "
                "add it to `stages`, or name one `page_variant`"
            )
        found[name] = mine[0]
    return found


def toc_files(toc) -> list[str]:
    """All pages of a table of contents, in order."""
    if isinstance(toc, dict):
        own = [toc[key] for key in ("root", "file") if key in toc]
        return own + [name for key in ("parts", "chapters", "sections") for name in toc_files(toc.get(key, []))]
    return [name for entry in toc for name in toc_files(entry)]


def build(profile: str) -> Path:
    """The whole book in HTML; returns its first page."""
    prepare(profile)
    index = paths.root() / "_build" / "html" / "index.html"
    call_jupyter_book("html", index)
    add_explorer(profile, index.parent)
    refuse(guard.built(index.parent))
    print(f"book built from profile {profile}: {index.relative_to(paths.root())}", flush=True)
    return index


def refuse(faults) -> None:
    """One error for all faults, if there are any."""
    found = list(faults)
    if found:
        lines = "\n  ".join([*found[:20], *([f"... and {len(found) - 20} more"] if len(found) > 20 else [])])
        raise RunError(f"the book is not built:\n  {lines}\n(stale pages: make study runs what has changed)")


def prepare(profile: str) -> None:
    """Put executed notebooks and all generated text where jupyter-book reads them, after the guard has passed them."""
    root, shown = paths.root(), pages(profile)
    folders = dict(zip(shown, finished(profile, list(shown.values())), strict=True))
    records = {name: read_record(folder) for name, folder in folders.items()}
    sources = {name: root / f"{name}.ipynb" for name in shown}
    today = {name: source_hashes(sources[name], r["params"], r["variant"]) for name, r in records.items()}
    refuse(
        fault
        for name, folder in folders.items()
        for fault in guard.page_faults(folder / "notebook.ipynb", sources[name], records[name], today[name])
    )
    generated = root / "book" / "generated"
    generated.mkdir(exist_ok=True)
    made = [path for kind in ("*.md", "*.svg", "tables/*") for path in generated.glob(kind)]
    for old in [*(root / "book" / "notebooks").glob("*.ipynb"), *made]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, folder in folders.items():
        page = guard.as_page(guard.read(folder / "notebook.ipynb"), guard.read(sources[name]))
        dress(page, folder, records[name], root / "book" / f"{name}.ipynb", profile)
        for text in sorted([*folder.glob("*.md"), *folder.glob("*.svg")]):
            shutil.copyfile(text, generated / text.name)  # sentences with numbers and figures, made by chapters
    write_status(profile, finished(profile, profiles.plan(profile)))
    (generated / "note.md").write_text(note(profile), encoding="utf-8")
    if (root / "book" / "budget.md").exists():
        from .budget_page import markdown

        (generated / "budget.md").write_text(markdown(), encoding="utf-8")
    if (root / "book" / "api.md").exists():
        api_pages.write_api_pages(generated)
    marks = "".join(f"- {guard.published_mark(name)}\n" for name in published())
    (generated / "published.md").write_text(marks, encoding="utf-8")


def published() -> list[str]:
    """The profiles whose tables lie in data/results."""
    return sorted(path.parent.name for path in (paths.root() / "data" / "results").glob("*/runs.csv"))


def note(profile: str) -> str:
    """The warning that a profile wants to see on every page (its line `note`), as Markdown."""
    text = profiles.load_profile(profile).get("note")
    return f":::{{warning}}\n{text}\n:::\n" if text else ""


def dress(page: dict, folder: Path, record: dict, target: Path, profile: str) -> None:
    """Write a run's page, with the profile's warning, the state of published tables, the tables of its folder, and
    links to the library's rooms that it uses."""
    used = {Path(name).parts[2] for name in record["inputs"] if name.startswith("data/results/")}
    marks = [f":::{{note}}\n{guard.published_mark(name)}\n:::\n" for name in sorted(used)]
    head = [text for text in (note(profile), *marks) if text]
    read = [paths.root() / name for name in record["inputs"] if not name.startswith("data/models/")]
    tables = [p for p in (*sorted(folder.iterdir()), *read) if p.suffix in (".csv", ".parquet") and p.is_file()]
    foot = [download(tables)] if tables else []
    code = [cell["source"] for cell in page["cells"] if cell["cell_type"] == "code"]
    if (paths.root() / "book" / "api.md").exists():
        foot.append(api_pages.links(code))

    def cells(texts: list[str], kind: str) -> list[dict]:
        return [
            {"cell_type": "markdown", "id": f"{kind}-{i}", "metadata": {}, "source": text}
            for i, text in enumerate(texts)
        ]

    for cell in page["cells"]:
        imports = [line for line in cell["source"].splitlines() if line.startswith(("from ", "import "))]
        if cell["cell_type"] == "code" and len(imports) > 4:
            cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "hide-input"]  # a long list of names
    page["cells"] = [*page["cells"][:1], *cells(head, "head"), *page["cells"][1:], *cells(foot, "foot")]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def download(tables: list[Path]) -> str:
    """Copy tables beside the pages, in a folder for each run; a line of links to them."""
    links = []
    for table in tables:
        where = paths.root() / "book" / "generated" / "tables" / table.parent.name
        where.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table, where / table.name)
        links.append(f"{{download}}`{table.name} <../generated/tables/{table.parent.name}/{table.name}>`")
    return f"**The tables behind this page**, written or read by the run: {', '.join(links)}."


def call_jupyter_book(builder: str, first: Path) -> None:
    """One call of this environment's jupyter-book, every warning an error; `first` is the page it must make."""
    shutil.rmtree(first.parent, ignore_errors=True)
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command = [*program, "build", "book", "--builder", builder, "--all", "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, cwd=paths.root(), capture_output=True, text=True)
    if done.returncode or not first.exists():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        faults = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-15:]
        raise RunError("jupyter-book did not build the book:\n  " + "\n  ".join(faults))


def add_explorer(profile: str, html: Path) -> None:
    """Lay the caption explorer beside the pages, from the run that wrote its data, if the profile has one."""
    for job in profiles.plan(profile):
        folder = paths.run_dir(profile, job.stage, job.variant)
        if (folder / "explorer.json").exists():
            from ..report.explorer import publish

            publish(folder, paths.root() / "book" / "explorer", html / "explorer")


def write_status(profile: str, folders: list[Path]) -> None:
    """book/generated/status.md: where and with what the shown runs were made."""
    runs = run_table(folders)
    changes = runs["dirty"].astype(bool).map({True: " with local changes", False: ""})
    commits = "`" + runs["git_commit"].str[:10] + "`" + changes
    facts = {
        "Profile": profile,
        "Code": ", ".join(sorted(set(commits))),
        "Device": ", ".join(sorted(set(runs["device"]))),
        "PyTorch": ", ".join(sorted(set(runs["torch"]))),
        "Transformers": ", ".join(sorted(set(runs["transformers"]))),
        "Notebook time": f"{runs['seconds'].sum() / 60:.1f} min in {len(runs)} runs",
        "Started": runs["started_utc"].min(),
    }
    names = {"stage": "run", "run_id": "run id", "seconds": "seconds", "peak_mib": "peak memory (MiB)",
        "started_utc": "started (UTC)"}  # fmt: skip
    shown = runs[list(names)].rename(columns=names)
    text = markdown_table(pd.DataFrame(facts.items(), columns=["", "value"])) + "\n" + markdown_table(shown)
    (paths.root() / "book" / "generated" / "status.md").write_text(text, encoding="utf-8")
