"""The tables of the page on budgets: memory computed from data/shapes, and what was measured on GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..core.formatting import markdown_table
from ..core.paths import root
from ..models import memory as budget
from ..models.memory import Plan, Shape, read_shape
from .preview import preview

MODELS = {"7B": "llava-hf/llava-1.5-7b-hf", "13B": "llava-hf/llava-1.5-13b-hf"}
GIB = 2**30
PROFILES = ("llava-1.5-7b", "llava-1.5-7b-t4")
PARTS = {"decoder": "linear matrices of the decoder", "embeddings": "token embeddings", "head": "head",
    "vision": "vision tower", "projector": "projector", "norms": "norms"}  # fmt: skip
COSTS = "costs*.csv"  # of `make gpu-check`, kept in a folder of data/results
# what `make gpu-check` does with the 7B model, positions of an item (image, prompt, answer) and of its answer included
CHECKED = Plan(edited=4, first=28, unquantised=4, batch=2, tokens=696, answer=105, answers=1, write_batch=4,
    max_new_tokens=16)  # fmt: skip
MEASURED = ["act", "how", "median time or ratio (95 % interval)", "n", "peak GiB", "computed", "reserved", "card"]
NOT_YET = "Not measured yet: no table of a GPU stands in `data/results`."


def markdown() -> str:
    """All tables of the page as Markdown."""
    found = measured(root() / "data" / "results")
    parts = {
        "The model": model_table(),
        "What an edit adds": edit_table(),
        "Largest memory of a step": peak_table(),
        "The whole study": study_table(),
        "Measured": found,
    }
    texts = {title: NOT_YET + "\n" if table is None else markdown_table(table) for title, table in parts.items()}
    return "\n".join(f"### {title}\n\n{text}" for title, text in texts.items())


def _table(rows: dict[str, list[float]], digits: int = 2) -> pd.DataFrame:
    """A figure of each model for each row."""
    cells = [[name, *(f"{figure:,.{digits}f}" for figure in figures)] for name, figures in rows.items()]
    return pd.DataFrame(cells, columns=["", *MODELS])


def _shapes() -> list[Shape]:
    return [read_shape(model) for model in MODELS.values()]


def model_table() -> pd.DataFrame:
    """Parameters in millions and bytes in GiB, by model."""
    shapes = _shapes()
    counts = [budget.parameters(s) for s in shapes]
    rows = {f"{label} (million)": [count[part] / 1e6 for count in counts] for part, label in PARTS.items()}
    rows["all parameters (million)"] = [sum(count.values()) / 1e6 for count in counts]
    sizes = {
        "half precision (GiB)": [budget.model_bytes(s, False) / GIB for s in shapes],
        "NF4, scales quantised again (GiB)": [budget.model_bytes(s, True) / GIB for s in shapes],
        "NF4, four down-projections in half precision (GiB)": [budget.model_bytes(s, True, 4) / GIB for s in shapes],
        "NF4, all down-projections in half precision (GiB)": [
            budget.model_bytes(s, True, s.layers) / GIB for s in shapes
        ],
    }
    return pd.concat([_table(rows, 1), _table(sizes)], ignore_index=True)


def edit_table() -> pd.DataFrame:
    """GiB that an edit adds to the model: trained matrices by option, graph by lowest layer and batch."""
    rows, shapes, tokens = {}, _shapes(), Plan.tokens
    for n in (1, 2, 4):
        for label, options in (("AdamW", {}), ("SGD", {"optimiser": "sgd"}), ("AdamW, rank 16", {"rank": 16})):
            rows[f"{n} down-projections, {label}"] = [budget.trained_bytes(s, n, **options) / GIB for s in shapes]
    for batch in (1, 2, 8):
        for part, label in ((1, "all layers"), (2, "upper half"), (8, "last eighth")):
            kept = [budget.activation_bytes(s, s.layers // part, tokens, batch) for s in shapes]
            rows[f"graph of {batch} x {tokens} positions, {label}"] = [size / GIB for size in kept]
    for length in (5, 20):
        rows[f"prefix of {length} (MiB)"] = [budget.prefix_bytes(s, length) / 2**20 for s in shapes]
    return _table(rows)


def peak_table() -> pd.DataFrame:
    """GiB of a whole step by card, all down-projections in half precision, two edited in the middle."""
    cases = {"16 GB: one item at a time, 4 answers written": Plan(batch=1, write_batch=4, max_new_tokens=256),
             "24 GB: two items, 8 answers": Plan(batch=2, write_batch=8)}  # fmt: skip
    rows = {}
    for label, plan in cases.items():
        plans = [(s, replace(plan, edited=2, first=s.layers // 2, unquantised=s.layers)) for s in _shapes()]
        for step in ("write", "prefix", "edit"):
            rows[f"{label}: {step}"] = [budget.peak(s, of)[step] / GIB for s, of in plans]
    return _table(rows)


def study_table() -> pd.DataFrame:
    """What `make study PROFILE=... DRY=1` adds up to: the largest memory of a stage, and what is downloaded."""
    rows = []
    for profile in PROFILES:
        found = preview(profile)
        gib, size = found.stages["gpu_gib"].max(), found.downloads["bytes"].sum() / 1e9
        rows.append((profile, f"{gib:.1f}", f"{size:.1f}"))
    return pd.DataFrame(rows, columns=["profile", "GPU, GiB", "downloads, GB"])


def measured(folder: Path) -> pd.DataFrame | None:
    """What `make gpu-check` found on GPUs, beside the memory that is computed for the same step; None without any."""
    found, peaks = [], checked_peaks()
    for path in sorted(folder.glob(f"*/{COSTS}"), key=lambda p: (p.parent.name, len(p.name))):
        card = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))["gpu"]
        found += [(*_measured_row(row, peaks), card) for row in pd.read_csv(path).to_dict("records")]
    return pd.DataFrame(found, columns=MEASURED) if found else None


def _measured_row(row: dict, peaks: dict[str, int]) -> tuple[str, ...]:
    """Texts of one row of a table of costs; a step that was left out or failed shows its note."""
    known = {key: value for key, value in row.items() if pd.notna(value)}
    what, setting = row["what"], known.get("setting", "")
    if "ratio" in known:
        key, factor, digits, unit = "ratio", 1, ".3f", ""
    elif "seconds" in known:
        factor, name = (1000, "ms") if known["seconds"] < 1 else (1, "s")
        key, digits, unit = "seconds", ".3g", f" {name} per {row['unit']}"
    else:
        return what, known.get("note", ""), "", "", "", "", ""
    shown = {k: f"{factor * known[k]:{digits}}" for k in (key, "lo", "hi") if k in known}
    value = shown[key] + unit + (f" ({shown['lo']} to {shown['hi']})" if "lo" in shown else "")
    peak, computed = known.get("peak_gib"), peaks.get(f"{what}, {setting}", peaks.get(what))
    beside = computed / GIB if peak and computed else None
    gib = ("" if n is None else f"{n:.2f}" for n in (peak, beside, known.get("reserved_gib")))
    return what, setting, value, f"{known.get('repeats', 1):.0f}", *gib


def checked_peaks() -> dict[str, int]:
    """Bytes that are computed for the steps of `make gpu-check`, with its sizes."""
    s, plan = read_shape(MODELS["7B"]), CHECKED
    edit, write = budget.edit_peak(s, plan), budget.write_peak(s, plan)
    return {
        "build": budget.model_bytes(s, True, plan.edited),
        "edit, plain": edit,
        "edit, fast": edit,
        "edit in the middle, fast": budget.edit_peak(s, replace(plan, first=(s.layers - plan.edited) // 2)),
        "prefix": budget.prefix_peak(s, plan),
        "generation, base": write,
        # the matrices that the edit's stand in for are kept
        "generation, edited": write + plan.edited * budget.matrices(s)["down_proj"] * plan.each,
    }
