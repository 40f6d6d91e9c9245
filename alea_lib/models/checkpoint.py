"""Resumable training: weights, optimiser state and step in one safetensors file, replaced atomically."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.files import DiskFullError, replacing

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors; the file is whole or as it was. DiskFullError, with the size, when the disk is full."""
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        if isinstance(error, DiskFullError) or "No space left" in str(error):
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            raise DiskFullError(
                errno.ENOSPC, f"no room on the disk for {size / 2**20:.1f} MiB; free some and run again", str(path)
            ) from error
        raise


def save(
    path: Path,
    step: int,
    parameters: dict[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
    tag: str = "",
    extra: dict[str, torch.Tensor] | None = None,
    note: str = "",
) -> None:
    """Write a checkpoint after ``step`` steps. ``tag`` names the settings: another tag is never resumed. ``extra``
    tensors and a ``note`` come back from ``extras``."""
    tensors = {f"weight.{n}": p.detach().contiguous() for n, p in parameters.items()}
    tensors |= {f"extra.{n}": t.detach().contiguous() for n, t in (extra or {}).items()}
    for name, p in parameters.items():
        for key, value in optimiser.state.get(p, {}).items():
            if key in MOMENTS and value is not None:
                tensors[f"{key}.{name}"] = value.detach().clone().contiguous()
    write_safetensors(tensors, path, {"steps": str(step), "tag": tag, "note": note})


def resume(path: Path, parameters: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, tag: str = "") -> int:
    """Load a checkpoint in place, if there is one of the same tag; returns the number of steps already done."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as f:
        if f.metadata().get("tag") != tag or {f"weight.{n}" for n in parameters} - set(f.keys()):
            return 0
        keys = set(f.keys())
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(f.get_tensor(f"weight.{name}"))
                state = {k: f.get_tensor(f"{k}.{name}") for k in MOMENTS if f"{k}.{name}" in keys}
                if state:
                    optimiser.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        return int(f.metadata()["steps"])


def extras(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The extra tensors and the note of a checkpoint."""
    with safe_open(path, "pt") as f:
        names = [k for k in f.keys() if k.startswith("extra.")]
        return {k.removeprefix("extra."): f.get_tensor(k) for k in names}, f.metadata().get("note", "")
