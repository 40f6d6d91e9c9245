"""Hand an edit over: as a peft adapter, or as a whole checkpoint in which only the changed tensors are rewritten."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open

from ..core.files import write_csv
from ..models.checkpoint import write_safetensors
from ..models.delta import Delta, WrongBase
from ..models.hub import hub_name
from ..models.identity import weight_hash

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def low_rank(delta: Delta, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact factors (B [out,r], A [r,in]) of a difference: its own if it is low-rank, else its changed columns or all
    rows beside a selection, whichever is fewer."""
    if name in delta.factors:
        return delta.factors[name]
    change = delta.weights[name]
    columns = change.abs().amax(0).nonzero()[:, 0]
    if 0 < len(columns) <= change.shape[0]:
        return change[:, columns].contiguous(), torch.eye(change.shape[1])[columns]
    return torch.eye(change.shape[0]), change.contiguous()


def export_adapter(delta: Delta, folder: Path, base: str = "") -> Path:
    """A LoRA adapter that ``PeftModel.from_pretrained`` loads over the base model, 4-bit or not.

    The factors' product is the delta exactly, so a full-matrix edit has a rank of up to its smaller side. ``base``:
    name or path of the base model to write into the configuration (default: the hub's name of the key that it was
    loaded by, or that key).
    """
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    factors = {n: low_rank(delta, n) for n in sorted(delta.weights)}
    ranks = {n: b.shape[1] for n, (b, _) in factors.items()}
    top = max(ranks.values())
    LoraConfig(
        r=top,
        lora_alpha=top,  # scaling 1: the factors are the delta
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=sorted(factors),
        base_model_name_or_path=base or hub_name(delta.info["model"]),
        revision=delta.info.get("revision") or None,
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {}
    for name, (b, a) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    write_safetensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def export_checkpoint(delta: Delta, source: Path, target: Path) -> pd.DataFrame:
    """Copy a full-precision checkpoint folder and overwrite the bytes of the edited tensors alone.

    Memory is that of one matrix. Returns what was written: tensor, its relative change, the share of its entries
    that changed and how much of the change survived the checkpoint's precision (also in ``edited.csv``). Raises
    FileNotFoundError, WrongBase when the checkpoint is not what the delta was computed on, OSError for a full disk.
    """
    where = tensor_files(source)
    names = {name: stored_name(name + ".weight", list(where)) for name in sorted(delta.weights)}
    for name, key in names.items():
        with safe_open(source / where[key], "pt") as f:
            if weight_hash(f.get_tensor(key)) != delta.base[name]:
                raise WrongBase(
                    f"{key} in {source} is not the weight that this delta was computed on "
                    f"({delta.info.get('model')}); export over that model, loaded in its own precision"
                )
    target.mkdir(parents=True, exist_ok=True)
    need, free = sum(f.stat().st_size for f in source.rglob("*")), shutil.disk_usage(target).free
    if free < need:
        message = f"no room on the disk: {need / 2**20:.0f} MiB needed, {free / 2**20:.0f} free"
        raise OSError(errno.ENOSPC, message, str(target))
    shutil.copytree(source, target, dirs_exist_ok=True)
    rows = [_patch(delta.weights[n], source / where[key], target / where[key], key) for n, key in names.items()]
    table = pd.DataFrame(rows)
    write_csv(table, target / "edited.csv")
    return table


def tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file, of a checkpoint in one file or in shards."""
    if (folder / INDEX).is_file():
        return json.loads((folder / INDEX).read_text())["weight_map"]
    if not (folder / ONE_FILE).is_file():
        raise FileNotFoundError(
            f"no {ONE_FILE} and no {INDEX} in {folder}: give the folder of a safetensors checkpoint"
        )
    with safe_open(folder / ONE_FILE, "pt") as f:
        return dict.fromkeys(f.keys(), ONE_FILE)


def stored_name(name: str, stored: list[str]) -> str:
    """The name on disk of a tensor that has another name in memory: the longest common ending, then most parts."""
    parts = name.split(".")

    def likeness(key: str) -> tuple[int, int]:
        theirs = key.split(".")
        differ = [i for i, (a, b) in enumerate(zip(parts[::-1], theirs[::-1])) if a != b]
        return min([*differ, len(parts), len(theirs)]), len(set(parts) & set(theirs))

    best = max(map(likeness, stored))
    found = [key for key in stored if likeness(key) == best]
    if len(found) != 1 or best[0] < 3:
        raise WrongBase(f"the checkpoint has no tensor that answers to {name}; nearest: {sorted(found)[:3]}")
    return found[0]


def _patch(change: torch.Tensor, source: Path, target: Path, key: str) -> dict:
    """Overwrite one tensor's bytes in the copy; everything else stays byte by byte."""
    with safe_open(source, "pt") as f:
        own = f.get_tensor(key)
    new = (own.float() + change).to(own.dtype).contiguous()
    with target.open("r+b") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        start, end = json.loads(f.read(size))[key]["data_offsets"]
        raw = new.view(torch.uint8).numpy().tobytes()
        assert len(raw) == end - start
        f.seek(8 + size + start)
        f.write(raw)
        f.flush()
        os.fsync(f.fileno())
    written = new.float() - own.float()
    return {
        "tensor": key,
        "relative": (change.norm() / own.float().norm()).item(),
        "changed": (new != own).float().mean().item(),
        "survived": ((written * change).sum() / change.square().sum().clamp(min=1e-30)).item(),
    }
