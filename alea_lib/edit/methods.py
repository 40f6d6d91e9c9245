"""The edits by the names they have in every table: which preset, where, and under which adversary; and fitting one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch

from ..adversary.prefix import (
    Prefix,
    PrefixSettings,
    adversary_preset,
    fit_prefix,
    load_prefix,
    official_index,
    random_like,
    save_prefix,
)
from ..locate.choose import choose_heads
from ..locate.run import locate_heads, official_layers
from ..models.delta import Delta
from ..models.loading import layers_of, load
from ..models.vlm import VLM
from .fit import fit_edit
from .settings import CONTROLS, EditSettings, control_layers, preset

OFFICIAL_EPOCHS = 3  # of the official adversary
# the heads of the edit `heads`: so many that this locator names on the first pairs
HEAD_LOCATOR, N_HEADS, LOCATE_PAIRS = "gradient", 2, 60


@dataclass(frozen=True)
class EditMethod:
    """``preset``: of the edit's settings. ``place``: the located layers, the located heads, the layers that the
    official code's way of locating names, or a control's layers. ``adversary``: what the prefixed steps see; "" for
    edits without such steps, "random": rows of the norms of "contrast", not tuned."""

    preset: str
    place: str = "located"
    adversary: str = "contrast"


METHODS = {
    "no-prefix": EditMethod("no-prefix", adversary=""),
    "random-prefix": EditMethod("random-prefix", adversary="random"),
    "alea-official": EditMethod("alea-official", "official", "official"),
    "alea-corrected": EditMethod("alea-corrected"),
    "alea-mixed": EditMethod("alea-mixed"),
    "sft": EditMethod("sft", "all-layers", ""),
    "lora": EditMethod("lora", adversary=""),
    "heads": EditMethod("heads", "heads", ""),
    "random-layers": EditMethod("no-prefix", "random-layers", ""),
    "last-layer": EditMethod("no-prefix", "last-layer", ""),
    "all-layers": EditMethod("no-prefix", "all-layers", ""),
}
# what a preset says that a profile's common values (epochs, lr, kl) do not touch
KEPT = {"alea-official": ("epochs", "lr", "kl"), "sft": ("kl",)}


def edit_method(name: str) -> EditMethod:
    """KeyError names the methods there are."""
    if name not in METHODS:
        raise KeyError(f"unknown edit {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class EditRequest:
    """One edit by its method's name. ``layers``: the located ones. ``heads`` that are not given are located when the
    method is made for heads; so are ``official`` layers (of ``locate.official_layers``) that are None, while ()
    stands for the located ones. ``changes``: of the edit's settings, as far as the method leaves them open."""

    method: str
    layers: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    official: tuple[int, ...] | None = None
    seed: int = 0
    changes: dict = field(default_factory=dict)
    prefix_length: int = 5
    prefix_steps: int = 100

    def settings(self, n_layers: int) -> EditSettings:
        """The method's preset in its place, with the changes. KeyError for an unknown method, ValueError for heads
        that are missing or values out of range."""
        method = edit_method(self.method)
        changes = {k: v for k, v in self.changes.items() if k not in KEPT.get(method.preset, ())}
        changes["seed"] = self.seed
        if method.place == "heads":
            if not self.heads:
                raise ValueError("the edit `heads` needs heads, (layer, head): give some, or those of located_heads")
            return preset(method.preset, heads=tuple(map(tuple, self.heads)), layers=(), **changes)
        layers = tuple((method.place == "official" and self.official) or self.layers)
        if method.place in CONTROLS:
            layers = control_layers(method.place, n_layers, k=len(self.layers), seed=self.seed)
        return preset(method.preset, layers=layers, **changes)

    def adversary(self) -> dict:
        """What its adversary changes of :func:`adversary_settings`."""
        return {"length": self.prefix_length, "steps": self.prefix_steps, "seed": self.seed}


