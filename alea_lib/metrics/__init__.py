"""CHAIR, POPE, MME, AMBER, the truncation frontier: tables in, tables out. Imports no torch.

Command line: ``python -m alea_lib.metrics chair|pope|mme|amber``."""

from .amber import amber, amber_responses, read_amber
from .chair import chair, companion_share, distinct
from .frontier import cut, drop_incomplete, drop_last_sentence, frontier, frontier_gap
from .mme import mme, read_mme, read_mme_answers
from .parse import mentions
from .pointing import pointing
from .pope import pope, read_pope
from .timing import TimingSizes, timings
from .truth import read_truth

__all__ = [
    "TimingSizes", "amber", "amber_responses", "chair", "companion_share", "cut", "distinct", "drop_incomplete",
    "drop_last_sentence", "frontier", "frontier_gap", "mentions", "mme", "pointing", "pope", "read_amber", "read_mme",
    "read_mme_answers", "read_pope", "read_truth", "timings",
]  # fmt: skip
