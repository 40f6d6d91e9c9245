"""What an edit is: one dataclass, and the presets as the differences between them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EditSettings:
    """One edit of down-projections. Steps count batches; ``prefix_share`` of them run under the adversarial prefix."""

    layers: tuple[int, ...] = (2, 3)
    prefix_share: float = 0.5
    prompt: str = "plain"  # the grounded answer is learnt as the answer to this prompt
    nll: float = 1.0  # weight of NLL(grounded answer)
    kl: float = 0.2  # weight of KL(base || edited) on clean prompts
    kl_prompt: str = "careful"
    epochs: int = 4
    batch: int = 24
    lr: float = 1e-3
    seed: int = 0


# Each preset is only what differs: how many of the steps see the prefix.
PRESETS = {
    "no-prefix": {"prefix_share": 0.0},  # control: plain supervised editing of the same modules
    "alea-corrected": {"prefix_share": 1.0},  # the paper's idea with the official code's faults mended
    "alea-mixed": {"prefix_share": 0.5},  # ours: half of the steps are clean
}


def preset(name: str, **changes) -> EditSettings:
    """A preset with changes. KeyError names the presets there are; ValueError for values out of range."""
    if name not in PRESETS:
        raise KeyError(f"unknown edit preset {name!r}; there are {sorted(PRESETS)}")
    settings = replace(EditSettings(), **{**PRESETS[name], **changes})
    if not 0 <= settings.prefix_share <= 1:
        raise ValueError(f"prefix_share is {settings.prefix_share}, it must lie between 0 and 1")
    if not settings.layers or settings.epochs < 1 or settings.batch < 1:
        raise ValueError(f"nothing to edit: layers {settings.layers}, epochs {settings.epochs}, batch {settings.batch}")
    return settings
