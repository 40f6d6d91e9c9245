"""Time and memory of every step of the method at the size of LLaVA-1.5-7B. Each figure is written as soon as it is
there; a step that fails or for which no time is left becomes a row that says so."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from ..edit.delta import applied, delta_of
from ..edit.fit import fit_edit
from ..edit.settings import EditSettings
from ..locate.run import locate_heads
from ..locate.settings import LocateSettings
from ..measures.parse import mentions
from ..prefix import PrefixSettings, fit_prefix, random_prefix
from ..tables import write_csv
from ..tail import capture
from ..taps import full_weight
from ..worlds.describe import noun_phrase
from ..worlds.scenes import objects
from .settings import LABEL, Size
from .shape import compute_dtype, edited_layers, random_llava

COLUMNS = [
    "what",
    "setting",
    "seconds",
    "unit",
    "ratio",
    "repeats",
    "peak_gib",
    "reserved_gib",
    "note",
    "model",
    "label",
]


class Meter:
    """Seconds and, on a GPU, memory of an act: queued kernels are waited for before and after, peaks start anew."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, act: Callable) -> dict[str, float]:
        gc.collect()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        act()
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        if not cuda:
            return {"seconds": seconds}
        peaks = (torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        return {"seconds": seconds, **dict(zip(("peak_gib", "reserved_gib"), (p / 2**30 for p in peaks)))}


def made_pairs(n: int, sentences: int, seed: int = 0) -> pd.DataFrame:
    """Pairs of answers of that many sentences, every second object of the negative another one than the positive's."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        names = rng.permutation(objects())[: sentences + sentences // 2].tolist()
        told, wrong = names[:sentences], names[sentences:]
        false = [wrong[i // 2] if i % 2 and i // 2 < len(wrong) else name for i, name in enumerate(told)]
        texts = [" ".join(f"There is {noun_phrase(name)}." for name in side) for side in (told, false)]
        rows.append((*texts, wrong))
    return pd.DataFrame(rows, columns=["positive", "negative", "wrong"])


class Bench:
    """A model with images and pairs; each ``measure_*`` gives rows of the table."""

    def __init__(self, size: Size, device: torch.device):
        self.size, self.meter = size, Meter(device)
        self.built = self.meter(lambda: setattr(self, "vlm", random_llava(size, device, compute_dtype(device))))
        rng = np.random.default_rng(0)
        side = (size.image, size.image, 3)
        self.images = [Image.fromarray(rng.integers(0, 256, side, dtype=np.uint8)) for _ in range(size.items)]
        self.pairs = made_pairs(size.items, size.sentences)
        self.features = self.vlm.features(self.images)
        self.positives, self.negatives = self.pairs["positive"].tolist(), self.pairs["negative"].tolist()
        self._warm_up()

    def _warm_up(self) -> None:
        """Kernels are loaded at their first use, and so is the parser of captions."""
        mentions(self.positives[0])
        self.write(2)
        once = EditSettings(layers=edited_layers(self.size), prefix_share=0.0, epochs=1, batch=1, lr=1e-5, fast=False)
        fit_edit(self.vlm, self.features[:1], self.positives[:1], None, once)

    def write(self, new_tokens: int) -> None:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        self.vlm.generate(self.features[: self.size.written], self.vlm.prompt("plain"), **options)

    def build(self) -> list[dict]:
        return [{**self.built, "setting": "NF4, layer by layer", "unit": "model"}]

    def see(self) -> list[dict]:
        cost = self.meter(lambda: self.vlm.features(self.images))
        return [_each(cost, len(self.images), "image", f"{len(self.images)} images")]

    def generate(self) -> list[dict]:
        """Base and edited in turn, the same modules unquantised in both; which goes first alternates."""
        names = [self.vlm.address("down_proj", i) for i in edited_layers(self.size)]
        delta = delta_of(self.vlm, {n: full_weight(self.vlm, n) * 1.01 for n in names}, {})
        found: dict[str, list[dict]] = {"base": [], "edited": []}
        for turn in range(self.size.turns):
            for kind in ("base", "edited")[:: 1 if turn % 2 == 0 else -1]:
                with applied(self.vlm, delta if kind == "edited" else None):
                    found[kind].append(self.meter(lambda: self.write(self.size.new_tokens)))
        rows = []
        for kind, costs in found.items():
            middle = {key: float(np.median([c[key] for c in costs])) for key in costs[0]}
            rows.append(_each(middle, self.size.new_tokens, f"token of {self.size.written} answers", kind))
        ratios = [e["seconds"] / b["seconds"] for b, e in zip(found["base"], found["edited"])]
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        note = f"median of paired turns, quartiles {low:.3f} to {high:.3f}"
        rows.append({"setting": "edited / base", "ratio": ratio, "note": note})
        return [{**row, "repeats": self.size.turns} for row in rows]

    def capture(self) -> list[dict]:
        """What enters the first edited layer, read once for each item."""
        vlm, first = self.vlm, edited_layers(self.size)[0]
        batch = vlm.encode(self.features, vlm.prompt("plain"), self.positives)
        embeds = vlm.embed(batch)
        cost = self.meter(lambda: capture(vlm, first, embeds, batch.mask, batch.labels))
        return [_each(cost, len(batch.ids), "item", f"before layer {first}, {batch.ids.shape[1]} positions")]

    def prefix(self) -> list[dict]:
        """Later steps: a run of one step is taken off."""

        def run(steps: int):
            settings = PrefixSettings(steps=steps, batch=self.size.batch)
            return self.meter(lambda: fit_prefix(self.vlm, self.features, self.negatives, settings))

        return [self._steps(run, 1, 1 + self.size.prefix_steps, f"batch {self.size.batch}")]

    def edit(self, layers: tuple[int, ...], fast: bool) -> list[dict]:
        """Later epochs: a run of one epoch, which also reads what is kept, is taken off."""
        size, prefix = self.size, random_prefix(self.vlm, PrefixSettings())
        settings = {"layers": layers, "prefix_share": 1.0, "batch": size.batch, "lr": 1e-5, "fast": fast}

        def run(steps: int):
            edit = EditSettings(**settings, epochs=steps * size.batch // size.items)
            return self.meter(lambda: fit_edit(self.vlm, self.features, self.positives, prefix, edit))

        epoch = size.items // size.batch
        loop = "frozen part reused" if fast else "plain"
        setting = f"{loop}, down_proj of layers {layers[0]}-{layers[-1]}, batch {size.batch}, AdamW"
        return [self._steps(run, epoch, epoch * (1 + size.epochs), setting)]

    def edit_plain(self) -> list[dict]:
        return self.edit(edited_layers(self.size), fast=False)

    def edit_fast(self) -> list[dict]:
        return self.edit(edited_layers(self.size), fast=True)

    def edit_middle(self) -> list[dict]:
        middle = self.size.decoder[2] // 2
        return self.edit(tuple(range(middle - self.size.edited // 2, middle + self.size.edited // 2)), fast=True)

    def heads_gradient(self) -> list[dict]:
        return self._heads("gradient", LocateSettings(batch_size=1))

    def heads_ablation(self) -> list[dict]:
        settings = LocateSettings(batch_size=1, sites="answer", grounded="negative", max_rows=self.vlm.n_heads)
        return self._heads("zero-ablation", settings)

    def _heads(self, name: str, settings: LocateSettings) -> list[dict]:
        few = self.pairs.head(self.size.located)
        cost = self.meter(lambda: locate_heads(self.vlm, self.features[: len(few)], few, [name], settings))
        setting = f"{name}, all {self.vlm.n_layers * self.vlm.n_heads} heads, positions: {settings.sites}"
        return [_each(cost, len(few), "pair", setting)]

    def _steps(self, run: Callable, few: int, many: int, setting: str) -> dict:
        short, long = run(few), run(many)
        cost = {**long, "seconds": long["seconds"] - short["seconds"]}
        return {
            **_each(cost, many - few, "step", setting),
            "note": f"the first run, {few} steps: {short['seconds']:.2f} s",
        }


def _each(cost: dict, n: int, unit: str, setting: str) -> dict:
    return {**cost, "seconds": cost["seconds"] / n, "unit": unit, "setting": setting, "repeats": n}


# in the order of what must not be missed
STEPS = {
    "build": Bench.build,
    "image features": Bench.see,
    "edit, plain": Bench.edit_plain,
    "edit, fast": Bench.edit_fast,
    "generation": Bench.generate,
    "capture": Bench.capture,
    "prefix": Bench.prefix,
    "head attribution, gradient": Bench.heads_gradient,
    "edit in the middle, fast": Bench.edit_middle,
    "head attribution, ablation": Bench.heads_ablation,
}


def measure(size: Size, device: torch.device, path: Path, seconds: float) -> pd.DataFrame:
    """Take every step of ``STEPS``, and begin none after ``seconds``; the table is written after each."""
    import bitsandbytes  # noqa: F401  (imports are no part of the time that building takes)
    from transformers import LlavaForConditionalGeneration  # noqa: F401

    started, rows = time.perf_counter(), []
    bench = Bench(size, device)
    for what, step in STEPS.items():
        if time.perf_counter() - started > seconds:
            found = [{"note": "left out: the time was used up"}]
        else:
            try:
                found = step(bench)
            except Exception as error:  # a step too large for the card is a result; the others go on
                found = [{"note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}]
        rows += [{"what": what, "model": bench.vlm.key, "label": LABEL, **row} for row in found]
        write_csv(pd.DataFrame(rows, columns=COLUMNS), path)
    return pd.DataFrame(rows, columns=COLUMNS)
