"""Models of the hub: the rows of data/hub.yaml, and their snapshots at a pinned commit. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from pydantic import Field

from ..core.files import sha256
from ..core.paths import read_data, root
from ..core.schema import Dtype, Strict, validated

MEANS = ("hub", "revision", "dtype", "four_bit", "unquantised")  # fields that results depend on, beyond rounding
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja"]  # never pickled weights


class ModelRow(Strict):
    """``hub``, ``revision``: repository and commit. ``dtype`` of weights and computation; ``four_bit``: the decoder's
    matrices in NF4, but for the parts named in ``unquantised`` (of all layers: any of them may be edited).

    Largest batches that the card takes: images that are seen at once (``see``), answers written (``write``), answers
    read without gradient (``read``), items of one backward pass (``train``: a larger batch goes through in pieces,
    with the gradient of the whole; 0 sets no limit). ``keep_gib``: how much of what an edit reads once stays on the
    card, the rest goes to disk; 0 sets no limit. ``cache``: image features are kept on disk, in data/runs/features.
    """

    key: str
    hub: str = Field(min_length=1)
    revision: str = Field(pattern="^[0-9a-f]{40}$", description="a whole commit (40 hexadecimal digits)")
    dtype: Dtype = "float32"
    four_bit: bool = False
    unquantised: list[str] = ["down_proj"]
    see: int = Field(64, ge=1)
    write: int = Field(100, ge=1)
    read: int = Field(50, ge=1)
    train: int = Field(0, ge=0)
    keep_gib: float = Field(0.0, ge=0)
    cache: bool = False


def model_row(key: str) -> ModelRow | None:
    """The row of a key, None where there is none. RunError for a row that cannot be meant."""
    rows = read_data("hub") or {}
    if key not in rows:
        return None
    values = {**rows[key], "key": key} if isinstance(rows[key], dict) else rows[key]
    return validated(ModelRow, values, f"data/hub.yaml: {key}")


def hub_name(key: str) -> str:
    """The hub's name of a key of data/hub.yaml; any other key as it is."""
    row = model_row(key)
    return row.hub if row else key


def fingerprint(row: ModelRow) -> dict[str, str]:
    """What a run records of a model: its revision, and a hash of everything in its row that results depend on."""
    means = json.dumps([getattr(row, name) for name in MEANS])
    return {"revision": row.revision, "sha256": hashlib.sha256(means.encode()).hexdigest()}


def outside(path: Path) -> tuple[str, dict[str, str]] | None:
    """The model that ``data/models/<key>/<file>`` stands for when there is no such file: its name in records, and
    what identifies it. None when it is no model."""
    models = root() / "data" / "models"
    if not path.is_relative_to(models):
        return None
    key = path.parent.relative_to(models).as_posix()
    if row := model_row(key):
        return f"data/hub.yaml: {key}", fingerprint(row)
    folder = Path("/", key) if Path("/", key).is_dir() else Path(key)
    if (folder / "config.json").is_file():
        return f"model {folder.name}", {"sha256": sha256(folder)}
    if config := cached(key, "config.json"):
        commit = config.parent.name
        return f"hub {key}", {"revision": commit, "sha256": hashlib.sha256(commit.encode()).hexdigest()}
    return None


def cached(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a hub model in the cache (of the default branch without a revision), None when it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:  # no name of the hub's form
        return None
    return Path(found) if isinstance(found, str) else None


def in_cache(row: ModelRow) -> bool:
    """True when every shard of the pinned revision was downloaded."""
    index = cached(row.hub, "model.safetensors.index.json", row.revision)
    shards = {"model.safetensors"}
    if index:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(cached(row.hub, name, row.revision) for name in shards)


def switched_off() -> bool:
    """True when the hub must not be asked (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off")


def snapshot(row: ModelRow) -> Path:
    """The folder of a pinned hub model, complete. FileNotFoundError when it is not there and the hub is off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    off = switched_off()
    try:
        return Path(snapshot_download(row.hub, revision=row.revision, allow_patterns=WANTED, local_files_only=off))
    except LocalEntryNotFoundError as error:
        how = "the hub is switched off: set HF_HUB_OFFLINE=0" if off else "the hub does not answer: is there a network?"
        raise FileNotFoundError(f"{row.key}: {row.hub} at {row.revision[:12]} was not downloaded, and {how}") from error
