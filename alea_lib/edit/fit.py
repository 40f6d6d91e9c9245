"""EDIT, the defence: fine-tune located down-projections to answer truthfully while the adversary is at work."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .. import checkpoint
from ..prefix import Prefix
from ..taps import full_weight, replaced_linear
from ..vlm import VLM, Batch, scored
from .delta import Delta, delta_of, hash_text, weight_hash
from .settings import EditSettings


def fit_edit(
    vlm: VLM,
    features: torch.Tensor,
    positives: list[str],
    prefix: Prefix | None,
    settings: EditSettings,
    checkpoint_path: Path | None = None,
) -> tuple[Delta, pd.DataFrame]:
    """Compute an edit; the model is left bit-equal.

    features [N,P,D] and positives [N] are the images and grounded answers of the pairs; ``prefix`` may be None when
    ``settings.prefix_share`` is 0. Returns the delta and its curve (step, prefixed, nll, kl). With a checkpoint path,
    a run that was cut off goes on after its last whole epoch and ends in the same delta.
    Raises ValueError for empty pairs, FloatingPointError when the loss is not finite (the checkpoint keeps the last
    good weights).
    """
    if not len(positives):
        raise ValueError("no pairs to edit on: stage 02_activate found none, or the filter removed all")
    if settings.prefix_share and prefix is None:
        raise ValueError(f"prefix_share is {settings.prefix_share} but no prefix was given; fit one or set it to 0")
    names = [vlm.address("down_proj", layer) for layer in settings.layers]
    masters = {n: full_weight(vlm, n).requires_grad_(True) for n in names}
    optimiser = torch.optim.AdamW(masters.values(), lr=settings.lr, weight_decay=0.0)
    reference = base_states(vlm, features, positives, settings)
    order = schedule(len(positives), settings)
    per_epoch = len(order) // settings.epochs
    tag = json.dumps([asdict(settings), hash_text(positives), {n: weight_hash(w) for n, w in masters.items()}])
    done = checkpoint.resume(checkpoint_path, masters, optimiser, tag) if checkpoint_path else 0
    curve = []
    for step in tqdm(range(done, len(order)), desc="edit", initial=done, total=len(order)):
        pick, prefixed = order[step]
        row = _step(
            vlm, features, positives, reference, prefix if prefixed else None, pick, masters, optimiser, settings
        )
        if not np.isfinite(row["nll"] + row["kl"]):
            raise FloatingPointError(
                f"the edit's loss is not finite at step {step} ({row}); lower lr ({settings.lr}). "
                f"The last whole epoch is kept in {checkpoint_path}"
            )
        curve.append({"step": step, "prefixed": prefixed, **row})
        if checkpoint_path and (step + 1) % per_epoch == 0:
            checkpoint.save(checkpoint_path, step + 1, masters, optimiser, tag)
    if not all(w.isfinite().all() for w in masters.values()):
        raise FloatingPointError(f"the edit's last step left weights that are not finite; lower lr ({settings.lr})")
    return delta_of(vlm, masters, {"edit": asdict(settings)}), pd.DataFrame(
        curve, columns=["step", "prefixed", "nll", "kl"]
    )


def schedule(n: int, settings: EditSettings) -> list[tuple[np.ndarray, bool]]:
    """Batches of all epochs: (indices, under the prefix?). The share is met exactly, spread evenly, from the seed."""
    out = []
    for epoch in range(settings.epochs):
        shuffled = np.random.default_rng([settings.seed, 2, epoch]).permutation(n)
        out += np.array_split(shuffled, max(1, round(n / settings.batch)))
    share = settings.prefix_share
    return [(pick, int((i + 1) * share + 1e-9) > int(i * share + 1e-9)) for i, pick in enumerate(out)]


@torch.no_grad()
def base_states(
    vlm: VLM, features: torch.Tensor, positives: list[str], settings: EditSettings, batch_size: int = 50
) -> list[torch.Tensor]:
    """Final hidden states of the base on clean prompt + positive, one [n_tokens, D] an item.

    The KL's reference: from them and the head the base's logits are made when needed, so memory does not grow with
    the vocabulary.
    """
    out: list[torch.Tensor] = []
    if not settings.kl:
        return out
    for start in range(0, len(positives), batch_size):
        rows = slice(start, start + batch_size)
        batch = vlm.encode(features[rows], vlm.prompt(settings.kl_prompt), positives[rows])
        h = vlm.hidden(vlm.embed(batch), batch.mask, batch)
        out += [h[i, t] for i, t in enumerate(batch.targets)]
    return out


def _step(
    vlm: VLM,
    features,
    positives,
    reference,
    prefix: Prefix | None,
    pick: np.ndarray,
    masters: dict,
    optimiser: torch.optim.Optimizer,
    settings: EditSettings,
) -> dict:
    """One optimiser step. Returns the two parts of the loss."""
    texts, images = [positives[i] for i in pick], features[torch.as_tensor(pick)]
    optimiser.zero_grad()
    with replaced_linear(vlm, masters):
        nll = answer_nll(vlm, vlm.encode(images, vlm.prompt(settings.prompt), texts), prefix)
        (settings.nll * nll).backward()
        kl = torch.zeros(())
        if settings.kl:
            batch = vlm.encode(images, vlm.prompt(settings.kl_prompt), texts)
            kl = kl_to_base(vlm, batch, torch.cat([reference[i] for i in pick]))
            (settings.kl * kl).backward()
    optimiser.step()
    return {"nll": nll.item(), "kl": kl.item()}


def answer_nll(vlm: VLM, batch: Batch, prefix: Prefix | None = None) -> torch.Tensor:
    """Mean NLL of the answer's tokens (EOS included, BOS and prompt not), in nats."""
    with torch.no_grad():
        embeds, mask, labels = vlm.embed(batch), batch.mask, batch.labels
        if prefix is not None:
            embeds, mask, labels = prefix.insert(batch, embeds)
    logits = vlm.answer_logits(batch, embeds, mask, scored(labels))
    return F.cross_entropy(logits.float(), labels[labels != -100])


def kl_to_base(vlm: VLM, batch: Batch, base: torch.Tensor) -> torch.Tensor:
    """Mean over answer tokens of KL(base || model now), in nats. ``base`` [n,D]: final states of the base."""
    with torch.no_grad():
        teacher = vlm.head(base).float().log_softmax(-1)
    student = vlm.answer_logits(batch).float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
