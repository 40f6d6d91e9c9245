"""What a rival costs where it writes: seconds a token and memory, beside the base model's, on the same pictures."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..edit.delta import applied
from ..vlm import VLM
from .ground import Ground
from .registry import Rival


@dataclass(frozen=True)
class CostSettings:
    """``batches`` of ``batch`` pictures each, from the first of the test split; ``tokens``: every answer is written to
    this length, so that no method gains by saying less."""

    batches: int = 4
    batch: int = 16
    tokens: int = 24


def rival_cost(ground: Ground, rows: dict[str, Rival], s: CostSettings = CostSettings()) -> pd.DataFrame:
    """Columns method, batch, base_seconds, seconds (each a token), relative, base_mib, mib (peak over what was held
    before). Base and rival take turns over the same batches; rivals are fitted ones."""
    out, vlm = [], ground.vlm
    ready = {name: ground.seeing(row, ground.test) for name, row in rows.items() if row.kind != "after"}
    _written(vlm, ground.test.features[: s.batch], None, s)  # the first pass is slow
    for i in range(s.batches):
        features = ground.test.features[i * s.batch : (i + 1) * s.batch]
        if len(features) < s.batch:
            raise ValueError(f"cost needs {s.batches * s.batch} test pictures, there are {len(ground.test.features)}")
        for name, row in ready.items():
            base, own = (_written(vlm, features, r, s) for r in (None, row))
            peaks = [_peak(vlm, features, r, s) for r in (None, row)] if i == 0 else [float("nan")] * 2
            out.append((name, i, base, own, own / base, *peaks))
    columns = ["method", "batch", "base_seconds", "seconds", "relative", "base_mib", "mib"]
    return pd.DataFrame(out, columns=columns)


def relative_cost(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: relative (median over batches), its least and largest (lo, hi), peak memory over the base's."""
    groups = table.groupby("method", sort=False)
    first = groups.first()
    return pd.DataFrame(
        {
            "relative": groups["relative"].median(),
            "lo": groups["relative"].min(),
            "hi": groups["relative"].max(),
            "memory": first["mib"] / first["base_mib"],
        }
    ).reset_index()


def _generate(vlm: VLM, features: torch.Tensor, row: Rival | None, s: CostSettings) -> None:
    how = {} if row is None else {"decoding": row.decoding}
    question = vlm.prompt("plain" if row is None else row.prompt)
    vlm.generate(features, question, s.tokens, batch_size=s.batch, min_new_tokens=s.tokens, **how)


def _written(vlm: VLM, features: torch.Tensor, row: Rival | None, s: CostSettings) -> float:
    """Seconds a token: the clock on a GPU, the process's own time on a CPU that others use too."""
    gpu = vlm.device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    with applied(vlm, row.delta if row else None):
        if gpu:
            torch.cuda.synchronize()
        start = clock()
        _generate(vlm, features, row, s)
        if gpu:
            torch.cuda.synchronize()
        return (clock() - start) / (s.tokens * len(features))


def _peak(vlm: VLM, features: torch.Tensor, row: Rival | None, s: CostSettings) -> float:
    """MiB of tensors at the peak, beyond those that were there before."""
    with applied(vlm, row.delta if row else None), Held() as held:
        _generate(vlm, features, row, s)
    return held.peak / 2**20


class Held(TorchDispatchMode):
    """Bytes of tensors that live at once, of those made inside the block; ``peak`` is the most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._add(t.untyped_storage(), given)
        return out

    def _add(self, storage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
