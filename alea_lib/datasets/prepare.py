"""The world of a profile: composed on the spot, or a folder of COCO-format files that lies in ``data``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..core.files import DataError
from ..core.paths import root
from .write import World, make_scenes

COMPOSED = {"scenes": make_scenes}


def prepare_world(
    name: str, folder: Path, seed: int = 0, activate: int = 0, validate: int = 0, test: int = 0, pope_images: int = 0
) -> World:
    """The world ``name`` for a run, opened: one of ``COMPOSED`` is written to ``folder`` in these sizes; any other lies
    in ``data/<name>`` (or in the folder of that path), and ``folder`` only says where.

    DataError before anything is written when there is no such world, or a split of it has fewer images than the sizes
    ask for; the message names the command that fetches them. ``pope_images`` counts for composed worlds alone.
    """
    if name in COMPOSED:
        return COMPOSED[name](folder, seed, activate, validate, test, pope_images)
    there = root() / "data" / name if (root() / "data" / name).is_dir() else root() / name
    fetch = f"python -m alea_lib.datasets fetch {Path(name).name}"
    if not (there / "world.json").is_file():
        raise DataError(f"there is no world {name!r} in data: {fetch}")
    sizes = World(there).info["sizes"]
    for split, n in {"activate": activate, "validate": validate, "test": test}.items():
        if n > sizes.get(split, 0):
            raise DataError(
                f"world {name!r} has {sizes.get(split, 0)} images of split {split!r}, the profile asks for {n}: "
                f"ask for fewer, or {fetch}"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    at = there.relative_to(root()).as_posix() if there.is_relative_to(root()) else str(there)
    (folder / "world.json").write_text(json.dumps({"at": at}) + "\n")
    return World(folder)
