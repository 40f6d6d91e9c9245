"""Time and memory of every step of the method at the size of LLaVA-1.5-7B. Each figure is written as soon as it is
there; a step that fails or for which no time is left becomes a row that says so."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.autograd import DeviceType
from torch.optim.optimizer import register_optimizer_step_post_hook

from alea_lib.adversary.prefix import PrefixSettings, fit_prefix, random_prefix
from alea_lib.core.files import write_csv
from alea_lib.core.stats import RESAMPLES, interval
from alea_lib.datasets.describe import noun_phrase
from alea_lib.datasets.scenes import objects
from alea_lib.edit.fit import fit_edit
from alea_lib.edit.settings import EditSettings
from alea_lib.locate.run import locate_heads
from alea_lib.locate.settings import LocateSettings
from alea_lib.models.cached_forward import capture
from alea_lib.models.delta import applied, delta_of
from alea_lib.models.hooks import full_weight

from .settings import KERNELS, LABEL, RATIO, Size
from .shape import compute_dtype, edited_layers, random_llava

AGAIN = 5  # times that an act is done for its time
FEWEST_TURNS, TURNS_END = 5, 25.0  # of generation; no turn begins after so many seconds
KERNEL_TURNS = 5
COLUMNS = ["what", "setting", "seconds", "unit", "ratio", "lo", "hi", "repeats", "peak_gib", "reserved_gib", "note",
    "model", "label"]  # fmt: skip


class Meter:
    """Seconds and, on a GPU, memory of an act: queued kernels are waited for before and after, peaks are reset."""

    def __init__(self, device: torch.device):
        self.device = device

    def clock(self) -> float:
        """The time, once the GPU has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, act: Callable) -> float:
        """Time alone. Memory of earlier acts stays with the allocator: asking for it again would be timed too."""
        start = self.clock()
        act()
        return self.clock() - start

    @contextmanager
    def steps(self) -> Iterator[list[float]]:
        """A list that receives the time at the end of each step of an optimiser."""
        times: list[float] = []
        hook = register_optimizer_step_post_hook(lambda *_: times.append(self.clock()))
        try:
            yield times
        finally:
            hook.remove()

    def kernels(self, act: Callable) -> tuple[int, float]:
        """How many kernels an act starts on the GPU, and the seconds that they take: the host's time is left out."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as run:
            act()
            self.clock()
        own = [event.device_time_total for event in run.events() if event.device_type == DeviceType.CUDA]
        return len(own), sum(own) / 1e6

    def __call__(self, act: Callable) -> dict[str, float]:
        gc.collect()
        if cuda := self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(act)
        if not cuda:
            return {"seconds": seconds}
        peaks = (torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device))
        return {"seconds": seconds, **dict(zip(("peak_gib", "reserved_gib"), (p / 2**30 for p in peaks)))}


def made_pairs(n: int, sentences: int, seed: int = 0) -> pd.DataFrame:
    """Pairs of answers of that many sentences, every second object of the negative another one than the positive's."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        names = rng.permutation(objects())[: sentences + sentences // 2].tolist()
        true, wrong = names[:sentences], names[sentences:]
        false = [wrong[i // 2] if i % 2 and i // 2 < len(wrong) else name for i, name in enumerate(true)]
        texts = [" ".join(f"There is {noun_phrase(name)}." for name in side) for side in (true, false)]
        rows.append((*texts, wrong))
    return pd.DataFrame(rows, columns=["positive", "negative", "wrong"])


class Bench:
    """A model with images and pairs; each of ``STEPS`` gives rows of the table.

    Kernels and parsers are loaded at their first use, so what is done first is never what is timed.
    """

    def __init__(self, size: Size, device: torch.device):
        self.size, self.meter = size, Meter(device)
        self.built = self.meter(lambda: setattr(self, "vlm", random_llava(size, device, compute_dtype(device))))
        rng = np.random.default_rng(0)
        side = (size.image, size.image, 3)
        self.images = [Image.fromarray(rng.integers(0, 256, side, dtype=np.uint8)) for _ in range(size.items)]
        self.pairs = made_pairs(size.items, size.sentences)
        self.features = self.vlm.features(self.images)
        self.positives, self.negatives = self.pairs["positive"].tolist(), self.pairs["negative"].tolist()

    def write(self, new_tokens: int) -> None:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        self.vlm.generate(self.features[: self.size.written], self.vlm.prompt("plain"), **options)

    def build(self) -> list[dict]:
        return [{**self.built, "setting": "NF4, layer by layer", "unit": "model"}]

    def see(self) -> list[dict]:
        n = len(self.images)
        return [self._again(lambda: self.vlm.features(self.images), n, "image", f"{n} images")]

    def generate(self) -> list[dict]:
        """Base and edited in turn, the same modules unquantised in both; which goes first alternates."""
        names = [self.vlm.address("down_proj", i) for i in edited_layers(self.size)]
        delta = delta_of(self.vlm, {n: full_weight(self.vlm, n) * 1.01 for n in names}, {})
        kinds, new_tokens = {"base": None, "edited": delta}, self.size.new_tokens

        def taken(kind: str, measure: Callable):
            with applied(self.vlm, kinds[kind]):
                return measure(lambda: self.write(new_tokens))

        costs = {kind: taken(kind, self.meter) for kind in kinds}
        times = self._turns(lambda kind: taken(kind, self.meter.seconds), self.size.turns)
        rows = self._compared(times, "")
        rows = [{**costs.get(row["setting"], {}), **row} for row in rows]
        if self.meter.device.type == "cuda":
            found = self._turns(lambda kind: taken(kind, self.meter.kernels), KERNEL_TURNS)
            rows += self._compared({kind: [s for _, s in each] for kind, each in found.items()}, KERNELS)
            print("kernels:", {kind: sorted({n for n, _ in each}) for kind, each in found.items()})
        return rows

    def _turns(self, act: Callable[[str], object], turns: int) -> dict[str, list]:
        """What base and edited gave in so many turns, or in as many as there was time for."""
        found, started = {"base": [], "edited": []}, time.perf_counter()
        for turn in range(turns):
            if turn >= FEWEST_TURNS and time.perf_counter() - started > TURNS_END:
                break
            for kind in list(found)[:: 1 if turn % 2 == 0 else -1]:
                found[kind].append(act(kind))
        return found

    def _compared(self, times: dict[str, list[float]], what: str) -> list[dict]:
        """Rows of base, edited and their ratio."""
        unit = f"token of {self.size.written} answers"
        rows = [
            {**middle(np.divide(each, self.size.new_tokens)), "unit": unit, "setting": kind + what}
            for kind, each in times.items()
        ]
        ratio = middle(np.divide(times["edited"], times["base"]), "ratio")
        return [*rows, {**ratio, "setting": RATIO + what, "note": "median of paired turns"}]

    def capture(self) -> list[dict]:
        """What enters the first edited layer, read once for each item."""
        vlm, first = self.vlm, edited_layers(self.size)[0]
        batch = vlm.encode(self.features, vlm.prompt("plain"), self.positives)
        embeds = vlm.embed(batch)
        setting = f"before layer {first}, {batch.ids.shape[1]} positions"
        act = partial(capture, vlm, first, embeds, batch.mask, batch.labels)
        return [self._again(act, len(batch.ids), "item", setting)]

    def prefix(self) -> list[dict]:
        settings = PrefixSettings(steps=1 + self.size.prefix_steps, batch=self.size.batch)
        act = partial(fit_prefix, self.vlm, self.features, self.negatives, settings)
        return [self._steps(act, 1, f"batch {self.size.batch}")]

    def edit(self, layers: tuple[int, ...], fast: bool) -> list[dict]:
        """The first epoch, which also reads what is kept, is not counted."""
        size, prefix = self.size, random_prefix(self.vlm, PrefixSettings())
        settings = EditSettings(
            layers=layers, prefix_share=1.0, epochs=1 + size.epochs, batch=size.batch, lr=1e-5, fast=fast
        )
        loop = "frozen part reused" if fast else "plain"
        setting = f"{loop}, down_proj of layers {layers[0]}-{layers[-1]}, batch {size.batch}, AdamW"
        act = partial(fit_edit, self.vlm, self.features, self.positives, prefix, settings)
        return [self._steps(act, size.items // size.batch, setting)]

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
        act = partial(locate_heads, self.vlm, self.features[: len(few)], few, [name], settings)
        setting = f"{name}, all {self.vlm.n_layers * self.vlm.n_heads} heads, positions: {settings.sites}"
        return [self._again(act, len(few), "pair", setting)]

    def _again(self, act: Callable, n: int, unit: str, setting: str) -> dict:
        """An act that does ``n`` things at once, done once for its memory and then again for its time."""
        cost = self.meter(act)
        times = np.array([self.meter.seconds(act) for _ in range(AGAIN)])
        return {**cost, **middle(times / n), "unit": unit, "setting": setting}

    def _steps(self, act: Callable, first: int, setting: str) -> dict:
        """A step after the first ones: these load kernels and read what is kept."""
        with self.meter.steps() as times:
            cost = self.meter(act)
        rest = np.diff(times)[first - 1 :]
        note = f"whole run, {len(times)} steps: {cost['seconds']:.2f} s"
        return {**cost, **middle(rest), "unit": "step", "setting": setting, "note": note}


def middle(values: np.ndarray, name: str = "seconds") -> dict[str, float]:
    """Median of repeated times, its 95 % interval by bootstrap, and how many there are."""
    rows = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    value = float(np.median(values))
    lo, hi = interval(value, np.median(np.asarray(values)[rows], axis=1))
    return {name: value, "lo": lo, "hi": hi, "repeats": len(values)}


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
