"""How models of the hub are loaded: the rows of data/hub.yaml. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from alea_lib.runs.places import RunError, read_yaml, root

DTYPES = ("float32", "float16", "bfloat16")
REVISION_LENGTH = 40  # hexadecimal digits of a commit
MEANS = ("hub", "revision", "dtype", "four_bit", "unquantised")  # fields that results depend on, beyond rounding


@dataclass(frozen=True)
class ModelRow:
    """``hub``, ``revision``: repository and commit. ``dtype`` of weights and computation; ``four_bit``: the decoder's
    matrices in NF4, but for the parts named in ``unquantised`` (of all layers: any of them may be edited).

    Largest batches that the card takes: images that are seen at once (``see``), answers written (``write``), answers
    read without gradient (``read``), items of one backward pass (``train``: a larger batch goes through in pieces,
    with the gradient of the whole). ``keep_gib``: how much of what an edit reads once stays on the card, the rest goes
    to disk; 0 sets no limit. ``cache``: image features are kept on disk, in data/runs/features.
    """

    key: str
    hub: str
    revision: str
    dtype: str = "float32"
    four_bit: bool = False
    unquantised: tuple[str, ...] = ("down_proj",)
    see: int = 64
    write: int = 100
    read: int = 50
    train: int = 0
    keep_gib: float = 0.0
    cache: bool = False


def model_row(key: str) -> ModelRow | None:
    """The row of a key, None where there is none. RunError for a row that cannot be meant."""
    path = root() / "data" / "hub.yaml"
    rows = (read_yaml(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}
    if key not in rows:
        return None
    values = {**rows[key], "key": key}
    fields = {f.name for f in dataclasses.fields(ModelRow)}
    if unknown := sorted(set(values) - fields):
        raise RunError(f"data/hub.yaml: {key} has no field {', '.join(unknown)}; there are {', '.join(sorted(fields))}")
    if missing := sorted({"hub", "revision"} - set(values)):
        raise RunError(f"data/hub.yaml: {key} lacks {' and '.join(missing)}")
    row = ModelRow(**{**values, "unquantised": tuple(values.get("unquantised", ModelRow.unquantised))})
    _check(row)
    return row


def hub_name(key: str) -> str:
    """The hub's name of a key of data/hub.yaml; any other key as it is."""
    row = model_row(key)
    return row.hub if row else key


def _check(row: ModelRow) -> None:
    where = f"data/hub.yaml: {row.key}"
    if row.dtype not in DTYPES:
        raise RunError(f"{where}: dtype is {row.dtype!r}, it must be one of {', '.join(DTYPES)}")
    if len(str(row.revision)) != REVISION_LENGTH or set(str(row.revision)) - set("0123456789abcdef"):
        raise RunError(f"{where}: revision must be a whole commit ({REVISION_LENGTH} digits), it is {row.revision!r}")
    for name in ("see", "write", "read", "train"):
        value = getattr(row, name)
        if not isinstance(value, int) or value < (name != "train"):
            raise RunError(f"{where}: {name} is {value!r}, it must be a number of items, at least 1")


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
        from alea_lib.runs.record import sha256

        return f"model {folder.name}", {"sha256": sha256(folder)}
    commit = _cached_commit(key)
    return (
        (f"hub {key}", {"revision": commit, "sha256": hashlib.sha256(commit.encode()).hexdigest()}) if commit else None
    )


def _cached_commit(repository: str) -> str:
    """The commit of the hub model that is in the cache under its default branch, "" when it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""
