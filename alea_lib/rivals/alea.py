"""The method of this study and its control as rows beside their rivals: adversary, then edit of the located layers."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from ..edit.delta import Delta
from ..edit.fit import fit_edit
from ..edit.methods import adversary_settings, edit_method, edit_settings, fit_adversary
from ..vlm import VLM
from .registry import Rival, register


@dataclass(frozen=True)
class AleaSettings:
    """``edit``: a name of :data:`alea_lib.edit.methods.METHODS`. ``layers``: the located ones. The defaults are those
    of the page on editing."""

    edit: str
    layers: tuple[int, ...] = (2, 3)
    prefix_length: int = 5
    prefix_steps: int = 60
    epochs: int = 3
    lr: float = 1e-3
    kl: float = 0.2
    seed: int = 0


def fit_alea(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AleaSettings) -> tuple[Delta, pd.DataFrame]:
    """The edit and its curve; the model is left bit-equal. ``features`` [N,P,D] and ``pairs`` (positive, negative) are
    of the same images."""
    positives, negatives = pairs["positive"].tolist(), pairs["negative"].tolist()
    edit = edit_settings(s.edit, vlm.n_layers, s.layers, seed=s.seed, epochs=s.epochs, lr=s.lr, kl=s.kl)
    how = {"length": s.prefix_length, "steps": s.prefix_steps, "seed": s.seed}
    attack = adversary_settings("contrast", vlm, negatives, features.shape[1], **how)
    prefix = fit_adversary(edit_method(s.edit).adversary, vlm, features, negatives, positives, attack)
    return fit_edit(vlm, features, positives, prefix, edit)


register(
    Rival("alea-mixed", "delta", fit_alea, AleaSettings("alea-mixed"),
          description="adversarial edit of the located layers, half of the steps clean", source="this study")
)  # fmt: skip
register(
    Rival("alea-corrected", "delta", fit_alea, AleaSettings("alea-corrected"),
          description="adversarial edit of the located layers", source="arXiv 2512.21999, faults mended")
)  # fmt: skip
register(
    Rival("no-prefix", "delta", fit_alea, AleaSettings("no-prefix"),
          description="the same edit without the adversary", source="control of this study")
)  # fmt: skip
