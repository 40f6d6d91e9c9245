"""What a profile asks for: its parameters by stage and variant, and the plan of its jobs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter

from ..core.paths import RunError, nearest, read_data, read_yaml, root
from ..core.schema import Dtype, Strict, validated
from .sources import parameters

# of a stage, untyped: names are compared with the notebook's own (``profiles.check_parameters``)
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda values: {} if values is None else values)]


class Needs(Strict):
    """The section ``needs`` of a profile. ``gpu_gib``: memory of the card; ``disk_gib`` for everything, downloads
    included; ``download_gb`` in 10^9 bytes; ``hours``: of all stages; ``parts`` of the world's downloads."""

    gpu_gib: float = Field(0.0, ge=0)
    dtype: Dtype = "float32"
    host_gib: float = Field(0.0, ge=0)
    disk_gib: float = Field(0.0, ge=0)
    download_gb: float = Field(0.0, ge=0)
    hours: float = Field(0.0, ge=0)
    parts: list[str] = []


def _named(variants: Any) -> Any:
    """A list of variants as a mapping of variants to the parameters in which they differ."""
    return dict.fromkeys(variants) if isinstance(variants, list) else variants or {}


class Profile(Strict):
    """data/profiles/<name>.yaml. Plain values serve every stage whose notebook has a parameter of that name."""

    world: str = ""
    model: str = ""
    detector: str = ""
    four_bit: bool = False
    max_new_tokens: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    book: bool = True
    note: str = ""
    needs: Needs | None = None
    stages: dict[str, Parameters] = Field(min_length=1)
    variants: dict[str, Annotated[dict[str, Parameters], BeforeValidator(_named)]] = {}
    page_variant: dict[str, str] = {}


Reads = TypeAdapter(dict[str, Annotated[list[str], BeforeValidator(lambda entries: entries or [])]])


@dataclass(frozen=True)
class Job:
    """One notebook run of a profile: a stage, perhaps in a variant, and the jobs it reads."""

    stage: str
    variant: str = ""
    needs: tuple[Job, ...] = ()
    after_collect: bool = False  # reads results/metrics.csv, so it is not part of it

    @property
    def label(self) -> str:
        return f"{self.stage}-{self.variant}" if self.variant else self.stage


def before(job: Job) -> set[Job]:
    """All jobs that must be finished before this one."""
    return {earlier for need in job.needs for earlier in (need, *before(need))}


def read_profile(name: str) -> Profile:
    """data/profiles/<name>.yaml. RunError for a name, key or value that cannot be meant."""
    folder = root() / "data" / "profiles"
    if not (folder / f"{name}.yaml").exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        listed = ", ".join(known) or "none"
        raise RunError(f"no profile '{name}': the profiles are {listed} (data/profiles){nearest([name], known)}")
    where = f"data/profiles/{name}.yaml"
    profile = validated(Profile, read_data(f"profiles/{name}") or {}, where)
    for key in ("variants", "page_variant"):
        for stage in set(getattr(profile, key)) - set(profile.stages):
            hint = nearest([stage], profile.stages)
            raise RunError(f"{where}: `{key}` names {stage}, which is not among its stages{hint}")
    for stage, variant in profile.page_variant.items():
        if variant not in (there := profile.variants.get(stage, {})):
            raise RunError(f"{where}: page_variant: {stage} is {variant!r}, it must be one of {', '.join(there)}")
    return profile


def load_profile(name: str) -> dict:
    """The profile as a dict of what its file says; `stages`, `variants` and `page_variant` are always there."""
    profile = read_profile(name)
    always = {key: getattr(profile, key) for key in ("stages", "variants", "page_variant")}
    return {**profile.model_dump(exclude_unset=True), **always}


def settings(profile: dict, stage: str, variant: str = "") -> dict:
    """What the profile says for a stage: its section, then the variant's differences."""
    if stage not in profile["stages"]:
        raise RunError(f"the profile has no section `{stage}` under `stages:` (it has {', '.join(profile['stages'])})")
    return {**profile["stages"][stage], **profile["variants"].get(stage, {}).get(variant, {})}


def common(profile: dict) -> dict:
    """Top-level plain values (world, model, seed, ...) as parameters that any stage may ask for by name."""
    return {key.upper(): value for key, value in profile.items() if not isinstance(value, (dict, list))}


