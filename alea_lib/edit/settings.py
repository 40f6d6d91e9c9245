"""What an edit is: one dataclass, and the presets as the differences between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

MODULES = ("down_proj", "o_proj", "decoder")
CHOICES = {
    "modules": MODULES,
    "optimiser": ("adamw", "sgd"),
    "reset": ("step", "epoch"),
    "master_dtype": ("fp32", "fp16"),
    "kl_reference": ("states", "logits"),
}


@dataclass(frozen=True)
class EditSettings:
    """One edit. Steps count batches; ``prefix_share`` of them run under the adversarial prefix."""

    layers: tuple[int, ...] = (2, 3)
    modules: str = "down_proj"  # "o_proj": the columns of ``heads``; "decoder": every linear matrix of ``layers``
    heads: tuple[tuple[int, int], ...] = ()  # (layer, head)
    rank: int = 0  # of a low-rank edit of the same matrices; 0 edits them whole
    prefix_share: float = 0.5
    prefix_dropout: float = 0.0  # chance that a row of the prefix is left out in a step
    rounds: int = 1  # times that the adversary is tuned, against the model as it is edited by then
    prompt: str = "plain"  # the grounded answer is learnt as the answer to this prompt
    nll: float = 1.0  # weight of NLL(grounded answer)
    kl: float = 0.2  # weight of KL(base || edited) on clean prompts
    kl_prompt: str = "careful"
    kl_reference: str = "states"  # what is kept of the base: final hidden states, or logits (official)
    unlikelihood: float = 0.0  # weight of -log(1 - p) of the negative's tokens where it leaves the positive
    bos: bool = False  # the start token is a target too (official)
    eos: bool = True  # the end token is a target (official: never)
    epochs: int = 4
    batch: int = 24
    lr: float = 1e-3
    optimiser: str = "adamw"
    reset: str = "step"  # when gradients are set to zero; "epoch" is official: with SGD a momentum of 1.0
    master_dtype: str = "fp32"  # type of the trained copies; "fp16" is official: small steps are lost in rounding
    fast: bool = True  # reuse what lies below the first edited layer: same gradients
    seed: int = 0


# Each preset is only what differs. The layers are the caller's: those that a locator names, or a control's.
PRESETS: dict[str, dict] = {
    "no-prefix": {"prefix_share": 0.0},  # control: plain supervised editing of the same modules
    "random-prefix": {"prefix_share": 1.0},  # control: the caller hands over random rows, see random_like
    "alea-corrected": {"prefix_share": 1.0},  # the paper's idea without the official code's faults
    "alea-mixed": {"prefix_share": 0.5},  # ours: half of the steps are clean
    # as coded, with the adversary "official", which was tuned with the plain prompt
    "alea-official": dict(
        prefix_share=1.0, prompt="speculative", nll=0.2, kl=1.0, kl_reference="logits", bos=True, eos=False, epochs=5,
        batch=2, optimiser="sgd", reset="epoch", master_dtype="fp16", fast=False,
    ),
    "sft": {"prefix_share": 0.0, "modules": "decoder", "kl": 0.0},  # control: all decoder matrices, NLL alone
    "lora": {"prefix_share": 0.0, "rank": 8},
    "heads": {"prefix_share": 0.0, "modules": "o_proj"},
}  # fmt: skip
CONTROLS = ("random-layers", "last-layer", "all-layers", "first")  # the places of an edit, see control_layers


def control_layers(name: str, n_layers: int, k: int = 2, seed: int = 0) -> tuple[int, ...]:
    """The layers of a control of the place: k at random, the last one, all, or the first k. KeyError for others."""
    if name == "random-layers":
        return tuple(sorted(np.random.default_rng([seed, 3]).choice(n_layers, k, replace=False).tolist()))
    if name not in CONTROLS:
        raise KeyError(f"unknown control {name!r}; there are {CONTROLS}")
    return {"last-layer": (n_layers - 1,), "all-layers": tuple(range(n_layers)), "first": tuple(range(k))}[name]


def preset(name: str, **changes) -> EditSettings:
    """A preset with changes. KeyError names the presets there are; ValueError for values out of range."""
    if name not in PRESETS:
        raise KeyError(f"unknown edit preset {name!r}; there are {sorted(PRESETS)}")
    settings = replace(EditSettings(), **{**PRESETS[name], **changes})
    check(settings)
    return settings


def check(s: EditSettings) -> None:
    """ValueError that names the value and what it may be."""
    for name, allowed in CHOICES.items():
        if getattr(s, name) not in allowed:
            raise ValueError(f"{name} is {getattr(s, name)!r}, it must be one of {allowed}")
    if not 0 <= s.prefix_share <= 1:
        raise ValueError(f"prefix_share is {s.prefix_share}, it must lie between 0 and 1")
    if not 0 <= s.prefix_dropout < 1:
        raise ValueError(f"prefix_dropout is {s.prefix_dropout}, it must lie between 0 and 1 (not 1)")
    places = s.heads if s.modules == "o_proj" else s.layers
    if not places or s.epochs < 1 or s.batch < 1 or s.rounds < 1:
        raise ValueError(f"nothing to edit: {s.modules} of {places}, epochs {s.epochs}, batch {s.batch}")
    if s.rounds > s.epochs:
        raise ValueError(f"rounds is {s.rounds}: each needs an epoch, and there are {s.epochs}")
    if s.rank and s.modules == "o_proj":
        raise ValueError("rank is for whole matrices: the columns of a head are few already; set rank to 0")
