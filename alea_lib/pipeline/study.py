"""The whole study: drop what is stale, draw again what only looks different, let Snakemake run what is missing."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from ..core import paths
from ..core.files import sha256
from ..core.paths import RunError
from ..models import hub
from . import profiles
from .book import pages
from .guard import changed
from .preview import require
from .profiles import Job, before
from .sources import Sources, source_hashes

# What Snakemake says beside errors (--quiet all would hide those too), or after one that a stage explained.
CHATTER = (
    "Assuming unrestricted", "Building DAG", "Using shell", "Provided cores", "Rules claiming", "Select jobs",
    "Execute ", "Nothing to be done", "Complete log", "Elapsed time", "RuleException:", "Shutting down",
    "CalledProcessError in", "Command 'set -euo", "Exiting because", "WorkflowError:", "At least one job",
)  # fmt: skip


def _own(profile: str, job: Job) -> Path:
    return paths.run_dir(profile, job.stage, job.variant) / "run.json"


def _kept(profile: str, job: Job) -> Path:
    """A run's record while it is drawn again: with it, a drawing that fails does not cost the numbers."""
    return paths.root() / ".snakemake" / "drawing" / profile / f"{job.label}.json"


def _record(profile: str, job: Job) -> Path | None:
    """The record that counts; None where there is none."""
    return next((path for path in (_own(profile, job), _kept(profile, job)) if path.exists()), None)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _sources(job: Job, record: dict) -> Sources:
    return source_hashes(paths.root() / "notebooks" / f"{job.stage}.ipynb", record["params"], record["variant"])


def stale_reason(profile: str, job: Job) -> str:
    """Why the numbers of a finished run no longer stand for the profile ('' if they do, or if there is none)."""
    path = _record(profile, job)
    if path is None:
        return ""
    record = _read(path)
    if path == _own(profile, job) and not path.with_name("notebook.ipynb").exists():
        return "it has no finished notebook"
    for name, value in profiles.job_settings(profile, job).items():
        if record["params"].get(name) != value:
            return f"it was run with {name}={record['params'].get(name)}"
    written = path.stat().st_mtime
    inputs = (_input_changed(name, content, written) for name, content in record["inputs"].items())
    return changed(record, "sources", _sources(job, record).numbers) or next(filter(None, inputs), "")


def _input_changed(name: str, content: dict, written: float) -> str:
    """Why an input outside the runs is not what a record of that time read."""
    path, key = paths.root() / name, name.removeprefix("data/hub.yaml: ")
    if key != name and (row := hub.model_row(key)) and hub.fingerprint(row) != content:
        return f"the row of {key} in data/hub.yaml has changed"
    if "run_id" in content or not path.exists():
        return ""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    newer = max(p.stat().st_mtime for p in files) > written
    return f"{name} has changed" if newer and sha256(path) != content["sha256"] else ""


def to_run(profile: str) -> dict[Job, str]:
    """The runs that do not stand, or that read one that does not, and why. (What reads a run that was only made later
    is Snakemake's to find: it compares times.)"""
    found: dict[Job, str] = {}
    joined = (paths.results_dir(profile) / "metrics.csv").exists()
    for job in sorted(profiles.plan(profile), key=lambda job: job.after_collect):
        reads = [o.label for o in found if o in job.needs or (job.after_collect and not o.after_collect)]
        if not _record(profile, job):
            found[job] = "it has no finished run"
        elif reason := stale_reason(profile, job):
            found[job] = reason
        elif reads:
            found[job] = f"it reads {reads[0]}, which runs again"
        elif job.after_collect and not joined:
            found[job] = "the tables are not joined yet"
    return found


def to_draw(profile: str) -> dict[Job, str]:
    """The runs whose numbers stand, but whose notebook would look different now, and why."""
    shown = pages(profile).values() if profiles.load_profile(profile).get("book", True) else ()
    found, again = {}, to_run(profile)
    for job in profiles.plan(profile):
        path = _record(profile, job)
        if job in again or path is None:
            continue
        record = _read(path)
        if path == _kept(profile, job):
            found[job] = "its last drawing did not end"
        elif job in shown and (reason := changed(record, "page_sources", _sources(job, record).page)):
            found[job] = reason
    return found


