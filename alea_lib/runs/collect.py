"""Join the stages' own tables into the ones that pages read."""

import json
from pathlib import Path

import pandas as pd

from alea_lib.runs import places
from alea_lib.runs.imports import sources_id
from alea_lib.runs.places import Job, MissingStage, RunError
from alea_lib.runs.record import read_record

RUN_COLUMNS = (
    "run_id", "stage", "git_commit", "dirty", "started_utc", "seconds", "device", "peak_mib", "threads",
    "torch", "transformers", "params_json", "inputs_sha256", "sources_sha256",
)  # fmt: skip
LARGE = 1_000_000  # bytes of a table


def finished(profile: str, jobs: list[Job]) -> list[Path]:
    """The folders of the jobs, all of them finished."""
    folders = []
    for job in jobs:
        folder = places.run_dir(profile, job.stage, job.variant)
        if not (folder / "run.json").exists():
            how = places.command(job.stage, job.variant, profile)
            raise MissingStage(f"{job.label} is not finished: {how}")
        folders.append(folder)
    return folders


def collect(profile: str) -> Path:
    """Write metrics.csv, notes.csv, runs.csv and localisation.csv of a profile; returns their folder."""
    from alea_lib.tables import METRIC_COLUMNS, write_csv, write_metrics

    folders = finished(profile, [job for job in places.plan(profile) if not job.after_collect])
    out = places.results_dir(profile)
    out.mkdir(parents=True, exist_ok=True)
    scores = _join(folders, "scores.csv", list(METRIC_COLUMNS))
    try:
        write_metrics(scores, out / "metrics.csv")
    except ValueError as error:
        raise RunError(f"the stages' scores do not make one table: {error}") from error
    notes = _join(folders, "notes.csv", ["stage"])
    write_csv(notes.sort_values(list(notes.columns), kind="stable"), out / "notes.csv")
    write_csv(run_table(folders), out / "runs.csv")
    _join_located(folders, out / "localisation.csv")
    return out


def _join_located(folders: list[Path], path: Path) -> None:
    """The tables localisation.csv of the stages that tried locators, with the run that each row comes from."""
    from alea_lib.tables import read_csv, write_csv

    found = [f for f in folders if (f / "localisation.csv").exists()]
    parts = [read_csv(f / "localisation.csv").assign(run_id=read_record(f)["run_id"]) for f in found]
    joined = pd.concat([pd.DataFrame(columns=["run_id"]), *parts], ignore_index=True)  # no such stage: a bare header
    write_csv(joined, path)


def publish(profile: str) -> Path:
    """Copy a profile's joined tables to data/results/<profile>, where they are committed; returns that folder.

    Tables larger than LARGE bytes become Parquet, a twentieth of the size.
    """
    from alea_lib.tables import read_csv, replacing, write_parquet

    source, target = places.results_dir(profile), places.root() / "data" / "results" / profile
    tables = sorted(source.glob("*.csv"))
    if not tables:
        raise MissingStage(f"profile {profile} has no joined tables: make study PROFILE={profile}")
    for table in tables:
        if table.stat().st_size > LARGE:
            write_parquet(read_csv(table), target / f"{table.stem}.parquet")
            continue
        with replacing(target / table.name) as temporary:
            temporary.write_bytes(table.read_bytes())
    return target


def _join(folders: list[Path], name: str, first: list[str]) -> pd.DataFrame:
    """The tables of that name from all folders, one below the other; `stage` is added if it is asked for."""
    from alea_lib.tables import read_csv

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
