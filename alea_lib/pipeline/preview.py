"""What a profile would do, before it does anything: stages, measured times, memory, disk, downloads, checks.

Needs no torch, no GPU and no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ..core import paths
from ..core.files import read_record
from ..core.paths import RunError
from ..models import hub
from ..models import memory as budget
from ..models.hub import ModelRow
from ..models.memory import Plan, Shape
from . import checks, profiles
from .checks import Check
from .profiles import Job
from .sources import parameters

IMAGES = {"02_activate": "N_IMAGES", "03_locate_layers": "N_VALIDATE", "06_measure": "N_TEST"}  # whose features are new
OWN = {"03_locate_layers": "edit", "04_locate_heads": "write", "05_adversary": "prefix", "05_edit": "edit"}
HERE, ELSEWHERE = "measured here", "measured, data/results"
OTHER, NEVER = "measured here with other parameters", "not measured"
NAN = float("nan")


class Preview(NamedTuple):
    """``stages``: stage, state, seconds, source, gpu_gib, disk_gib, params, reads, writes, command.
    ``downloads``: what, bytes, there. ``checks``: what must hold for the study to reach its end."""

    profile: str
    about: str
    stages: pd.DataFrame
    downloads: pd.DataFrame
    checks: list[Check]


class _Model(NamedTuple):
    """What is known of a profile's model; ``shape`` is None where the profile asks for no GPU."""

    key: str
    row: ModelRow | None
    shape: Shape | None


def preview(profile: str) -> Preview:
    """Everything that a study of the profile would do and need. RunError for names and values that cannot be meant."""
    asked, jobs = profiles.read_profile(profile), profiles.plan(profile)
    needs, row = asked.needs, hub.model_row(asked.model)
    shape = budget.read_shape(row.hub if row else asked.model) if needs and needs.gpu_gib else None
    model = _Model(asked.model, row, shape)
    published = _published(profile)
    table = pd.DataFrame([_stage(profile, job, model, published) for job in jobs])
    found = _downloads(model, needs.parts if needs else [])
    downloads = pd.DataFrame(found, columns=["what", "bytes", "there"])
    held = []
    if needs:
        left = _left(table, downloads)
        seconds = _known(table)[table["state"] != "finished"].sum(skipna=False)
        held = checks.run_checks(needs, model.key, row, table["gpu_gib"].max(), left, seconds)
    return Preview(profile, _about(asked.world, model), table, downloads, held)


def require(profile: str) -> None:
    """Nothing starts that cannot finish: RunError with every check that fails. A profile without needs has none."""
    if profiles.load_profile(profile).get("needs") is None:
        return
    failed = [f"{c.what}: {c.found}" for c in preview(profile).checks if not c.ok]
    if failed:
        raise RunError(f"profile {profile} cannot reach its end here, so nothing was started: {'; '.join(failed)}")


def _resolved(profile: str, job: Job, settings: dict) -> dict:
    """The parameters of a job, none left open. RunError names what no one sets."""
    notebook = paths.root() / "notebooks" / f"{job.stage}.ipynb"
    profiles.check_parameters(notebook, profile, job.variant, {})
    written = {k: v for k, v in parameters(notebook).items() if k not in ("PROFILE", "VARIANT")}
    if missing := sorted(k for k, v in written.items() if v is None and k not in settings):
        raise RunError(
            f"{job.stage}: no value for {', '.join(missing)}: set it in data/profiles/{profile}.yaml under "
            f"stages: {job.stage}"
        )
    return {k: settings.get(k, v) for k, v in written.items()}


def _stage(profile: str, job: Job, model: _Model, published: dict[str, float]) -> dict:
    folder, settings = paths.run_dir(profile, job.stage, job.variant), profiles.job_settings(profile, job)
    params = _resolved(profile, job, settings)
    record = read_record(folder) if (folder / "run.json").exists() else None
    done = record is not None and all(record["params"].get(name) == value for name, value in settings.items())
    if record and (done or job.label not in published):
        seconds, source = record["seconds"], HERE if done else OTHER
    else:
        seconds, source = published.get(job.label, NAN), ELSEWHERE if job.label in published else NEVER
    return {
        "stage": job.label,
        "state": "finished" if done else "to do",
        "seconds": seconds,
        "source": source,
        "gpu_gib": _memory(job, params, model) / 2**30,
        "disk_gib": (_size(folder) if done else _disk(job, params, model)) / 2**30,
        "params": params,
        "reads": [need.label for need in job.needs] + ["results/metrics.csv"] * job.after_collect,
        "writes": folder.relative_to(paths.root()).as_posix(),
        "command": profiles.command(job.stage, job.variant, profile),
    }


def _published(profile: str) -> dict[str, float]:
    """Seconds of a profile's published runs by stage."""
    path = paths.root() / "data" / "results" / profile / "runs.csv"
    return pd.read_csv(path).set_index("stage")["seconds"].astype(float).to_dict() if path.exists() else {}


