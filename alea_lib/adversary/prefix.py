"""EDIT, the adversary: a soft prefix that makes the model neglect the image, and what one does on held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from ..core.stats import summarise
from ..metrics.chair import chair
from ..metrics.truth import Truth
from ..models.batch import Batch, loss_scale, scale_gradient, target_mask
from ..models.checkpoint import write_safetensors
from ..models.vlm import VLM
from .objectives import TERMS, AdversaryLoss

PLACES = ("answer", "question", "index")
WRITTEN = ("chair_s", "chair_i", "recall", "words")
BOUNDED = ("chair_s", "recall")  # with their intervals


@dataclass(frozen=True)
class Prefix:
    """``rows`` [k, D] put into every item: before the answer, before the question (i.e. after the image), or at one
    absolute ``index`` of the sequence (the official code's way; at the end of an item that is shorter)."""

    rows: torch.Tensor
    place: str = "answer"
    index: int = 0

    def insert(self, batch: Batch, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B,T+k,D], mask [B,T+k] and labels [B,T+k] with the rows in their place in each item."""
        at = self.where(batch)
        k = len(self.rows)
        rows = self.rows.to(embeds).expand(len(embeds), -1, -1)
        ones, none = batch.mask.new_ones(len(embeds), k), batch.labels.new_full((len(embeds), k), -100)
        return _splice(embeds, rows, at), _splice(batch.mask, ones, at), _splice(batch.labels, none, at)

    def where(self, batch: Batch) -> torch.Tensor:
        """Position [B] of each item that the rows are put before."""
        if self.place != "index":
            return batch.answer if self.place == "answer" else batch.question
        first, width = batch.mask.argmax(1), batch.mask.shape[1]
        return torch.minimum(first + self.index, width - batch.mask.flip(1).argmax(1))


def _splice(x: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """x [B,T,...], new [B,k,...], at [B] -> [B,T+k,...], new before x[b, at[b]]."""
    return torch.stack([torch.cat([x[b, :p], new[b], x[b, p:]]) for b, p in enumerate(at.tolist())])


@dataclass(frozen=True)
class PrefixSettings:
    """How the prefix is tuned. Norms are in units of the mean norm of a token embedding."""

    length: int = 5
    place: str = "answer"
    index: int = 0  # with place "index": see official_index
    prompt: str = "plain"
    init: str = "scaled"  # random rows of the embeddings' norm; "normal": N(0,1), official
    nll: float = 1.0  # weight of the NLL of the negative
    contrast: float = 0.0  # weight of softplus(margin - log p(negative) + log p(positive)): beyond imitation
    margin: float = 10.0  # nats an answer
    neglect: float = 0.5  # weight of KL(no-image output || output under the prefix)
    norm: float = 2.0  # largest norm of a row: the adversary's budget; 0 sets no limit
    steps: int = 100
    batch: int = 24
    lr: float = 0.02
    reset: bool = True  # zero the gradient at each step; the official code never does
    seed: int = 0


# Each is only what differs. "imitation" makes the hallucinated answer as likely as speculation does; "contrast" goes
# beyond: it parts the hallucinated from the grounded answer. "official": `index` comes from official_index.
ADVERSARIES: dict[str, dict] = {
    "imitation": {},
    "contrast": {"contrast": 0.5, "margin": 20.0, "batch": 16},
    "official": dict(place="index", init="normal", neglect=0.0, norm=0.0, reset=False, lr=1e-3, batch=4),
}


def adversary_preset(name: str, **changes) -> PrefixSettings:
    """A named adversary with changes. KeyError names those there are."""
    if name not in ADVERSARIES:
        raise KeyError(f"unknown adversary {name!r}; there are {sorted(ADVERSARIES)}")
    return replace(PrefixSettings(), **{**ADVERSARIES[name], **changes})


def embedding_scale(vlm: VLM) -> float:
    """Mean norm of a token embedding, as the language model reads it (Gemma multiplies its table)."""
    table = vlm.model.get_input_embeddings()
    with torch.no_grad():
        return table(torch.arange(len(table.weight), device=vlm.device)).float().norm(dim=-1).mean().item()


def official_index(vlm: VLM, answers: list[str], n_image: int) -> int:
    """The absolute index that falls inside the answer in 59 % of the items and behind it in the others.

    The official code's index, 650, did that for its own prompt and captions; another model has other lengths.
    """
    start = len(vlm.prompt_ids(vlm.prompt("plain"), n_image))
    lengths = sorted((len(vlm.answer_ids(a, eos=True)) for a in answers), reverse=True)
    return start + max(1, lengths[min(len(lengths) - 1, round(0.59 * len(lengths)))])


def random_prefix(vlm: VLM, settings: PrefixSettings) -> Prefix:
    """The starting point, and the control."""
    if settings.place not in PLACES:
        raise ValueError(f"unknown prefix place {settings.place!r}; there are {PLACES}")
    generator = torch.Generator().manual_seed(settings.seed)
    width = vlm.model.get_input_embeddings().weight.shape[1]
    rows = torch.randn(settings.length, width, generator=generator)
    if settings.init == "scaled":
        rows = rows / rows.norm(dim=-1, keepdim=True) * embedding_scale(vlm)
    return Prefix(rows.to(vlm.device), settings.place, settings.index)


def random_like(vlm: VLM, prefix: Prefix, settings: PrefixSettings) -> Prefix:
    """A random prefix in the same place, each row with the norm of the tuned one's."""
    control = random_prefix(vlm, replace(settings, seed=settings.seed + 1000, init="scaled", length=len(prefix.rows)))
    unit = control.rows / control.rows.norm(dim=-1, keepdim=True)
    return replace(prefix, rows=unit * prefix.rows.norm(dim=-1, keepdim=True).to(unit))


def fit_prefix(
    vlm: VLM, features: torch.Tensor, negatives: list[str], settings: PrefixSettings, positives: list[str] | None = None
) -> tuple[Prefix, pd.DataFrame]:
    """Tune a prefix until the hallucinated answers are likely and the image hardly matters.

    Returns the prefix and its curve (step and the terms of the loss). The model is not touched: inside ``applied`` or
    ``replaced_linear`` the prefix attacks the edited model. Only ``contrast`` needs ``positives``.
    """
    if not len(negatives):
        raise ValueError("no negatives to tune the prefix on: stage 02_activate found no pairs")
    if settings.contrast and positives is None:
        raise ValueError(f"contrast is {settings.contrast} but no positives were given; give them or set it to 0")
    objective, n = AdversaryLoss(vlm, features, (negatives, positives), settings), len(negatives)
    start = random_prefix(vlm, settings)
    rows, scale = start.rows.clone().requires_grad_(True), loss_scale(vlm.model.dtype)
    scale_gradient([rows], scale)
    optimiser = torch.optim.AdamW([rows], lr=settings.lr, weight_decay=0.0)
    limit = settings.norm * embedding_scale(vlm) if settings.norm else float("inf")
    curve = []
    for step in tqdm(range(settings.steps), desc="prefix"):
        pick = np.random.default_rng([settings.seed, 1, step]).choice(n, min(settings.batch, n), replace=False)
        if settings.reset:
            optimiser.zero_grad()
        terms = dict.fromkeys(TERMS, 0.0)
        for piece in vlm.limits.microbatches(pick):
            loss, found = objective(replace(start, rows=rows), piece, whole=pick)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the prefix's loss is {loss.item()} at step {step}; lower lr ({settings.lr}) or norm"
                )
            (scale * loss).backward()
            terms = {name: terms[name] + found[name] for name in TERMS}
        optimiser.step()
        with torch.no_grad():
            rows *= (limit / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        curve.append({"step": step, **terms})
    return replace(start, rows=rows.detach()), pd.DataFrame(curve, columns=["step", *TERMS])


def save_prefix(prefix: Prefix, path: Path) -> None:
    """Safetensors, written atomically."""
    meta = {"place": f"{prefix.place} {prefix.index}"}
    write_safetensors({"rows": prefix.rows.detach().cpu().contiguous()}, Path(path), meta)


def load_prefix(path: Path) -> Prefix:
    """FileNotFoundError with what to do if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prefix at {path}: run notebook 05_adversary first")
    with safe_open(path, "pt") as f:
        place, _, index = f.metadata()["place"].partition(" ")
        return Prefix(f.get_tensor("rows"), place, int(index or 0))


# ---- on pairs that it was not tuned on -------------------------------------------------------------------------------


@torch.no_grad()
def prefix_evidence(
    vlm: VLM,
    features: torch.Tensor,
    pairs: pd.DataFrame,
    prefixes: dict[str, Prefix | None],
    prompt: str,
    truth: Truth,
    max_new_tokens: int,
    batch_size: int = 50,
) -> pd.DataFrame:
    """What prefixes do on pairs; None is no prefix, for comparison.

    Rows: the names of ``prefixes``. Columns: NLL of both answers in nats a token; image_effect, KL(seeing || blind) at
    the tokens of the positive; chair_s, chair_i, recall and words of what the model then writes (_lo and _hi of the
    first and the third, 95 % over images; NaN where undefined); n pairs. ``prompt``: the role of the prompt that all
    these answer.
    """
    rows = []
    for name, prefix in prefixes.items():
        row = {"prefix": name, **_read(vlm, features, pairs, prefix, prompt, batch_size)}
        rows.append({**row, **_written(vlm, features, pairs, prefix, prompt, truth, max_new_tokens), "n": len(pairs)})
    return pd.DataFrame(rows).set_index("prefix")


def _read(vlm: VLM, features, pairs: pd.DataFrame, prefix: Prefix | None, prompt: str, batch_size: int) -> dict:
    """Teacher-forced: likelihood of both answers, and the image's effect."""
    sums, batch_size = np.zeros(5), vlm.limits.of("read", batch_size)
    for start in range(0, len(pairs), batch_size):
        part = slice(start, start + batch_size)
        for i, column in enumerate(("negative", "positive")):
            batch = vlm.encode(features[part], vlm.prompt(prompt), pairs[column].tolist()[part])
            nll, effect, n = _effects(vlm, batch, prefix)
            sums[2 * i : 2 * i + 2] += nll, n
            sums[4] += effect if column == "positive" else 0.0
    return {"nll_negative": sums[0] / sums[1], "nll_positive": sums[2] / sums[3], "image_effect": sums[4] / sums[3]}


def _effects(vlm: VLM, batch: Batch, prefix: Prefix | None) -> tuple[float, float, int]:
    """Summed NLL and summed KL(seeing || blind) over the answer's tokens, and their number."""
    embeds, mask, labels = vlm.embed(batch), batch.mask, batch.labels
    hidden = mask * (batch.ids != vlm.image_id)
    if prefix is not None:
        hidden = prefix.insert(replace(batch, mask=hidden), embeds)[1]
        embeds, mask, labels = prefix.insert(batch, embeds)
    seeing = vlm.answer_logits(batch, embeds, mask, target_mask(labels)).float().log_softmax(-1)
    blind = vlm.answer_logits(batch, embeds, hidden, target_mask(labels)).float().log_softmax(-1)
    nll = F.nll_loss(seeing, labels[labels != -100], reduction="sum")
    return nll.item(), F.kl_div(blind, seeing, log_target=True, reduction="sum").item(), len(seeing)


def _written(vlm: VLM, features, pairs: pd.DataFrame, prefix, prompt: str, truth: Truth, max_new_tokens: int) -> dict:
    """Greedy captions under the prefix, scored."""
    answers = vlm.generate(features, vlm.prompt(prompt), max_new_tokens, prefix=prefix)
    table = pd.DataFrame({"image_id": pairs["image_id"].tolist(), "caption": [a.text for a in answers]})
    found = summarise(chair(table, truth).items).set_index("metric")
    found = found.reindex(WRITTEN)  # captions that name nothing, as under a strong prefix, have no chair_i
    out = {name: found.loc[name, "value"] for name in WRITTEN}
    return out | {f"{name}_{side}": found.loc[name, side] for name in BOUNDED for side in ("lo", "hi")}
