"""What all rivals are given alike: one model, the same pairs and pictures, one budget of tokens; and what each does."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch

from ..edit.delta import Delta, applied
from ..hooks import counted
from ..measures.truth import Truth, read_truth
from ..probe.answers import captions
from ..scoring import Benchmarks, Evaluated, evaluate, truncated
from ..tables import DataError
from ..vlm import VLM
from ..worlds.write import Split
from .registry import Rival


@dataclass(frozen=True)
class Shown:
    """Pictures of a split with their truth, features and the base model's captions. The pictures are read once."""

    vlm: VLM
    split: Split
    max_new_tokens: int

    @cached_property
    def truth(self) -> Truth:
        return read_truth(self.split.instances, self.split.captions).only(self.split.ids)

    @cached_property
    def features(self) -> torch.Tensor:
        return self.vlm.features(self.split.files)

    @cached_property
    def base(self) -> pd.DataFrame:
        """Captions of the base model, plain prompt, greedy."""
        return captions(self.vlm, self.split, self.features, max_new_tokens=self.max_new_tokens)


def part_of(whole, n: int, seed: int):
    """The rows of one seed, ``n`` of them: seed 0 has the first ones, and no two seeds share any. DataError when they
    do not suffice."""
    found = whole[seed * n : (seed + 1) * n]
    if len(found) < n:
        raise DataError(
            f"seed {seed} needs rows {seed * n} to {(seed + 1) * n}, there are {len(whole)}: ask for fewer "
            "(N_PAIRS, N_VALIDATE) or fewer seeds, or make more (02_activate, N_IMAGES)"
        )
    return found


@dataclass(frozen=True)
class Ground:
    """``pairs`` and the features ``known`` [N,P,D] of their images: what rivals learn from. ``validate`` is where
    settings are chosen, ``test`` where the chosen ones are measured, ``benchmarks`` the questions about it."""

    vlm: VLM
    pairs: pd.DataFrame
    known: torch.Tensor
    validate: Shown
    test: Shown
    benchmarks: Benchmarks
    n_grounding: int | None = None

    def fitted(self, row: Rival) -> tuple[Rival, float, float]:
        """The rival with what it learns from the pairs, and the forward and backward passes that this took."""
        with ExitStack() as stack:
            count = stack.enter_context(counted(self.vlm))
            ready = row.fitted(self.vlm, self.known, self.pairs)
        return ready, count.forwards, count.backwards

    def seeing(self, row: Rival, shown: Shown) -> Rival:
        return row.seeing(self.vlm, shown.split.files, shown.features)

    def captions(self, row: Rival, shown: Shown) -> pd.DataFrame:
        """What a fitted rival says of these pictures."""
        if row.kind == "after":
            return row.act(row.settings, shown.base)
        row = self.seeing(row, shown)
        with applied(self.vlm, row.delta):
            return captions(
                self.vlm, shown.split, shown.features, row.prompt, shown.max_new_tokens, decoding=row.decoding
            )

    def measured(self, row: Rival | None, edit: Delta | None = None) -> Evaluated:
        """All measures of a fitted rival on the test pictures (None: of the base model), on top of an ``edit`` of the
        weights if there is one. ValueError for two edits at once."""
        shown = self.test
        if row is not None and row.kind == "after":
            return truncated(shown.base, shown.truth, shown.max_new_tokens, self.benchmarks.amber)
        delta, how = edit, {}
        if row is not None:
            if row.delta and edit:
                raise ValueError(f"{row.name} is an edit of the weights itself: it cannot stand on another one")
            row, delta = self.seeing(row, shown), row.delta or edit
            how = {"prompt": row.prompt, "decoding": row.decoding}
        budget = shown.max_new_tokens
        return evaluate(
            self.vlm, shown.split, shown.truth, self.benchmarks, budget, delta, n_grounding=self.n_grounding, **how
        )
