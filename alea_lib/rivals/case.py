"""One rival from its row to its record, kept in a folder, so that a long comparison can be taken up again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from ..edit.delta import load_delta, save_delta
from ..scoring import Evaluated, read_evaluated, write_evaluated
from ..tables import read_jsonl, write_jsonl
from .ground import Ground
from .registry import Rival
from .tune import tune


@dataclass(frozen=True)
class Case:
    """One rival's record: itself fitted with the chosen settings, ``tuning`` (see ``tune``), what it said on the test
    pictures, and the passes that fitting took."""

    row: Rival
    tuning: pd.DataFrame
    found: Evaluated
    passes: dict[str, float]


def rival_case(ground: Ground, row: Rival, folder: Path, tolerance: float = 0.03) -> Case:
    """Tune and measure a rival; read from ``folder`` if that was done before. Its mark is written last."""
    mark = folder / "case.json"
    if mark.is_file():
        return _read(row, folder, json.loads(mark.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    ready, tuning, passes = tune(ground, row, tolerance)
    found = ground.measured(ready)
    write_evaluated(found, folder)
    write_jsonl(tuning, folder / "tuning.jsonl")
    if ready.delta is not None:
        save_delta(ready.delta, folder / "delta.safetensors")
    mark.write_text(json.dumps({"settings": asdict(ready.settings), "passes": passes}), encoding="utf-8")
    return Case(ready, tuning, found, passes)


def _read(row: Rival, folder: Path, mark: dict) -> Case:
    settings = {k: _tuples(v) for k, v in mark["settings"].items()}
    ready = replace(row, settings=type(row.settings)(**settings))
    if row.kind == "delta":
        ready = replace(ready, delta=load_delta(folder / "delta.safetensors"))
    return Case(ready, pd.DataFrame(read_jsonl(folder / "tuning.jsonl")), read_evaluated(folder), mark["passes"])


def _tuples(value):
    """JSON knows lists alone; settings are frozen."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
