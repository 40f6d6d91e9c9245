"""How long the stages of a study take on a card, by arithmetic: what is computed over what the card can do.

Time is the largest of operations over the card's rate, bytes moved over its bandwidth, both scaled by a share that real
code reaches, and the host's time to start the kernels. The last was measured (``make gpu-check``); the shares, the
lengths of texts and the counts of passes are assumptions and named as such. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from .budget import Shape, matrices, parameters
from .locate.registry import all_passes

COMPUTE, TRAFFIC = 0.35, 0.6  # shares of the card's rates that are reached: assumed
PACKED, READ, WRITTEN = 0.5, 2.0, 2.0  # bytes a number: NF4 read, unpacked to half precision and read again
HOST = 1.6e-3  # seconds of the host a decoder layer in 4 bits and pass: data/results/gpu-h200, 51.6 ms over 32 layers
ANSWER, LONGEST, PROMPT, SHORT = 130, 1.5, 40, 4  # tokens of an answer, a batch's longest over that, a prompt, a yes/no
TEXTS = 2  # a pair has two answers


@dataclass(frozen=True)
class Card:
    """``tflops``: dense half precision, accumulated in fp32; ``bandwidth`` in GB/s: the maker's figures."""

    name: str
    gib: int
    tflops: float
    bandwidth: float
    bfloat16: bool


CARDS = {
    "t4": Card("NVIDIA T4", 16, 65, 320, False),
    "l4": Card("NVIDIA L4", 24, 121, 300, True),
    "rtx-3090": Card("NVIDIA RTX 3090", 24, 71, 936, True),
    "a100": Card("NVIDIA A100 40 GB", 40, 312, 1555, True),
    "h100": Card("NVIDIA H100", 80, 990, 3350, True),
}


@dataclass(frozen=True)
class Costs:
    """Seconds of the acts of a study with one model on one card. ``four_bit``: the decoder in NF4 but for its
    down-projections. ``write``, ``read``, ``train``: batches."""

    shape: Shape
    card: Card
    four_bit: bool = True
    write: int = 8
    read: int = 4
    train: int = 2

    @property
    def _traffic(self) -> float:
        """Bytes moved for the decoder's weights in one pass."""
        s, whole = self.shape, parameters(self.shape)
        plain = s.layers * matrices(s)["down_proj"] if self.four_bit else whole["decoder"]
        packed = whole["decoder"] - plain
        return plain * READ + packed * (PACKED + WRITTEN + READ) + whole["head"] * READ

    def _seconds(self, operations: float, traffic: float) -> float:
        reached = self.card.tflops * 1e12 * COMPUTE, self.card.bandwidth * 1e9 * TRAFFIC
        return max(operations / reached[0], traffic / reached[1])

    def passes(self, tokens: float, sequences: int, share: float = 1.0) -> float:
        """One forward pass of a batch through a share of the layers."""
        s = self.shape
        attention = 4 * tokens * tokens * s.width * s.layers
        operations = sequences * (2 * parameters(s)["decoder"] * tokens + attention) * share
        return max(self._seconds(operations, self._traffic * share), HOST * s.layers * share)

    @property
    def length(self) -> int:
        """Tokens of an image, a prompt and an answer."""
        return self.shape.places + PROMPT + ANSWER

    def seen(self, images: float) -> float:
        """Image features."""
        s, tower = self.shape, parameters(self.shape)["vision"]
        return images * self._seconds(2 * tower * s.patches + 4 * s.patches**2 * s.vision_width * s.vision_layers, 0)

    def reads(self, n: float, share: float = 1.0) -> float:
        """Answers read without gradient."""
        return n / self.read * self.passes(self.length, self.read, share)

    def trains(self, n: float, share: float = 1.0, tokens: float | None = None) -> float:
        """Answers read with a gradient to states of the lowest trained layer: a backward pass costs a forward one."""
        return n / self.train * 2 * self.passes(tokens or self.length, self.train, share)

    def writes(self, n: float, tokens: float = ANSWER) -> float:
        """Answers written: the prompt is read once, then each token is a pass of its own."""
        prompt = self.passes(self.shape.places + PROMPT, self.write)
        return n / self.write * (prompt + tokens * (LONGEST if tokens > SHORT else 1) * self.passes(1, self.write))


def _activate(p, c: Costs) -> float:
    return c.seen(p.N_IMAGES) + c.writes(TEXTS * p.N_IMAGES)


def _layers(p, c: Costs) -> float:
    """Locators, then an edit and captions a layer (``edit_benefit``)."""
    forwards = p.N_PAIRS * all_passes("layer", c.shape.layers, c.shape.heads)[0]
    own = sum(c.trains(2 * p.N_EDIT, 1 - i / c.shape.layers) for i in range(c.shape.layers))
    return c.reads(forwards) + own + c.shape.layers * c.writes(p.N_VALIDATE)


def _heads(p, c: Costs) -> float:
    return c.reads(p.N_PAIRS * all_passes("head", c.shape.layers, c.shape.heads)[0]) + 4 * c.writes(p.N_VALIDATE)


def _prefix(p, c: Costs) -> float:
    """The adversary: image and prompt are read once a step, prefix and answer trained through; two answers a pair."""
    n = p.PREFIX_STEPS * 16 * TEXTS
    return c.reads(n) + c.trains(n, tokens=ANSWER + p.PREFIX_LENGTH)


def _adversary(p, c: Costs) -> float:
    return _prefix(p, c) + 3 * c.writes(p.N_HELD_OUT)


def _edit(p, c: Costs) -> float:
    """What lies below the edited layers is read once an item and term, the rest trained through each epoch."""
    first = min(p.LAYERS) / c.shape.layers if p.LAYERS else 0.5  # located layers: assumed in the middle
    terms = 2 * p.N_PAIRS
    fit = c.reads(terms, first) + c.trains(p.EPOCHS * terms, 1 - first)
    return fit + (_prefix(p, c) + 3 * c.writes(100) if hasattr(p, "PREFIX_STEPS") else 0.0)


def _measure(p, c: Costs) -> float:
    """Captions, POPE's three settings, attention, ability, grounding, and each head's route."""
    questions = c.writes(18 * min(500, p.N_TEST), SHORT)
    read = c.reads(3 * p.N_TEST + 3 * p.N_GROUNDING)
    route = c.reads(p.N_ROUTE * c.shape.layers * (c.shape.heads + 1), 0.5)
    return c.seen(p.N_TEST) + c.writes(p.N_TEST) + questions + read + route


def _robustness(p, c: Costs) -> float:
    return (1 + len(p.METHODS)) * (_prefix(p, c) + 3 * c.writes(p.N_TEST))


STAGES: dict[str, Callable[[SimpleNamespace, Costs], float]] = {
    "02_activate": _activate,
    "03_locate_layers": _layers,
    "04_locate_heads": _heads,
    "05_adversary": _adversary,
    "05_edit": _edit,
    "06_measure": _measure,
    "10_robustness": _robustness,
}
NO_MODEL = ("01_world", "04_verdict", "06_compare", "06_read_chair", "11_performance", "12_what_holds")
LIGHT = 60.0  # seconds of a stage that runs no model: assumed


def stage_seconds(stage: str, variant: str, params: dict, costs: Costs) -> float | None:
    """Computed seconds of a stage; None for one that is not modelled. ``truncation`` runs no model either."""
    if stage in NO_MODEL or (stage == "06_measure" and variant == "truncation"):
        return LIGHT
    if stage not in STAGES:
        return None
    return LIGHT + STAGES[stage](SimpleNamespace(**params), costs)
