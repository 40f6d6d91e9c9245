"""Models of the hub at a pinned commit, as a folder on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from .runs.rows import ModelRow

WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja")  # never pickled weights


def switched_off() -> bool:
    """True when the hub must not be asked (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off")


def snapshot(row: ModelRow) -> Path:
    """The folder of a pinned hub model, complete. FileNotFoundError when it is not there and the hub is off."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    off = switched_off()
    try:
        return Path(
            snapshot_download(row.hub, revision=row.revision, allow_patterns=list(WANTED), local_files_only=off)
        )
    except LocalEntryNotFoundError as error:
        how = "the hub is switched off: set HF_HUB_OFFLINE=0" if off else "the hub does not answer: is there a network?"
        raise FileNotFoundError(f"{row.key}: {row.hub} at {row.revision[:12]} was not downloaded, and {how}") from error
