"""Image features on disk: one file an image, found again by what the image holds, read in batches.

At the size of LLaVA-1.5-7B an image takes 4.7 MB, two thousand of them more than a small machine's memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..core.files import sha256
from .checkpoint import write_safetensors
from .layout import opened

NAME = "features"


class Features:
    """Features [N,P,D] in files, one an image. Indexing with tensors, arrays or slices picks images and reads
    nothing; a single number, the methods, and functions of torch read what was picked, to the CPU."""

    device = torch.device("cpu")

    def __init__(self, files: list[Path], shape: torch.Size, dtype: torch.dtype, index: torch.Tensor):
        self.files, self.one, self.dtype, self.index = files, shape, dtype, index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.one))

    def __getitem__(self, pick) -> Features | torch.Tensor:
        index = self.index[pick]
        chosen = Features(self.files, self.one, self.dtype, index.reshape(-1))
        return chosen if index.dim() else chosen.tensor()[0]

    def tensor(self) -> torch.Tensor:
        """All of it, [N,P,D]."""
        if not len(self):
            return torch.zeros(self.shape, dtype=self.dtype)
        where, back = self.index.unique(return_inverse=True)
        return torch.stack([_read(self.files[i]) for i in where.tolist()])[back]

    def to(self, *args, **kwargs) -> torch.Tensor:
        return self.tensor().to(*args, **kwargs)

    def repeat(self, *sizes: int) -> torch.Tensor:
        return self.tensor().repeat(*sizes)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*map(_plain, args), **{k: _plain(v) for k, v in (kwargs or {}).items()})


def _plain(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.tensor() if isinstance(value, Features) else value


def fingerprint(features: torch.Tensor | Features, block: int = 64) -> str:
    """sha256 of features as fp32, first 16 hex digits, read block by block."""
    digest = hashlib.sha256()
    for start in range(0, len(features), block):
        part = features[start : start + block].to("cpu", torch.float32)
        digest.update(part.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_features(vlm, images: list[Path | str], cache: Path, batch_size: int) -> Features:
    """Features of image files, from ``cache`` where they are whole there, computed and kept where not.

    A file is named by the image's content, in a folder named by the model, its revision, its processor and the dtype;
    fp32 features are kept in half precision. A damaged file is computed again, and what is finished stays when the
    disk is full (OSError, saying how much is needed).
    """
    folder = cache / folder_name(vlm)
    for image in images:
        if not Path(image).is_file():
            opened(image, 0)  # says what is missing, before anything is computed
    names = [sha256(Path(image)) for image in images]
    files = [folder / name[:2] / f"{name}.safetensors" for name in names]
    todo = list({f: image for f, image in zip(files, images) if not whole(f)}.items())
    for start in tqdm(range(0, len(todo), batch_size), desc="features", disable=not todo):
        part = todo[start : start + batch_size]
        for (file, _), one in zip(part, vlm.compute_features([image for _, image in part], batch_size)):
            _write(file, one.half() if one.dtype == torch.float32 else one, len(todo) - start)
    first = _read(files[0])
    return Features(files, first.shape, first.dtype, torch.arange(len(files)))


def folder_name(vlm) -> str:
    """What features depend on beside the image: model, revision, configuration of tower and processor, dtype."""
    from .identity import config_hash

    processor = vlm.processor.image_processor.to_dict()
    loose = ("processor_class", "_processor_class", "_valid_processor_keys")
    given = [vlm.key, vlm.revision, config_hash(vlm.model.config), str(vlm.model.dtype), vlm.row.canvas]
    given += [{k: v for k, v in processor.items() if k not in loose}, vlm.row.image_options]
    return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:16]


def whole(file: Path) -> bool:
    """True for a file that holds what was written into it."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as f:
            return (f.metadata() or {}).get("crc") == _crc(f.get_tensor(NAME))
    except (SafetensorError, OSError, KeyError):
        return False


def _crc(one: torch.Tensor) -> str:
    return f"{zlib.crc32(one.contiguous().view(torch.uint8).numpy()):08x}"


def _read(file: Path) -> torch.Tensor:
    with safe_open(file, "pt") as f:
        return f.get_tensor(NAME)


def _write(file: Path, one: torch.Tensor, left: int) -> None:
    one = one.detach().cpu().contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_safetensors({NAME: one}, file, {"crc": _crc(one)})
    except OSError as error:
        need, free = left * one.nbytes / 2**30, shutil.disk_usage(file.parent).free / 2**30
        raise OSError(
            error.errno,
            f"features of {left} images take {need:.2f} GiB more and {free:.2f} GiB are free; make room and start "
            "again: what is finished is kept",
            str(file.parent),
        ) from error
