"""What a profile would do, before it does anything: stages, times, memory, disk, downloads, checks.

Needs no torch, no GPU and no network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from alea_lib import budget
from alea_lib.budget import Plan, Shape
from alea_lib.runs import checks, places, rows
from alea_lib.runs.checks import Check, Needs
from alea_lib.runs.execute import check_parameters
from alea_lib.runs.imports import parameters
from alea_lib.runs.places import Job, RunError
from alea_lib.runs.record import read_record
from alea_lib.runs.rows import ModelRow
from alea_lib.runs.study import job_settings
from alea_lib.workload import CARDS, Costs, stage_seconds

IMAGES = {"02_activate": "N_IMAGES", "03_locate_layers": "N_VALIDATE", "06_measure": "N_TEST"}  # whose features are new
OWN = {"03_locate_layers": "edit", "04_locate_heads": "write", "05_adversary": "prefix", "05_edit": "edit"}


@dataclass(frozen=True)
class Preview:
    """``stages``: stage, state, seconds, source, gpu_gib, disk_gib, and dicts or lists params, reads, writes.
    ``downloads``: what, bytes, state. ``checks``: what must hold for the study to reach its end."""

    profile: str
    about: str
    stages: pd.DataFrame
    downloads: pd.DataFrame
    checks: list[Check] = field(default_factory=list)
    hours: float = 0.0
    card: str = ""  # key of CARDS that times and memory are reckoned for


@dataclass(frozen=True)
class _Model:
    """What is known of a profile's model; ``shape`` is None where its sizes are unknown or do not matter."""

    key: str
    row: ModelRow | None
    shape: Shape | None
    costs: Costs | None


def preview(profile: str) -> Preview:
    """Everything that a study of the profile would do and need. RunError for names and values that cannot be meant."""
    asked, jobs = places.load_profile(profile), places.plan(profile)
    needs = checks.read_needs(profile, asked)
    model = _model(str(asked.get("model", "")), needs)
    given = {job: resolved(profile, job) for job in jobs}
    measured = _published(profile)
    table = pd.DataFrame([_stage(profile, job, given[job], model, measured) for job in jobs])
    downloads = pd.DataFrame(_downloads(model, needs), columns=["what", "bytes", "there"])
    peak = table["gpu_gib"].max() if len(table) else float("nan")
    found = checks.run_checks(needs, model.key, model.row, peak, _left(table, downloads))
    return Preview(profile, _about(asked, model), table, downloads, found, needs.hours, needs.card)


def resolved(profile: str, job: Job) -> dict:
    """The parameters of a job, none left open. RunError names what no one sets."""
    notebook = places.root() / "notebooks" / f"{job.stage}.ipynb"
    check_parameters(notebook, profile, job.variant, {})
    settings = job_settings(profile, job)
    written = parameters(notebook)
    missing = sorted(k for k, v in written.items() if v is None and k not in settings and k != "VARIANT")
    if missing:
        raise RunError(
            f"{job.stage}: no value for {', '.join(missing)}: set it in data/profiles/{profile}.yaml under "
            f"stages: {job.stage}"
        )
    return {k: settings.get(k, v) for k, v in written.items() if k not in ("PROFILE", "VARIANT")}


def _model(key: str, needs: Needs) -> _Model:
    row = rows.model_row(key)
    if not needs.card:
        return _Model(key, row, None, None)
    shape = budget.read_shape(row.hub if row else key)
    sizes = {"four_bit": row.four_bit, "write": row.write, "read": row.read, "train": row.train or 16} if row else {}
    return _Model(key, row, shape, Costs(shape, CARDS[needs.card], **sizes))


