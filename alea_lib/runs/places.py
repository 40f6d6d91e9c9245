"""Where things are, whatever the working directory, and what a profile asks for."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml


class RunError(RuntimeError):
    """Something a user can mend: the message says what and how."""


class MissingStage(RunError):
    """An upstream stage has no finished run: the message names the command that makes one."""


@dataclass(frozen=True)
class Job:
    """One notebook run of a profile: a stage, perhaps in a variant, and the jobs it reads."""

    stage: str
    variant: str = ""
    needs: tuple["Job", ...] = ()
    after_collect: bool = False  # reads results/metrics.csv, so it is not part of it

    @property
    def label(self) -> str:
        return f"{self.stage}-{self.variant}" if self.variant else self.stage


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number (plain YAML 1.1 wants 1.0e-3 and hands out a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str):
    """Parse YAML text, numbers like 1e-3 included."""
    return yaml.load(text, Loader=_Loader)


def root() -> Path:
    """The repository: $ALEA_ROOT, else the folder with a _config.yml above the cwd, else above this file."""
    if os.environ.get("ALEA_ROOT"):
        return Path(os.environ["ALEA_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_config.yml").exists() and (folder / "notebooks").is_dir():
                return folder.resolve()
    raise RunError("no repository found above this folder: cd into it, or set ALEA_ROOT to its path")


def load_profile(name: str) -> dict:
    """data/profiles/<name>.yaml as a dict; `stages`, `variants` and `page_variant` are always there."""
    folder = root() / "data" / "profiles"
    path = folder / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise RunError(f"no profile '{name}': the profiles are {known} (data/profiles)")
    profile = read_yaml(path.read_text(encoding="utf-8")) or {}
    if not isinstance(profile.get("stages"), dict):
        raise RunError(f"data/profiles/{name}.yaml has no `stages:` mapping of notebook names to parameters")
    profile["stages"] = {stage: values or {} for stage, values in profile["stages"].items()}
    variants = profile.get("variants") or {}
    profile["variants"] = {stage: _named(value) for stage, value in variants.items()}
    profile["page_variant"] = profile.get("page_variant") or {}
    for key in ("variants", "page_variant"):
        for stage in set(profile[key]) - set(profile["stages"]):
            raise RunError(f"data/profiles/{name}.yaml: `{key}` names {stage}, which is not among its stages")
    return profile


def _named(variants) -> dict:
    """A list of variants, or a mapping of variants to the parameters in which they differ, as a mapping."""
    pairs = variants.items() if isinstance(variants, dict) else dict.fromkeys(variants).items()
    return {name: values or {} for name, values in pairs}


def settings(profile: dict, stage: str, variant: str = "") -> dict:
    """What the profile says for a stage: its section, then the variant's differences."""
    if stage not in profile["stages"]:
        raise RunError(f"the profile has no section `{stage}` under `stages:` (it has {', '.join(profile['stages'])})")
    return {**profile["stages"][stage], **profile["variants"].get(stage, {}).get(variant, {})}


def common(profile: dict) -> dict:
    """Top-level plain values (world, model, seed, ...) as parameters that any stage may ask for by name."""
    return {key.upper(): value for key, value in profile.items() if not isinstance(value, (dict, list))}


def run_dir(profile: str, stage: str, variant: str = "") -> Path:
    """The folder of one run."""
    return root() / "data" / "runs" / profile / Job(stage, variant).label


def results_dir(profile: str) -> Path:
    """The folder of the joined tables."""
    return root() / "data" / "runs" / profile / "results"


def command(stage: str, variant: str, profile: str) -> str:
    """The command that makes one run; in Colab, where nothing is set up by make, one that makes what it reads too."""
    if "google.colab" in sys.modules:
        chosen = f" --variant {variant}" if variant else ""
        return f"!python -m alea_lib.runs execute {stage}{chosen} --profile {profile} --needed"
    return f"make run NB={stage}" + (f" VARIANT={variant}" if variant else "") + f" PROFILE={profile}"


def plan(name: str) -> list[Job]:
    """All jobs of a profile, each after the ones it reads (notebooks/stages.yaml says what reads what)."""
    profile = load_profile(name)
    reads = read_yaml((root() / "notebooks" / "stages.yaml").read_text(encoding="utf-8"))
    jobs: dict[tuple[str, str], Job] = {}

    def job(stage: str, variant: str, trail: tuple = ()) -> Job:
        if (stage, variant) in trail:
            raise RunError(f"notebooks/stages.yaml: {stage} reads itself ({' > '.join(t[0] for t in trail)})")
        if (stage, variant) not in jobs:
            entries = reads[stage] or []
            runs = [_upstream(profile, stage, variant, entry) for entry in entries if entry != "collect"]
            needs = tuple(job(*key, (*trail, (stage, variant))) for keys in runs for key in keys)
            late = "collect" in entries or any(need.after_collect for need in needs)
            jobs[stage, variant] = Job(stage, variant, needs, late)
        return jobs[stage, variant]

    for stage in profile["stages"]:
        if stage not in reads:
            raise RunError(f"notebooks/stages.yaml does not say what {stage} reads: add a line `{stage}: []`")
        for variant in profile["variants"].get(stage) or {"": {}}:
            job(stage, variant)
    return list(jobs.values())


def _upstream(profile: dict, stage: str, variant: str, entry: str) -> list[tuple[str, str]]:
    """The runs behind one entry of stages.yaml, `stage` or `stage:variant`, for one variant of the reader."""
    other, _, wanted = entry.partition(":")
    if other not in profile["stages"]:
        raise RunError(f"{stage} reads {other}, which the profile does not run: add a `{other}:` section to its stages")
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
