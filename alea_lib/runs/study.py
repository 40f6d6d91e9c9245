"""The whole study: drop what is stale, let Snakemake run what is missing, leave nothing behind if killed."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from alea_lib.runs import places, rows
from alea_lib.runs.checks import require
from alea_lib.runs.execute import check_parameters
from alea_lib.runs.guard import changed
from alea_lib.runs.imports import parameters, source_hashes
from alea_lib.runs.places import Job, RunError
from alea_lib.runs.record import read_record, sha256

# What Snakemake says beside errors (--quiet all would hide those too), or after one that a stage explained.
CHATTER = (
    "Assuming unrestricted", "Building DAG", "Using shell", "Provided cores", "Rules claiming", "Select jobs",
    "Execute ", "Nothing to be done", "Complete log", "Elapsed time", "RuleException:", "Shutting down",
    "CalledProcessError in", "Command 'set -euo", "Exiting because", "WorkflowError:", "At least one job",
)  # fmt: skip


def job_settings(profile: str, job: Job) -> dict:
    """The parameters a profile gives to a job: its section, and the common ones its notebook asks for."""
    asked = places.load_profile(profile)
    names = parameters(places.root() / "notebooks" / f"{job.stage}.ipynb")
    shared = {key: value for key, value in places.common(asked).items() if key in names}
    return {**shared, **places.settings(asked, job.stage, job.variant)}


def stale_reason(profile: str, job: Job) -> str:
    """Why a finished run no longer stands for the profile ('' if it does, or if there is none)."""
    folder = places.run_dir(profile, job.stage, job.variant)
    if not (folder / "run.json").exists():
        return ""
    if not (folder / "notebook.ipynb").exists():
        return "it has no finished notebook"
    record = read_record(folder)
    for name, value in job_settings(profile, job).items():
        if record["params"].get(name) != value:
            return f"it was run with {name}={record['params'].get(name)}"
    for reason in changed(record, source_hashes(places.root() / "notebooks" / f"{job.stage}.ipynb")):
        return reason
    written = (folder / "run.json").stat().st_mtime
    for name, content in record["inputs"].items():
        path = places.root() / name
        key = name.removeprefix("data/hub.yaml: ")
        if key != name and (row := rows.model_row(key)) and rows.fingerprint(row) != content:
            return f"the row of {key} in data/hub.yaml has changed"
        if "run_id" in content or not path.exists():
            continue
        newest = max(
            [path.stat().st_mtime, *(p.stat().st_mtime for p in path.rglob("*"))]
            if path.is_dir()
            else [path.stat().st_mtime]
        )
        if newest > written and sha256(path) != content["sha256"]:
            return f"{name} has changed"
    return ""


def refresh(profile: str) -> None:
    """Check every notebook's parameters, and drop records that no longer stand, so that they are run again.

    Snakemake compares times and the profile; this sees what it cannot: a run by hand with other parameters,
    a changed model or data file, a run that was killed between its record and its notebook.
    """
    for job in places.plan(profile):
        check_parameters(places.root() / "notebooks" / f"{job.stage}.ipynb", profile, job.variant, {})
        reason = stale_reason(profile, job)
        if reason:
            print(f"stage {job.label} will run again: {reason}", flush=True)
            (places.run_dir(profile, job.stage, job.variant) / "run.json").unlink()


def study(profile: str, jobs: int, target: str = "all", only: tuple[str, ...] = ()) -> int:
    """Run what is missing of a profile and build the book (``only``: these stages and what they read, no book);
    returns Snakemake's exit status. RunError, before anything starts, when the profile's needs are not met (see
    ``checks.require``)."""
    require(profile)
    root = places.root()
    wanted = [f"data/runs/{profile}/{job.label}/run.json" for job in places.plan(profile) if job.stage in only]
    if only and not wanted:
        raise RunError(f"profile {profile} runs none of {', '.join(only)}")
    clear_stale_lock(root)
    refresh(profile)
    options = f"--snakefile notebooks/Snakefile --cores {jobs} --rerun-incomplete --config profile={profile}"
    command = [sys.executable, "-m", "snakemake", *(wanted or [target]), "--directory", str(root), *options.split()]
    command += ["--quiet", "rules", "host", "progress", "reason"]
    environment = {**os.environ, "ALEA_WATCH": str(os.getpid()), "ALEA_ROOT": str(root)}
    started = time.time()
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as snakemake:
        for line in snakemake.stderr:
            if not line.startswith(CHATTER):
                print(line, end="", file=sys.stderr, flush=True)
    if snakemake.returncode == 0:
        print(f"study {profile}: done in {time.time() - started:.0f} s", flush=True)
    else:
        print(
            f"study {profile}: stopped; mend what is named above and call it again, finished stages are kept",
            file=sys.stderr,
        )
    return snakemake.returncode


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
