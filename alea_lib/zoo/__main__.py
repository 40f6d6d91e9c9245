"""``python -m alea_lib.zoo --seed 0``: train tower and detector, then natural and clean, and ship them.

Two processes of one thread each work side by side, so results do not depend on the number of cores.
Finished parts are kept in ``data/runs/zoo/seed<N>`` and never trained twice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ..core.paths import root, run_dir
from .card import write_measured

DETECTOR_SEED = 7
PARTS = ("all", "tower", "detector", "features", "natural", "clean", "ship", "grouped")
MODELS = ("natural", "clean", "grouped")  # "grouped" (natural with another decoder) is not in "all", and ships itself


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alea_lib.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="base seed: tower, initialisation and order of the data")
    parser.add_argument("--part", choices=[*PARTS, "card", "implants"], default="all")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the training steps (1.0: the shipped models)"
    )
    parser.add_argument("--out", type=Path, help="folder for the models (default data/models)")
    a = parser.parse_args()
    folder = root() / "data" / "runs" / "zoo" / f"seed{a.seed}"
    out = a.out or root() / "data" / "models"
    if a.part == "card":
        return write_measured(run_dir("scenes", "01_models"), out)
    if a.part == "implants":
        return _implants(out)
    if a.part != "all":
        return _part(a.part, a.seed, a.scale, folder, out)
    started = time.time()
    for parts in (["tower", "detector"], ["features"], ["natural", "clean"], ["ship"]):
        _together(a, parts)
    print(f"make model: finished in {(time.time() - started) / 60:.0f} minutes; models in {out}")


def _implants(out: Path) -> None:
    """Train, measure and ship every implant of the clean model; finished ones are never made twice."""
    from .ship import make

    _one_thread()
    made = make(root() / "data" / "runs" / "zoo" / "implants", out)
    print(f"make implants: {len(made)} implanted models in {out}")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _together(a: argparse.Namespace, parts: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alea_lib.zoo", "--seed", str(a.seed), "--scale", str(a.scale)]
    command += ["--out", str(a.out)] if a.out else []
    running = [subprocess.Popen([*command, "--part", p], env=environment) for p in parts]
    if any(p.wait() for p in running):
        raise SystemExit(f"training {' and '.join(parts)} failed (see above). Run the command again to go on")


def _part(part: str, seed: int, scale: float, folder: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    from . import card, detector, language, vision

    _one_thread()
    tower_settings = vision.VisionSettings(seed=seed, steps=round(3000 * scale))
    eye = vision.VisionSettings(
        seed=DETECTOR_SEED + seed, width=96, mlp=192, layers=3, first=500_000, steps=round(2500 * scale)
    )
    if part == "detector":
        detector.save_detector(vision.train_tower(eye, folder / "detector"), eye, out / card.key("detector", seed))
        return
    tower = vision.train_tower(tower_settings, folder / "tower")
    features = folder / "features.safetensors"
    s = language.LanguageSettings(
        seed=seed, prior=part != "clean", steps=round(1300 * scale), polish=round(300 * scale),
        kv_heads=2 if part == "grouped" else 0,
    )  # fmt: skip
    if part in ("features", *MODELS) and not features.is_file():
        save_file({"features": language.tower_features(tower, "train", range(s.scenes))}, features)
    if part in MODELS:
        vlm = language.build(tower, s, tower_settings.patch)
        language.train_language(vlm, tower, load_file(features)["features"], s, folder / part)
        vlm.model.half().save_pretrained(folder / part / "model")
        vlm.processor.save_pretrained(folder / part / "model")
        (folder / part / "settings.json").write_text(json.dumps(asdict(s), indent=1))
    for name in {"ship": ("natural", "clean"), "grouped": ("grouped",)}.get(part, ()):
        card.ship(name, seed, folder, out, tower_settings)


if __name__ == "__main__":
    main()
