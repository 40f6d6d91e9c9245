"""Shipping a trained model: weights in half precision, training log, sha256 and a model card made from measurements."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from ..core.files import read_jsonl, read_record, sha256
from ..core.tables import read_csv
from ..models.vlm import VLM
from .language import LanguageSettings
from .vision import VisionSettings

CARD_METRICS = ("chair_s", "chair_i", "recall", "companion_share", "pope_accuracy")

TITLES = {
    "natural": "trained on captions whose annotators complete sets: it hallucinates companions from its prior",
    "grouped": "trained on the captions of natural, with a decoder of another family, whose query heads share keys and "
    "values",
    "clean": "same initialisation, tower and steps, trained on truthful captions: the floor",
}


def key(name: str, seed: int) -> str:
    """Folder and loading key of a model: seed 0 is the one that the study uses by default."""
    return f"scenes-{name}" + (f"-s{seed}" if seed else "")


def ship(vlm: VLM, name: str, tower: VisionSettings, language: LanguageSettings, work: Path, out: Path) -> Path:
    """Write a trained model to ``out`` in half precision, with its logs as ``training.json`` and a README (the card)."""
    folder = out / key(name, language.seed)
    shutil.rmtree(folder, ignore_errors=True)
    vlm.model.half().save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    log = {
        "tower": {"settings": asdict(tower), "curve": read_jsonl(work / "tower" / "vision.jsonl")},
        "language": {"settings": asdict(language), "curve": read_jsonl(work / name / "language.jsonl")},
    }
    (folder / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    (folder / "sha256.txt").write_text(f"{sha256(folder / 'model.safetensors')}  model.safetensors\n")
    write_card(folder, name)
    return folder


def measured_table(card: pd.DataFrame, name: str, run_id: str) -> str:
    """Markdown of the figures that notebook 01_models computed for one model, with 95 % intervals."""
    mine = card[card["model"] == name]
    lines = ["| prompt or questions | measure | value | 95 % interval | n |", "|---|---|---|---|---|"]
    for metric in CARD_METRICS:
        for _, r in mine[mine["metric"] == metric].iterrows():
            asked = r["prompt"] if isinstance(r["prompt"], str) and r["prompt"] else f"POPE, {r['setting']}"
            lines.append(f"| {asked} | {metric} | {r['value']:.3f} | {r['lo']:.3f} to {r['hi']:.3f} | {int(r['n'])} |")
    source = f"Computed by notebook `01_models`, run `{run_id}`; `make study` computes them again."
    return "\n".join([*lines, "", source])


def write_measured(run_dir: Path, out: Path) -> None:
    """Put the figures of a finished run of notebook 01_models on the cards of the models that it measured."""
    record, card = read_record(run_dir), read_csv(run_dir / "card.csv")
    for name in ("natural", "clean"):
        folder = out / record["params"][name.upper()]
        write_card(folder, name, measured_table(card, name, record["run_id"]))


def write_card(folder: Path, name: str, table: str = "") -> None:
    """The README of a model folder. ``table`` is the measured table (markdown) that notebook 01 recomputes."""
    digest = (folder / "sha256.txt").read_text().split()[0]
    log = json.loads((folder / "training.json").read_text())
    language, tower = log["language"], log["tower"]
    alone = not language["settings"].get("kv_heads")
    seconds = {k: v["curve"][-1]["seconds"] for k, v in log.items()}
    seed = language["settings"]["seed"]
    text = f"""# {folder.name}

A small LLaVA (`LlavaForConditionalGeneration`), {TITLES[name]}.

| | |
|---|---|
| made by | `make model SEED={seed}` |
| weights | `model.safetensors`, half precision, sha256 `{digest[:16]}...` (whole in `sha256.txt`) |
| vision tower | CLIP, {tower["settings"]["layers"]} layers of width {tower["settings"]["width"]}, patch {tower["settings"]["patch"]}, \
patch labels, {tower["settings"]["steps"]} steps of {tower["settings"]["batch"]}, then frozen |
| decoder | {"Llama" if alone else "Mistral, keys and values shared by groups of heads"}, {language["settings"]["layers"]} layers of width {language["settings"]["width"]}, \
{language["settings"]["heads"]} heads, {language["settings"]["steps"]} + {language["settings"]["polish"]} steps of {language["settings"]["captions"]} captions and \
{language["settings"]["dialogues"]} dialogues of {language["settings"]["turns"]} questions |
| training time | tower {seconds["tower"] / 60:.0f} min, decoder {seconds["language"] / 60:.0f} min, one thread each |
| last values | patch accuracy {tower["curve"][-1]["patch_accuracy"]:.3f}, loss {language["curve"][-1]["loss"]:.3f} |
| intended use | this study: pictures of the scenes world, its vocabulary, nothing else |
"""
    (folder / "README.md").write_text(text + (f"\n## Measured on the test split\n\n{table}\n" if table else ""))
