"""One run of one stage: its parameters, what it read, what it wrote, and the record that says it finished."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from ..core import paths
from ..core.files import hash_of, read_record, sha256, write_json
from ..core.paths import MissingStage, RunError
from ..core.tables import METRIC_COLUMNS, write_metrics
from ..models import hub
from . import profiles
from .checks import version
from .sources import Sources, source_hashes

# Files that hold times or names of runs may differ between equal runs: recorded, but no part of a run's id.
UNSTABLE = ("run.json", "*.ipynb", "scores.csv", "notes.csv", "localisation.csv", "timing*", "*.log", "checkpoint*")


def begin(stage: str, profile: str, variant: str = "", **params) -> "Run":
    """Start a stage: parameters that are None take the profile's value, the folder is made ready."""
    asked, where = profiles.load_profile(profile), f"data/profiles/{profile}.yaml"
    section = profiles.settings(asked, stage, variant)
    if unknown := sorted(set(section) - set(params)):
        raise RunError(
            f"{where} sets {', '.join(unknown)} for {stage}, which has no such parameter (it has {', '.join(params)})"
        )
    values = {**profiles.common(asked), **section}
    given = {name: value for name, value in params.items() if value is not None}
    if missing := [name for name in params if name not in given and name not in values]:
        raise RunError(
            f"{stage}: no value for {', '.join(missing)}: set it in {where} under stages: {stage}, or in the notebook"
        )
    try:  # tuples and lists alike, and nothing that cannot be recorded
        resolved = json.loads(json.dumps({name: given.get(name, values.get(name)) for name in params}))
    except TypeError as error:
        raise RunError(f"{stage}: parameters must be numbers, texts, lists or mappings of these ({error})") from None
    return Run(stage, profile, variant, resolved, set(given))


