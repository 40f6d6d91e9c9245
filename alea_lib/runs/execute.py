"""Run one notebook through papermill's API, so that only a finished notebook ever looks finished."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from alea_lib.runs import places
from alea_lib.runs.checks import require
from alea_lib.runs.imports import PACKAGE, parameters
from alea_lib.runs.places import RunError


def check_parameters(notebook: Path, profile: str, variant: str, given: dict) -> None:
    """Refuse names that the notebook's parameters cell does not have: papermill would only log a warning."""
    if not notebook.exists():
        known = ", ".join(sorted(p.stem for p in notebook.parent.glob("*.ipynb"))) or "none"
        raise RunError(f"no notebook {notebook.name}: there are {known}")
    names = parameters(notebook)
    if "PROFILE" not in names:
        raise RunError(f"{notebook.name} has no cell tagged `parameters` with a line PROFILE = ...")
    section = places.settings(places.load_profile(profile), notebook.stem, variant)
    for source, wanted in (
        ("the command", given),
        (f"data/profiles/{profile}.yaml", section),
        ("the command", {"VARIANT": variant} if variant else {}),
    ):
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise RunError(
                f"{notebook.name} has no parameter {', '.join(unknown)} (set by {source}); it has {', '.join(names)}"
            )


def execute(notebook: str, profile: str, variant: str = "", given: dict | None = None, bar: bool = False) -> Path:
    """Execute notebooks/<notebook>.ipynb into its run's folder; the finished copy, or RunError."""
    given = given or {}
    source = places.root() / "notebooks" / f"{Path(notebook).stem}.ipynb"
    names = parameters(source) if source.exists() else {}
    variant = variant or str(given.get("VARIANT") or names.get("VARIANT") or "")
    check_parameters(source, profile, variant, given)
    require(profile)
    folder = places.run_dir(profile, source.stem, variant)
    folder.mkdir(parents=True, exist_ok=True)
    partial, failed, final = (folder / f"notebook{kind}.ipynb" for kind in (".partial", ".failed", ""))
    for path in (partial, failed, final, folder / "run.json"):
        path.unlink(missing_ok=True)
    label = places.Job(source.stem, variant).label
    started = time.time()
    print(f"stage {label} started", flush=True)
    values = {**given, "PROFILE": profile, **({"VARIANT": variant} if variant else {})}
    try:
        with heartbeat(label, partial):
            _papermill(source, partial, values, bar)
        hide_injected(partial)
        guard(partial)
        if not (folder / "run.json").exists() or (folder / "run.json").stat().st_mtime < started - 1:
            raise RunError("the notebook ended without calling run.finish(...)")
    except BaseException as error:  # Ctrl-C too may not leave a run that looks finished
        (folder / "run.json").unlink(missing_ok=True)
        if partial.exists():
            os.replace(partial, failed)
        if not isinstance(error, Exception):
            raise
        seen = f"; see {failed.relative_to(places.root())}" if failed.exists() else ""
        raise RunError(f"stage {label} failed after {time.time() - started:.0f} s: {brief(error)}{seen}") from error
    os.replace(partial, final)
    print(f"stage {label} finished in {time.time() - started:.0f} s", flush=True)
    return final


def _papermill(source: Path, output: Path, values: dict, bar: bool) -> None:
    """One call of papermill's API, with a kernel of this very interpreter that imports this very library."""
    import papermill

    with own_kernel():
        papermill.execute_notebook(
            str(source),
            str(output),
            parameters=values,
            kernel_name="python3",
            cwd=str(source.parent),
            progress_bar=bar,
            coalesce_streams=True,
        )


@contextmanager
def own_kernel():
    """Make `python3` mean sys.executable, whatever kernels are installed; pass on root and library."""
    saved = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))

        def ahead(first, name):
            return os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))

        os.environ.update(
            JUPYTER_PATH=ahead(folder, "JUPYTER_PATH"),
            PYTHONPATH=ahead(PACKAGE.parent, "PYTHONPATH"),
            ALEA_ROOT=str(places.root()),
            PYTHONHASHSEED="0",
            OMP_NUM_THREADS="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            TOKENIZERS_PARALLELISM="false",
        )
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(saved)


@contextmanager
def heartbeat(label: str, partial: Path, every: float = 30.0):
    """Print how far a long notebook has come, so that silence never has to be guessed at."""
    done, started = threading.Event(), time.time()

    def beat() -> None:
        while not done.wait(every):
            try:
                cells = [c for c in json.loads(partial.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
            except (OSError, ValueError):
                continue  # papermill is writing it at this moment
            ran = sum(c.get("execution_count") is not None for c in cells)
            now, seconds = min(ran + 1, len(cells)), time.time() - started
            print(f"stage {label}: cell {now} of {len(cells)}, {seconds:.0f} s", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def brief(error: Exception) -> str:
    """A failure in a line or a few: which cell, which exception, the last lines of what it said."""
    name = getattr(error, "ename", "")
    if name:  # papermill's account of an exception in a cell
        lines = str(error.evalue).strip().splitlines()[-3:]
        return f"cell {error.exec_count}: {name}: " + "\n  ".join(lines)
    if type(error).__name__ == "DeadKernelError":
        return "the kernel died (out of memory, or killed)"
    return " ".join(str(error).split()) or type(error).__name__


def hide_injected(path: Path) -> None:
    """Tag papermill's own parameter cell so that the book leaves it out."""
    book = json.loads(path.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags and "remove-cell" not in tags:
            cell["metadata"]["tags"] = [*tags, "remove-cell"]
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def guard(path: Path) -> None:
    """Refuse a notebook that was not executed to its end without an error."""
    book = json.loads(Path(path).read_text(encoding="utf-8"))
    state = book["metadata"].get("papermill", {})
    if not state or not state.get("end_time"):
        raise RunError(f"{path.name} was not executed to its end by papermill")
    for index, cell in enumerate(book["cells"]):
        tags = cell["metadata"].get("tags", [])
        if "papermill-error-cell-tag" in tags:
            raise RunError(f"{path.name} failed: papermill left an error mark in cell {index}")
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            raise RunError(f"{path.name} failed: cell {index} holds an error")
        if cell.get("execution_count") is None:
            raise RunError(f"{path.name} is incomplete: cell {index} was not executed")
        if cell["metadata"].get("papermill", {}).get("status", "completed") != "completed":
            raise RunError(f"{path.name} is incomplete: cell {index} is {cell['metadata']['papermill']['status']}")
    if state.get("exception"):
        raise RunError(f"{path.name} failed: papermill recorded an exception")


def copy_page(source: Path, target: Path) -> None:
    """Copy an executed notebook for the book, guarded."""
    guard(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
