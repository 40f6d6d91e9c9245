"""The study of LLaVA-1.5-7B from its first download to its last table, with a tiny model and tiny files instead."""

import json
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

from alea_lib.tables import read_metrics

HERE = Path(__file__).resolve().parents[1]
SIZES = {  # of the real profile's stages, made small; everything else stays as it says
    "01_world": {"N_ACTIVATE": 20, "N_VALIDATE": 4, "N_TEST": 12, "N_POPE": 6},
    "02_activate": {"N_IMAGES": 20},
    "03_locate_layers": {"N_PAIRS": 4, "N_EDIT": 4, "N_VALIDATE": 4, "RESAMPLES": 2},
    "04_locate_heads": {"N_PAIRS": 2, "K": 2, "N_VALIDATE": 4, "RESAMPLES": 2},
    "05_edit": {"N_PAIRS": 8, "PREFIX_STEPS": 2, "EPOCHS": 1},
    "06_measure": {"N_TEST": 12, "N_GROUNDING": 4, "N_ROUTE": 1},
    "06_read_chair": {"N_TEST": 12, "SIZES": [6, 12]},
    "10_robustness": {"METHODS": ["no-prefix", "alea-mixed"], "N_TEST": 6, "N_SEEN": 8, "PREFIX_STEPS": 2},
}
VARIANTS = {"05_edit": ["no-prefix", "alea-mixed"], "06_measure": ["base", "truncation", "no-prefix", "alea-mixed"]}


def repository(folder: Path) -> Path:
    """A copy of what a study needs; the models of the small world are only pointed to."""
    for name in ("alea_lib", "notebooks"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb*"))
    (folder / "data" / "profiles").mkdir(parents=True)
    for name in ("_config.yml", "data/hub.yaml", "data/scenes.yaml"):
        shutil.copyfile(HERE / name, folder / name)
    (folder / "data" / "models").symlink_to(HERE / "data" / "models")
    profile = yaml.safe_load((HERE / "data" / "profiles" / "llava-1.5-7b.yaml").read_text())
    del profile["needs"]  # a card, and gigabytes of downloads
    profile["max_new_tokens"] = 24
    for stage, sizes in SIZES.items():
        profile["stages"][stage].update(sizes)
    for stage, names in VARIANTS.items():
        kept = profile["variants"][stage]
        profile["variants"][stage] = {n: kept[n] for n in names} if isinstance(kept, dict) else names
    (folder / "data" / "profiles" / "llava-1.5-7b.yaml").write_text(yaml.safe_dump(profile))
    return folder


def call(folder: Path, cache: Path, *words: str) -> str:
    environment = {**os.environ, "ALEA_ROOT": str(folder), "PYTHONPATH": str(folder), "HF_HUB_CACHE": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    environment.pop("ALEA_WATCH", None)
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_study_of_the_large_model_runs_to_its_end(tmp_path):
    files = tiny_coco()
    folder, cache = repository(tmp_path / "study"), tmp_path / "cache"
    vlm, loss = learnt(files)
    assert loss < 0.5
    pinned = yaml.safe_load((HERE / "data" / "hub.yaml").read_text())["llava-1.5-7b"]
    assert pinned["four_bit"]
    cached(vlm, cache, pinned["hub"], pinned["revision"])
    write_catalogue(folder / "data", files, activate=20)
    server = Server(files)
    try:
        call(folder, cache, "alea_lib.worlds", "fetch", "coco", "--from", server.url)
    finally:
        server.stop()
    call(folder, cache, "alea_lib.runs", "study", "--profile", "llava-1.5-7b", "--jobs", "1")

    runs = folder / "data" / "runs" / "llava-1.5-7b"
    records = {p.parent.name: json.loads(p.read_text()) for p in runs.glob("*/run.json")}
    listed = yaml.safe_load((folder / "data" / "profiles" / "llava-1.5-7b.yaml").read_text())["stages"]
    assert {r["stage"] for r in records.values()} == set(listed)
    metrics = read_metrics(runs / "results" / "metrics.csv")
    assert set(metrics["world"]) == {"coco"} and set(metrics["model"]) == {"llava-1.5-7b"}
    assert set(metrics["benchmark"]) == {"chair", "pope", "grounding", "ability"}
    pairs = pd.read_parquet(runs / "02_activate" / "pairs.parquet")
    assert set(pairs["label_source"]) == {"truth"} and pairs["image"].str.startswith("COCO_val2014_").all()
    notes = pd.read_csv(runs / "results" / "notes.csv")
    base = notes[notes["stage"] == "06_measure-base"].set_index("metric")["reason"]
    assert "coco has no MME questions" in base["mme_*"] and "coco has no AMBER questions" in base["amber_*"]
    assert not (runs / "03_locate_layers" / "localisation.csv").exists()  # no implants were asked for
    assert records["02_activate"]["inputs"]["data/hub.yaml: llava-1.5-7b"]["revision"] == pinned["revision"]