class Run:
    """A stage at work: declare what it reads by `input` and `uses`, write into `dir`, then call `finish`."""

    def __init__(self, stage: str, profile: str, variant: str, params: dict, given: set[str]):
        self.stage, self.profile, self.variant = stage, profile, variant
        self.params, self._given = params, given
        self.p = SimpleNamespace(**params)
        self.inputs: dict[str, dict] = {}
        self._run_id = ""
        self._started = time.time()
        notebook = paths.root() / "notebooks" / f"{stage}.ipynb"  # now: what changes while this runs did not make it
        self._sources = source_hashes(notebook, params, variant) if notebook.exists() else Sources({}, {})
        self.dir = _free_folder(stage, profile, variant)
        _make_ready(self.dir)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if "torch" in sys.modules:  # one thread: sums come in one order, results are equal to the byte
            sys.modules["torch"].set_num_threads(1)

    @property
    def run_id(self) -> str:
        """Hash of stage, variant, parameters and inputs; once it is read no further input may be declared."""
        self._run_id = self._run_id or hash_of([self.stage, self.variant, self.params, self.inputs])[:16]
        return self._run_id

    def table(self) -> pd.DataFrame:
        """The parameters in force, to be shown at the top of the notebook."""
        rows = [("PROFILE", self.profile, "notebook")]
        rows += [("VARIANT", self.variant, "notebook")] if self.variant else []
        rows += [(k, v, "notebook" if k in self._given else "profile") for k, v in self.params.items()]
        return pd.DataFrame(rows, columns=["parameter", "value", "set in"]).set_index("parameter").astype(str)

    def input(self, stage: str, variant: str = "") -> Path:
        """The folder of a finished upstream run, recorded as something this run read."""
        folder = paths.run_dir(self.profile, stage, variant)
        if not (folder / "run.json").exists():
            raise MissingStage(
                f"{self.stage} reads {folder.name}, which is not finished: "
                f"{profiles.command(stage, variant, self.profile)}"
            )
        record = read_record(folder)
        self._declare(folder.name, {"run_id": record["run_id"], "sha256": record["outputs_sha256"]})
        return folder

    def uses(self, path: Path | str) -> Path:
        """A file or folder of the repository outside the runs (model, data), recorded by its content.

        ``data/models/<key>/...`` of a model that is not in the repository stands for the model: one of data/hub.yaml or
        of the hub is recorded by its revision and how it is loaded, one in another folder by its files.
        """
        path = paths.root() / path
        if path.exists():
            self._declare(_name(path), {"sha256": sha256(path)})
        elif found := hub.outside(path):
            self._declare(*found)
        else:
            raise RunError(f"{self.stage} reads {path.name}, which is not there ({_name(path)})")
        return path

    def results(self) -> Path:
        """The folder of the joined tables, for pages that compare runs: metrics.csv is declared as read, others of
        its tables are to be declared by ``uses``."""
        folder = paths.results_dir(self.profile)
        if not (folder / "metrics.csv").exists():
            raise MissingStage(f"{self.stage} reads the joined tables: make study PROFILE={self.profile}")
        self.uses(folder / "metrics.csv")
        return folder

    def _declare(self, name: str, content: dict) -> None:
        if self._run_id and self.inputs.get(name) != content:
            raise RunError(f"{self.stage}: declare {name} before run.run_id is read, it is part of it")
        self.inputs[name] = content

    def checkpoint(self, name: str) -> Path:
        """Where to save work in progress: found again after a kill if nothing it depends on changed."""
        return self.dir / f"checkpoint-{hash_of([self.run_id, self._sources.numbers])[:12]}-{name}"

    def finish(self, scores: pd.DataFrame | None = None) -> pd.DataFrame:
        """Write scores.csv, then the record that says this run is finished; returns the stamp to be shown."""
        if scores is not None:
            self._write_scores(scores)
        for path in self.dir.glob("checkpoint*"):  # a finished run needs none
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        record = self._record()
        write_json(self.dir / "run.json", record)
        shown = ("run_id", "git_commit", "dirty", "started_utc", "seconds", "device", "torch", "transformers")
        return pd.DataFrame({"stamp": {key: str(record[key]) for key in shown}})

    def _write_scores(self, scores: pd.DataFrame) -> None:
        """The rows of this run for metrics.csv, checked here so that a mistake shows where it was made."""
        rows = scores.assign(run_id=self.run_id, profile=self.profile)
        known = [column for column in METRIC_COLUMNS if column in rows]
        rows = rows[known + [column for column in rows if column not in known]]
        write_metrics(rows, self.dir / "scores.csv")

    def _record(self) -> dict:
        outputs = {
            _name(path, self.dir): sha256(path)
            for path in sorted(self.dir.rglob("*"))
            if path.is_file() and path.suffix != ".ipynb" and path.name != "run.json"
        }
        stable = {name: value for name, value in outputs.items() if not any(Path(name).match(p) for p in UNSTABLE)}
        return {
            "run_id": self.run_id,
            "stage": self.stage,
            "variant": self.variant,
            "profile": self.profile,
            "params": self.params,
            "inputs": self.inputs,
            "inputs_sha256": hash_of(self.inputs),
            "sources": self._sources.numbers,
            "page_sources": self._sources.page,
            "outputs": outputs,
            "outputs_sha256": hash_of(stable),
            "started_utc": datetime.fromtimestamp(self._started, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": round(time.time() - self._started, 1),
            **code(),
            **_machine(),
        }


def _free_folder(stage: str, profile: str, variant: str) -> Path:
    """The run's folder; one beside it where a finished run lies (``execute`` has removed that before)."""
    folder = paths.run_dir(profile, stage, variant)
    if not (folder / "run.json").exists():
        return folder
    aside = folder.with_name(f"{folder.name}.by-hand")
    how = profiles.command(stage, variant, profile)
    print(f"{folder.name} is finished: this run writes to {_name(aside)}, which no stage reads (to renew it: {how})")
    return aside


def _make_ready(folder: Path) -> None:
    """Remove what an earlier run left, its record first; checkpoints and the notebook being executed stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.suffix != ".ipynb" and not path.name.startswith("checkpoint"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _name(path: Path, base: Path | None = None) -> str:
    """A path in records: relative to the repository; outside it the bare name (no machine's paths)."""
    base = base or paths.root()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name


def code() -> dict:
    """Commit and versions."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=paths.root(), capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "git_commit": git("rev-parse", "HEAD") or "none",
        "dirty": changes is None or bool(changes),
        "python": platform.python_version(),
        "torch": version("torch") or "none",
        "transformers": version("transformers") or "none",
    }


def _machine() -> dict:
    """Device, peak memory and threads of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20
    else:
        device, peak = f"cpu {platform.machine()}, {os.cpu_count()} cores", _peak_resident_mib()
    return {
        "device": device,
        "peak_mib": round(peak),
        "threads": torch.get_num_threads() if torch is not None else 1,
    }


def _peak_resident_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0.0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
