"""DPO on the pairs (Rafailov et al. 2023): the grounded answer is to gain more over the base than the hallucinated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..edit.losses import CachedForward
from ..edit.settings import EditSettings
from ..edit.settings import check as check_edit
from ..edit.trained import Trained, trained
from ..models.batch import loss_scale, scale_gradient
from ..models.delta import Delta
from ..models.vlm import VLM
from .registry import Baseline, register

CURVE = ["step", "loss", "margin", "accuracy"]
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class DpoSettings:
    """``beta`` scales the log-ratios; the other fields mean what they do in an edit's settings. ``layers`` () = all."""

    beta: float = 0.1
    layers: tuple[int, ...] = ()
    modules: str = "down_proj"
    rank: int = 0
    prompt: str = "plain"
    epochs: int = 2
    batch: int = 12
    lr: float = 1e-4
    fast: bool = True
    seed: int = 0


def preference_loss(change: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta (change of the positives - change of the negatives)), mean over pairs.

    ``change`` [2,n]: log-probability of the positives and negatives (sums over their tokens) minus the base's.
    """
    return -F.logsigmoid(beta * (change[0] - change[1])).mean()


def fit_dpo(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, settings: DpoSettings = DpoSettings()
) -> tuple[Delta, pd.DataFrame]:
    """The edit and its curve (step, loss, margin in nats an answer, share of pairs with a margin above 0); the model is
    left bit-equal. The base's log-probabilities are computed once an answer.

    ``features`` [N,P,D] and ``pairs`` (positive, negative) are of the same images. ValueError for no pairs or settings
    out of range, FloatingPointError when the loss is not finite.
    """
    if not len(pairs):
        raise ValueError("no pairs to prefer one answer in: stage 02_activate found none, or the filter removed all")
    edit = _edit_settings(vlm, settings)
    check_edit(edit)
    made = trained(vlm, edit)
    texts = {side: pairs[side].tolist() for side in SIDES}
    passes = CachedForward(vlm, features, texts, edit, made)
    base: dict[tuple[str, int], float] = {}
    scale = loss_scale(vlm.model.dtype)
    scale_gradient(made.parameters.values(), scale)
    optimiser = torch.optim.AdamW(made.parameters.values(), lr=settings.lr, weight_decay=0.0)
    curve = []
    for pick in tqdm(list(_order(len(pairs), settings)), desc="dpo"):
        optimiser.zero_grad()
        total, margins = 0.0, []
        for piece in vlm.limits.microbatches(pick):
            reference = _reference(passes, made, settings.prompt, piece, base)
            change = _log_p(passes, made.weights(), settings.prompt, piece) - reference
            loss = len(piece) / len(pick) * preference_loss(change, settings.beta)
            (scale * loss).backward()
            total += loss.item()
            margins.append((change[0] - change[1]).detach())
        optimiser.step()
        if not (np.isfinite(total) and made.finite()):
            raise FloatingPointError(
                f"loss ({total}) or weights are not finite at step {len(curve)}; lower lr ({settings.lr})"
            )
        margin = torch.cat(margins)
        curve.append((len(curve), total, margin.mean().item(), (margin > 0).float().mean().item()))
    return made.delta(vlm, {"dpo": asdict(settings)}), pd.DataFrame(curve, columns=CURVE)


def _edit_settings(vlm: VLM, s: DpoSettings) -> EditSettings:
    shared = {f.name: getattr(s, f.name) for f in fields(s) if f.name not in ("beta", "layers")}
    return EditSettings(layers=s.layers or tuple(range(vlm.n_layers)), prefix_share=0.0, **shared)


def _order(n: int, s: DpoSettings):
    """Indices of the batches of all epochs, mixed from the seed."""
    for epoch in range(s.epochs):
        mixed = np.random.default_rng([s.seed, 8, epoch]).permutation(n)
        yield from np.array_split(mixed, max(1, round(n / s.batch)))


def _log_p(passes: CachedForward, weights: dict[str, torch.Tensor], prompt: str, pick: np.ndarray) -> torch.Tensor:
    """Log-probabilities [2,n] of the picked positives and negatives, end token included."""
    rows = []
    for side in SIDES:
        logits, labels = passes(side, prompt, pick, weights)
        each = -F.cross_entropy(logits.float(), labels, reduction="none")
        lengths = (passes.encode(side, prompt, pick).labels != -100).sum(1).tolist()
        rows.append(torch.stack([part.sum() for part in each.split(lengths)]))
    return torch.stack(rows)


@torch.no_grad()
def _reference(passes: CachedForward, made: Trained, prompt: str, pick: np.ndarray, kept: dict) -> torch.Tensor:
    """The same of the base, each answer's kept after its first batch."""
    new = np.array([i for i in pick if ("positive", int(i)) not in kept], dtype=int)
    if len(new):
        found = _log_p(passes, made.own, prompt, new).tolist()
        kept |= {(side, int(i)): value for side, row in zip(SIDES, found) for i, value in zip(new, row, strict=True)}
    return torch.tensor([[kept[side, int(i)] for i in pick] for side in SIDES], device=passes.vlm.device)


GRID = ({}, {"lr": 3e-5}, {"modules": "decoder", "rank": 8})
register(
    Baseline("dpo", "delta", fit_dpo, DpoSettings(), GRID, "preference of the grounded over the hallucinated answers",
             "DPO: Rafailov et al. 2023 (NeurIPS); beta 0.1")
)  # fmt: skip
