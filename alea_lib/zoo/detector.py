"""The auxiliary detector: a tower of its own (other seed, size and training scenes), so that its errors are its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..core.paths import root
from ..datasets.scenes import objects
from ..models.layout import opened
from .text import pixels
from .vision import Tower, VisionSettings, batch_of


class Detector:
    """Names the categories that it sees. ``threshold`` is on the largest patch probability of a category."""

    def __init__(self, tower: Tower, threshold: float):
        self.tower, self.threshold = tower.eval(), threshold

    def scores(self, images: list, batch_size: int = 200) -> np.ndarray:
        """Largest patch probability of each category, float [N, len(objects())]; images: files, uint8 arrays or PIL."""
        out = []
        for start in range(0, len(images), batch_size):
            x = pixels(np.stack([np.asarray(opened(i, 0)) for i in images[start : start + batch_size]]))
            out.append(_strongest(self.tower, x))
        return np.concatenate(out)

    def detect(self, images: list) -> list[frozenset[str]]:
        """The set of categories detected in each image."""
        names = np.array(objects())
        return [frozenset(names[row >= self.threshold].tolist()) for row in self.scores(images)]


@torch.no_grad()
def _strongest(tower: Tower, x: torch.Tensor) -> np.ndarray:
    return tower(x)[1].softmax(-1)[..., 1:].amax(1).numpy()


def choose_threshold(tower: Tower, patch: int, n: int = 1000) -> tuple[float, dict]:
    """The threshold with the best F1 on validate scenes, with its precision and recall."""
    probabilities, truth = [], np.zeros((n, len(objects())), dtype=bool)
    for start in range(0, n, 250):
        x, y, _ = batch_of(range(start, start + 250), "validate", patch)
        probabilities.append(_strongest(tower, x))
        for i, row in enumerate(y):
            truth[start + i, row[row > 0].unique().numpy() - 1] = True
    p, best = np.concatenate(probabilities), (0.5, {"f1": -1.0})
    for threshold in np.arange(0.3, 0.95, 0.05):
        hit = p >= threshold
        tp = (hit & truth).sum()
        f1 = 2 * tp / (hit.sum() + truth.sum())
        if f1 > best[1]["f1"]:
            quality = {"f1": float(f1), "precision": float(tp / hit.sum()), "recall": float(tp / truth.sum()), "n": n}
            best = round(float(threshold), 2), quality
    return best


def save_detector(tower: Tower, s: VisionSettings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    threshold, quality = choose_threshold(tower, s.patch)
    save_file(tower.half().state_dict(), folder / "tower.safetensors")
    shape = {k: getattr(s, k) for k in ("width", "mlp", "layers", "heads", "patch")}
    info = {"shape": shape, "threshold": threshold, "validate": quality}
    (folder / "detector.json").write_text(json.dumps(info, indent=1) + "\n")


def load_detector(key: str = "scenes-detector") -> Detector:
    """The shipped detector, in fp32. FileNotFoundError names the command that trains one."""
    folder = root() / "data" / "models" / key
    if not (folder / "detector.json").is_file():
        raise FileNotFoundError(f"no detector in {folder}: train it with 'make model'")
    info = json.loads((folder / "detector.json").read_text())
    tower = Tower(VisionSettings(**info["shape"]))
    tower.load_state_dict(load_file(folder / "tower.safetensors"))
    return Detector(tower, info["threshold"])
