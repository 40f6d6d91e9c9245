"""A cache of what an edit computes once and uses often: in memory up to a limit, the rest in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from ..models.cached_forward import Cached
from ..models.checkpoint import write_safetensors

FIELDS = ("states", "labels", "scored", "activation")


class SpillCache:
    """Key -> :class:`Cached` item or tensor, bit-equal to what was put in. The first ``limit`` bytes (None: all) stay
    in memory; the rest goes to files in ``folder`` (emptied first) or, without a folder, is not kept."""

    def __init__(self, limit: int | None = None, folder: Path | None = None):
        self.limit, self.folder, self.bytes = limit, folder, 0
        self.near: dict[object, Cached | torch.Tensor] = {}
        self.far: dict[object, tuple[Path, torch.device]] = {}
        self.written = 0
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.near) + len(self.far)

    def __contains__(self, key: object) -> bool:
        return key in self.near or key in self.far

    def __getitem__(self, key: object) -> Cached | torch.Tensor:
        return self.near[key] if key in self.near else _read(*self.far[key])

    def put(self, key: object, item: Cached | torch.Tensor) -> None:
        """Keep an item if there is room. OSError when the disk is full."""
        size = sum(t.nbytes for t in _parts(item).values())
        if self.limit is None or self.bytes + size <= self.limit:
            self.near[key] = item
            self.bytes += size
        elif self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.written}.safetensors"
            write_safetensors({n: t.cpu().contiguous() for n, t in _parts(item).items()}, path, {})
            self.far[key] = path, next(iter(_parts(item).values())).device
            self.written += 1


@contextmanager
def scratch(beside: Path | None) -> Iterator[Path]:
    """A folder for the files of one edit, beside its checkpoint if there is one, gone afterwards."""
    if beside is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = Path(beside).with_suffix(".kept")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _parts(item: Cached | torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return {"tensor": item}
    return {n: t for n in FIELDS if (t := getattr(item, n)) is not None}


def _read(path: Path, device: torch.device) -> Cached | torch.Tensor:
    with safe_open(path, "pt", device=str(device)) as f:
        found = {n: f.get_tensor(n) for n in f.keys()}
    return found["tensor"] if "tensor" in found else Cached(**found)
