"""The study of LLaVA-1.5-7B from its first download to its last table, with a tiny model and tiny files instead."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hub import cached, learnt
from serving import Server, tiny_coco, write_catalogue

from alea_lib.core.files import read_jsonl, read_record
from alea_lib.core.paths import read_yaml
from alea_lib.core.tables import read_metrics
from alea_lib.pipeline import preview
from alea_lib.pipeline.profiles import check_parameters, load_profile, plan
from alea_lib.report.labels import ADVERSARY
from alea_lib.report.verdicts import NOT_RUN

HERE = Path(__file__).resolve().parents[2]
PROFILES = ("llava-1.5-7b", "llava-1.5-7b-t4")
SIZES = {  # of the real profile's stages, made small; everything else stays as it says
    "01_world": {"N_ACTIVATE": 20, "N_VALIDATE": 4, "N_TEST": 12, "N_POPE": 6},
    "02_activate": {"N_IMAGES": 20},
    "03_locate_layers": {"N_PAIRS": 4, "N_EDIT": 4, "N_VALIDATE": 4, "RESAMPLES": 2},
    "04_locate_heads": {"N_PAIRS": 2, "K": 2, "N_VALIDATE": 4, "RESAMPLES": 2},
    "05_adversary": {"N_PAIRS": 8, "N_HELD_OUT": 4, "PREFIX_STEPS": 2},
    "05_edit": {"N_PAIRS": 8, "EPOCHS": 2, "LR": 1e-2},
    "06_measure": {"N_TEST": 12, "N_GROUNDING": 4, "N_ROUTE": 1},
    "06_read_chair": {"N_TEST": 12, "SIZES": [6, 12]},
    "10_robustness": {"N_TEST": 6, "N_SEEN": 8, "PREFIX_STEPS": 2},
}
JUDGED = {"holds", "does not hold", "not shown", "not tested"}


def repository(folder: Path, profile: str) -> Path:
    """A copy of what a study needs, its profile made small; the models of the small world are only pointed to."""
    for name in ("alea_lib", "notebooks"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb*"))
    (folder / "data" / "profiles").mkdir(parents=True)
    for name in ("_config.yml", "data/hub.yaml", "data/scenes.yaml"):
        shutil.copyfile(HERE / name, folder / name)
    for name in ("models", "results"):
        (folder / "data" / name).symlink_to(HERE / "data" / name)
    asked = read_yaml((HERE / "data" / "profiles" / f"{profile}.yaml").read_text())
    del asked["needs"]  # a card, and gigabytes of downloads
    asked["max_new_tokens"] = 32
    for stage, sizes in SIZES.items():
        assert set(sizes) <= set(asked["stages"][stage]), f"{stage}: the profile has no such size"
        asked["stages"][stage].update(sizes)
    (folder / "data" / "profiles" / f"{profile}.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return folder


def call(folder: Path, cache: Path, *words: str) -> str:
    environment = {**os.environ, "ALEA_ROOT": str(folder), "PYTHONPATH": str(folder), "HF_HUB_CACHE": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment.pop("ALEA_WATCH", None)
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_the_plan_of_a_real_profile_names_every_run(profile, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(HERE))
    told = preview.text(preview.preview(profile)).splitlines()
    for job in plan(profile):
        assert [line.split()[0] for line in told if line.strip()].count(job.label) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_the_small_study_has_the_runs_of_the_real_one(profile, tmp_path, monkeypatch):
    folder, labels = repository(tmp_path / "study", profile), {}
    for root in (HERE, folder):
        monkeypatch.setenv("ALEA_ROOT", str(root))
        labels[root] = [job.label for job in plan(profile)]
        for job in plan(profile):
            check_parameters(root / "notebooks" / f"{job.stage}.ipynb", profile, job.variant, {})
    assert labels[folder] == labels[HERE]


@pytest.mark.parametrize("profile", PROFILES)
def test_the_last_page_finds_what_it_judges(profile, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(HERE))
    asked = load_profile(profile)
    assert {*ADVERSARY, "no-prefix"} <= set(asked["variants"]["06_measure"])
    assert {*ADVERSARY, "no-prefix"} <= set(asked["stages"]["10_robustness"]["METHODS"])


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_study_of_the_large_model_runs_to_its_end(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(HERE))
    files = tiny_coco()
    folder, cache = repository(tmp_path / "study", profile), tmp_path / "cache"
    vlm, loss = learnt(files)
    assert loss < 0.5
    pinned = read_yaml((HERE / "data" / "hub.yaml").read_text())[profile]
    assert pinned["four_bit"]
    cached(vlm, cache, pinned["hub"], pinned["revision"])
    write_catalogue(folder / "data", files, activate=20)
    server = Server(files)
    try:
        call(folder, cache, "alea_lib.datasets", "fetch", "coco", "--from", server.url)
    finally:
        server.stop()
    call(folder, cache, "alea_lib.pipeline", "study", "--profile", profile, "--jobs", "1")

    runs = folder / "data" / "runs" / profile
    everything_is_finished(profile, folder, cache, runs)
    metrics = read_metrics(runs / "results" / "metrics.csv")
    assert set(metrics["world"]) == {"coco"} and set(metrics["model"]) == {profile}
    assert set(metrics["benchmark"]) == {"chair", "pope", "grounding", "ability"}
    edits = {"no-prefix", "alea-corrected", "alea-mixed"}
    assert set(metrics["method"]) == {"base", "truncation", *edits}
    assert set(metrics.loc[metrics["condition"] == "attacked", "method"]) == {"base", *edits}
    pairs = pd.read_parquet(runs / "02_activate" / "pairs.parquet")
    assert set(pairs["label_source"]) == {"truth"} and pairs["image"].str.startswith("COCO_val2014_").all()
    notes = pd.read_csv(runs / "results" / "notes.csv")
    base = notes[notes["stage"] == "06_measure-base"].set_index("metric")["reason"]
    assert "coco has no MME questions" in base["mme_*"] and "coco has no AMBER questions" in base["amber_*"]
    assert not (runs / "03_locate_layers" / "localisation.csv").exists()  # no implants were asked for
    told = {m: read_jsonl(runs / f"06_measure-{m}" / "captions.jsonl") for m in ("base", *edits)}
    assert all(told[m] != told["base"] for m in edits)  # the edits reach what is measured
    claims = pd.read_csv(runs / "12_what_holds" / "claims.csv")
    assert set(claims["scenes"]) == {NOT_RUN["scenes"]} and set(claims["coco"]) <= JUDGED
    record = read_record(runs / "02_activate")
    assert record["inputs"][f"data/hub.yaml: {profile}"]["revision"] == pinned["revision"]


def everything_is_finished(profile: str, folder: Path, cache: Path, runs: Path) -> None:
    """Every run of the plan has its record and its notebook, the plan says so, and a second call starts nothing."""
    planned = call(folder, cache, "alea_lib.pipeline", "plan", "--profile", profile)
    labels = [line.split()[0] for line in planned.splitlines() if line.endswith("(finished)")]
    assert set(labels) == {p.parent.name for p in runs.glob("*/run.json")}
    assert {label for label in labels if (runs / label / "notebook.ipynb").is_file()} == set(labels)
    assert {read_record(runs / label)["stage"] for label in labels} == set(load_profile(profile)["stages"])
    assert "started" not in call(folder, cache, "alea_lib.pipeline", "study", "--profile", profile, "--jobs", "1")