def fit_method(
    vlm: VLM,
    features: torch.Tensor,
    pairs: pd.DataFrame,
    request: EditRequest,
    prefix: Prefix | None = None,
    checkpoint: Path | None = None,
    folder: Path | None = None,
) -> tuple[Delta, pd.DataFrame]:
    """Fit an edit by its name: find its place, tune its adversary, train. Returns the delta and its curve; the model is
    left bit-equal.

    ``features`` [N,P,D] and ``pairs`` (positive, negative) are of the same images. ``prefix``: an adversary that is
    tuned already; otherwise it is tuned here and, with a ``folder``, kept there, so that equal ones are tuned once.
    """
    place = edit_method(request.method).place
    if place == "heads" and not request.heads:
        request = replace(request, heads=located_heads(vlm, features, pairs))
    if place == "official" and request.official is None:
        request = replace(request, official=tuple(official_layers(vlm, features, pairs)[1]))
    settings = request.settings(vlm.n_layers)
    if settings.prefix_share and prefix is None:
        prefix = method_prefix(vlm, features, pairs, request, folder)
    negatives, positives = pairs["negative"].tolist(), pairs["positive"].tolist()
    rounds = adversary_preset("contrast", **request.adversary()) if settings.rounds > 1 else None
    return fit_edit(vlm, features, positives, prefix, settings, checkpoint, negatives, rounds)


def located_heads(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, k: int = N_HEADS, n: int = LOCATE_PAIRS
) -> tuple[tuple[int, int], ...]:
    """The ``k`` heads (layer, head) that the edit `heads` changes: by gradient, on the first ``n`` pairs."""
    return tuple(choose_heads(locate_heads(vlm, features[:n], pairs.head(n), [HEAD_LOCATOR]).scores, k))


def load_for_edit(key: str, request: EditRequest, four_bit: bool = False) -> VLM:
    """The model with the matrices that are edited in full precision, whatever the rest is stored in."""
    if edit_method(request.method).place == "heads":
        layers = tuple({layer for layer, _ in request.heads}) or None
        return load(key, four_bit, layers, edited_parts=("o_proj",))
    return load(key, four_bit, request.settings(layers_of(key)).layers)


def adversary_settings(name: str, vlm: VLM, negatives: list[str], n_image: int, **changes) -> PrefixSettings:
    """The settings of an adversary by its name in METHODS. KeyError for an unknown one.

    "official" keeps its own learning rate and batch and passes over the hallucinated answers three times, whatever
    ``steps`` says; the index of its place comes from their lengths.
    """
    if name != "official":
        return adversary_preset(name, **changes)
    found = adversary_preset("official", **changes, index=official_index(vlm, negatives, n_image))
    return replace(found, steps=max(1, OFFICIAL_EPOCHS * len(negatives) // found.batch))


def method_prefix(
    vlm: VLM, features: torch.Tensor, pairs: pd.DataFrame, request: EditRequest, folder: Path | None = None
) -> Prefix:
    """The prefix that the request's edit sees, tuned on its pairs; read from ``folder`` if an equal one is there."""
    name = edit_method(request.method).adversary or "contrast"
    kind = "contrast" if name == "random" else name
    negatives, positives = pairs["negative"].tolist(), pairs["positive"].tolist()
    settings = adversary_settings(kind, vlm, negatives, features.shape[1], **request.adversary())

    def tune() -> Prefix:
        return fit_prefix(vlm, features, negatives, settings, positives)[0]

    label = f"prefix-{kind}-s{request.seed}-k{settings.length}-n{len(pairs)}"
    tuned = kept_prefix(vlm, folder / f"{label}.safetensors", tune) if folder else tune()
    return random_like(vlm, tuned, settings) if name == "random" else tuned


def kept_prefix(vlm: VLM, path: Path, tune) -> Prefix:
    """The prefix in a file, which ``tune()`` makes if it is not there, on the model's device."""
    if not path.exists():
        save_prefix(tune(), path)
    found = load_prefix(path)
    return replace(found, rows=found.rows.to(vlm.device))


def read_adversary(method: str, folder: Path) -> Prefix | None:
    """The prefix that a method's edit sees, of those that notebook 05_adversary wrote; None for edits without one."""
    name = edit_method(method).adversary
    return load_prefix(Path(folder) / f"{name}.safetensors") if name else None
