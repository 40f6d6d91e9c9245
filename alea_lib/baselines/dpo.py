"""DPO on the pairs (Rafailov et al. 2023): the grounded answer is to gain more over the base than the hallucinated."""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..edit.losses import CachedForward
from ..edit.settings import preset
from ..edit.trained import trained
from ..models.batch import loss_scale, scale_gradient
from ..models.delta import Delta
from ..models.vlm import VLM
from .registry import Baseline, register

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class DpoSettings:
    """``beta`` scales the log-ratios; the other fields mean what they do in an edit's settings, in all layers."""

    beta: float = 0.1
    modules: str = "down_proj"
    rank: int = 0
    epochs: int = 2
    batch: int = 12
    lr: float = 1e-4
    seed: int = 0


def preference_loss(change: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta (change of the positives - change of the negatives)), mean over pairs.

    ``change`` [2,n]: log-probability of the positives and negatives (sums over their tokens) minus the base's.
    """
    return -F.logsigmoid(beta * (change[0] - change[1])).mean()


def fit_dpo(vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, s: DpoSettings) -> Delta:
    """The edit; the model is left bit-equal. The base's log-probabilities are computed once an answer.

    ``features`` [N,P,D] and ``pairs`` (positive, negative) are of the same images. ValueError for no pairs or settings
    out of range, FloatingPointError when the loss is not finite.
    """
    if not len(pairs):
        raise ValueError("no pairs to prefer one answer in: stage 02_activate found none, or the filter removed all")
    changes = {k: v for k, v in asdict(s).items() if k != "beta"}
    edit = preset("no-prefix", layers=tuple(range(vlm.n_layers)), **changes)
    made = trained(vlm, edit)
    passes = CachedForward(vlm, features, {side: pairs[side].tolist() for side in SIDES}, edit, made)
    base: dict[int, torch.Tensor] = {}  # pair -> [2]
    scale = loss_scale(vlm.model.dtype)
    scale_gradient(made.parameters.values(), scale)
    optimiser = torch.optim.AdamW(made.parameters.values(), lr=s.lr, weight_decay=0.0)
    for step, pick in enumerate(tqdm(list(_order(len(pairs), s)), desc="dpo")):
        optimiser.zero_grad()
        total = 0.0
        for piece in vlm.limits.microbatches(pick):
            if piece[0] not in base:  # an epoch has each pair once: in the first one none is known
                with torch.no_grad():
                    base.update(zip(piece.tolist(), _log_p(passes, made.own, piece).T))
            change = _log_p(passes, made.weights(), piece) - torch.stack([base[i] for i in piece.tolist()], 1)
            loss = len(piece) / len(pick) * preference_loss(change, s.beta)
            (scale * loss).backward()
            total += loss.item()
        optimiser.step()
        if not (np.isfinite(total) and made.finite()):
            raise FloatingPointError(f"loss ({total}) or weights are not finite at step {step}; lower lr ({s.lr})")
    return made.delta(vlm, {"dpo": asdict(s)})


def _order(n: int, s: DpoSettings):
    """Indices of the batches of all epochs, mixed from the seed."""
    for epoch in range(s.epochs):
        mixed = np.random.default_rng([s.seed, 8, epoch]).permutation(n)
        yield from np.array_split(mixed, max(1, round(n / s.batch)))


def _log_p(passes: CachedForward, weights: dict[str, torch.Tensor], pick: np.ndarray) -> torch.Tensor:
    """Log-probabilities [2,n] of the picked positives and negatives, end token included."""
    rows = []
    for side in SIDES:
        logits, labels = passes(side, "plain", pick, weights)
        each = -F.cross_entropy(logits.float(), labels, reduction="none")
        lengths = (passes.encode(side, "plain", pick).labels != -100).sum(1).tolist()
        rows.append(torch.stack([part.sum() for part in each.split(lengths)]))
    return torch.stack(rows)


GRID = ({}, {"lr": 3e-5}, {"modules": "decoder", "rank": 8})
register(
    Baseline("dpo", "delta", fit_dpo, DpoSettings(), GRID, "preference of the grounded over the hallucinated answers",
             "DPO: Rafailov et al. 2023 (NeurIPS); beta 0.1")
)  # fmt: skip
