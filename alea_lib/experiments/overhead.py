"""What a baseline costs where it writes: seconds a token and memory, beside the base model's, on the same images."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..baselines.registry import Baseline
from ..models.delta import applied
from ..models.vlm import VLM
from .baseline_trial import EvaluationSetup


@dataclass(frozen=True)
class CostSettings:
    """``batches`` of ``batch`` images each, from the first of the test split; ``tokens``: every answer is written to
    this length, so that no method gains by saying less."""

    batches: int
    batch: int
    tokens: int


def baseline_cost(setup: EvaluationSetup, baselines: dict[str, Baseline], s: CostSettings) -> pd.DataFrame:
    """Columns method, batch, base_seconds, seconds (each a token), relative, base_mib, mib (peak over what was held
    before). Base and (fitted) baselines take turns over the same batches."""
    rows, vlm, test = [], setup.vlm, setup.test.features
    ready = {name: setup.test.with_views(b) for name, b in baselines.items() if b.kind != "after"}
    _seconds(vlm, test[: s.batch], None, s)  # the first pass is slow
    for i in range(s.batches):
        features = test[i * s.batch : (i + 1) * s.batch]
        if len(features) < s.batch:
            raise ValueError(f"cost needs {s.batches * s.batch} test images, there are {len(test)}")
        for name, baseline in ready.items():
            base, own = (_seconds(vlm, features, b, s) for b in (None, baseline))
            peaks = [_peak(vlm, features, b, s) for b in (None, baseline)] if i == 0 else [float("nan")] * 2
            rows.append((name, i, base, own, own / base, *peaks))
    columns = ["method", "batch", "base_seconds", "seconds", "relative", "base_mib", "mib"]
    return pd.DataFrame(rows, columns=columns)


def relative_cost(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: relative (median over batches), its least and largest (lo, hi), peak memory over the base's."""
    groups = table.groupby("method", sort=False)
    cost = groups["relative"].agg(relative="median", lo="min", hi="max")
    memory = groups[["mib", "base_mib"]].first()
    return cost.assign(memory=memory["mib"] / memory["base_mib"]).reset_index()


def _generate(vlm: VLM, features: torch.Tensor, baseline: Baseline | None, s: CostSettings) -> None:
    options = {"decoding": baseline.decoding} if baseline else {}
    question = vlm.prompt(baseline.prompt if baseline else "plain")
    vlm.generate(features, question, s.tokens, batch_size=s.batch, min_new_tokens=s.tokens, **options)


def _seconds(vlm: VLM, features: torch.Tensor, baseline: Baseline | None, s: CostSettings) -> float:
    """Seconds a token: the clock on a GPU, the process's own time on a CPU that others use too."""
    gpu = vlm.device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    with applied(vlm, baseline.delta if baseline else None):
        if gpu:
            torch.cuda.synchronize()
        start = clock()
        _generate(vlm, features, baseline, s)
        if gpu:
            torch.cuda.synchronize()
        return (clock() - start) / (s.tokens * len(features))


def _peak(vlm: VLM, features: torch.Tensor, baseline: Baseline | None, s: CostSettings) -> float:
    """MiB of tensors at the peak, beyond those that were there before."""
    with applied(vlm, baseline.delta if baseline else None), Held() as held:
        _generate(vlm, features, baseline, s)
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