def refresh(profile: str) -> None:
    """Check every notebook's parameters, and drop records that no longer stand, so that they are run again.

    Snakemake compares times; this sees what it cannot: other code or parameters, a changed model or data file, a run
    that was killed between its record and its notebook.
    """
    for job in profiles.plan(profile):
        profiles.check_parameters(paths.root() / "notebooks" / f"{job.stage}.ipynb", profile, job.variant, {})
    again = to_run(profile)
    for job, reason in again.items():
        if _record(profile, job):
            print(f"stage {job.label} will run again: {reason}", flush=True)
        for path in (_own(profile, job), _kept(profile, job)):
            path.unlink(missing_ok=True)
    if any(not job.after_collect for job in again):
        (paths.results_dir(profile) / "metrics.csv").unlink(missing_ok=True)  # what is joined is asked for again


def draw(profile: str, workers: int) -> bool:
    """Execute again what only looks or reads differently now, each after what it reads; whether all went well.

    A run whose results come out the same keeps the time of its record, so that nothing that reads it is run.
    """
    left = to_draw(profile)
    while left:
        ready = [job for job in left if not before(job) & set(left)]
        for job in ready:
            print(f"stage {job.label} is drawn again: {left.pop(job)}", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            if not all(pool.map(lambda job: _draw(profile, job), ready)):
                return False
    return True


def _draw(profile: str, job: Job) -> bool:
    own, kept = _own(profile, job), _kept(profile, job)
    if own.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(own, kept)  # with its time
    command = [sys.executable, "-m", "alea_lib.pipeline", "execute", job.stage, "--variant", job.variant, "--quiet"]
    done = subprocess.run([*command, "--profile", profile], cwd=paths.root(), env=_environment())
    if done.returncode:
        return False
    old, new = _read(kept), _read(own)
    if all(old[key] == new[key] for key in ("run_id", "outputs_sha256")):
        shutil.copystat(kept, own)
    kept.unlink()
    return True


def _environment() -> dict[str, str]:
    """For a process that ends when this one does."""
    return {**os.environ, "ALEA_WATCH": str(os.getpid()), "ALEA_ROOT": str(paths.root())}


def study(profile: str, jobs: int, target: str = "all", only: tuple[str, ...] = ()) -> int:
    """Run what is missing of a profile and build the book (``only``: these stages and what they read, no book);
    returns Snakemake's exit status. RunError, before anything starts, when the profile's needs are not met (see
    ``preview.require``)."""
    require(profile)
    root, started = paths.root(), time.time()
    wanted = [f"data/runs/{profile}/{job.label}/run.json" for job in profiles.plan(profile) if job.stage in only]
    if only and not wanted:
        raise RunError(f"profile {profile} runs none of {', '.join(only)}")
    options = f"--snakefile notebooks/Snakefile --cores {jobs} --rerun-incomplete --nolock --config profile={profile}"
    command = [sys.executable, "-m", "snakemake", *(wanted or [target]), "--directory", str(root), *options.split()]
    command += ["--quiet", "rules", "host", "progress", "reason"]
    with alone(root) as lock:
        refresh(profile)
        status = 0 if only or target == "collect" or draw(profile, jobs) else 1
        if not status:
            status = _snakemake(command, root, lock)
    if status:
        again = "correct what is named above and call it again, finished stages are kept"
        print(f"study {profile}: stopped; {again}", file=sys.stderr)
    else:
        print(f"study {profile}: done in {time.time() - started:.0f} s", flush=True)
    return status


def _snakemake(command: list[str], root: Path, lock: int) -> int:
    """Run Snakemake and pass on what it and the stages say, without its chatter; its exit status."""
    with subprocess.Popen(
        command, cwd=root, env=_environment(), pass_fds=[lock], stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            if not line.startswith(CHATTER):
                print(line, end="", file=sys.stderr, flush=True)
    return process.returncode


@contextmanager
def alone(root: Path, patience: float = 10.0) -> Iterator[int]:
    """Refuse a second study in this folder. Yields the descriptor of a lock that the system frees when this process,
    and all that were handed the descriptor, are gone, however they ended."""
    path = root / ".snakemake" / "study.lock"
    path.parent.mkdir(exist_ok=True)
    end = time.time() + patience  # one that is being killed needs a moment to go
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > end:
                    raise RunError("another study is at work in this folder: wait for it, or stop it") from None
                time.sleep(0.5)
        yield lock.fileno()


def end_with(parent: int, every: float = 1.0) -> None:
    """End this process and all it started once the process that asked for the work is gone (kill -9)."""

    def alive() -> bool:
        try:
            return psutil.Process(parent).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while alive():
            time.sleep(every)
        for child in psutil.Process().children(recursive=True):
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
