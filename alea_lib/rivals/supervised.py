"""Supervised fine-tuning on the grounded answers alone: of all decoder matrices, whole (``sft``) or by low-rank factors
(``lora-all``). The controls of an edit: the same data, no adversary, no located modules."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from ..edit.delta import Delta
from ..edit.fit import fit_edit
from ..edit.methods import edit_settings
from ..vlm import VLM
from .registry import Baseline, register


@dataclass(frozen=True)
class SupervisedSettings:
    """``rank``: of the factors, 0 trains the matrices whole."""

    rank: int = 0
    epochs: int = 3
    batch: int = 24
    lr: float = 1e-3
    seed: int = 0


SFT, LORA_ALL = SupervisedSettings(), SupervisedSettings(rank=8)


def fit_supervised(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, settings: SupervisedSettings = SFT
) -> tuple[Delta, pd.DataFrame]:
    """The edit and its curve; the model is left bit-equal. ``features`` [N,P,D] and ``pairs`` (positive) are of the
    same images."""
    s = settings
    how = {"rank": s.rank, "epochs": s.epochs, "batch": s.batch, "lr": s.lr}
    edit = edit_settings("sft", vlm.n_layers, (), seed=s.seed, **how)
    return fit_edit(vlm, features, pairs["positive"].tolist(), None, edit)


GRID = ({}, {"lr": 3e-4}, {"epochs": 1})
register(
    Baseline("sft", "delta", fit_supervised, SFT, GRID, "all decoder matrices trained on the grounded answers",
             "control: supervised fine-tuning")
)  # fmt: skip
register(
    Baseline("lora-all", "delta", fit_supervised, LORA_ALL, GRID, "the same by factors of low rank",
             "control: LoRA, Hu et al. 2022 (ICLR)")
)  # fmt: skip