def command(stage: str, variant: str, profile: str) -> str:
    """The command that makes one run; in Colab, where nothing is set up by make, one that makes what it reads too."""
    if "google.colab" in sys.modules:
        chosen = f" --variant {variant}" if variant else ""
        return f"!python -m alea_lib.pipeline execute {stage}{chosen} --profile {profile} --needed"
    return f"make run NB={stage}" + (f" VARIANT={variant}" if variant else "") + f" PROFILE={profile}"


def plan(name: str) -> list[Job]:
    """All jobs of a profile, each after the ones it reads (notebooks/stages.yaml says what reads what)."""
    profile, path = load_profile(name), root() / "notebooks" / "stages.yaml"
    reads = validated(Reads, read_yaml(path.read_text(encoding="utf-8")), "notebooks/stages.yaml")
    jobs: dict[tuple[str, str], Job] = {}

    def job(stage: str, variant: str, trail: tuple = ()) -> Job:
        if (stage, variant) in trail:
            raise RunError(f"notebooks/stages.yaml: {stage} reads itself ({' > '.join(t[0] for t in trail)})")
        if stage not in reads:
            hint = nearest([stage], reads)
            raise RunError(f"notebooks/stages.yaml does not say what {stage} reads: add a line `{stage}: []`{hint}")
        if (stage, variant) not in jobs:
            runs = [_upstream(profile, stage, variant, entry) for entry in reads[stage] if entry != "collect"]
            needs = tuple(job(*key, (*trail, (stage, variant))) for keys in runs for key in keys)
            late = "collect" in reads[stage] or any(need.after_collect for need in needs)
            jobs[stage, variant] = Job(stage, variant, needs, late)
        return jobs[stage, variant]

    for stage in profile["stages"]:
        for variant in profile["variants"].get(stage) or {"": {}}:
            job(stage, variant)
    return list(jobs.values())


def _upstream(profile: dict, stage: str, variant: str, entry: str) -> list[tuple[str, str]]:
    """The runs behind one entry of stages.yaml, `stage` or `stage:variant`, for one variant of the reader."""
    other, _, wanted = entry.partition(":")
    if other not in profile["stages"]:
        hint = nearest([other], profile["stages"])
        raise RunError(
            f"{stage} reads {other}, which the profile does not run: add a `{other}:` section to its stages{hint}"
        )
    theirs = profile["variants"].get(other, {})
    if wanted and wanted not in theirs:
        raise RunError(
            f"{stage} reads {entry}, which the profile does not run: add `{wanted}` to the variants of {other}"
        )
    if wanted:
        return [(other, wanted)] if (other, wanted) != (stage, variant) else []
    if not theirs:
        return [(other, "")]
    if variant:  # the same variant where there is one: measuring `base` reads no edit
        return [(other, variant)] if variant in theirs else []
    return [(other, name) for name in theirs]


def job_settings(profile: str, job: Job) -> dict:
    """The parameters a profile gives to a job: its section, and the common ones its notebook asks for."""
    asked = load_profile(profile)
    names = parameters(root() / "notebooks" / f"{job.stage}.ipynb")
    shared = {key: value for key, value in common(asked).items() if key in names}
    return {**shared, **settings(asked, job.stage, job.variant)}


def check_parameters(notebook: Path, profile: str, variant: str, given: dict) -> None:
    """Refuse names that the notebook's parameters cell does not have: papermill would only log a warning."""
    if not notebook.exists():
        known = sorted(p.stem for p in notebook.parent.glob("*.ipynb"))
        hint = nearest([notebook.stem], known)
        raise RunError(f"no notebook {notebook.name}: there are {', '.join(known) or 'none'}{hint}")
    names = parameters(notebook)
    if "PROFILE" not in names:
        raise RunError(f"{notebook.name} has no cell tagged `parameters` with a line PROFILE = ...")
    section = settings(load_profile(profile), notebook.stem, variant)
    for source, wanted in (
        ("the command", {**given, **({"VARIANT": variant} if variant else {})}),
        (f"data/profiles/{profile}.yaml", section),
    ):
        if unknown := sorted(set(wanted) - set(names)):
            raise RunError(
                f"{notebook.name} has no parameter {', '.join(unknown)} (set by {source}); it has {', '.join(names)}"
                f"{nearest(unknown, names)}"
            )
