"""What must hold, judged from the tables of the parts, and the page that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from alea_lib.core.files import write_csv
from alea_lib.core.tables import read_csv

from .settings import EQUAL, KERNELS, LABEL, OVERHEAD, PEAK_GIB, RATIO

COLUMNS = ["bar", "limit", "found", "verdict"]
NOT_JUDGED = "not judged"


def bars(out: Path, device: str) -> pd.DataFrame:
    """One row a bar: pass, fail, or not judged (memory and time of a CPU say nothing). No figure is a failure."""
    tests, costs, captions = _read(out / "tests.csv"), _read(out / "costs.csv"), _read(out / "captions.json")
    bad = f"{(tests['outcome'] != 'passed').sum()} of {len(tests)}" if len(tests) else ""
    for column in {"peak_gib", "ratio", "lo", "hi"} & set(costs):  # empty throughout, they come back as texts
        costs[column] = pd.to_numeric(costs[column])
    edits = costs[costs["what"].isin(["edit, plain", "edit, fast"])] if len(costs) else costs
    whole = len(edits) == 2 and edits["peak_gib"].notna().all()
    peak = edits["peak_gib"].max() if whole else None
    ratio, about = _ratio(costs) if len(costs) else (None, "")
    share = captions.get("share") if isinstance(captions, dict) else None
    most, longest = "peak memory of an edit of four down-projections, GiB", "time of generation, edited / base"
    rows = [
        ("tests on the device that did not pass", "0", bad, bad.startswith("0 ")),
        (most, f"<= {PEAK_GIB:g}", _text(peak), peak is not None and peak <= PEAK_GIB),
        (longest, f"<= {OVERHEAD:g}", _text(ratio) + about, ratio is not None and ratio <= OVERHEAD),
        ("small world's captions equal to the CPU's", f">= {EQUAL:g}", _text(share), (share or 0.0) >= EQUAL),
    ]
    verdicts = [(*row[:3], "pass" if row[3] else "fail") for row in rows]
    if device == "cpu":
        verdicts[1:3] = [(*row[:3], NOT_JUDGED) for row in verdicts[1:3]]
    return pd.DataFrame(verdicts, columns=COLUMNS)


def _ratio(costs: pd.DataFrame) -> tuple[float | None, str]:
    """Generation, edited over base, and its interval: of the kernels alone where timed, which no host disturbs."""
    for setting in (RATIO + KERNELS, RATIO):
        rows = costs[(costs["setting"] == setting) & costs["ratio"].notna()]
        if len(rows):
            row = rows.iloc[0]
            return row["ratio"], f" ({row['lo']:.3f} to {row['hi']:.3f})"
    return None, ""


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _read(path: Path):
    """A table or a JSON file; an empty table where a part wrote none."""
    if not path.exists():
        return pd.DataFrame()
    return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_csv(path)


def write_report(out: Path, device: str, size: str, parts: pd.DataFrame) -> pd.DataFrame:
    """``parts.csv``, ``bars.csv`` and ``README.md``; returns the bars."""
    found = bars(out, device)
    write_csv(parts, out / "parts.csv")
    write_csv(found, out / "bars.csv")
    about = _read(out / "environment.json")
    about = about if isinstance(about, dict) else {}
    lines = [f"# GPU check on {about.get('gpu', device)}, size {size}", "", f"Costs: {LABEL}. "]
    lines[-1] += f"Commit {about.get('git_commit', 'none')[:10]}; `environment.json` has the versions."
    for table in (found, parts):
        lines += ["", f"| {' | '.join(table.columns)} |", "|---" * table.shape[1] + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in table.values.tolist()]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found
