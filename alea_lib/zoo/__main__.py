"""``python -m alea_lib.zoo --seed 0``: train tower and detector, then natural and clean, and ship them.

Two processes of one thread each work side by side, so results do not depend on the number of cores.
Finished parts are kept in ``data/runs/zoo/seed<N>`` and never trained twice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from ..core.paths import root, run_dir

DETECTOR_SEED = 7
TOGETHER = (("tower", "detector"), ("features",), ("natural", "clean"))
GROUPED = "grouped"  # natural with another decoder; not part of "all"
MODELS = ("natural", "clean", GROUPED)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alea_lib.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="base seed: tower, initialisation and order of the data")
    parts = ("all", *(part for some in TOGETHER for part in some), GROUPED, "card", "implants")
    parser.add_argument("--part", choices=parts, default="all")
    a = parser.parse_args()
    out = root() / "data" / "models"
    if a.part == "all":
        _all(a.seed)
    elif a.part == "card":
        from .card import write_measured

        write_measured(run_dir("scenes", "01_models"), out)
    elif a.part == "implants":
        from .implant import make

        _one_thread()
        made = make(root() / "data" / "runs" / "zoo" / "implants", out)
        print(f"make implants: {len(made)} implanted models in {out}")
    else:
        _part(a.part, a.seed, root() / "data" / "runs" / "zoo" / f"seed{a.seed}", out)


def _all(seed: int) -> None:
    started = time.time()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alea_lib.zoo", "--seed", str(seed), "--part"]
    for parts in TOGETHER:
        running = [subprocess.Popen([*command, part], env=environment) for part in parts]
        if any([p.wait() for p in running]):
            raise SystemExit(f"training {' and '.join(parts)} failed (see above). Run the command again to go on")
    print(f"make model: finished in {(time.time() - started) / 60:.0f} minutes; the models are in data/models")


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _part(part: str, seed: int, folder: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    from . import card, detector, language, vision

    _one_thread()
    if part == "detector":
        eye = vision.VisionSettings(DETECTOR_SEED + seed, width=96, mlp=192, layers=3, first=500_000, steps=2500)
        detector.save_detector(vision.train_tower(eye, folder / "detector"), eye, out / card.key("detector", seed))
        return
    tower_settings = vision.VisionSettings(seed)
    tower = vision.train_tower(tower_settings, folder / "tower")
    features = folder / "features.safetensors"
    s = language.LanguageSettings(seed, prior=part != "clean", kv_heads=2 if part == GROUPED else 0)
    if part != "tower" and not features.is_file():
        save_file({"features": language.tower_features(tower, range(s.scenes))}, features)
    if part in MODELS:
        vlm = language.build(tower, s, tower_settings.patch)
        language.train_language(vlm, tower, load_file(features)["features"], s, folder / part)
        card.ship(vlm, part, tower_settings, s, folder, out)


if __name__ == "__main__":
    main()
