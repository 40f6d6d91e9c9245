"""How large the check is, which parts it has, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "mechanics and cost; random weights, no quality"
FILES = ("environment.json", "tests.csv", "costs.csv", "captions.json", "parts.csv", "bars.csv", "log.txt", "README.md")
PARTS = {"environment": 30, "tests": 70, "costs": 200, "captions": 60}  # seconds that each may take

RATIO = "edited / base"
KERNELS = ", kernels alone"  # the GPU's own time, without the host's between its kernels

PEAK_GIB = 12.0  # an edit of four down-projections, at most
OVERHEAD = 1.02  # time of generation, edited over base, at most
EQUAL = 0.99  # share of captions that are the CPU's, at least


@dataclass(frozen=True)
class Size:
    """An architecture and how much is done with it."""

    name: str
    image: int  # pixels of a side; patches are of 14
    tower: tuple[int, int, int, int]  # width, MLP, layers, heads
    decoder: tuple[int, int, int, int]
    vocabulary: int
    edited: int  # down-projections
    items: int  # pairs that prefix and edit are tuned on
    batch: int
    sentences: int  # of an answer, five tokens each
    prefix_steps: int
    epochs: int
    written: int  # images described at once
    new_tokens: int
    turns: int  # of generation, base and edited each, at most
    located: int  # pairs whose heads are attributed
    captions: int  # of the small world


SIZES = {
    size.name: size
    for size in (
        Size("7b", 336, (1024, 4096, 24, 16), (4096, 11008, 32, 32), 32064, 4, 8, 2, 20, 12, 4, 4, 16, 30, 1, 500),
        Size("tiny", 56, (32, 64, 2, 2), (64, 128, 4, 4), 512, 2, 4, 2, 4, 4, 2, 2, 6, 2, 1, 12),
    )
}
