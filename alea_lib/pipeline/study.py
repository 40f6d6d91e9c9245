"""The whole study: drop what is stale, draw again what only looks different, let Snakemake run what is missing."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

from ..core import paths
from ..core.files import read_record, sha256
from ..core.paths import RunError
from ..models import hub
from . import profiles
from .book import pages
from .guard import changed
from .preview import require
from .profiles import Job
from .sources import Sources, source_hashes

# What Snakemake says beside errors (--quiet all would hide those too), or after one that a stage explained.
CHATTER = (
    "Assuming unrestricted", "Building DAG", "Using shell", "Provided cores", "Rules claiming", "Select jobs",
    "Execute ", "Nothing to be done", "Complete log", "Elapsed time", "RuleException:", "Shutting down",
    "CalledProcessError in", "Command 'set -euo", "Exiting because", "WorkflowError:", "At least one job",
)  # fmt: skip


def stale_reason(profile: str, job: Job, at: Path | None = None) -> str:
    """Why the numbers of a finished run no longer stand for the profile ('' if they do, or if there is none).
    ``at``: its record, where that is not in the run's folder."""
    path = at or _record(profile, job)
    if not path.exists():
        return ""
    if not at and not path.with_name("notebook.ipynb").exists():
        return "it has no finished notebook"
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, value in profiles.job_settings(profile, job).items():
        if record["params"].get(name) != value:
            return f"it was run with {name}={record['params'].get(name)}"
    written = path.stat().st_mtime
    inputs = (_input_changed(name, content, written) for name, content in record["inputs"].items())
    return changed(record, "sources", _sources(job, record).numbers) or next(filter(None, inputs), "")


def _record(profile: str, job: Job) -> Path:
    return paths.run_dir(profile, job.stage, job.variant) / "run.json"


def _kept_record(profile: str, job: Job) -> Path:
    """A run's record while it is drawn again: with it, a drawing that fails does not cost the numbers."""
    return paths.root() / ".snakemake" / "drawing" / profile / f"{job.label}.json"


def _sources(job: Job, record: dict) -> Sources:
    return source_hashes(paths.root() / "notebooks" / f"{job.stage}.ipynb", record["params"], record["variant"])


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


class Step(NamedTuple):
    """What would be done about a job, and why: "run", "draw" (its notebook again, but nothing that reads it), "".
    ``gone``: its record does not stand, or that of something it reads, whatever their times."""

    what: str = ""
    reason: str = ""
    gone: bool = False


def planned(profile: str) -> dict[str, Step]:
    """What a study would do now, by the label of the job; starts nothing."""
    shown = pages(profile).values() if profiles.load_profile(profile).get("book", True) else ()
    jobs = sorted(profiles.plan(profile), key=lambda job: job.after_collect)
    joined = [job for job in jobs if not job.after_collect]
    steps: dict[str, Step] = {}
    for job in jobs:
        own = _own_step(profile, job, job in shown)
        steps[job.label] = own if own.what == "run" else _readers_step(profile, job, steps, joined) or own
    return steps


def _own_step(profile: str, job: Job, shown: bool) -> Step:
    """What a job needs for reasons of its own."""
    path, kept = _record(profile, job), _kept_record(profile, job)
    drawing = kept.exists() and not path.exists()
    if not path.exists() and not drawing:
        return Step("run", "it has no finished run", gone=True)
    if reason := stale_reason(profile, job, kept if drawing else None):
        return Step("run", reason, gone=True)
    if drawing:
        return Step("draw", "its last drawing did not end")
    record = read_record(path.parent)
    reason = changed(record, "page_sources", _sources(job, record).page) if shown else ""
    return Step("draw", reason) if reason else Step()


def _readers_step(profile: str, job: Job, steps: dict[str, Step], joined: list[Job]) -> Step | None:
    """What a job needs for what it reads: other runs, or the tables of all that is joined."""
    tables = paths.results_dir(profile) / "metrics.csv"
    reads = [*job.needs, *(joined if job.after_collect else ())]
    again = [other.label for other in reads if steps[other.label].what == "run"]
    if again:
        gone = any(steps[label].gone for label in again)
        return Step("run", f"it reads {again[0]}, which runs again", gone)
    if job.after_collect and not tables.exists():
        return Step("run", "the tables are not joined yet")
    for other in reads:
        at, mine = _record(profile, other), _record(profile, job) if other in job.needs else tables
        if at.exists() and mine.exists() and at.stat().st_mtime > mine.stat().st_mtime:
            return Step("run", f"it reads {other.label}, which was run later")
    return None


