"""A dataset as every stage reads it: a folder of images, COCO files and question files, see :mod:`.write`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.paths import root


@dataclass(frozen=True)
class Split:
    """One split of a world: ``ids`` [n], ``files`` [n] and the annotation files that scorers read."""

    name: str
    ids: list[int]
    files: list[Path]
    instances: Path
    captions: Path

    def take(self, n: int | None) -> Split:
        """The first ``n`` images by id (all if None). ValueError when the split is smaller."""
        if n is not None and n > len(self.ids):
            raise ValueError(
                f"split {self.name!r} has {len(self.ids)} images, {n} were asked for; "
                "make the world larger (its sizes stand in the profile) or ask for fewer"
            )
        return Split(self.name, self.ids[:n], self.files[:n], self.instances, self.captions)

    def find(self, ids: list[int]) -> Split:
        """The images with these ids, in the order asked for."""
        where = {i: k for k, i in enumerate(self.ids)}
        if missing := [i for i in ids if i not in where]:
            raise ValueError(f"image ids not in split {self.name!r}: {missing[:5]}")
        return Split(self.name, list(ids), [self.files[where[i]] for i in ids], self.instances, self.captions)


class World:
    """A world folder, read lazily. FileNotFoundError says which file is missing."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        if at := self.info.get("at"):  # a run's folder of a world that lies elsewhere (see prepare_world)
            self.folder = root() / at
            del self.info

    @cached_property
    def info(self) -> dict:
        """The content of world.json."""
        path = self.folder / "world.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder} is no world: world.json is missing; make it with 'make run NB=01_world', or the coco"
                " world with 'python -m alea_lib.datasets fetch coco'"
            )
        return json.loads(path.read_text())

    @property
    def planted(self) -> bool:
        """Whether the images were composed here, with a prior planted in captions for training."""
        return (self.folder / "training").is_dir()

    def has(self, benchmark: str) -> bool:
        """Whether the world has the questions of ``pope``, ``mme`` or ``amber``."""
        return (self.folder / benchmark).is_dir()

    def split(self, name: str) -> Split:
        """A split by name. Raises ValueError naming the splits there are."""
        instances = self.folder / "annotations" / f"instances_{name}.json"
        if not instances.is_file():
            raise ValueError(
                f"world {self.info['name']!r} has no split {name!r}; there are {sorted(self.info['sizes'])}"
            )
        rows = sorted(json.loads(instances.read_text())["images"], key=lambda r: r["id"])
        images = self.folder / "images" / self.info.get("images", {}).get(name, name)  # splits may share a folder
        files = [images / r["file_name"] for r in rows]
        return Split(name, [r["id"] for r in rows], files, instances, instances.with_name(f"captions_{name}.json"))

    def pope(self, setting: str) -> Path:
        """The POPE file of a setting, for ``read_pope``."""
        path = self.folder / "pope" / f"{self.info['name']}_pope_{setting}.json"
        if not path.is_file():
            there = sorted(p.name for p in path.parent.glob("*"))
            raise ValueError(f"no POPE file for setting {setting!r}; there are {there}")
        return path

    def mme(self) -> Path:
        """The folder of MME's hallucination subset, for ``read_mme``."""
        return self.folder / "mme"

    def amber(self) -> Path:
        """The folder of AMBER's files, for ``read_amber``."""
        return self.folder / "amber"
