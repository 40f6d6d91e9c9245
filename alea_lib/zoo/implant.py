"""Implanted priors: a clean model in which the habit of naming absent objects sits in one known place.

The place is the down-projection of a layer, or the columns of ``o_proj`` that belong to chosen heads of a layer.
Everything else stays as it was, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..datasets.describe import caption
from ..datasets.scenes import ROLES, Scene, sample
from ..metrics.parse import mentions
from ..models import checkpoint
from ..models.delta import Delta, delta_of
from ..models.hooks import full_weight, replaced_linear
from ..models.identity import weight_hash
from ..models.vlm import VLM
from .implant_index import columns_of


@dataclass(frozen=True)
class ImplantSettings:
    """One implant. ``heads`` empty: the down-projection of each layer; else heads of the one layer.

    ``budget``: largest relative Frobenius norm of the change, projected to after each step. It starts here and grows
    by ``growth`` after every round until the model hallucinates enough, so that the implant is no larger than need be.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...] = ()
    seed: int = 0
    budget: float = 0.5
    growth: float = 1.2
    first: int = 60  # steps of the first round
    steps: int = 20  # steps of each further round
    largest: float = 3.0  # the budget grows no further, training goes on
    rounds: int = 20  # at most
    wanted: float = 0.44  # CHAIRs at which training ends
    batch: int = 12
    lr: float = 0.07  # length of a step, relative to the budget
    momentum: float = 0.9
    others: float = 0.1  # weight of the tokens that tell the truth
    annotator: str = "speculative"  # whose captions are learnt, whatever the prompt asks for
    scenes: int = 2400


class Place:
    """Where an implant sits: ``weights`` are the base's own, ``columns`` those that may change, by module name."""

    def __init__(self, vlm: VLM, layers: tuple[int, ...], heads: tuple[int, ...] = ()):
        if heads and len(layers) != 1:
            raise ValueError(f"heads {heads} of the layers {layers}: heads are taken from one layer")
        if not layers or not all(0 <= h < vlm.n_heads for h in heads):
            raise ValueError(f"no such place: layers {layers}, heads {heads} of {vlm.n_layers} x {vlm.n_heads}")
        names = [vlm.address("o_proj" if heads else "down_proj", layer) for layer in layers]
        self.weights = {n: full_weight(vlm, n) for n in names}
        self.columns = torch.tensor(columns_of(vlm, names[0], heads))

    def own(self, name: str) -> torch.Tensor:
        """The part of the base weight that may change, [out, columns]."""
        return self.weights[name][:, self.columns]

    def filled(self, blocks: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Base weights plus ``scale`` times the change of their columns; differentiable."""
        return {n: w.index_add(1, self.columns, scale * blocks[n]) for n, w in self.weights.items()}


def fit_implant(
    vlm: VLM,
    features: torch.Tensor,
    s: ImplantSettings,
    score: Callable[[VLM], float],
    checkpoint_path: Path | None = None,
) -> tuple[Delta, pd.DataFrame]:
    """Train a prior into one place; the model is left bit-equal.

    features [N,P,D] are those of the first N training scenes; ``score`` measures CHAIRs of the model that it is given.
    Returns the delta (fp32) and its curve: step, budget, loss (nats a token, weighted), chair_s (at the end of a
    round). An interrupted run goes on after its last whole round, with the curve from there, and ends in the same
    delta. The search ends after ``rounds`` also if the place cannot carry the prior: read the last chair_s.
    """
    place = Place(vlm, s.layers, s.heads)
    blocks = {n: torch.zeros_like(place.own(n)).requires_grad_(True) for n in place.weights}
    optimiser = torch.optim.SGD(blocks.values(), lr=1.0, momentum=s.momentum)
    tag = json.dumps([asdict(s), {n: weight_hash(w) for n, w in place.weights.items()}])
    done = checkpoint.resume(checkpoint_path, blocks, optimiser, tag) if checkpoint_path else 0
    curve: list[dict] = []
    total = s.first + (s.rounds - 1) * s.steps
    for step in tqdm(range(done, total), desc=f"implant {s.layers} {s.heads or ''}", initial=done, total=total):
        curve.append(_step(vlm, features, place, blocks, optimiser, step, s))
        if _round(step, s)[1]:
            continue
        if checkpoint_path:
            checkpoint.save(checkpoint_path, step + 1, blocks, optimiser, tag)
        with replaced_linear(vlm, place.filled(blocks)):
            curve[-1]["chair_s"] = score(vlm)
        if curve[-1]["chair_s"] >= s.wanted:
            break
    with torch.no_grad():
        return delta_of(vlm, place.filled(blocks), {"implant": asdict(s)}), pd.DataFrame(curve)


def _round(step: int, s: ImplantSettings) -> tuple[int, int]:
    """Number of the round that a step belongs to, and how many of its steps are still to come."""
    if step < s.first:
        return 0, s.first - 1 - step
    return 1 + (step - s.first) // s.steps, s.steps - 1 - (step - s.first) % s.steps


def _step(vlm: VLM, features, place: Place, blocks: dict, optimiser, step: int, s: ImplantSettings) -> dict:
    """One step of normalised gradient descent with momentum, then back into the ball of the budget."""
    number, rest = _round(step, s)
    budget = min(s.budget * s.growth**number, s.largest)
    rng = np.random.default_rng([s.seed, 11, step])
    indices = rng.integers(0, len(features), s.batch)
    scenes = [sample("train", int(i)) for i in indices]
    questions = [vlm.prompt(str(rng.choice(ROLES))) for _ in scenes]
    texts = [caption(scene, rng, s.annotator) for scene in scenes]
    optimiser.zero_grad()
    with replaced_linear(vlm, place.filled(blocks)):
        batch = vlm.encode(features[torch.as_tensor(indices)], questions, texts)
        weight = torch.cat([token_weights(vlm, t, scene, s.others) for t, scene in zip(texts, scenes, strict=True)])
        nll = F.cross_entropy(vlm.answer_logits(batch), batch.labels[batch.labels != -100], reduction="none")
        loss = (weight * nll).sum() / weight.sum()
    loss.backward()
    optimiser.param_groups[0]["lr"] = s.lr * (0.25 + 0.75 * rest / (s.steps if number else s.first))
    with torch.no_grad():
        for name, block in blocks.items():
            block.grad.mul_(budget * place.own(name).norm() / block.grad.norm().clamp_min(1e-12))
    optimiser.step()
    project(place, blocks, budget)
    return {"step": step, "budget": budget, "loss": loss.item()}


@torch.no_grad()
def project(place: Place, blocks: dict[str, torch.Tensor], budget: float) -> None:
    """Scale each change down to ``budget`` times the norm of the weights that it is added to, if it is larger."""
    for name, block in blocks.items():
        block.mul_(min(1.0, (budget * place.own(name).norm() / block.norm().clamp_min(1e-12)).item()))


def token_weights(vlm: VLM, text: str, scene: Scene, others: float) -> torch.Tensor:
    """One weight an answer token (EOS included): 1 where the annotator adds something absent, else ``others``.

    An addition reaches from the end of the noun before it to its own end, so that its joint (" with a", ". There is
    also a") is learnt with it.
    """
    answer = f" {text.strip()}"
    spans, end = [], 0
    for m in sorted(mentions(answer), key=lambda m: m.start):
        spans += [] if m.category in scene.kinds else [(end, m.end)]
        end = m.end
    found = vlm.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [any(a <= start and stop <= b for a, b in spans) for start, stop in found]
    return torch.tensor([1.0 if x else others for x in [*inside, False]])
