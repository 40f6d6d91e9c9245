"""Join the stages' own tables into the ones that pages read."""

import json
from pathlib import Path

import pandas as pd

from ..core import paths
from ..core.files import read_parquet, read_record, write_csv, write_parquet
from ..core.paths import MissingStage, RunError
from ..core.tables import METRIC_COLUMNS, read_csv, write_metrics
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
    notes = [table.assign(stage=folder.name) for table, folder in _read(folders, "notes.csv")]
    joined = {
        "metrics": _join([table for table, _ in _read(folders, "scores.csv")], list(METRIC_COLUMNS)),
        "notes": _join(notes, ["stage"]),
        "runs": run_table(folders),
    }
    joined["notes"] = joined["notes"].sort_values(list(joined["notes"].columns), kind="stable")
    for name in JOINED:  # with the run that each row comes from; a bare header where no stage has one
        found = [table.assign(run_id=read_record(folder)["run_id"]) for table, folder in _read(folders, f"{name}.csv")]
        joined[name] = pd.concat([pd.DataFrame(columns=["run_id"]), *found], ignore_index=True)
    return joined


def _read(folders: list[Path], name: str) -> list[tuple[pd.DataFrame, Path]]:
    return [(read_csv(folder / name), folder) for folder in folders if (folder / name).exists()]


def _join(tables: list[pd.DataFrame], first: list[str]) -> pd.DataFrame:
    """One below the other, these columns first."""
    filled = [table for table in tables if len(table)]
    joined = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=first)
    return joined[[*first, *joined.columns.drop(first)]]


def _write(name: str, table: pd.DataFrame, path: Path) -> None:
    if name != "metrics":
        return write_csv(table, path)
    try:
        write_metrics(table, path, declared_only=False)  # each stage has checked its own methods
    except ValueError as error:
        raise RunError(f"the stages' scores do not make one table: {error}") from error


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
    if stages:
        jobs = [job for job in jobs if {job.stage, job.label} & set(stages)]
    elif not any(paths.results_dir(profile).glob("*.csv")):
        raise MissingStage(f"profile {profile} has no joined tables: make study PROFILE={profile}")
    found = tables(finished(profile, jobs))
    if stages:
        found = _merged({name: _published(target, name) for name in found}, found)
    for name, table in found.items():
        _publish_table(name, table, target)
    return target


def _published(folder: Path, name: str) -> pd.DataFrame:
    """A table of data/results, empty if there is none."""
    for path, read in ((folder / f"{name}.csv", read_csv), (folder / f"{name}.parquet", read_parquet)):
        if path.exists():
            return read(path)
    return pd.DataFrame(columns=["run_id", "stage"])


def _merged(old: dict[str, pd.DataFrame], found: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """What was published, without the rows of runs whose stage has a new one, and the new rows."""
    stages = found["runs"]["stage"]
    gone = old["runs"].loc[old["runs"]["stage"].isin(stages), "run_id"]
    out = {}
    for name, table in found.items():
        kept = old[name]
        kept = kept[~(kept["stage"].isin(stages) if name == "notes" else kept["run_id"].isin(gone))]
        out[name] = pd.concat([kept, table], ignore_index=True) if len(kept) else table
    out["runs"] = out["runs"].sort_values("stage", kind="stable")
    return out


def _publish_table(name: str, table: pd.DataFrame, target: Path) -> None:
    """As CSV or, where that is large, as Parquet; the other form of an earlier time goes."""
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
