"""What a profile asks for: its parameters by stage and variant, and the plan of its jobs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..core.paths import RunError, nearest, read_data, read_yaml, root
from ..core.schema import validated
from .schema import Profile, Reads
from .sources import parameters


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


def read_profile(name: str) -> Profile:
    """data/profiles/<name>.yaml. RunError for a name, key or value that cannot be meant."""
    folder = root() / "data" / "profiles"
    if not (folder / f"{name}.yaml").exists():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        listed = ", ".join(known) or "none"
        raise RunError(f"no profile '{name}': the profiles are {listed} (data/profiles){nearest([name], known)}")
    where = f"data/profiles/{name}.yaml"
    profile = validated(Profile, read_data(f"profiles/{name}") or {}, where)
    _check_common(profile, where)
    for key, section in (("variants", profile.variants), ("page_variant", profile.page_variant)):
        for stage in set(section) - set(profile.stages):
            hint = nearest([stage], profile.stages)
            raise RunError(f"{where}: `{key}` names {stage}, which is not among its stages{hint}")
    for stage, variant in profile.page_variant.items():
        if variant not in (known := profile.variants.get(stage, {})):
            raise RunError(f"{where}: page_variant: {stage} is {variant!r}, it must be one of {', '.join(known)}")
    return profile


def _check_common(profile: Profile, where: str) -> None:
    """Another plain value at the top must be the parameter of a notebook that the profile runs."""
    if not profile.model_extra:
        return
    paths = [root() / "notebooks" / f"{stage}.ipynb" for stage in profile.stages]
    names = {name.lower() for path in paths if path.exists() for name in parameters(path)}
    for key, value in profile.model_extra.items():
        if key not in names or isinstance(value, (dict, list)):
            fields = sorted(Profile.model_fields)
            hint = nearest([key], [*fields, *sorted(names)])
            raise RunError(
                f"{where}: has no entry {key}{hint}; there are {', '.join(fields)}, and plain values for parameters "
                "of its notebooks"
            )


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
    profile, reads = load_profile(name), _reads()
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


def _reads() -> dict[str, list[str]]:
    """What each stage reads, by notebooks/stages.yaml."""
    path = root() / "notebooks" / "stages.yaml"
    return validated(Reads, read_yaml(path.read_text(encoding="utf-8")), "notebooks/stages.yaml")


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
    path = root() / "data" / "profiles" / f"{profile}.yaml"
    asked = _profile(path, path.stat().st_mtime_ns)
    names = parameters(root() / "notebooks" / f"{job.stage}.ipynb")
    shared = {key: value for key, value in common(asked).items() if key in names}
    return {**shared, **settings(asked, job.stage, job.variant)}


@lru_cache(maxsize=8)
def _profile(path: Path, _written: int) -> dict:
    return load_profile(path.stem)


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
