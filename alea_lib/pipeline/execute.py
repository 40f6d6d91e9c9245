"""Run one notebook through papermill's API, so that only a finished notebook ever looks finished."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core import paths
from ..core.files import write_json
from ..core.paths import RunError
from . import profiles
from .collect import collect
from .guard import guard
from .preview import require
from .sources import PACKAGE, code_cells, parameters

WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: str, profile: str, variant: str = "", given: dict | None = None, bar: bool = False) -> Path:
    """Execute notebooks/<notebook>.ipynb into its run's folder; the finished copy, or RunError."""
    given = given or {}
    source = paths.root() / "notebooks" / f"{Path(notebook).stem}.ipynb"
    names = parameters(source) if source.exists() else {}
    variant = variant or str(given.get("VARIANT") or names.get("VARIANT") or "")
    profiles.check_parameters(source, profile, variant, given)
    require(profile)
    folder = paths.run_dir(profile, source.stem, variant)
    folder.mkdir(parents=True, exist_ok=True)
    partial, failed, final = (folder / f"notebook{kind}.ipynb" for kind in (".partial", ".failed", ""))
    for path in (partial, failed, final, folder / "run.json"):
        path.unlink(missing_ok=True)
    label = profiles.Job(source.stem, variant).label
    started = time.time()
    say(f"stage {label} started")
    values = {**given, "PROFILE": profile, **({"VARIANT": variant} if variant else {})}
    try:
        with heartbeat(label, partial):
            _papermill(source, partial, values, bar)
        tidy(partial)
        guard(partial)
        if not (folder / "run.json").exists():
            raise RunError("the notebook ended without calling run.finish(...)")
    except BaseException as error:  # Ctrl-C too may not leave a run that looks finished
        (folder / "run.json").unlink(missing_ok=True)
        if partial.exists():
            os.replace(partial, failed)
        if not isinstance(error, Exception):
            raise
        where = f"; see {failed.relative_to(paths.root())}" if failed.exists() else ""
        raise RunError(f"stage {label} failed after {time.time() - started:.0f} s: {brief(error)}{where}") from error
    os.replace(partial, final)
    say(f"stage {label} finished in {time.time() - started:.0f} s")
    return final


def execute_needed(notebook: str, profile: str, variant: str = "") -> list[Path]:
    """Execute the stages that a notebook reads and that have no finished run; for one that reads the joined tables,
    everything that is joined."""
    jobs, stage = profiles.plan(profile), Path(notebook).stem
    mine = [job for job in jobs if job.stage == stage]
    if not mine:
        raise RunError(f"profile {profile} does not run {stage}; it runs {', '.join(job.label for job in jobs)}")
    job = next((job for job in mine if job.variant == variant), mine[0])
    wanted = [o for o in jobs if (not o.after_collect if job.after_collect else o in profiles.before(job))]
    missing = [o for o in wanted if not (paths.run_dir(profile, o.stage, o.variant) / "run.json").exists()]
    made = [execute(other.stage, profile, other.variant) for other in missing]
    if job.after_collect:
        collect(profile)
    return made


def _papermill(source: Path, output: Path, values: dict, bar: bool) -> None:
    """One call of papermill, with a kernel of this very interpreter that imports this very library."""
    import papermill

    with own_kernel():
        papermill.execute_notebook(
            source,
            output,
            parameters=values,
            kernel_name="python3",
            cwd=source.parent,
            progress_bar=bar,
            coalesce_streams=True,
        )


@contextmanager
def own_kernel():
    """Make `python3` mean sys.executable, whatever kernels are installed; pass on root and library."""
    saved = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        write_json(
            Path(folder) / "kernels" / "python3" / "kernel.json",
            {"argv": argv, "display_name": "Python 3", "language": "python"},
        )
        os.environ.update(
            JUPYTER_PATH=os.pathsep.join([folder, os.environ.get("JUPYTER_PATH", "")]).rstrip(os.pathsep),
            PYTHONPATH=os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            ALEA_ROOT=str(paths.root()),
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
    """Print how far a long notebook has come, within a long cell too: papermill's bar moves only between cells."""
    done, started = threading.Event(), time.time()

    def beat() -> None:
        while not done.wait(every):
            with suppress(OSError, ValueError):  # papermill is writing the file at this moment
                cells = code_cells(partial.read_text("utf-8"))
                ran = sum(cell.get("execution_count") is not None for cell in cells)
                at = min(ran + 1, len(cells))
                say(f"stage {label}: cell {at} of {len(cells)}, {time.time() - started:.0f} s")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def say(text: str) -> None:
    """A line in one write: stages that run side by side share standard output, and unbuffered lines would mix."""
    print(f"{text}\n", end="", flush=True)


def brief(error: BaseException) -> str:
    """A failure in a line or a few: which cell, which exception, the last lines of its message."""
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        lines = str(error.evalue).strip().splitlines()[-3:]
        return f"cell {error.exec_count}: {error.ename}: " + "\n  ".join(lines)
    if type(error).__name__ == "DeadKernelError":
        return "the kernel died (out of memory, or killed)"
    return " ".join(str(error).split()) or type(error).__name__


def tidy(path: Path) -> None:
    """Make a finished notebook a page: tag papermill's own parameter cell so that the book leaves it out, and drop live
    controls, which would be empty boxes without a kernel."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["metadata"].pop("widgets", None)
    for cell in book["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "injected-parameters" in tags and "remove-cell" not in tags:
            cell["metadata"]["tags"] = [*tags, "remove-cell"]
        if "outputs" in cell:
            cell["outputs"] = [o for o in cell["outputs"] if WIDGET not in o.get("data", {})]
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
