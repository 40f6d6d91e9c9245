"""EDIT, the adversary: a soft prefix that makes the model neglect the image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .vlm import VLM, Batch, scored

PLACES = ("answer", "question")


@dataclass(frozen=True)
class Prefix:
    """``rows`` [k, D] put before the answer (or before the question, i.e. after the image) of every item."""

    rows: torch.Tensor
    place: str = "answer"

    def insert(self, batch: Batch, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B,T+k,D], mask [B,T+k] and labels [B,T+k] with the rows in their place in each item."""
        at = batch.answer if self.place == "answer" else batch.question
        k = len(self.rows)
        rows = self.rows.to(embeds).expand(len(embeds), -1, -1)
        ones, none = batch.mask.new_ones(len(embeds), k), batch.labels.new_full((len(embeds), k), -100)
        return _splice(embeds, rows, at), _splice(batch.mask, ones, at), _splice(batch.labels, none, at)


def _splice(x: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """x [B,T,...], new [B,k,...], at [B] -> [B,T+k,...], new before x[b, at[b]]."""
    return torch.stack([torch.cat([x[b, :p], new[b], x[b, p:]]) for b, p in enumerate(at.tolist())])


@dataclass(frozen=True)
class PrefixSettings:
    """How the prefix is tuned. Norms are in units of the mean norm of a token embedding."""

    length: int = 5
    place: str = "answer"
    prompt: str = "plain"
    neglect: float = 0.5  # weight of KL(no-image output || output under the prefix) beside the NLL of the negative
    norm: float = 2.0  # largest norm of a row: the adversary's budget
    steps: int = 100
    batch: int = 24
    lr: float = 0.02
    seed: int = 0


def embedding_scale(vlm: VLM) -> float:
    """Mean norm of a token embedding, as the language model reads it (Gemma multiplies its table)."""
    table = vlm.model.get_input_embeddings()
    with torch.no_grad():
        return table(torch.arange(len(table.weight), device=vlm.device)).float().norm(dim=-1).mean().item()


def random_prefix(vlm: VLM, settings: PrefixSettings) -> Prefix:
    """The starting point, and the control: random rows of the scale of the embeddings."""
    if settings.place not in PLACES:
        raise ValueError(f"unknown prefix place {settings.place!r}; there are {PLACES}")
    generator = torch.Generator().manual_seed(settings.seed)
    width = vlm.model.get_input_embeddings().weight.shape[1]
    rows = torch.randn(settings.length, width, generator=generator)
    return Prefix((rows / rows.norm(dim=-1, keepdim=True) * embedding_scale(vlm)).to(vlm.device), settings.place)


def fit_prefix(
    vlm: VLM, features: torch.Tensor, negatives: list[str], settings: PrefixSettings
) -> tuple[Prefix, pd.DataFrame]:
    """Tune a prefix until the hallucinated answers are likely and the image hardly matters.

    Returns the prefix and its curve (step, nll, neglect). The model is not touched.
    """
    if not len(negatives):
        raise ValueError("no negatives to tune the prefix on: stage 02_activate found no pairs")
    start = random_prefix(vlm, settings)
    rows = start.rows.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([rows], lr=settings.lr, weight_decay=0.0)
    limit = settings.norm * embedding_scale(vlm)
    curve = []
    for step in tqdm(range(settings.steps), desc="prefix"):
        pick = np.random.default_rng([settings.seed, 1, step]).choice(
            len(negatives), min(settings.batch, len(negatives)), replace=False
        )
        batch = vlm.encode(features[torch.as_tensor(pick)], vlm.prompt(settings.prompt), [negatives[i] for i in pick])
        nll, neglect = _adversary_loss(vlm, batch, replace(start, rows=rows), settings.neglect)
        loss = nll + settings.neglect * neglect
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the prefix's loss is {loss.item()} at step {step}; lower lr ({settings.lr}) or norm"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            rows *= (limit / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        curve.append({"step": step, "nll": nll.item(), "neglect": neglect.item()})
    return Prefix(rows.detach(), settings.place), pd.DataFrame(curve)


def _adversary_loss(vlm: VLM, batch: Batch, prefix: Prefix, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        plain = vlm.embed(batch)
    embeds, mask, labels = prefix.insert(batch, plain)
    logits = vlm.answer_logits(batch, embeds, mask, scored(labels))
    nll = F.cross_entropy(logits.float(), labels[labels != -100])
    if not weight:
        return nll, torch.zeros(())
    blind = blind_logits(vlm, batch, plain).float().log_softmax(-1)
    return nll, F.kl_div(logits.float().log_softmax(-1), blind, log_target=True, reduction="batchmean")


@torch.no_grad()
def blind_logits(vlm: VLM, batch: Batch, embeds: torch.Tensor) -> torch.Tensor:
    """Answer logits [n,V] when no position may look at the image (its positions are masked out)."""
    image = batch.ids == vlm.model.config.image_token_id
    return vlm.answer_logits(batch, embeds, batch.mask * ~image)


@torch.no_grad()
def prefix_evidence(
    vlm: VLM,
    features: torch.Tensor,
    pairs: pd.DataFrame,
    prefix: Prefix,
    settings: PrefixSettings,
    batch_size: int = 50,
) -> pd.DataFrame:
    """What a prefix does on pairs, beside none and a random one of equal norm.

    Rows: none, random, tuned. Columns: NLL of both answers in nats a token, and how much the image matters, i.e.
    KL(seeing || blind) at the tokens of the positive; n pairs. Empty when there are no pairs.
    """
    control = random_prefix(vlm, replace(settings, seed=settings.seed + 1000))
    scale = prefix.rows.norm(dim=-1).mean() / control.rows.norm(dim=-1).mean()
    control = replace(control, rows=control.rows * scale)
    rows = []
    for name, each in (("none", None), ("random", control), ("tuned", prefix)):
        sums = np.zeros(5)
        for start in range(0, len(pairs), batch_size):
            part = slice(start, start + batch_size)
            for i, column in enumerate(("negative", "positive")):
                batch = vlm.encode(features[part], vlm.prompt(settings.prompt), pairs[column].tolist()[part])
                nll, effect, n = _effects(vlm, batch, each)
                sums[2 * i : 2 * i + 2] += nll, n
                sums[4] += effect if column == "positive" else 0.0
        rows.append(
            {
                "prefix": name,
                "nll_negative": sums[0] / sums[1],
                "nll_positive": sums[2] / sums[3],
                "image_effect": sums[4] / sums[3],
                "n": len(pairs),
            }
            if len(pairs)
            else {"prefix": name}
        )
    return pd.DataFrame(rows).set_index("prefix")


def _effects(vlm: VLM, batch: Batch, prefix: Prefix | None) -> tuple[float, float, int]:
    """Summed NLL and summed KL(seeing || blind) over the answer's tokens, and their number."""
    embeds, mask, labels = vlm.embed(batch), batch.mask, batch.labels
    hidden = mask * (batch.ids != vlm.model.config.image_token_id)
    if prefix is not None:
        hidden = prefix.insert(replace(batch, mask=hidden), embeds)[1]
        embeds, mask, labels = prefix.insert(batch, embeds)
    seeing = vlm.answer_logits(batch, embeds, mask, scored(labels)).float().log_softmax(-1)
    blind = vlm.answer_logits(batch, embeds, hidden, scored(labels)).float().log_softmax(-1)
    nll = F.nll_loss(seeing, labels[labels != -100], reduction="sum")
    return nll.item(), F.kl_div(blind, seeing, log_target=True, reduction="sum").item(), len(seeing)


def save_prefix(prefix: Prefix, path: Path) -> None:
    save_file({"rows": prefix.rows.detach().cpu().contiguous()}, path, metadata={"place": prefix.place})


def load_prefix(path: Path) -> Prefix:
    """FileNotFoundError if there is none."""
    with safe_open(path, "pt") as f:
        return Prefix(f.get_tensor("rows"), f.metadata()["place"])
