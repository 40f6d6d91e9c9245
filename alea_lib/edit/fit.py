"""EDIT, the defence: fine-tune located modules to answer truthfully while the adversary is at work."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..adversary.prefix import Prefix, PrefixSettings, fit_prefix
from ..models import checkpoint
from ..models.batch import loss_scale, scale_gradient
from ..models.delta import Delta
from ..models.feature_cache import fingerprint
from ..models.hooks import replaced_linear
from ..models.identity import hash_text, weight_hash
from ..models.vlm import VLM
from .losses import CachedForward, Reference, dropped, kl_divergence, scratch, unlikelihood
from .settings import EditSettings, check
from .trained import trained

TERMS = ("nll", "kl", "unlikelihood")
CURVE = ["step", "prefixed", *TERMS]


def fit_edit(
    vlm: VLM,
    features: torch.Tensor,
    positives: list[str],
    prefix: Prefix | None,
    settings: EditSettings,
    checkpoint_path: Path | None = None,
    negatives: list[str] | None = None,
    adversary: PrefixSettings | None = None,
) -> tuple[Delta, pd.DataFrame]:
    """Compute an edit; the model is left bit-equal.

    ``features`` [N,P,D] and ``positives`` [N]: images and grounded answers. ``prefix``: None when
    ``settings.prefix_share`` is 0. ``negatives`` [N] serve the unlikelihood and, with ``adversary``, the rounds.
    Returns the delta and its curve (step, prefixed, terms of the loss). With a checkpoint, a run that was cut off goes
    on after its last whole epoch and ends in the same delta. ValueError for empty pairs or settings out of range,
    FloatingPointError for a loss that is not finite, OSError for a full disk.
    """
    _check_input(positives, prefix, settings, negatives, adversary)
    with scratch(checkpoint_path) as folder:
        run = _Run(vlm, features, positives, negatives, [prefix] if prefix else [], settings, adversary, folder)
        if checkpoint_path:
            run.resume(checkpoint_path)
        for epoch in tqdm(range(run.epoch, settings.epochs), desc="edit", initial=run.epoch, total=settings.epochs):
            run.new_round(epoch)
            run.run_epoch(epoch, checkpoint_path)
            if checkpoint_path:
                run.save(checkpoint_path)
        return run.trained.delta(vlm, {"edit": asdict(settings)}), pd.DataFrame(run.curve, columns=CURVE)


def _check_input(positives, prefix, settings: EditSettings, negatives, adversary) -> None:
    check(settings)
    if not len(positives):
        raise ValueError("no pairs to edit on: stage 02_activate found none, or the filter removed all")
    if settings.prefix_share and prefix is None:
        raise ValueError(f"prefix_share is {settings.prefix_share} but no prefix was given; fit one or set it to 0")
    if settings.unlikelihood and negatives is None:
        raise ValueError(f"unlikelihood is {settings.unlikelihood}: give negatives, or set it to 0")
    if settings.rounds > 1 and (negatives is None or adversary is None):
        raise ValueError(f"rounds is {settings.rounds}: give negatives and the adversary's settings, or set it to 1")


def schedule(n: int, settings: EditSettings) -> list[tuple[np.ndarray, bool]]:
    """Batches of all epochs: (indices, under the prefix?). The share is met exactly, spread evenly, from the seed."""
    out = []
    for epoch in range(settings.epochs):
        shuffled = np.random.default_rng([settings.seed, 2, epoch]).permutation(n)
        out += np.array_split(shuffled, max(1, round(n / settings.batch)))
    share = settings.prefix_share
    return [(pick, int((i + 1) * share + 1e-9) > int(i * share + 1e-9)) for i, pick in enumerate(out)]


class _Run:
    """The state of one edit in the making. ``prefixes`` take turns; each round adds one."""

    def __init__(self, vlm: VLM, features, positives, negatives, prefixes, settings, adversary, folder=None):
        self.vlm, self.features, self.settings, self.adversary = vlm, features, settings, adversary
        self.texts, self.prefixes = {"positive": positives, "negative": negatives}, prefixes
        self.trained = trained(vlm, settings)
        parameters = self.trained.parameters.values()
        optimiser = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.SGD
        self.optimiser = optimiser(parameters, lr=settings.lr, weight_decay=0.0)
        self.scale = loss_scale(vlm.model.dtype)
        scale_gradient(parameters, self.scale)
        self.passes = CachedForward(vlm, features, self.texts, settings, self.trained, folder)
        self.reference = Reference(self.passes)
        self.order = schedule(len(positives), settings)
        self.per_epoch = len(self.order) // settings.epochs
        self.epoch, self.curve = 0, []
        self.tag = self._tag()

    def new_round(self, epoch: int) -> None:
        """Tune one more adversary, against the model as it is edited by now, when a round begins."""
        s = self.settings
        starts = [r * s.epochs // s.rounds for r in range(1, s.rounds)]
        if epoch not in starts:
            return
        adversary = replace(self.adversary, seed=self.adversary.seed + 1 + starts.index(epoch))
        weights = {n: w.detach() for n, w in self.trained.weights().items()}
        with replaced_linear(self.vlm, weights):
            tuned, _ = fit_prefix(self.vlm, self.features, self.texts["negative"], adversary, self.texts["positive"])
        self.prefixes = [*self.prefixes, tuned]

    def run_epoch(self, epoch: int, path: Path | None) -> None:
        for step in range(epoch * self.per_epoch, (epoch + 1) * self.per_epoch):
            row = self.step(step)
            if not np.isfinite(sum(row[k] for k in TERMS)) or not self.trained.finite():
                raise FloatingPointError(
                    f"the edit's loss or weights are not finite at step {step} ({row}); lower lr ({self.settings.lr}). "
                    f"The last whole epoch is kept in {path}"
                )
            self.curve.append(row)
        self.epoch = epoch + 1

    def step(self, step: int) -> dict:
        """One optimiser step. Returns its row of the curve."""
        s, (whole, prefixed) = self.settings, self.order[step]
        if s.reset == "step" or step % self.per_epoch == 0:
            self.optimiser.zero_grad()
        row = {"step": step, "prefixed": prefixed, **dict.fromkeys(TERMS, 0.0)}
        for piece in self.vlm.limits.microbatches(whole):
            for name, term in self.terms(piece, step, prefixed):
                share = self.share(name, piece, whole)
                (self.scale * getattr(s, name) * share * term).backward()
                row[name] += share * term.item()
        self.optimiser.step()
        return row

    def terms(self, pick: np.ndarray, step: int, prefixed: bool):
        """The terms of the loss one by one, so that only one graph is alive at a time."""
        s, prefix, number = self.settings, None, -1
        if prefixed:
            number = step % len(self.prefixes)
            prefix = dropped(self.prefixes[number], s, step)
        logits, labels = self.passes("positive", s.prompt, pick, self.trained.weights(), prefix, number)
        yield "nll", F.cross_entropy(logits.float(), labels)
        if s.kl:
            logits, _ = self.passes("positive", s.kl_prompt, pick, self.trained.weights())
            yield "kl", kl_divergence(logits, self.reference(pick))
        if s.unlikelihood:
            logits, labels = self.passes("negative", s.prompt, pick, self.trained.weights(), prefix, number)
            yield "unlikelihood", unlikelihood(logits, labels, self.unsaid(pick))

    def share(self, name: str, piece: np.ndarray, whole: np.ndarray) -> float:
        """Share of a batch's tokens that lie in a piece of it: each term is a mean over the tokens that it counts."""
        if len(piece) == len(whole):
            return 1.0
        n, total = (self.count(name, part) for part in (piece, whole))
        return n / max(1, total)

    def count(self, name: str, pick: np.ndarray) -> int:
        """How many tokens of these items a term counts."""
        if name == "unlikelihood":
            return int(self.unsaid(pick).sum())
        s = self.settings
        return sum(self.vlm.answer_length(self.texts["positive"][int(i)], s.eos, s.bos) for i in pick)

    def unsaid(self, pick: np.ndarray) -> torch.Tensor:
        """Bool [n]: tokens of the negatives that their positives do not say."""
        ids = {k: self.passes.encode(k, self.settings.prompt, pick).labels for k in ("negative", "positive")}
        rows = [~torch.isin(n[n != -100], p[p != -100]) for n, p in zip(ids["negative"], ids["positive"])]
        return torch.cat(rows)

    # ---- stopped and resumed ---------------------------------------------------------------------------------
    def _tag(self) -> str:
        """What a checkpoint belongs to."""
        texts = [hash_text(t) if t else "" for t in self.texts.values()]
        own = {n: weight_hash(w) for n, w in self.trained.own.items()}
        rows = [[weight_hash(p.rows), p.place, p.index] for p in self.prefixes]
        adversary = asdict(self.adversary) if self.adversary else None
        return json.dumps([asdict(self.settings), texts, fingerprint(self.features), own, rows, adversary])

    def save(self, path: Path) -> None:
        rows = {f"prefix.{i}": p.rows for i, p in enumerate(self.prefixes)}
        places = [(p.place, p.index) for p in self.prefixes]
        note = json.dumps({"epoch": self.epoch, "curve": self.curve, "places": places})
        done, parameters = self.epoch * self.per_epoch, self.trained.parameters
        checkpoint.save(path, done, parameters, self.optimiser, self.tag, rows, note)

    def resume(self, path: Path) -> None:
        if not checkpoint.resume(path, self.trained.parameters, self.optimiser, self.tag):
            return
        rows, note = checkpoint.extras(path)
        state = json.loads(note)
        self.epoch, self.curve = state["epoch"], state["curve"]
        self.prefixes = [
            Prefix(rows[f"prefix.{i}"].to(self.vlm.device), place, index)
            for i, (place, index) in enumerate(state["places"])
        ]