def _stage(profile: str, job: Job, params: dict, model: _Model, measured: dict[str, float]) -> dict:
    folder = places.run_dir(profile, job.stage, job.variant)
    done = (folder / "run.json").exists()
    seconds, source = _seconds(folder if done else None, job, params, model, measured)
    return {
        "stage": job.label,
        "state": "finished" if done else "to do",
        "seconds": seconds,
        "source": source,
        "gpu_gib": _memory(job, params, model) / 2**30,
        "disk_gib": (_size(folder) if done else _disk(job, params, model)) / 2**30,
        "params": params,
        "reads": [need.label for need in job.needs] + ["results/metrics.csv"] * job.after_collect,
        "writes": folder.relative_to(places.root()).as_posix(),
    }


def _seconds(done: Path | None, job: Job, params: dict, model: _Model, measured: dict) -> tuple[float, str]:
    """Seconds of a stage, and where the number comes from: never a guess."""
    if done:
        return read_record(done)["seconds"], "measured here"
    if job.label in measured:
        return measured[job.label], "measured, data/results"
    found = stage_seconds(job.stage, job.variant, params, model.costs) if model.costs else None
    return (found, "computed") if found is not None else (float("nan"), "unknown")


def _published(profile: str) -> dict[str, float]:
    """Seconds of a profile's published runs by stage."""
    path = places.root() / "data" / "results" / profile / "runs.csv"
    if not path.exists():
        return {}
    table = pd.read_csv(path)
    return dict(zip(table["stage"], table["seconds"].astype(float)))


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
        return float("nan")
    found = budget.peak(model.shape, memory_plan(model.row, model.shape, params))
    steps = {"write", OWN.get(job.stage, "write")} | ({"prefix"} if "PREFIX_STEPS" in params else set())
    return max(found[step] for step in steps)


def _disk(job: Job, params: dict, model: _Model) -> float:
    """Bytes that a stage adds: features of images that no earlier stage has seen, a delta, what an edit keeps."""
    if not model.shape:
        return float("nan")
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
    """Bytes that the study would still write; what edits keep while they run does not add up."""
    todo = stages[stages["state"] != "finished"]
    edits = todo["stage"].str.startswith("05_edit")
    disk = todo.loc[~edits, "disk_gib"].sum() + (todo.loc[edits, "disk_gib"].max() if edits.any() else 0.0)
    missing = downloads.loc[~downloads["there"].astype(bool), "bytes"].sum()
    return (0.0 if pd.isna(disk) else disk * 2**30) + missing


def _downloads(model: _Model, needs: Needs) -> list[tuple[str, int, bool]]:
    found = []
    if model.row and model.shape:
        size = sum(budget.parameters(model.shape).values()) * budget.HALF
        found.append((f"{model.row.hub} at {model.row.revision[:12]}", size, checks.in_cache(model.row)))
    if needs.parts:
        from alea_lib.worlds.coco import load_catalogue, needed
        from alea_lib.worlds.fetch import Lock

        left = needed(load_catalogue(), list(needs.parts), Lock(places.root() / "data" / "coco"))
        found.append((f"COCO: {', '.join(needs.parts)}", left, not left))
    return found


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _about(asked: dict, model: _Model) -> str:
    text = f"world {asked.get('world', '?')}, model {model.key or '?'}"
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
    known = p.stages["seconds"].dropna()
    more = f", and {len(p.stages) - len(known)} stages of unknown time" if len(known) < len(p.stages) else ""
    allowed = f" (the profile allows for {p.hours:g} h)" if p.hours else ""
    lines += ["", f"all stages one after the other: {duration(known.sum())}{more}{allowed}"]
    lines += ["", "downloads" if len(p.downloads) else "downloads: none"]
    for d in p.downloads.to_dict("records"):
        lines.append(f"    {d['what']}: " + ("there" if d["there"] else f"{d['bytes'] / 1e9:.2f} GB"))
    lines += ["", "checks" if p.checks else "checks: none, the profile states no needs"]
    lines += [f"    {'pass' if c.ok else 'FAIL'}  {c.what}: {c.found}" for c in p.checks]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    if pd.isna(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gib(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.1f} GiB"
