"""Build the book from executed notebooks: copy, guard, write the status table, call jupyter-book."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from alea_lib.runs import places
from alea_lib.runs.collect import finished, run_table
from alea_lib.runs.execute import copy_page
from alea_lib.runs.places import Job, RunError


def pages(profile: str) -> dict[str, Job]:
    """Which job's notebook is shown for each `notebooks/...` entry of the table of contents."""
    jobs, shown = places.plan(profile), places.load_profile(profile)["page_variant"]
    toc = places.read_yaml((places.root() / "book" / "_toc.yml").read_text(encoding="utf-8"))
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
    """The whole book; returns its first page."""
    root = places.root()
    shown = pages(profile)
    folders = finished(profile, list(shown.values()))
    target = root / "book" / "notebooks"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.ipynb"):
        old.unlink()
    for name, folder in zip(shown, folders, strict=True):
        copy_page(folder / "notebook.ipynb", root / "book" / f"{name}.ipynb")
    write_status(profile, finished(profile, places.plan(profile)))
    if (root / "book" / "budget.md").exists():
        from alea_lib.budget_page import markdown

        (root / "book" / "generated" / "budget.md").write_text(markdown(), encoding="utf-8")
    for text in [path for folder in folders for path in sorted(folder.glob("*.md"))]:
        shutil.copyfile(text, root / "book" / "generated" / text.name)  # sentences with numbers, written by chapters
    index = root / "_build" / "html" / "index.html"
    shutil.rmtree(index.parent, ignore_errors=True)
    program = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
    ]  # of this environment, not of the PATH
    command = [*program, "build", "book", "--all", "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode or not index.exists():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        told = [line for line in lines if "WARNING" in line or "ERROR" in line] or lines[-15:]
        raise RunError("jupyter-book did not build the book:\n  " + "\n  ".join(told))
    print(f"book built from profile {profile}: {index.relative_to(root)}", flush=True)
    return index


def write_status(profile: str, folders: list[Path]) -> None:
    """book/generated/status.md: where and with what the shown runs were made."""
    runs = run_table(folders)
    facts = {
        "Profile": profile,
        "Code": ", ".join(
            sorted(
                {
                    f"`{c[:10]}`" + (" with local changes" if d else "")
                    for c, d in zip(runs["git_commit"], runs["dirty"].astype(bool), strict=True)
                }
            )
        ),
        "Device": ", ".join(sorted(set(runs["device"]))),
        "PyTorch": ", ".join(sorted(set(runs["torch"]))),
        "Transformers": ", ".join(sorted(set(runs["transformers"]))),
        "Notebook time": f"{runs['seconds'].sum() / 60:.1f} min in {len(runs)} runs",
        "Started": runs["started_utc"].min(),
    }
    shown = runs[["stage", "run_id", "seconds", "peak_mib", "started_utc"]].rename(
        columns={
            "stage": "run",
            "run_id": "run id",
            "peak_mib": "peak memory (MiB)",
            "started_utc": "started (UTC)",
        }
    )
    text = markdown_table(pd.DataFrame(facts.items(), columns=["", "value"])) + "\n" + markdown_table(shown)
    path = places.root() / "book" / "generated" / "status.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def markdown_table(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(table.columns), ["---"] * table.shape[1], *table.astype(str).values.tolist()]
    return "".join("| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |\n" for row in rows)
