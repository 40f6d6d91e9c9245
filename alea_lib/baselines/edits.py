"""Edits by supervised or adversarial training as rows beside the baselines: those of this study, their controls without
the adversary, with one that was not tuned, or in another place, and fine-tuning of all decoder matrices."""

from dataclasses import dataclass

import pandas as pd
import torch

from ..edit.methods import EditRequest, fit_method
from ..models.delta import Delta
from ..models.vlm import VLM
from .registry import Baseline, register


@dataclass(frozen=True)
class AleaSettings:
    """``edit``: a name of :data:`alea_lib.edit.methods.METHODS`. ``layers``: the located ones. The defaults are those
    of the page on editing."""

    edit: str
    layers: tuple[int, ...] = (2, 3)
    prefix_steps: int = 60
    epochs: int = 3
    lr: float = 1e-3
    seed: int = 0


def fit_alea(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AleaSettings) -> Delta:
    """An edit of this study; see :func:`alea_lib.edit.methods.fit_method`."""
    changes = {"epochs": s.epochs, "lr": s.lr}
    request = EditRequest(s.edit, s.layers, seed=s.seed, changes=changes, prefix_steps=s.prefix_steps)
    return fit_method(vlm, features, pairs, request)[0]


@dataclass(frozen=True)
class SupervisedSettings:
    """Of all decoder matrices. ``rank``: of their factors, 0 trains them whole."""

    rank: int = 0
    epochs: int = 3
    lr: float = 1e-3
    seed: int = 0


def fit_supervised(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: SupervisedSettings) -> Delta:
    """Fine-tuning on the grounded answers alone: no adversary, no located modules."""
    changes = {"rank": s.rank, "epochs": s.epochs, "lr": s.lr}
    return fit_method(vlm, features, pairs, EditRequest("sft", seed=s.seed, changes=changes))[0]


WHAT = {
    "alea-mixed": ("adversarial edit of the located layers, half of the steps clean", "this study"),
    "alea-corrected": ("adversarial edit of the located layers", "arXiv 2512.21999, faults corrected"),
    "alea-official": ("the edit as the official code makes it, in the layers that it names", "official code"),
    "no-prefix": ("the same edit without the adversary", "control of this study"),
    "random-prefix": ("the same edit with rows that were not tuned", "control of this study"),
    "random-layers": ("no adversary, in layers drawn by chance", "control of this study"),
    "last-layer": ("no adversary, in the last layer", "control of this study"),
    "all-layers": ("no adversary, in all layers", "control of this study"),
    "heads": ("no adversary, in the output columns of located heads", "control of this study"),
    "lora": ("no adversary, in the located layers by factors of low rank", "LoRA, Hu et al. 2022 (ICLR)"),
}
for name, (description, source) in WHAT.items():
    register(Baseline(name, "delta", fit_alea, AleaSettings(name), description=description, source=source))

GRID = ({}, {"lr": 3e-4}, {"epochs": 1})
for name, rank, description, source in (
    ("sft", 0, "all decoder matrices trained on the grounded answers", "control: supervised fine-tuning"),
    ("lora-all", 8, "the same by factors of low rank", "control: LoRA, Hu et al. 2022 (ICLR)"),
):
    register(Baseline(name, "delta", fit_supervised, SupervisedSettings(rank), GRID, description, source))