def refresh(profile: str) -> None:
    """Check every notebook's parameters, and drop records that no longer stand, so that they are run again.

    Snakemake compares times; this sees what it cannot: other code or parameters, a changed model or data file, a run
    that was killed between its record and its notebook.
    """
    for job in profiles.plan(profile):
        profiles.check_parameters(paths.root() / "notebooks" / f"{job.stage}.ipynb", profile, job.variant, {})
    steps = planned(profile)
    for job in profiles.plan(profile):
        step, found = steps[job.label], [_record(profile, job), _kept_record(profile, job)]
        if step.gone and any(path.exists() for path in found):
            print(f"stage {job.label} will run again: {step.reason}", flush=True)
            for path in found:
                path.unlink(missing_ok=True)
    if any(steps[job.label].gone for job in profiles.plan(profile) if not job.after_collect):
        (paths.results_dir(profile) / "metrics.csv").unlink(missing_ok=True)  # what is joined is asked for again


def draw(profile: str, workers: int) -> bool:
    """Execute again what only looks or reads differently now, each after what it reads; whether all went well.

    A run whose results come out the same keeps the time of its record, so that nothing that reads it is run.
    """
    steps = planned(profile)
    left = [job for job in profiles.plan(profile) if steps[job.label].what == "draw"]
    while left:
        ready = [job for job in left if not before(job) & set(left)]
        for job in ready:
            print(f"stage {job.label} is drawn again: {steps[job.label].reason}", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            if not all(pool.map(lambda job: _draw(profile, job), ready)):
                return False
        left = [job for job in left if job not in ready]
    return True


def _draw(profile: str, job: Job) -> bool:
    own, kept = _record(profile, job), _kept_record(profile, job)
    if own.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(own, kept)  # with its time
    command = [sys.executable, "-m", "alea_lib.pipeline", "execute", job.stage, "--variant", job.variant, "--quiet"]
    done = subprocess.run([*command, "--profile", profile], cwd=paths.root(), env=_environment())
    if done.returncode:
        return False
    old, new = json.loads(kept.read_text(encoding="utf-8")), read_record(own.parent)
    if all(old[key] == new[key] for key in ("run_id", "outputs_sha256")):
        shutil.copystat(kept, own)
    kept.unlink()
    return True


def before(job: Job) -> set[Job]:
    """All jobs that must be finished before this one."""
    return {earlier for need in job.needs for earlier in (need, *before(need))}


def _environment() -> dict[str, str]:
    """For a process that ends when this one does."""
    return {**os.environ, "ALEA_WATCH": str(os.getpid()), "ALEA_ROOT": str(paths.root())}


def study(profile: str, jobs: int, target: str = "all", only: tuple[str, ...] = ()) -> int:
    """Run what is missing of a profile and build the book (``only``: these stages and what they read, no book);
    returns Snakemake's exit status. RunError, before anything starts, when the profile's needs are not met (see
    ``preview.require``)."""
    require(profile)
    root = paths.root()
    wanted = [f"data/runs/{profile}/{job.label}/run.json" for job in profiles.plan(profile) if job.stage in only]
    if only and not wanted:
        raise RunError(f"profile {profile} runs none of {', '.join(only)}")
    clear_stale_lock(root)
    refresh(profile)
    options = f"--snakefile notebooks/Snakefile --cores {jobs} --rerun-incomplete --config profile={profile}"
    command = [sys.executable, "-m", "snakemake", *(wanted or [target]), "--directory", str(root), *options.split()]
    command += ["--quiet", "rules", "host", "progress", "reason"]
    started = time.time()
    status = 0 if only or target == "collect" or draw(profile, jobs) else 1
    if not status:
        with subprocess.Popen(command, cwd=root, env=_environment(), stderr=subprocess.PIPE, text=True) as snakemake:
            for line in snakemake.stderr:
                if not line.startswith(CHATTER):
                    print(line, end="", file=sys.stderr, flush=True)
        status = snakemake.returncode
    if status:
        again = "mend what is named above and call it again, finished stages are kept"
        print(f"study {profile}: stopped; {again}", file=sys.stderr)
    else:
        print(f"study {profile}: done in {time.time() - started:.0f} s", flush=True)
    return status


def clear_stale_lock(root: Path, patience: float = 10.0) -> None:
    """Remove the lock of a killed Snakemake, unless one is at work in this folder."""
    locks = root / ".snakemake" / "locks"
    if not (locks.is_dir() and any(locks.iterdir())):
        return
    end = time.time() + patience  # one that is being killed needs a moment to go
    while others := running_here(root):
        if time.time() > end:
            raise RunError(f"another study is at work in this folder (process {others[0]}): wait for it, or stop it")
        time.sleep(0.5)
    for lock in locks.iterdir():
        lock.unlink()


def running_here(root: Path) -> list[int]:
    """Processes of a Snakemake that works in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                "snakemake" in process.cmdline()
                and Path(process.cwd()) == root
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


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
