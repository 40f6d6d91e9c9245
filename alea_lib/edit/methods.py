"""The edits by the names they have in every table: which preset, where, and under which adversary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..evidence import random_like
from ..loading import load
from ..prefix import ADVERSARIES as TUNED
from ..prefix import Prefix, PrefixSettings, adversary, fit_prefix, load_prefix, official_index
from ..vlm import VLM
from .settings import CONTROLS, EditSettings, control_layers, preset

PLACES = ("located", "heads", "official", *CONTROLS)
ADVERSARIES = ("", "random", *TUNED)
OFFICIAL_EPOCHS = 3  # of the official adversary


@dataclass(frozen=True)
class EditMethod:
    """``preset``: of the edit's settings. ``place``: the located layers, the located heads, the layers that the
    official code's way of locating names, or a control's layers. ``adversary``: what the prefixed steps see; "" for
    edits without such steps, "random": rows of the norms of "contrast", not tuned."""

    preset: str
    place: str = "located"
    adversary: str = "contrast"
    changes: tuple[tuple[str, object], ...] = ()  # of the preset: what the profile's values must not overwrite


METHODS = {
    "no-prefix": EditMethod("no-prefix", adversary=""),
    "random-prefix": EditMethod("random-prefix", adversary="random"),
    "alea-official": EditMethod("alea-official", "official", "official"),
    "alea-corrected": EditMethod("alea-corrected"),
    "alea-mixed": EditMethod("alea-mixed"),
    "sft": EditMethod("sft", "all-layers", ""),
    "lora": EditMethod("lora", changes=(("prefix_share", 0.0),), adversary=""),
    "heads": EditMethod("heads", "heads", "", (("prefix_share", 0.0),)),
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


def edit_settings(
    name: str,
    n_layers: int,
    located: tuple[int, ...],
    heads: tuple[tuple[int, int], ...] = (),
    seed: int = 0,
    official: tuple[int, ...] = (),
    **changes,
) -> EditSettings:
    """The settings of a method: its preset in its place, with the changes that the preset leaves open.

    ``located`` layers and ``heads`` (layer, head) are a locator's; only the method that is made for heads reads these.
    ``official``: the layers that the official code would edit (see :func:`alea_lib.official_layers`), where
    `alea-official` is made; if there are none given, in the located ones. KeyError for an unknown method, ValueError
    for heads that are missing or values out of range.
    """
    method = edit_method(name)
    changes = {k: v for k, v in changes.items() if k not in KEPT.get(method.preset, ())}
    changes |= {"seed": seed, **dict(method.changes)}
    if method.place == "heads":
        if not heads:
            raise ValueError("the edit `heads` needs heads, (layer, head): run notebook 04_locate_heads or give some")
        return preset(method.preset, heads=tuple(map(tuple, heads)), layers=(), **changes)
    layers = tuple((method.place == "official" and official) or located)
    if method.place in CONTROLS:
        layers = control_layers(method.place, n_layers, k=len(located), seed=seed)
    return preset(method.preset, layers=layers, **changes)


def load_for_edit(key: str, settings: EditSettings, four_bit: bool = False) -> VLM:
    """The model with the matrices that are edited in full precision, whatever the rest is stored in."""
    if settings.modules == "o_proj":
        return load(key, four_bit, tuple({layer for layer, _ in settings.heads}), edited_parts=("o_proj",))
    return load(key, four_bit, settings.layers)


def adversary_settings(name: str, vlm: VLM, negatives: list[str], n_image: int, **changes) -> PrefixSettings:
    """The settings of an adversary by its name in METHODS. KeyError for an unknown one.

    "official" keeps its own learning rate and batch and passes over the hallucinated answers three times, whatever
    ``steps`` says; the index of its place comes from their lengths.
    """
    if name != "official":
        return adversary(name, **changes)
    found = adversary("official", **changes, index=official_index(vlm, negatives, n_image))
    return replace(found, steps=max(1, OFFICIAL_EPOCHS * len(negatives) // found.batch))


def fit_adversary(
    name: str, vlm: VLM, features, negatives: list[str], positives: list[str], settings: PrefixSettings, tuned=None
) -> Prefix | None:
    """The prefix that a method's edit sees, None for "". ``tuned``: for "random", the tuned prefix whose norms it
    takes (tuned here if it is not given)."""
    if name not in ADVERSARIES:
        raise KeyError(f"unknown adversary {name!r}; there are {ADVERSARIES}")
    if not name:
        return None
    if name != "random":
        return fit_prefix(vlm, features, negatives, settings, positives)[0]
    tuned = tuned or fit_prefix(vlm, features, negatives, settings, positives)[0]
    return random_like(vlm, tuned, settings)


def read_adversary(method: str, folder: Path) -> Prefix | None:
    """The prefix that a method's edit sees, of those that notebook 05_adversary wrote; None for edits without one."""
    name = edit_method(method).adversary
    return load_prefix(Path(folder) / f"{name}.safetensors") if name else None