def memory_plan(row: ModelRow, shape: Shape, params: dict) -> Plan:
    """How a stage with these parameters uses the card."""
    layers = params.get("LAYERS") or list(range(shape.layers // 2, shape.layers // 2 + 2))  # located ones: assumed
    return Plan(
        four_bit=row.four_bit,
        edited=len(layers),
        first=min(layers),
        unquantised=shape.layers if "down_proj" in row.unquantised else len(layers),
        batch=row.train or 16,
        prefix_length=params.get("PREFIX_LENGTH", 5),
        write_batch=row.write,
        max_new_tokens=params.get("MAX_NEW_TOKENS", 64),
        each=budget.FULL if row.dtype == "float32" else budget.HALF,
    )


def _memory(job: Job, params: dict, model: _Model) -> float:
    """Largest GPU memory in bytes; nan where it is not known, or no model is run."""
    if not model.shape or not model.row or "MODEL" not in params:
        return NAN
    found = budget.peak(model.shape, memory_plan(model.row, model.shape, params))
    steps = {"write", OWN.get(job.stage, "write")} | ({"prefix"} if "PREFIX_STEPS" in params else set())
    return max(found[step] for step in steps)


def _disk(job: Job, params: dict, model: _Model) -> float:
    """Bytes that a stage adds: features of images that no earlier stage has read, a delta, what an edit keeps."""
    if not model.shape:
        return NAN
    first = job.stage in IMAGES and job.variant in ("", "base")
    images = params.get(IMAGES.get(job.stage, ""), 0) if first and model.row and model.row.cache else 0
    need = float(budget.features_bytes(model.shape, images))
    if job.stage == "05_edit":
        plan = memory_plan(model.row, model.shape, params) if model.row else Plan()
        conditions = 3 if "mixed" in job.variant else 2  # clean, under the prefix, and the KL's prompt
        need += plan.edited * budget.matrices(model.shape)["down_proj"] * budget.FULL
        need += conditions * budget.cache_bytes(params["N_PAIRS"], plan.tokens, model.shape.width, plan.each)
    return need


def _left(stages: pd.DataFrame, downloads: pd.DataFrame) -> float:
    """Bytes that the study would still write, nan where they are not known; what edits keep while they run does not
    add up."""
    todo = stages[stages["state"] != "finished"]
    edits = todo["stage"].str.startswith("05_edit")
    disk = todo.loc[~edits, "disk_gib"].sum(skipna=False) + (todo.loc[edits, "disk_gib"].max() if edits.any() else 0.0)
    return disk * 2**30 + downloads.loc[~downloads["there"].astype(bool), "bytes"].sum()


def _known(stages: pd.DataFrame) -> pd.Series:
    """Measured seconds; nan where a stage was not measured as it would run."""
    return stages["seconds"].where(stages["source"] != OTHER)


def _downloads(model: _Model, parts: list[str]) -> list[tuple[str, int, bool]]:
    found = []
    if model.row and model.shape:
        size = sum(budget.parameters(model.shape).values()) * budget.HALF
        found.append((f"{model.row.hub} at {model.row.revision[:12]}", size, checks.in_cache(model.row)))
    if parts:
        from ..datasets.coco import load_catalogue, needed

        left = needed(load_catalogue(), parts, paths.root() / "data" / "coco")
        found.append((f"COCO: {', '.join(parts)}", left, not left))
    return found


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _about(world: str, model: _Model) -> str:
    text = f"world {world or '?'}, model {model.key or '?'}"
    if row := model.row:
        text += f" ({row.hub} at {row.revision[:12]}, {row.dtype}{', NF4' if row.four_bit else ''})"
    return text


# ---- shown -----------------------------------------------------------------------------------------------------------


def text(p: Preview) -> str:
    """The preview as text, for a terminal."""
    lines = [f"profile {p.profile}: {p.about}", "", f"{'stage':<32}{'time':>10}  {'GPU':>9}  {'disk':>9}  from"]
    for s in p.stages.to_dict("records"):
        lines.append(
            f"{s['stage']:<32}{duration(s['seconds']):>10}  {gib(s['gpu_gib']):>9}  {gib(s['disk_gib']):>9}  "
            f"{s['source']}{' (finished)' if s['state'] == 'finished' else ''}"
        )
        lines.append(f"    {' '.join(f'{k}={json.dumps(v)}' for k, v in s['params'].items()) or 'no parameters'}")
        lines.append(f"    reads {', '.join(s['reads']) or 'no other stage'}; writes {s['writes']}")
    lines += ["", *_total(p), "", "downloads" if len(p.downloads) else "downloads: none"]
    for d in p.downloads.to_dict("records"):
        lines.append(f"    {d['what']}: " + ("there" if d["there"] else f"{d['bytes'] / 1e9:.2f} GB"))
    lines += ["", "checks" if p.checks else "checks: none, the profile states no needs"]
    lines += [f"    {'pass' if c.ok else 'FAIL'}  {c.what}: {c.found}" for c in p.checks]
    return "\n".join(lines)


def _total(p: Preview) -> list[str]:
    """The sum of the measured times, and how to measure the others."""
    known = _known(p.stages)
    unknown = p.stages[known.isna()]
    total = f"all stages one after the other: {duration(known.sum())}"
    if unknown.empty:
        return [total]
    probe = f'{unknown["command"].iloc[0]} PARAMS="NAME=VALUE ..."'
    lines = [f"{total}, and {len(unknown)} stages of unknown time"] if len(unknown) < len(known) else []
    return [*lines, f"not measured: run it once, or a short probe with small numbers, e.g. {probe}"]


def duration(seconds: float) -> str:
    if pd.isna(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gib(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.1f} GiB"
