"""Join the stages' own tables into the ones that pages read."""

import json
from pathlib import Path

import pandas as pd

from ..core import paths
from ..core.files import read_record
from ..core.paths import MissingStage, RunError
from . import profiles
from .profiles import Job
from .sources import sources_id

RUN_COLUMNS = (
    "run_id", "stage", "git_commit", "dirty", "started_utc", "seconds", "device", "peak_mib", "threads",
    "torch", "transformers", "params_json", "inputs_sha256", "sources_sha256",
)  # fmt: skip
LARGE = 500_000  # bytes of a table
JOINED = ("localisation", "robustness", "ablations", "rivals", "tuning", "timing-cost")  # of single stages
NAMES = ("metrics", "notes", "runs", *JOINED)


def finished(profile: str, jobs: list[Job]) -> list[Path]:
    """The folders of the jobs, all of them finished."""
    folders = []
    for job in jobs:
        folder = paths.run_dir(profile, job.stage, job.variant)
        if not (folder / "run.json").exists():
            how = profiles.command(job.stage, job.variant, profile)
            raise MissingStage(f"{job.label} is not finished: {how}")
        folders.append(folder)
    return folders


def collect(profile: str) -> Path:
    """Write metrics.csv, notes.csv, runs.csv and the JOINED tables of a profile; returns their folder."""
    folders = finished(profile, [job for job in profiles.plan(profile) if not job.after_collect])
    out = paths.results_dir(profile)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables(folders).items():
        _write(name, table, out / f"{name}.csv")
    return out


def tables(folders: list[Path]) -> dict[str, pd.DataFrame]:
    """The joined tables of these runs, by name."""
    from ..core.tables import METRIC_COLUMNS

    notes = _join(folders, "notes.csv", ["stage"])
    return {
        "metrics": _join(folders, "scores.csv", list(METRIC_COLUMNS)),
        "notes": notes.sort_values(list(notes.columns), kind="stable"),
        "runs": run_table(folders),
        **{name: _join_with_run(folders, f"{name}.csv") for name in JOINED},
    }


def _write(name: str, table: pd.DataFrame, path: Path) -> None:
    from ..core.files import write_csv
    from ..core.tables import write_metrics

    if name != "metrics":
        return write_csv(table, path)
    try:
        write_metrics(table, path, declared_only=False)  # each stage has checked its own methods
    except ValueError as error:
        raise RunError(f"the stages' scores do not make one table: {error}") from error


def _join_with_run(folders: list[Path], name: str) -> pd.DataFrame:
    """The tables of that name, with the run that each row comes from; a bare header where no stage has one."""
    from ..core.tables import read_csv

    parts = [read_csv(f / name).assign(run_id=read_record(f)["run_id"]) for f in folders if (f / name).exists()]
    return pd.concat([pd.DataFrame(columns=["run_id"]), *parts], ignore_index=True)


def publish(profile: str, stages: tuple[str, ...] = ()) -> Path:
    """Copy a profile's joined tables to data/results/<profile>, where they are committed; returns that folder.

    ``stages``: publish the finished runs of these stages alone, of all their variants or of those that are named
    ("10_seeds-s1"); what other runs have published stays, and rows of an earlier run of the same stage and variant
    go. Tables larger than LARGE bytes become Parquet, a twentieth of the size. RunError for a stage that the profile
    does not run.
    """
    jobs = [job for job in profiles.plan(profile) if not job.after_collect]
    target = paths.root() / "data" / "results" / profile
    if unknown := sorted(set(stages) - {name for job in jobs for name in (job.stage, job.label)}):
        raise RunError(
            f"profile {profile} runs no {', '.join(unknown)}; it has {', '.join({j.stage: 0 for j in jobs})}"
        )
    if not stages:
        source = paths.results_dir(profile)
        if not any(source.glob("*.csv")):
            raise MissingStage(f"profile {profile} has no joined tables: make study PROFILE={profile}")
        found, old = tables(finished(profile, jobs)), {}
    else:
        found = tables(finished(profile, [job for job in jobs if {job.stage, job.label} & set(stages)]))
        old = {name: _published(target, name) for name in found}
    for name, table in _merged(old, found).items():
        _publish_table(name, table, target)
    return target


def _published(folder: Path, name: str) -> pd.DataFrame:
    """A table of data/results, empty if there is none."""
    from ..core.files import read_parquet
    from ..core.tables import read_csv

    for path, read in ((folder / f"{name}.csv", read_csv), (folder / f"{name}.parquet", read_parquet)):
        if path.exists():
            return read(path)
    return pd.DataFrame()


def _merged(old: dict[str, pd.DataFrame], found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What was published, without the rows of runs whose stage has a new one, and the new rows."""
    if not old:
        return found
    before = old["runs"]
    renewed = before[before["stage"].isin(found["runs"]["stage"])] if len(before) else before
    gone = set(renewed["run_id"]) if len(renewed) else set()
    out = {}
    for name, table in found.items():
        key, drop = ("stage", set(found["runs"]["stage"])) if name == "notes" else ("run_id", gone)
        kept = old[name][~old[name][key].isin(drop)] if len(old[name]) else old[name]
        out[name] = pd.concat([kept, table], ignore_index=True) if len(kept) else table
    out["runs"] = out["runs"].sort_values("stage", kind="stable")
    return out


def _publish_table(name: str, table: pd.DataFrame, target: Path) -> None:
    """As CSV or, where that is large, as Parquet; the other form of an earlier time goes."""
    from ..core.files import write_parquet
    from ..core.tables import read_csv

    target.mkdir(parents=True, exist_ok=True)
    small, large = target / f"{name}.csv", target / f"{name}.parquet"
    if name in JOINED and not len(table):
        return
    _write(name, table, small)
    if small.stat().st_size > LARGE:
        write_parquet(read_csv(small), large)
        small.unlink()
    else:
        large.unlink(missing_ok=True)


def _join(folders: list[Path], name: str, first: list[str]) -> pd.DataFrame:
    """The tables of that name from all folders, one below the other; `stage` is added if it is asked for."""
    from ..core.tables import read_csv

    parts = []
    for folder in folders:
        if (folder / name).exists():
            part = read_csv(folder / name)
            parts.append(part.assign(stage=folder.name) if "stage" in first else part)
    parts = [part for part in parts if len(part)]
    joined = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=first)
    return joined[[*first, *(column for column in joined.columns if column not in first)]]


def run_table(folders: list[Path]) -> pd.DataFrame:
    """One row a run: which code, when, how long, on what."""
    rows = []
    for folder in folders:
        record = read_record(folder)
        stage = Job(record["stage"], record["variant"]).label
        params = json.dumps(record["params"], sort_keys=True)
        code = sources_id(record.get("sources", {}))
        rows.append({**record, "stage": stage, "params_json": params, "sources_sha256": code})
    return pd.DataFrame(rows, columns=list(RUN_COLUMNS)).sort_values("stage", kind="stable")
