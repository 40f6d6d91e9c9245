"""Training the vision tower on patch labels: which object covers this patch, and what colour is the background."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..datasets.scenes import SIZE, compose, objects, patch_labels, recipe, sample
from .text import pixels


@dataclass(frozen=True)
class VisionSettings:
    """One tower. ``first`` = index of its first training scene: towers of other seeds see other scenes."""

    seed: int = 0
    width: int = 128
    mlp: int = 320
    layers: int = 4
    heads: int = 4
    patch: int = 16
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    background: float = 0.2  # weight of background patches in the loss
    first: int = 0


class Tower(nn.Module):
    """CLIP + patch head: pixels [B,3,S,S] -> features [B,P,D], patch logits [B,P,K+1], colour logits [B,C]."""

    def __init__(self, s: VisionSettings):
        super().__init__()
        shape = {"hidden_size": s.width, "projection_dim": s.width, "intermediate_size": s.mlp}
        shape |= {"num_hidden_layers": s.layers, "num_attention_heads": s.heads}
        self.clip = CLIPVisionModel(CLIPVisionConfig(image_size=SIZE, patch_size=s.patch, **shape))
        self.patches = nn.Linear(s.width, len(objects()) + 1)
        self.colour = nn.Linear(s.width, len(recipe()["colours"]))

    def forward(self, x: torch.Tensor):
        h = self.clip(pixel_values=x, output_hidden_states=True).hidden_states[-1][:, 1:]
        return h, self.patches(h), self.colour(h.mean(1))


def batch_of(indices, split: str, patch: int):
    """Pixels [B,3,S,S], patch labels [B,P], background colours [B] of composed scenes."""
    images, labels, colours = [], [], []
    order = list(recipe()["colours"])
    for i in indices:
        scene = sample(split, int(i))
        image, cover = compose(scene)
        images.append(image)
        labels.append(patch_labels(scene, cover, patch))
        colours.append(order.index(scene.colour))
    return pixels(np.stack(images)), torch.as_tensor(np.stack(labels)), torch.as_tensor(colours)


def one_cycle(parameters, lr: float, steps: int, weight_decay: float = 0.01):
    """Fused AdamW with a one-cycle schedule, for all training in the zoo."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)


def write_row(log: TextIO, row: dict) -> None:
    """One line of a training curve, in the file at once, and shown."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    print(row, flush=True)


def train_tower(s: VisionSettings, folder: Path) -> Tower:
    """Train (or load, when ``folder`` holds the finished tower) a tower; logs a curve to ``vision.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s.seed)
    tower = Tower(s)
    done = folder / "tower.safetensors"
    if done.is_file():
        tower.load_state_dict(load_file(done))
        return tower.eval()
    weight = torch.ones(len(objects()) + 1)
    weight[0] = s.background
    optimiser, schedule = one_cycle(tower.parameters(), s.lr, s.steps)
    started, log = time.time(), (folder / "vision.jsonl").open("w")
    for step in range(s.steps):
        x, y, c = batch_of(range(s.first + step * s.batch, s.first + (step + 1) * s.batch), "train", s.patch)
        _, logits, colour = tower(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), weight) + 0.1 * F.cross_entropy(colour, c)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 99 or step == s.steps - 1:
            seconds = time.time() - started
            row = {"step": step + 1, "loss": loss.item(), **evaluate_tower(tower, s.patch), "seconds": seconds}
            write_row(log, row)
    save_file(tower.state_dict(), done)
    return tower.eval()


@torch.no_grad()
def evaluate_tower(tower: Tower, patch: int, n: int = 128) -> dict:
    """Accuracy on the patches of objects, and of the background's colour, on validate scenes."""
    x, y, c = batch_of(range(n), "validate", patch)
    _, logits, colour = tower(x)
    front = y > 0
    return {
        "patch_accuracy": (logits.argmax(-1) == y)[front].float().mean().item(),
        "colour_accuracy": (colour.argmax(-1) == c).float().mean().item(),
    }
