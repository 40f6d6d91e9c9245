"""The tables of the page on budgets: computed from data/shapes; measured figures stand below where there are any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from . import budget
from .budget import Plan, Shape, read_shape
from .runs.places import root
from .workload import CARDS, Costs

MODELS = {"7B": "llava-hf/llava-1.5-7b-hf", "13B": "llava-hf/llava-1.5-13b-hf"}
COSTS = "costs.csv"  # of `make gpu-check`, kept in a folder of data/results
NOT_YET = "Not measured yet: no table of a GPU stands in `data/results`."


def markdown() -> str:
    """All tables of the page as Markdown."""
    parts = {
        "The model": model_table(),
        "What an edit adds": edit_table(),
        "Keys, values, references and files": store_table(),
        "Largest memory of a step": peak_table(),
        "Seconds, computed": time_table(),
    }
    text = "".join(f"### {title}\n\n{_markdown(table)}\n" for title, table in parts.items())
    found = measured(root() / "data" / "results")
    return text + f"### Measured\n\n{NOT_YET if found is None else _markdown(found)}\n"


def shapes() -> dict[str, Shape]:
    return {name: read_shape(model) for name, model in MODELS.items()}


def _table(rows: dict[str, list], columns=("7B", "13B")) -> pd.DataFrame:
    return pd.DataFrame([[name, *values] for name, values in rows.items()], columns=["", *columns])


def _gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def model_table() -> pd.DataFrame:
    """Parameters in millions and bytes in GiB, by model."""
    both = shapes().values()
    names = {"decoder": "linear matrices of the decoder", "embeddings": "token embeddings", "head": "head",
             "vision": "vision tower", "projector": "projector", "norms": "norms"}  # fmt: skip
    counts = [budget.parameters(s) for s in both]
    rows = {f"{label} (million)": [f"{c[part] / 1e6:,.1f}" for c in counts] for part, label in names.items()}
    rows["all parameters (million)"] = [f"{sum(c.values()) / 1e6:,.1f}" for c in counts]
    rows["half precision (GiB)"] = [_gib(budget.model_bytes(s, False)) for s in both]
    rows["NF4, scales quantised again (GiB)"] = [_gib(budget.model_bytes(s, True)) for s in both]
    rows["NF4, four down-projections in half precision (GiB)"] = [_gib(budget.model_bytes(s, True, 4)) for s in both]
    rows["NF4, all down-projections in half precision (GiB)"] = [
        _gib(budget.model_bytes(s, True, s.layers)) for s in both
    ]
    return _table(rows)


def edit_table() -> pd.DataFrame:
    """GiB that an edit adds to the model: trained matrices by option, graph by lowest layer and batch."""
    both, rows = shapes().values(), {}
    for n in (1, 2, 4):
        for label, options in (("AdamW", {}), ("SGD", {"optimiser": "sgd"}), ("AdamW, rank 16", {"rank": 16})):
            rows[f"{n} down-projections, {label}"] = [_gib(budget.trained_bytes(s, n, **options)) for s in both]
    for batch in (1, 2, 8):
        for share, label in ((1, "all layers"), (2, "upper half"), (8, "last eighth")):
            kept = [_gib(budget.activation_bytes(s, s.layers // share, Plan.tokens, batch)) for s in both]
            rows[f"graph of {batch} x {Plan.tokens} positions, {label}"] = kept
    for length in (5, 20):
        rows[f"prefix of {length} (MiB)"] = [f"{budget.prefix_bytes(s, length) / 2**20:.2f}" for s in both]
    return _table(rows)


def store_table() -> pd.DataFrame:
    """GiB of what is kept: in memory while writing, for the KL, and on disk."""
    both, rows = shapes().values(), {}
    for n in (1, 4, 8, 100):
        rows[f"keys and values, {n} x 1,128 positions"] = [_gib(budget.kv_bytes(s, 1128, n)) for s in both]
    for kind, label in (("states", "final states"), ("logits", "logits, as the official code")):
        found = [budget.kl_reference_bytes(1500, Plan.answer, s.width, s.vocabulary)[kind] for s in both]
        rows[f"reference of the KL, 1,500 answers: {label}"] = [_gib(b) for b in found]
    for terms in (1, 3):
        found = [terms * budget.cache_bytes(1500, Plan.tokens, s.width) for s in both]
        rows[f"inputs of the first edited layer, 1,500 pairs, conditions: {terms}"] = [_gib(b) for b in found]
    for n in (500, 2000):
        rows[f"image features on disk, {n:,} images"] = [_gib(budget.features_bytes(s, n)) for s in both]
    return _table(rows)


def peak_table() -> pd.DataFrame:
    """GiB of a whole step by card, all down-projections in half precision, two edited in the middle."""
    rows = {}
    cases = {"16 GB: one item at a time, 4 answers written": Plan(batch=1, write_batch=4, max_new_tokens=256),
             "24 GB: two items, 8 answers": Plan(batch=2, write_batch=8)}  # fmt: skip
    for label, plan in cases.items():
        for step in ("write", "prefix", "edit"):
            found = []
            for s in shapes().values():
                half = replace(plan, edited=2, first=s.layers // 2, unquantised=s.layers)
                found.append(_gib(budget.peak(s, half)[step]))
            rows[f"{label}: {step}"] = found
    return _table(rows)


def time_table() -> pd.DataFrame:
    """Seconds of one act with the 7B model by card."""
    shape, cards = read_shape(MODELS["7B"]), ("t4", "rtx-3090", "h100")
    costs = {c: Costs(shape, CARDS[c], write=4 if c == "t4" else 8, read=2 if c == "t4" else 4) for c in cards}
    acts = {
        "features of 100 images": lambda c: c.seen(100),
        "100 answers read": lambda c: c.reads(100),
        "100 answers read, with the gradient through the upper half": lambda c: c.trains(100, 0.5),
        "100 captions written": lambda c: c.writes(100),
        "100 yes/no questions": lambda c: c.writes(100, 4),
    }
    rows = {label: [f"{act(costs[c]):.0f}" for c in cards] for label, act in acts.items()}
    return _table(rows, [CARDS[c].name for c in cards])


def measured(folder: Path) -> pd.DataFrame | None:
    """The tables of costs that were measured on GPUs, one below the other; None where there are none."""
    found = sorted(folder.glob(f"*/{COSTS}"))
    return pd.concat([pd.read_csv(p).assign(table=p.parent.name) for p in found]) if found else None


def _markdown(table: pd.DataFrame) -> str:
    from .runs.book import markdown_table

    return markdown_table(table)
