"""One row a rival: other ways to fewer hallucinations, all behind the same three parts.

A rival is one file of this folder, which registers itself; nothing else has to know it. It brings

* *settings*: a frozen dataclass, the published constants as defaults;
* *the act*, by its ``kind``:

  - ``decoding``: ``act(settings, vlm, batch, embeds, mask)`` is a context manager that yields a dict of options for
    ``generate`` (``logits_processor`` a list, ``num_beams``, ...). It is entered once for each batch, before the
    prompt is read, and left when the batch is written, so that hooks are set inside it. ``batch`` (padded on the left)
    says where the image is: ``batch.ids == vlm.image_id``. ``embeds`` [B,T+k,D] and ``mask`` [B,T+k] have the k rows
    of a soft prefix too, which never stand before the image, so the image's columns are those of ``batch.ids``;
  - ``delta``: ``act(vlm, features, pairs, settings)`` gives a :class:`~alea_lib.edit.delta.Delta` (or it and a table);
  - ``prompt``: ``act(settings)`` gives the prompt role;
  - ``after``: ``act(settings, captions)`` rewrites the table of captions of the base model;

* *the record*: the tables of captions and scores, the same for all: ``captions``, ``yes_no_answers`` and ``evaluate``
  take ``decoding=``, and :mod:`alea_lib.rivals.tune` chooses the settings from ``grid``.

Two things a decoding rival may need beforehand: ``learn(vlm, features, pairs, settings)`` gives settings that are
completed from pairs (which heads), ``view(vlm, files, settings)`` gives other features [N,P,D] of the pictures, which
the act then takes as ``views`` (see :class:`Views`).

register(Rival("my-way", "decoding", my_way, MySettings(), grid=({"alpha": 0.5}, {"alpha": 1.0}),
               description="one line", source="Name et al., year"))
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from ..edit.delta import Delta
from ..tables import declare_method
from ..vlm import VLM

KINDS = ("decoding", "delta", "prompt", "after")
ROWS: dict[str, Rival] = {}


@dataclass(frozen=True)
class Rival:
    """A row, and what it becomes once it is prepared: ``fitted`` (pairs), then ``seeing`` (pictures), then used.

    ``grid``: changes of the settings among which the validate split chooses, the published ones among them.
    """

    name: str
    kind: str
    act: Callable
    settings: object
    grid: tuple[dict, ...] = ({},)
    description: str = ""
    source: str = ""
    learn: Callable | None = None
    view: Callable | None = None
    delta: Delta | None = None
    views: Views | None = None

    def changed(self, **changes) -> Rival:
        """With other settings. ValueError names the ones there are."""
        names = [f.name for f in fields(self.settings)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(f"{self.name} has no settings {unknown}; it has {names}")
        return replace(self, settings=replace(self.settings, **changes))

    def seeded(self, seed: int) -> Rival:
        """With this seed, where it draws anything."""
        return self.changed(seed=seed) if hasattr(self.settings, "seed") else self

    def placed(self, layers: tuple[int, ...]) -> Rival:
        """With these located layers, where it is an edit of this study."""
        return self.changed(layers=tuple(layers)) if hasattr(self.settings, "edit") else self

    def fitted(self, vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame) -> Rival:
        """With what it learns from pairs: the weight edit, or settings. ``features`` [N,P,D] are the pairs' images."""
        if self.kind == "delta":
            found = self.act(vlm, features, pairs, self.settings)
            return replace(self, delta=found[0] if isinstance(found, tuple) else found)
        if self.learn is not None:
            return replace(self, settings=self.learn(vlm, features, pairs, self.settings))
        return self

    def seeing(self, vlm: VLM, files: list[Path], features: torch.Tensor) -> Rival:
        """With other views of the pictures that it will write about, where it needs some. ``features`` [N,P,D] are
        theirs."""
        return self if self.view is None else replace(self, views=Views(features, self.view(vlm, files, self.settings)))

    @property
    def decoding(self) -> Callable | None:
        """What ``generate`` takes; None (plain greedy decoding) for the other kinds."""
        if self.kind != "decoding":
            return None
        return partial(self.act, self.settings, **({} if self.view is None else {"views": self.views}))

    @property
    def prompt(self) -> str:
        """The prompt role under which it writes captions."""
        return self.act(self.settings) if self.kind == "prompt" else "plain"


class Views:
    """Other features of the same pictures, found again by the features that stand in a batch."""

    def __init__(self, features: torch.Tensor, others: torch.Tensor):
        self._row = {_key(f): i for i, f in enumerate(features)}
        self._others = others

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """The other view [B,P,D] of each row of ``features``. KeyError for a picture that was not shown."""
        try:
            rows = [self._row[_key(f)] for f in features]
        except KeyError:
            raise KeyError("a picture that the rival has not seen: call rival.seeing(vlm, files, features)") from None
        return self._others[rows]


def _key(feature: torch.Tensor) -> bytes:
    return hashlib.sha1(feature.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def register(row: Rival) -> Rival:
    """Add a row. ValueError for a name that is taken, an unknown kind, or a grid with unknown settings."""
    if row.kind not in KINDS:
        raise ValueError(f"{row.name} is of kind {row.kind!r}, it must be one of {KINDS}")
    if row.name in ROWS:
        raise ValueError(f"there is a rival {row.name!r} already")
    for changes in row.grid:
        row.changed(**changes)
    declare_method(row.name)  # rows of metrics.csv may bear it
    ROWS[row.name] = row
    return row


def rival(name: str, **changes) -> Rival:
    """The rival of this name, with changes of its settings. KeyError names the known ones."""
    _import_all()
    if name not in ROWS:
        raise KeyError(f"unknown rival {name!r}; there are {sorted(ROWS)}")
    return ROWS[name].changed(**changes)


def rival_names() -> set[str]:
    """The names of all rivals; rows of ``metrics.csv`` may bear them."""
    _import_all()
    return set(ROWS)


def rival_table() -> pd.DataFrame:
    """All rivals as a table: method, kind, settings (default), grid (number of settings), description, source."""
    _import_all()
    rows = [(r.name, r.kind, str(r.settings), len(r.grid), r.description, r.source) for _, r in sorted(ROWS.items())]
    return pd.DataFrame(rows, columns=["method", "kind", "settings", "grid", "description", "source"])


def _import_all() -> None:
    """Each file of this folder registers its rows when it is imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
