"""The edits of this study as rows beside their rivals: its methods, and their controls without the adversary, with one
that was not tuned, or in another place."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from ..edit.delta import Delta
from ..edit.fit import fit_edit
from ..edit.methods import adversary_settings, edit_method, edit_settings, fit_adversary
from ..locate.choose import choose_heads
from ..locate.run import locate_heads, official_layers
from ..vlm import VLM
from .registry import Baseline, register


@dataclass(frozen=True)
class AleaSettings:
    """``edit``: a name of :data:`alea_lib.edit.methods.METHODS`. ``layers``: the located ones. ``n_heads`` heads, and
    the layers of the official code, are located on the first ``n_locate`` pairs where the edit is made in them.
    The defaults are those of the page on editing."""

    edit: str
    layers: tuple[int, ...] = (2, 3)
    prefix_length: int = 5
    prefix_steps: int = 60
    epochs: int = 3
    lr: float = 1e-3
    kl: float = 0.2
    seed: int = 0
    n_heads: int = 2
    n_locate: int = 60


def fit_alea(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: AleaSettings) -> tuple[Delta, pd.DataFrame]:
    """The edit and its curve; the model is left bit-equal. ``features`` [N,P,D] and ``pairs`` (positive, negative) are
    of the same images."""
    positives, negatives = pairs["positive"].tolist(), pairs["negative"].tolist()
    method, few = edit_method(s.edit), (vlm, features[: s.n_locate], pairs.head(s.n_locate))
    heads = choose_heads(locate_heads(*few, ["gradient"]).scores, s.n_heads) if method.place == "heads" else ()
    official = tuple(official_layers(*few)[1]) if method.place == "official" else ()
    edit = edit_settings(
        s.edit, vlm.n_layers, s.layers, tuple(heads), s.seed, official, epochs=s.epochs, lr=s.lr, kl=s.kl
    )
    how = {"length": s.prefix_length, "steps": s.prefix_steps, "seed": s.seed}
    kind = "official" if method.adversary == "official" else "contrast"
    attack = adversary_settings(kind, vlm, negatives, features.shape[1], **how)
    prefix = fit_adversary(method.adversary, vlm, features, negatives, positives, attack)
    return fit_edit(vlm, features, positives, prefix, edit)


WHAT = {
    "alea-mixed": ("adversarial edit of the located layers, half of the steps clean", "this study"),
    "alea-corrected": ("adversarial edit of the located layers", "arXiv 2512.21999, faults mended"),
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
