"""The baselines: other ways to fewer hallucinations.

A baseline is one file of this folder and a line of ``MODULES``; a notebook may register its own without them. It brings
*settings* (a frozen
dataclass, the published constants as defaults), a *grid* of them among which
:mod:`alea_lib.experiments.baseline_trial` chooses, and ``apply``, by its ``kind``:

* ``decoding``: ``apply(settings, vlm, batch, embeds, mask)`` is the generator of a context manager: it yields, once, a
  dict of options for ``generate`` (``logits_processor`` a list, ``num_beams``, ...). It is entered for each batch,
  before the prompt is read, and left when the batch is written, so that hooks are set inside it. ``batch`` (padded on
  the left) says where the image is: ``batch.ids == vlm.image_id``. ``embeds`` [B,T+k,D] and ``mask`` [B,T+k] have the k
  rows of a soft prefix too, which never stand before the image, so its columns are those of ``batch.ids``;
* ``delta``: ``apply(vlm, features, pairs, settings)`` gives a :class:`~alea_lib.models.delta.Delta`;
* ``prompt``: ``apply(settings)`` gives the prompt role;
* ``after``: ``apply(settings, captions)`` rewrites the table of captions of the base model.

Two things a decoding baseline may need beforehand: ``learn(vlm, features, pairs, settings)`` gives settings that are
completed from pairs (which heads), ``view(vlm, files, settings)`` gives other features [N,P,D] of the images, which
``apply`` then takes as ``views`` (see :class:`Views`).

register(Baseline("my-way", "decoding", my_way, MySettings(), grid=({"alpha": 0.5}, {"alpha": 1.0}),
                  description="one line", source="Name et al., year"))
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..core.tables import declare_method
from ..models.delta import Delta
from ..models.vlm import VLM

KINDS = ("decoding", "delta", "prompt", "after")
# name of a baseline -> the file of this folder that registers it: a stage depends on the files that its parameters name
MODULES: dict[str, str] = {
    "truncation": "plain", "stop-early": "plain", "careful-prompt": "plain", "beam": "plain",
    "nucleus": "nucleus", "vcd": "vcd", "m3id": "m3id", "dola": "dola", "pai": "pai", "opera": "opera",
    "adhh": "adhh", "spin": "spin", "vhr": "vhr", "nullu": "nullu", "dpo": "dpo", "sft": "edits", "lora-all": "edits",
    "no-prefix": "edits", "random-prefix": "edits", "random-layers": "edits", "last-layer": "edits",
    "all-layers": "edits", "heads": "edits", "lora": "edits", "alea-official": "edits", "alea-corrected": "edits",
    "alea-mixed": "edits",
}  # fmt: skip
ROWS: dict[str, Baseline] = {}


@dataclass(frozen=True)
class Baseline:
    """A baseline, and what it becomes once it is prepared: ``fitted`` (pairs), then ``with_views`` (images), then used.

    ``grid``: changes of the settings among which the validate split chooses, the published ones among them.
    """

    name: str
    kind: str
    apply: Callable
    settings: Any
    grid: tuple[dict, ...] = ({},)
    description: str = ""
    source: str = ""
    learn: Callable | None = None
    view: Callable | None = None
    delta: Delta | None = None
    views: Views | None = None

    def changed(self, **changes) -> Baseline:
        """With other settings. ValueError names the ones there are."""
        names = [f.name for f in fields(self.settings)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(f"{self.name} has no settings {unknown}; it has {names}")
        return replace(self, settings=replace(self.settings, **changes))

    def seeded(self, seed: int) -> Baseline:
        """With this seed, where it draws anything."""
        return self.changed(seed=seed) if hasattr(self.settings, "seed") else self

    def placed(self, layers: tuple[int, ...]) -> Baseline:
        """With these located layers, where it is an edit of this study."""
        return self.changed(layers=tuple(layers)) if hasattr(self.settings, "edit") else self

    def fitted(self, vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame) -> Baseline:
        """With what it learns from pairs: the weight edit, or settings. ``features`` [N,P,D] are the pairs' images."""
        if self.kind == "delta":
            return replace(self, delta=self.apply(vlm, features, pairs, self.settings))
        if self.learn is not None:
            return replace(self, settings=self.learn(vlm, features, pairs, self.settings))
        return self

    def with_views(self, vlm: VLM, files: list[Path], features: torch.Tensor) -> Baseline:
        """With other views of the images that it will write about, where it needs some; ``features`` [N,P,D]."""
        return self if self.view is None else replace(self, views=Views(features, self.view(vlm, files, self.settings)))

    @property
    def decoding(self) -> Callable | None:
        """What ``generate`` takes; None (plain greedy decoding) for the other kinds."""
        if self.kind != "decoding":
            return None
        return contextmanager(partial(self.apply, self.settings, **({"views": self.views} if self.view else {})))

    @property
    def prompt(self) -> str:
        """The prompt role under which it writes captions."""
        return self.apply(self.settings) if self.kind == "prompt" else "plain"


class Views:
    """Other features of the same images, found by the features that stand in a batch."""

    def __init__(self, features: torch.Tensor, others: torch.Tensor):
        self._views = {feature_digest(f): other for f, other in zip(features, others, strict=True)}

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """The other view [B,P,D] of each row of ``features``. KeyError for an unknown image."""
        digests = [feature_digest(f) for f in features]
        if not self._views.keys() >= set(digests):
            raise KeyError("an image without a view: call baseline.with_views(vlm, files, features)")
        return torch.stack([self._views[d] for d in digests])


def feature_digest(feature: torch.Tensor, start: str = "") -> bytes:
    """SHA-256 of a text and of an image's features [P,D]."""
    return hashlib.sha256(start.encode() + feature.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def register(row: Baseline) -> Baseline:
    """Add a baseline. ValueError for a name that is taken, an unknown kind, or a grid with unknown settings."""
    if row.kind not in KINDS:
        raise ValueError(f"{row.name} is of kind {row.kind!r}, it must be one of {KINDS}")
    if row.name in ROWS or (row.name in MODULES and row.apply.__module__ != f"{__package__}.{MODULES[row.name]}"):
        raise ValueError(f"there is a baseline {row.name!r} already")
    for changes in row.grid:
        row.changed(**changes)
    declare_method(row.name)  # rows of metrics.csv may bear it
    ROWS[row.name] = row
    return row


def baseline(name: str, **changes) -> Baseline:
    """The baseline of this name, with changes of its settings. KeyError names the known ones."""
    if name in MODULES:
        importlib.import_module(f"{__package__}.{MODULES[name]}")
    if name not in ROWS:
        raise KeyError(f"unknown baseline {name!r}; there are {sorted(baseline_names())}")
    return ROWS[name].changed(**changes)


def baseline_names() -> set[str]:
    """The names of all baselines, of this folder's files and of others that were registered."""
    for module in sorted(set(MODULES.values())):
        importlib.import_module(f"{__package__}.{module}")
    return set(ROWS)


def baseline_table() -> pd.DataFrame:
    """All baselines as a table: method, kind, settings (default), grid (number of settings), description, source."""
    rows = [ROWS[name] for name in sorted(baseline_names())]
    return pd.DataFrame(
        [(r.name, r.kind, str(r.settings), len(r.grid), r.description, r.source) for r in rows],
        columns=["method", "kind", "settings", "grid", "description", "source"],
    )
