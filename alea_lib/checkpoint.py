"""Resumable training: weights, optimiser state and step in one safetensors file, replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")


def save(
    path: Path, step: int, parameters: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, tag: str = ""
) -> None:
    """Write a checkpoint after ``step`` steps. ``tag`` names the settings: another tag is never resumed."""
    tensors = {f"weight.{n}": p.detach().contiguous() for n, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimiser.state.get(p, {}).items():
            if key in MOMENTS and value is not None:
                tensors[f"{key}.{name}"] = value.detach().clone().contiguous()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"steps": str(step), "tag": tag})
    os.replace(partial, path)


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
