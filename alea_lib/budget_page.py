"""The tables of the page on budgets: computed from data/shapes; measured figures stand below where there are any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd

from . import budget
from .budget import Plan, Shape, read_shape
from .gpu_check.settings import SIZES
from .runs.places import root
from .runs.preview import preview
from .workload import CARDS, Costs

MODELS = {"7B": "llava-hf/llava-1.5-7b-hf", "13B": "llava-hf/llava-1.5-13b-hf"}
PROFILES = ("llava-1.5-7b", "llava-1.5-7b-t4")
COSTS = "costs*.csv"  # of `make gpu-check`, kept in a folder of data/results
CHECKED_TOKENS, CHECKED_ANSWER = 696, 105  # positions of an item there (image, prompt, answer), and of its answer
MEASURED = ["act", "how", "median time or ratio (95 % interval)", "n", "peak GiB", "computed", "reserved", "card"]
NOT_YET = "Not measured yet: no table of a GPU stands in `data/results`."


def markdown() -> str:
    """All tables of the page as Markdown."""
    parts = {
        "The model": model_table(),
        "What an edit adds": edit_table(),
        "Keys, values, references and files": store_table(),
        "Largest memory of a step": peak_table(),
        "Seconds, computed": time_table(),
        "The whole study": study_table(),
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
    rows = {label: [_seconds(act(costs[c])) for c in cards] for label, act in acts.items()}
    return _table(rows, [CARDS[c].name for c in cards])


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def study_table() -> pd.DataFrame:
    """What `make study PROFILE=... DRY=1` adds up to: hours of all stages, largest memory, and what is downloaded."""
    rows = []
    for profile in PROFILES:
        found = preview(profile)
        hours, peak = found.stages["seconds"].sum() / 3600, found.stages["gpu_gib"].max()
        size = found.downloads["bytes"].sum() / 1e9
        rows.append((profile, CARDS[found.card].name, f"{hours:.1f}", f"{peak:.1f}", f"{size:.1f}"))
    return pd.DataFrame(rows, columns=["profile", "reckoned for", "hours", "GPU, GiB", "downloads, GB"])


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
        small = known["seconds"] < 1
        key, factor, digits, unit = (
            "seconds",
            1000 if small else 1,
            ".3g",
            f" {'ms' if small else 's'} per {row['unit']}",
        )
    else:
        return what, known.get("note", ""), "", "", "", "", ""
    shown = {k: f"{factor * known[k]:{digits}}" for k in (key, "lo", "hi") if k in known}
    told = shown[key] + unit + (f" ({shown['lo']} to {shown['hi']})" if "lo" in shown else "")
    peak, computed = known.get("peak_gib"), peaks.get(f"{what}, {setting}", peaks.get(what))
    beside = computed / 2**30 if peak and computed else None
    gib = ("" if n is None else f"{n:.2f}" for n in (peak, beside, known.get("reserved_gib")))
    return what, setting, told, f"{known.get('repeats', 1):.0f}", *gib


def checked_peaks() -> dict[str, int]:
    """Bytes that are computed for the steps of `make gpu-check`, with its sizes."""
    s, size = read_shape(MODELS["7B"]), SIZES["7b"]
    plan = Plan(
        edited=size.edited,
        first=s.layers - size.edited,
        unquantised=size.edited,
        batch=size.batch,
        tokens=CHECKED_TOKENS,
        answer=CHECKED_ANSWER,
        answers=1,
        write_batch=size.written,
        max_new_tokens=size.new_tokens,
    )
    low = budget.edit_peak(s, replace(plan, first=(s.layers - size.edited) // 2))
    edit = budget.edit_peak(s, plan)
    return {
        "build": budget.model_bytes(s, True, size.edited),
        "edit, plain": edit,
        "edit, fast": edit,
        "edit in the middle, fast": low,
        "prefix": budget.prefix_peak(s, plan),
        "generation, base": budget.write_peak(s, plan),
        # the matrices that the edit's stand in for are kept
        "generation, edited": budget.write_peak(s, plan) + size.edited * budget.matrices(s)["down_proj"] * plan.each,
    }


def _markdown(table: pd.DataFrame) -> str:
    from .runs.book import markdown_table

    return markdown_table(table)
